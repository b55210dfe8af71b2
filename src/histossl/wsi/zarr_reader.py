"""Reads OME-Zarr, which is a folder: RGB or grey pictures of eight bits, versions 0.4 and 0.5."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import SlideError
from histossl.wsi.geometry import Size
from histossl.wsi.raster import MAX_TILE_PIXELS, Level, Refused, on_white

_METADATA = ("zarr.json", ".zattrs")  # of versions 0.5 and 0.4
_UNITS = {"nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}
_HINT = "export it as OME-Zarr of RGB, eight bits, one plane"
_CHUNKS = 8  # files that tell two slides apart


def zarr_metadata(path: Path) -> Path | None:
    """The file of an OME-Zarr's metadata.

    Args:
        path: the slide.

    Returns:
        The file; None where the path is no folder whose name ends in .zarr, or has no metadata.
    """
    if path.suffix.lower() != ".zarr" or not path.is_dir():
        return None
    return next((path / name for name in _METADATA if (path / name).is_file()), None)


def zarr_content(path: Path) -> bytes:
    """What tells the content of an OME-Zarr: its metadata, and some chunks of its smallest level.

    Args:
        path: the slide, of which `zarr_metadata` knows.

    Returns:
        A digest.

    Raises:
        OSError: it cannot be read.
    """
    digest, meta = hashlib.sha256(), zarr_metadata(path)
    digest.update(meta.read_bytes() if meta else b"")
    folders = [path / name for name in sorted(os.listdir(path)) if name.isascii() and name.isdigit()]
    files = sorted(
        file for folder in folders[-1:] for file in folder.rglob("*") if file.is_file() and not file.is_symlink()
    )
    for k in np.unique(np.linspace(0, len(files) - 1, _CHUNKS).astype(int)) if files else ():
        digest.update(files[k].relative_to(path).as_posix().encode() + files[k].read_bytes())
    return digest.digest()


class ZarrReader:
    """zarr: OME-Zarr, a folder."""

    def __init__(self, path: Path) -> None:
        if zarr_metadata(path) is None:
            raise Refused
        try:
            import zarr
        except ImportError as error:
            raise SlideError(path, "is OME-Zarr, which needs zarr", "pip install 'histossl[nuclei]'") from error
        group: Any = zarr.open_group(path, mode="r")
        if "bioformats2raw.layout" in group.attrs or "bioformats2raw.layout" in _ome(group):
            group = group["0"]
        scales = _ome(group).get("multiscales")
        if not isinstance(scales, list) or not scales:
            raise SlideError(path, "is a zarr folder without a picture of OME-Zarr", _HINT)
        self._names = [axis["name"] if isinstance(axis, Mapping) else str(axis) for axis in scales[0]["axes"]]
        places = [str(one["path"]) for one in scales[0]["datasets"]]
        if any(".." in Path(place).parts or Path(place).is_absolute() for place in places):
            raise SlideError(path, "names levels that lie outside of its folder", "the file is meant to harm")
        self._arrays: list[Any] = [group[place] for place in places]
        sizes = [self._size(path, array) for array in self._arrays]
        order = np.argsort([-size.width for size in sizes], kind="stable").tolist()
        self._arrays = [self._arrays[k] for k in order]
        self.levels = tuple(Level(sizes[k], sizes[order[0]].width / sizes[k].width) for k in order)
        self.vendor = "ome-zarr"
        self.properties = self._mpp(scales[0], scales[0]["datasets"][order[0]])

    def _size(self, path: Path, array: Any) -> Size:
        shape = dict(zip(self._names, array.shape, strict=True))
        planes = {name: length for name, length in shape.items() if name not in ("x", "y", "c") and length != 1}
        if planes or shape.get("c", 1) not in (1, 3, 4) or array.dtype != np.uint8 or not {"x", "y"} <= set(shape):
            told = " x ".join(f"{length} {name}" for name, length in shape.items())
            raise SlideError(path, f"its picture is {told} of {array.dtype}", _HINT)
        chunk = dict(zip(self._names, array.chunks, strict=True))
        if chunk["x"] * chunk["y"] > MAX_TILE_PIXELS:
            raise SlideError(path, f"its chunks have {chunk['x']} x {chunk['y']} pixels", "the file is meant to harm")
        return Size(shape["x"], shape["y"])

    def _mpp(self, scale: Mapping[str, Any], level: Mapping[str, Any]) -> dict[str, str]:
        """µm per pixel, where axes have a unit of length."""
        found = {}
        steps = [*level.get("coordinateTransformations", ()), *scale.get("coordinateTransformations", ())]
        for name in "xy":
            at = self._names.index(name)
            axis = scale["axes"][at]
            unit = _UNITS.get(str(axis.get("unit", "")).lower()) if isinstance(axis, Mapping) else None
            factors = [float(step["scale"][at]) for step in steps if step.get("type") == "scale"]
            if unit and factors:
                found[f"openslide.mpp-{name}"] = repr(float(np.prod(factors)) * unit)
        return found

    def read(self, level: int, x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], float, float]:
        """Read a rectangle, see `Reader.read`.

        Args:
            level: index of the level.
            x: left edge in pixels of the level.
            y: top edge in pixels of the level.
            width: width in pixels of the level.
            height: height in pixels of the level.

        Returns:
            (height, width, 3) uint8 RGB, x and y.
        """
        parts = {"x": slice(x, x + width), "y": slice(y, y + height), "c": slice(None)}
        pixels = np.asarray(self._arrays[level][tuple(parts.get(name, 0) for name in self._names)])
        kept = [name for name in self._names if name in parts]
        pixels = pixels.transpose([kept.index(name) for name in ("y", "x", "c") if name in kept])
        return on_white(np.ascontiguousarray(pixels)), float(x), float(y)

    def close(self) -> None:
        """Nothing stays open."""


def _ome(group: Any) -> Mapping[str, Any]:
    """The metadata of OME, of version 0.5 under a key of their own."""
    found = dict(group.attrs)
    inner = found.get("ome")
    return inner if isinstance(inner, Mapping) else found
