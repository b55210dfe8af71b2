"""Reads and writes features of a slide in the layouts of TRIDENT, CLAM and STAMP.

| layout | features | coordinates | what it does not carry |
|---|---|---|---|
| trident (and ours) | h5 `features` (N, D) float32 | `coords` (N, 2) int64 level-0 pixels, attributes | |
| clam | h5 `features` (N, D) float32 | `coords` (N, 2) int64 level-0 pixels | mostly, size of a tile and of the slide |
| clam-pt | tensor (N, D) float32 in a .pt file | none | coordinates |
| stamp | h5 `feats` (N, D) float16 | `coords` (N, 2) float32 µm, `tile_size_um`, `tile_size_px` | mpp, slide size |
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histossl.core.atomic import whole
from histossl.core.errors import READ_ERRORS, FileFormatError, SettingsError, file_errors
from histossl.core.hdf5 import (
    LARGEST,
    ROWS_A_CHUNK,
    dataset_of,
    new_h5,
    number,
    open_h5,
    read_attributes,
)

_FARTHEST = 2**31 - 1  # level-0 pixels; training keeps places in 32 bits


@dataclass(frozen=True)
class TileFeatures:
    """The features of a slide and the coordinates of its tiles.

    Attributes:
        name: of the slide.
        features: (N, D) float32.
        xy: (N, 2) int64, top-left corners (x, y) in level-0 pixels; None where the file has none.
        extent: level-0 pixels of a tile's side, fractions allowed, or None.
        px: pixels of a tile's side as the encoder saw it, or None.
        mpp: µm per level-0 pixel, or None.
        attributes: of `coords`, as TRIDENT and we write them, where the file has them.
        stride: level-0 pixels from a tile to the next, fractions allowed, or None.
        in_um: `xy`, `extent` and `stride` are in µm, since the size of a pixel is unknown.
        dataset: of the features in the HDF5 file; "" where they are not in one.
    """

    name: str
    features: NDArray[np.float32]
    xy: NDArray[np.int64] | None
    extent: float | None = None
    px: int | None = None
    mpp: float | None = None
    attributes: dict[str, Any] | None = None
    stride: float | None = None
    in_um: bool = False
    dataset: str = ""

    def __repr__(self) -> str:
        where = "without places" if self.xy is None else f"stride {self.stride or 0:g} {'µm' if self.in_um else 'px'}"
        return f"TileFeatures({self.name!r}, {len(self.features)} tiles of {self.features.shape[-1]} numbers, {where})"


def read_tile_features(path: Path, mpp: float | None = None, in_um: bool = False) -> TileFeatures:
    """Read the features of one slide in any of the layouts.

    Args:
        path: the .h5 or .pt file.
        mpp: µm per level-0 pixel; STAMP's µm cannot be converted to pixels without it, in other layouts it overrides
            the file.
        in_um: keep STAMP's µm where `mpp` is not known.

    Returns:
        The features, with coordinates where the layout has them.

    Raises:
        FileFormatError: not one of the layouts, damaged, STAMP's without `mpp`, or its values are in other files.
        SettingsError: `mpp` is not positive and finite.
    """
    if mpp is not None and not 0 < mpp < np.inf:
        raise SettingsError(f"mpp {mpp} is no number of µm per pixel", "give a positive one")
    if path.suffix == ".pt":
        return TileFeatures(path.stem, _checked(_read_tensor(path), path), None, mpp=mpp)
    content: dict[str, NDArray] = {}
    about: dict[str, Any] = {}
    with open_h5(path) as file, file_errors(path, "extract anew"):
        for name in ("features", "feats", "coords"):
            if file.get(name, getlink=True) is not None:
                dataset = dataset_of(file, name, path, linked=False)
                content[name] = np.asarray(dataset)
                about = read_attributes(dataset, path) if name == "coords" else about
        top = read_attributes(file, path)
        if "coords" not in content or not ("features" in content or "feats" in content):
            there = ", ".join(list(file)[:10]) or "nothing"
            raise FileFormatError(f"{path}: holds {there}", "coords and features are needed")
        return _of_layout(path, content, about, top, mpp, in_um)


def _of_layout(
    path: Path,
    content: dict[str, NDArray],
    about: dict[str, Any],
    top: dict[str, Any],
    mpp: float | None,
    in_um: bool,
) -> TileFeatures:
    if "feats" in content:
        return _from_stamp(path, content, top, mpp, in_um)
    features, xy = _checked(content["features"], path), _places(content["coords"], path)
    bag = TileFeatures(path.stem, features, xy, mpp=mpp, dataset="features")
    if "patch_size_level0" in about:
        return _from_trident(bag, about, path)
    return _from_clam(bag, about, path) if {"patch_size", "downsample"} <= set(about) else bag


def _from_trident(bag: TileFeatures, about: dict[str, Any], path: Path) -> TileFeatures:
    side = "extent_level0" if "extent_level0" in about else "patch_size_level0"
    extent = number(about, side, path, positive=True)
    px = _pixels(about, "patch_size", path)
    mpp = bag.mpp if bag.mpp is not None or "mpp" not in about else number(about, "mpp", path, positive=True)
    if mpp is None and px and "target_magnification" in about:
        mpp = px * 10 / number(about, "target_magnification", path, positive=True) / extent  # 10x is 1 µm per pixel
    overlap = number(about, "overlap", path) if "overlap" in about else 0.0
    if px and not abs(overlap) < px:
        raise FileFormatError(f"{path}: its attribute overlap is {overlap:g} of {px} pixels", "extract the slide anew")
    stride = extent * (1 - overlap / px) if px else extent
    if "stride_level0" in about:
        stride = number(about, "stride_level0", path, positive=True)
    for name in ("level0_width", "level0_height"):
        if name in about:
            number(about, name, path, positive=True)
    in_um = str(about.get("unit", "px")) == "um"
    kept = {name: value for name, value in about.items() if value is not None}
    return replace(bag, extent=extent, px=px, mpp=mpp, attributes=kept, stride=stride, in_um=in_um)


def _from_clam(bag: TileFeatures, about: dict[str, Any], path: Path) -> TileFeatures:
    """As CLAM's files of patches, and features made with them, say it: pixels of a level and its downsampling."""
    down = np.ravel(about["downsample"])[:1]  # CLAM writes one for each axis
    px = _pixels(about, "patch_size", path)
    assert px is not None
    extent = px * number({"downsample": down}, "downsample", path, positive=True)
    return replace(bag, extent=extent, px=px, stride=extent)


