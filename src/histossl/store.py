"""What stands on disk: whole or absent, fingerprinted, and read as other tools write it."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from histossl.errors import FileFormatError
from histossl.geometry import Size

if TYPE_CHECKING:
    from histossl.tiles import TileGrid

ROWS_A_CHUNK = 256


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write a file so that it is whole or absent under its final name, whatever happens in between.

    Yields a temporary path beside it for the body to write and close; on a clean exit it is fsynced and renamed over
    `path`, on an exception it is removed. Temporary names start with a dot and carry `.part`.

    Raises:
        OSError: the disk is full or the folder is not writable; `path` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not derived from the name: a name of 255 bytes leaves no room for a suffix.
    part = path.parent / f".{uuid.uuid4().hex}.part{path.suffix[:16]}"
    try:
        yield part
        _fsync(part)
        os.replace(part, path)
        _fsync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """As `whole`, for a folder of files: yields a temporary folder that becomes `path` on a clean exit."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{uuid.uuid4().hex}.part"
    part.mkdir()
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                _fsync(file)
        if path.exists():
            shutil.rmtree(path)
        os.replace(part, path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written; only for who holds the folder alone."""
    # By name of the rooms: to search them all would enter a folder for every slide.
    for where in (".*.part*", "*/.*.part*", "logs/*/.*.part*"):
        for part in folder.glob(where):
            shutil.rmtree(part) if part.is_dir() else part.unlink()


_FORMULA = re.compile("'*[=+\\-@\\t\\r]")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

V = TypeVar("V")


def cell(value: V) -> V | str:
    """A value for a cell of a table that people open: one more apostrophe before text that a spreadsheet would compute.

    Numbers stay as they are, also those that are text.
    """
    if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def text_of(cell: str) -> str:
    """The inverse of `cell` for text."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table of ours, each by column, as they were before `cell`."""
    from histossl.tables import read_table

    return [{name: text for name, text in row.items() if name} for row in read_table(path, ours=True).rows.values()]


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Tiles:
    """Where the tiles of a slide lie.

    Attributes:
        xy: (N, 2) int64 level-0 pixels of the top-left corners, (x, y).
        stride: level-0 pixels from a tile to the next, fractions allowed.
        extent: level-0 pixels of a tile's side.
        size: of the slide at level 0.
        fingerprint: of the settings that laid them.
        in_um: all of these are in µm, since nobody said how many make a pixel.
    """

    xy: NDArray[np.int64]
    stride: float
    extent: float
    size: Size
    fingerprint: str
    in_um: bool = False


@contextmanager
def new_tile_file(path: Path, slide_id: str, grid: TileGrid, fingerprint: str, state: str = "") -> Iterator[h5py.File]:
    """An HDF5 file with `coords` and attributes as TRIDENT writes them, whole or absent; yields it for more datasets.

    Beside TRIDENT's attributes `coords` carries ours: `stride_level0` and `extent_level0`, which need not be whole
    numbers; the file carries the fingerprint of what made it, and the state of the slide's own file.
    """
    with whole(path) as part, h5py.File(part, "w") as file:
        coords = file.create_dataset("coords", data=grid.xy.astype(np.int64), chunks=_chunks(len(grid.xy), 2))
        coords.attrs.update(_attributes(path, slide_id, grid))
        file.attrs["fingerprint"] = fingerprint
        file.attrs["slide_state"] = state
        yield file


def _attributes(path: Path, slide_id: str, grid: TileGrid) -> dict[str, object]:
    return {
        "patch_size": grid.spec.px,
        "patch_size_level0": round(grid.extent),
        "level0_width": grid.size.width,
        "level0_height": grid.size.height,
        # TRIDENT counts in magnifications; ten is 1 µm a pixel.
        "level0_magnification": round(10 / grid.mpp, 3),
        "target_magnification": round(10 / grid.spec.mpp, 3),
        "overlap": grid.spec.overlap,
        "name": slide_id,
        "savetodir": path.parent.name,
        "stride_level0": grid.stride,
        "extent_level0": grid.extent,
    }


def _chunks(rows: int, columns: int) -> tuple[int, int] | None:
    return (min(rows, ROWS_A_CHUNK), columns) if rows else None


@contextmanager
def new_features_file(
    path: Path, tiles_path: Path, fingerprint: str, kept: NDArray[np.int64] | None = None
) -> Iterator[h5py.File]:
    """As `new_tile_file`, with the places and attributes of a file that stands, or some of its places."""
    with _open_h5(tiles_path) as source, whole(path) as part, h5py.File(part, "w") as file:
        places = _dataset(source, "coords", tiles_path)
        if kept is None or len(kept) == len(places):
            source.copy(places, file)
        else:
            coords = file.create_dataset("coords", data=places[:][kept], chunks=_chunks(len(kept), 2))
            coords.attrs.update(places.attrs)
            file.attrs["tiles_lost"] = len(places) - len(kept)
        file["coords"].attrs["savetodir"] = path.parent.name
        file.attrs["fingerprint"] = fingerprint
        yield file


def create_features(file: h5py.File, rows: int, dim: int) -> h5py.Dataset:
    """The `features` dataset (rows, dim) float32, in chunks of hundreds of rows, to be filled in slices."""
    return file.create_dataset("features", (rows, dim), "float32", chunks=_chunks(rows, dim))


def read_tiles_of(path: Path) -> Tiles:
    """The tiles that an HDF5 file of ours or of TRIDENT's speaks of.

    Raises:
        FileFormatError: absent, truncated, without `coords`, or without the attributes that give their unit.
    """
    with _open_h5(path) as file:
        coords = _dataset(file, "coords", path)
        attrs: dict[str, Any] = dict(coords.attrs)
        extent = attrs.get("extent_level0", attrs.get("patch_size_level0"))
        if extent is None or "level0_width" not in attrs or "level0_height" not in attrs:
            raise FileFormatError(f"{path}: `coords` lacks patch_size_level0 or the slide's size", "encode it anew")
        share = 1 - attrs.get("overlap", 0) / attrs["patch_size"] if "patch_size" in attrs else 1.0
        size = Size(int(attrs["level0_width"]), int(attrs["level0_height"]))
        stride = float(attrs.get("stride_level0", extent * share))
        made, in_um = str(file.attrs.get("fingerprint", "")), attrs.get("unit", "px") == "um"
        return Tiles(coords[:].astype(np.int64), stride, float(extent), size, made, in_um)


def slide_state_of(path: Path) -> str:
    """The state of the slide's file when its tiles were laid; empty in files of other tools.

    Raises:
        FileFormatError: absent or truncated.
    """
    with _open_h5(path) as file:
        return str(file.attrs.get("slide_state", ""))


def read_features(path: Path) -> NDArray[np.float32]:
    """All features of a slide, (N, D) float32.

    Raises:
        FileFormatError: absent, truncated, of another shape, or not finite.
    """
    with _open_h5(path) as file:
        features = _dataset(file, "features", path)[:]
    if features.ndim == 3 and len(features) == 1:
        features = features[0]
    if features.ndim != 2:
        raise FileFormatError(f"{path}: `features` has shape {features.shape}, not (tiles, dimension)")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise FileFormatError(f"{path}: {len(bad)} features are not finite, the first of tile {bad[0]}", "encode anew")
    return features.astype(np.float32, copy=False)


def fingerprint_of(path: Path) -> str | None:
    """What made a file or folder of ours, or None where it is absent or not readable as one."""
    try:
        if path.is_dir():
            return json.loads((path / "made.json").read_text())["fingerprint"]
        with h5py.File(path, "r") as file:
            return str(file.attrs["fingerprint"])
    except (OSError, KeyError, ValueError):
        return None


def write_made(folder: Path, fingerprint: str, **more: object) -> None:
    """Say in a folder what made it: `made.json`."""
    text = json.dumps({"fingerprint": fingerprint, **more}, indent=1, sort_keys=True, ensure_ascii=False, default=str)
    (folder / "made.json").write_text(text, encoding="utf-8")


def read_made(folder: Path) -> dict:
    """What `write_made` said.

    Raises:
        FileFormatError: absent or not JSON.
    """
    try:
        return json.loads((folder / "made.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(
            f"{folder}: made.json cannot be read ({error})", "remove the folder and run again"
        ) from error


@contextmanager
def _open_h5(path: Path) -> Iterator[h5py.File]:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        what = "is not a readable HDF5 file" if Path(path).exists() else "does not exist"
        raise FileFormatError(f"{path} {what}", "encode the slide anew") from error
    with file:
        yield file


def _dataset(file: h5py.File, name: str, path: Path) -> h5py.Dataset:
    try:
        found = file.get(name)
        link = file.get(name, getlink=True)
    except OSError as error:
        raise FileFormatError(f"{path}: `{name}` cannot be read ({error})", "encode the slide anew") from error
    if found is None and isinstance(link, h5py.ExternalLink):
        raise FileFormatError(f"{path}: its features stand in {link.filename}, which cannot be read", "put it back")
    if not isinstance(found, h5py.Dataset):
        raise FileFormatError(f"{path}: no dataset `{name}`, only {', '.join(sorted(file)) or 'nothing'}")
    return found
