"""Tiles of a slide on disk: coordinates and attributes in HDF5 as TRIDENT writes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import FileFormatError, file_errors
from histossl.core.hdf5 import AGAIN, chunk_shape, dataset_of, new_h5, number, open_h5, read_attributes
from histossl.wsi.artefacts import KINDS, TileArtefacts, judge
from histossl.wsi.geometry import Size
from histossl.wsi.stain_norm import Look, look_from

if TYPE_CHECKING:
    from histossl.wsi.tiles import TileGrid


@dataclass(frozen=True)
class Tiles:
    """Coordinates of the tiles of a slide.

    Attributes:
        xy: (N, 2) int64, top-left corners (x, y) in level-0 pixels.
        stride: level-0 pixels from a tile to the next, fractions allowed.
        extent: side of a tile in level-0 pixels, fractions allowed.
        size: size of the slide at level 0.
        fingerprint: fingerprint of what made the file; empty in files of other tools.
        in_um: whether all lengths are in µm instead, because the mpp is unknown.
    """

    xy: NDArray[np.int64]
    stride: float
    extent: float
    size: Size
    fingerprint: str
    in_um: bool = False


@contextmanager
def new_tile_file(path: Path, slide_id: str, grid: TileGrid, fingerprint: str, state: str = "") -> Iterator[h5py.File]:
    """Write an HDF5 file with `coords` and attributes as TRIDENT writes them, whole or absent.

    `coords` has two attributes of our own, `stride_level0` and `extent_level0`, which need not be whole numbers.

    Args:
        path: the file.
        slide_id: name of the slide.
        grid: the tiles.
        fingerprint: fingerprint of what made the tiles.
        state: state of the slide's file, see `slide_state`, to detect that it was replaced.

    Yields:
        The open file, for more datasets.
    """
    with new_h5(path) as file:
        coords = file.create_dataset("coords", data=grid.xy.astype(np.int64), chunks=chunk_shape(len(grid.xy), 2))
        coords.attrs.update(_attributes(path, slide_id, grid))
        file.attrs["fingerprint"] = fingerprint
        file.attrs["slide_state"] = state
        if grid.artefacts is not None:
            write_artefacts(file, grid.artefacts)
        yield file


def write_artefacts(file: h5py.File, artefacts: TileArtefacts) -> None:
    """Write the artefacts of tiles as the dataset `artefacts`, a column each kind.

    Args:
        file: an open HDF5 file.
        artefacts: of its tiles.
    """
    scores = artefacts.scores.astype(np.float32)
    dataset = file.create_dataset("artefacts", data=scores, chunks=chunk_shape(*scores.shape) if len(scores) else None)
    dataset.attrs.update({"kinds": list(KINDS), "shares": artefacts.shares, "left_out": artefacts.left_out})


def write_look(file: h5py.File, look: Look | None) -> None:
    """Write the colours of a slide beside its tiles, where they are known.

    Args:
        file: an open HDF5 file.
        look: the colours.
    """
    if look is not None:
        file.attrs["look"] = look.numbers()


def read_look(path: Path) -> Look | None:
    """The colours of a slide, of the file of its tiles.

    Args:
        path: the file.

    Returns:
        The colours; None where they are not known.

    Raises:
        FileFormatError: the file is absent or damaged.
    """
    with open_h5(path) as file, file_errors(path, AGAIN):
        numbers = read_attributes(file, path).get("look")
        return None if numbers is None else look_from(np.asarray(numbers, np.float64).tolist())


def read_artefacts(path: Path) -> TileArtefacts:
    """The artefacts of the tiles in an HDF5 file.

    Args:
        path: the file.

    Returns:
        The artefacts; nothing is judged in files that know none.

    Raises:
        FileFormatError: the file is absent or truncated.
    """
    with open_h5(path) as file, file_errors(path, AGAIN):
        if "artefacts" not in file:
            count = len(dataset_of(file, "coords", path)[:])
            return judge(np.full((count, len(KINDS)), np.nan, np.float32), ())[1]
        dataset = dataset_of(file, "artefacts", path)
        attrs = read_attributes(dataset, path)
        if list(attrs.get("kinds", ())) != list(KINDS):
            raise FileFormatError(f"{path}: its artefacts are of other kinds", "run `histossl inspect` again")
        return TileArtefacts(dataset[:], np.asarray(attrs["shares"]), np.asarray(attrs["left_out"]))


def leave_out(file: h5py.File, kept: NDArray[np.bool_]) -> None:
    """Leave tiles out of a file whose `features` hold the others already, in its first rows.

    Args:
        file: an HDF5 file, open for writing.
        kept: (N,) the tiles that stay.
    """
    rows, attrs = np.asarray(file["coords"])[kept], dict(file["coords"].attrs)
    del file["coords"]
    coords = file.create_dataset("coords", data=rows, chunks=chunk_shape(len(rows), 2))
    coords.attrs.update(attrs)
    file["features"].resize(len(rows), axis=0)  # type: ignore[union-attr]


def _attributes(path: Path, slide_id: str, grid: TileGrid) -> dict[str, object]:
    return {
        "patch_size": grid.spec.px,
        "patch_size_level0": round(grid.extent),
        "level0_width": grid.size.width,
        "level0_height": grid.size.height,
        # TRIDENT stores magnifications: 10x is 1 µm per pixel.
        "level0_magnification": round(10 / grid.mpp, 3),
        "target_magnification": round(10 / grid.spec.mpp, 3),
        "overlap": grid.spec.overlap,
        "name": slide_id,
        "savetodir": path.parent.name,
        "stride_level0": grid.stride,
        "extent_level0": grid.extent,
    }


@contextmanager
def new_features_file(
    path: Path, tiles_path: Path, fingerprint: str, kept: NDArray[np.int64] | None = None
) -> Iterator[h5py.File]:
    """Write an HDF5 file with the `coords` and attributes of an existing tile file, whole or absent.

    Args:
        path: the file.
        tiles_path: the existing file.
        fingerprint: fingerprint of what makes the new file.
        kept: (k,) indices of the tiles to keep; None keeps all.

    Yields:
        The open file, for more datasets.

    Raises:
        FileFormatError: the existing file cannot be read.
    """
    with open_h5(tiles_path) as source, new_h5(path) as file:
        old = dataset_of(source, "coords", tiles_path)
        if kept is None or len(kept) == len(old):
            source.copy(old, file)
        else:
            coords = file.create_dataset("coords", data=old[:][kept], chunks=chunk_shape(len(kept), 2))
            coords.attrs.update(old.attrs)
            file.attrs["tiles_lost"] = len(old) - len(kept)
        file["coords"].attrs["savetodir"] = path.parent.name
        file.attrs["fingerprint"] = fingerprint
        yield file


def read_tiles_of(path: Path) -> Tiles:
    """The tiles in an HDF5 file of histossl or TRIDENT.

    Args:
        path: the file.

    Returns:
        The tiles.

    Raises:
        FileFormatError: the file is absent, truncated, without `coords` or without the attributes that give their unit.
    """
    with open_h5(path) as file, file_errors(path, AGAIN):
        coords = dataset_of(file, "coords", path)
        attrs = read_attributes(coords, path)
        side = "extent_level0" if "extent_level0" in attrs else "patch_size_level0"
        if not {side, "level0_width", "level0_height"} <= set(attrs):
            raise FileFormatError(f"{path}: `coords` lacks patch_size_level0 or the slide's size", "encode it anew")
        extent = number(attrs, side, path, positive=True)
        width, height = (number(attrs, name, path, positive=True) for name in ("level0_width", "level0_height"))
        stride = extent
        if "stride_level0" in attrs:
            stride = number(attrs, "stride_level0", path, positive=True)
        elif "patch_size" in attrs and "overlap" in attrs:
            stride = extent * (1 - number(attrs, "overlap", path) / number(attrs, "patch_size", path, positive=True))
        if not stride > 0 or coords.ndim != 2 or coords.shape[1] != 2:
            raise FileFormatError(f"{path}: a stride of {stride:g}, coords {coords.shape}", "encode it anew")
        made, in_um = str(read_attributes(file, path).get("fingerprint", "")), str(attrs.get("unit", "px")) == "um"
        return Tiles(coords[:].astype(np.int64), stride, extent, Size(int(width), int(height)), made, in_um)


def slide_state_of(path: Path) -> str:
    """The state of the slide's file when its tile file was written.

    Args:
        path: the tile file.

    Returns:
        The state that `new_tile_file` was given; empty in files of other tools.

    Raises:
        FileFormatError: the file is absent or truncated.
    """
    with open_h5(path) as file:
        return str(read_attributes(file, path).get("slide_state", ""))