def _pixels(about: dict[str, Any], name: str, path: Path) -> int | None:
    """A whole number of pixels above zero, or None where there is no such attribute."""
    if name not in about:
        return None
    value = number(about, name, path, positive=True)
    if not 1 <= value < 2**31:
        raise FileFormatError(f"{path}: its attribute {name} is {value:g}, no number of pixels", "extract anew")
    return int(value)


def _from_stamp(
    path: Path, content: dict[str, NDArray], top: dict[str, Any], mpp: float | None, in_um: bool
) -> TileFeatures:
    if mpp is None and not in_um:
        raise FileFormatError(f"{path}: its places are in µm, and it does not carry the slide's mpp", "give --mpp")
    if str(top.get("unit", "um")) != "um" or "tile_size_um" not in top:
        raise FileFormatError(f"{path}: no places in µm with tile_size_um, as STAMP writes since 2.0", "extract anew")
    xy = _places(content["coords"], path, scale=mpp or 1)
    px = _pixels(top, "tile_size_px", path)
    extent = number(top, "tile_size_um", path, positive=True) / (mpp or 1)
    features = _checked(content["feats"], path)
    return TileFeatures(path.stem, features, xy, extent, px, mpp, stride=extent, in_um=mpp is None, dataset="feats")


def _read_tensor(path: Path) -> NDArray:
    import torch

    hint = "save it with torch.save(features.float(), path)"
    _check_archive(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (*READ_ERRORS, pickle.UnpicklingError) as error:
        raise FileFormatError(f"{path}: not a tensor that torch.save wrote", hint) from error
    if not isinstance(found, torch.Tensor):
        raise FileFormatError(f"{path}: holds a {type(found).__name__}, not a tensor of features")
    if found.layout != torch.strided or found.is_meta or found.is_quantized or found.is_nested:
        raise FileFormatError(f"{path}: holds a tensor without plain values ({found.layout}, {found.dtype})", hint)
    if not (
        found.is_floating_point() or found.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    ):
        raise FileFormatError(f"{path}: features of {found.dtype} are no numbers", hint)
    size = found.numel() * max(4, found.element_size())
    if size > LARGEST or found.numel() * found.element_size() > found.untyped_storage().nbytes():
        raise FileFormatError(f"{path}: declares {tuple(found.shape)}, more than it holds or memory could", hint)
    return found.detach().float().numpy()


def _check_archive(path: Path) -> None:
    """Refuse a .pt file that unpacks to far more than its size: torch stores tensors unpacked."""
    try:
        if not path.is_file():
            raise FileFormatError(f"{path}: is no regular file", "give a file of features")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > 2 * path.stat().st_size + 2**20:
                raise FileFormatError(f"{path}: unpacks to {unpacked:,} bytes", "torch.save packs nothing; save anew")
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise FileFormatError(f"{path}: not a tensor that torch.save wrote ({error})") from error


def _checked(features: NDArray, path: Path) -> NDArray[np.float32]:
    if features.ndim == 3 and len(features) == 1:
        features = features[0]
    if features.ndim != 2 or not features.shape[1]:
        raise FileFormatError(f"{path}: features of shape {features.shape} are not (tiles, dimension)")
    if features.dtype.kind not in "fiu":
        raise FileFormatError(f"{path}: features of {features.dtype} are no numbers")
    with np.errstate(over="ignore"):  # values that float32 cannot hold are caught below
        features = features.astype(np.float32, copy=False)
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise FileFormatError(f"{path}: {len(bad)} features are not finite, the first of tile {bad[0]}", "extract anew")
    return features


def _places(coords: NDArray, path: Path, scale: float = 1) -> NDArray[np.int64]:
    """Coordinates as whole pixels of `scale` each."""
    if coords.ndim == 3 and len(coords) == 1:
        coords = coords[0]
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise FileFormatError(f"{path}: coords of shape {coords.shape} are not (tiles, 2)")
    if coords.dtype.kind not in "fiu" or not np.isfinite(coords).all():
        raise FileFormatError(f"{path}: coords of {coords.dtype} are no numbers, or not finite", "extract anew")
    with np.errstate(over="ignore"):
        far = np.abs(coords.astype(np.float64)).max(initial=0) / scale
    if not far <= _FARTHEST:
        raise FileFormatError(f"{path}: its coords reach to {far:g} pixels", "extract anew")
    if coords.dtype.kind != "f" and scale == 1:
        return coords.astype(np.int64)
    return np.rint(coords.astype(np.float64) / scale).astype(np.int64)


def write_tile_features(bag: TileFeatures, folder: Path, layout: str) -> Path:
    """Write the features of one slide in the layout of another tool, whole or absent.

    Args:
        bag: the features; all layouts but "clam-pt" need coordinates.
        folder: the folder to write into.
        layout: a key of LAYOUTS.

    Returns:
        The path of the file, named after the slide.

    Raises:
        SettingsError: an unknown layout.
        FileFormatError: the layout needs what the source did not carry.
    """
    if layout not in LAYOUTS:
        raise SettingsError(f"unknown layout {layout!r}", f"one of {', '.join(LAYOUTS)}")
    suffix, write = LAYOUTS[layout]
    path = folder / f"{bag.name}{suffix}"
    if layout != "clam-pt" and (bag.xy is None or len(bag.xy) != len(bag.features)):
        raise FileFormatError(f"{bag.name}: {layout} needs a place for every feature", "only clam-pt does without")
    write(bag, path)
    return path


def _write_h5(path: Path, features: str, values: NDArray, coords: NDArray, about: dict, top: dict) -> None:
    with new_h5(path) as file:
        rows = max(1, min(len(values), ROWS_A_CHUNK))
        file.create_dataset(features, data=values, chunks=(rows, values.shape[1]) if len(values) else None)
        file.create_dataset("coords", data=coords)
        file["coords"].attrs.update(about)
        file.attrs.update(top)


def _trident(bag: TileFeatures, path: Path) -> None:
    assert bag.xy is not None
    about = bag.attributes
    if about is None:
        if bag.extent is None or bag.px is None or bag.mpp is None:
            raise FileFormatError(
                f"{bag.name}: the source does not say how large its tiles are", "convert from STAMP's"
            )
        about = attributes_of(bag, path.parent.name)
    _write_h5(path, "features", bag.features, bag.xy, about, {})


def attributes_of(bag: TileFeatures, folder: str) -> dict[str, Any]:
    """The attributes that TRIDENT and histossl write beside `coords`, as far as they are known.

    Where the source does not carry the slide's size, the smallest size that holds all tiles replaces it.

    Args:
        bag: the features; coordinates and extent are needed.
        folder: name of the folder that is written into.

    Returns:
        Name of the attribute -> value; lengths in level-0 pixels unless their name says otherwise.
    """
    assert bag.xy is not None
    assert bag.extent is not None
    known, stride = bag.attributes or {}, bag.stride or bag.extent
    low = np.ceil(bag.xy.max(axis=0, initial=0) + bag.extent).astype(int)
    px = bag.px or round(bag.extent)
    about = {
        "patch_size": px,
        "patch_size_level0": round(bag.extent),
        "level0_width": int(known.get("level0_width", low[0])),
        "level0_height": int(known.get("level0_height", low[1])),
        "overlap": round(px * (1 - stride / bag.extent)),
        "name": bag.name,
        "savetodir": folder,
        "extent_level0": bag.extent,
        "stride_level0": stride,
    }
    if bag.mpp:
        about["mpp"] = bag.mpp
        about["level0_magnification"] = round(10 / bag.mpp, 3)
        about["target_magnification"] = round(10 * px / (bag.extent * bag.mpp), 3)
    if bag.in_um:
        about["unit"] = "um"
    return about


def _clam(bag: TileFeatures, path: Path) -> None:
    assert bag.xy is not None
    _write_h5(path, "features", bag.features, bag.xy, {}, {})


def _clam_pt(bag: TileFeatures, path: Path) -> None:
    import torch

    with whole(path) as part:
        torch.save(torch.from_numpy(bag.features.copy()), part)


def _stamp(bag: TileFeatures, path: Path) -> None:
    assert bag.xy is not None
    if bag.mpp is None or bag.extent is None:
        raise FileFormatError(f"{bag.name}: STAMP's layout is in µm, and the source carries no mpp", "give --mpp")
    micrometres = (bag.xy * bag.mpp).astype(np.float32)
    top = {"unit": "um", "tile_size_um": bag.extent * bag.mpp, "extractor": "histossl", "feat_type": "tile"}
    if bag.px is not None:
        top["tile_size_px"] = bag.px
    _write_h5(path, "feats", bag.features.astype(np.float16), micrometres, {}, top)


LAYOUTS: dict[str, tuple[str, Callable[[TileFeatures, Path], None]]] = {
    "trident": (".h5", _trident),
    "clam": (".h5", _clam),
    "clam-pt": (".pt", _clam_pt),
    "stamp": (".h5", _stamp),
}


def convert_file(path: Path, out: Path, to: str, mpp: float | None = None) -> None:
    """Convert one file of features to another tool's layout.

    Args:
        path: the file.
        out: the folder of the converted file.
        to: a key of LAYOUTS.
        mpp: µm per level-0 pixel, where the file does not carry it.

    Raises:
        FileFormatError: it holds no features, or the layout cannot hold them.
        OSError: the disk is full.
    """
    write_tile_features(read_tile_features(path, mpp), out, to)
