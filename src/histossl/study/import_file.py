"""Imports one file of features of another tool into a study; needs no torch, since workers start with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from histossl.core import atomic, fingerprints, hdf5
from histossl.core.config import fingerprint
from histossl.core.errors import FileFormatError, SettingsError, StudyError
from histossl.core.interchange import TileFeatures, attributes_of, read_tile_features
from histossl.core.npy import read_npy
from histossl.study.folder import Row, Study
from histossl.wsi.slide import open_slide

HALF_MAX = float(np.finfo(np.float16).max)
FEW = 10  # tiles; with fewer of them, large distances or equal coordinates are no sign of an error


@dataclass(frozen=True)
class FeatureOrigin:
    """The folder of features, and values that their files may lack.

    Attributes:
        folder: folder of the files, one per slide.
        stride: level-0 pixels from a tile to the next; overrides the value in the files.
        mpp: µm per level-0 pixel of all slides; overrides the value in the files.
        slides: folder of the slides themselves, for pictures and their mpp.

    Raises:
        SettingsError: the stride or the mpp is not positive.
    """

    folder: Path
    stride: float | None = None
    mpp: float | None = None
    slides: Path | None = None

    def __post_init__(self) -> None:
        for name in ("stride", "mpp"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise SettingsError(f"--{name} must be positive, got {value}")


@dataclass(frozen=True)
class ImportJob:
    """One file, for a worker.

    Attributes:
        study: the folder of the study, which the command holds.
        row: the slide's row of slides.csv.
        path: the file of features.
        origin: the features.
        spatial: whether coordinates are needed.
    """

    study: Path
    row: Row
    path: Path
    origin: FeatureOrigin
    spatial: bool


def import_file(job: ImportJob) -> tuple[int, Row]:
    """Import one file, unless that was done before.

    Args:
        job: the file.

    Returns:
        The length of its features, and the changes to the slide's row.

    Raises:
        FileFormatError: the file cannot be used.
        StudyError: the mpp in the row is no number.
        SlideError: the slide itself cannot be read.
        OSError: the disk is full.
    """
    study, row, path, origin = Study(job.study), job.row, job.path, job.origin
    features, views = study.features(row["slide_id"]), study.views(row["slide_id"])
    mpp, stat = _mpp(row, origin), path.stat()
    of = (str(path.absolute()), stat.st_size, stat.st_mtime_ns, origin.stride, job.spatial)
    key = fingerprint(*of, mpp if mpp is not None else _attributes(features).get("mpp"))
    if any(fingerprints.fingerprint_of(product) != key for product in (features, views)):
        placed = _placed(read_tile_features(path, mpp, in_um=True), path, job.spatial)
        bag = check_coordinates(placed, path, origin.stride)
        _write(study, bag, path, fingerprint(*of, bag.mpp))
    about = _attributes(features)
    values = read_npy(views / "features.npy", f"remove {views}")
    size = {"width": str(about["level0_width"]), "height": str(about["level0_height"]), "tiles": str(values.shape[1])}
    mpps = row["mpp"] or repr(float(about["mpp"])) if "mpp" in about else ""
    return values.shape[2], size | {"mpp": mpps, "status": "encoded"}


def _attributes(features: Path) -> dict:
    """Attributes of the coordinates in a features file of the study; empty where there is no file."""
    if not features.exists():
        return {}
    with hdf5.open_h5(features) as file:
        return hdf5.read_attributes(hdf5.dataset_of(file, "coords", features), features)


def _mpp(row: Row, origin: FeatureOrigin) -> float | None:
    """The mpp in slides.csv, else that of the command line, else that of the slide where its file is known."""
    if row["mpp"].strip():
        try:
            mpp = float(row["mpp"])
        except ValueError:
            mpp = np.nan
        if not 0 < mpp < np.inf:
            raise StudyError(f"slides.csv: mpp {row['mpp']!r} is not a positive number", "correct it")
        return mpp
    if origin.mpp is None and row["path"]:
        with open_slide(Path(row["path"])) as slide:
            return slide.mpp
    return origin.mpp


def _placed(bag: TileFeatures, path: Path, spatial: bool) -> TileFeatures:
    """Features with coordinates; those of CLAM's tensors are in the file of the same name in h5_files."""
    if bag.xy is not None:
        return bag
    twin = path.parent.parent / "h5_files" / f"{path.stem}.h5"
    if twin.is_file():
        found = read_tile_features(twin, bag.mpp, in_um=True)
        return replace(found, features=bag.features, name=bag.name, dataset="")
    if spatial:
        hint = "give the folder of h5_files, or train an encoder without coordinates: --pretrain.encoder.arch attention"
        raise FileFormatError(f"{path}: a tensor of features has no coordinates of its tiles", hint)
    line = np.stack([np.arange(len(bag.features)), np.zeros(len(bag.features), int)], 1)
    return replace(bag, xy=line, extent=1.0, stride=1.0)


def check_coordinates(bag: TileFeatures, path: Path, stride: float | None = None) -> TileFeatures:
    """Check coordinates, stride and extent of tiles against each other, and that features differ.

    Some tiles may have equal coordinates (the map averages them), but not all. Tiles may extend beyond the edge of the
    slide by less than their side.

    Args:
        bag: features with coordinates.
        path: their file, for messages.
        stride: level-0 pixels from a tile to the next, where the user gives it.

    Returns:
        The features, with stride and extent in level-0 pixels.

    Raises:
        FileFormatError: there are no tiles; the numbers of features and coordinates differ; all features are the same;
            the stride is unknown, or
            contradicts the coordinates; tiles lie outside the slide.
    """
    assert bag.xy is not None
    count = len(bag.features)
    if not count:
        raise FileFormatError(f"{path}: holds no tiles", "leave the slide out, or extract it again")
    if len(bag.xy) != count:
        raise FileFormatError(f"{path}: {count} features but {len(bag.xy)} coords", "extract the slide again")
    if count >= FEW and not np.ptp(bag.features, axis=0).any():
        raise FileFormatError(f"{path}: the features of all {count} tiles are the same", "extract the slide again")
    corners = np.unique(bag.xy, axis=0)
    if count >= FEW and len(corners) == 1:
        what = f"{path}: all {count} tiles have the same coordinates, {tuple(corners[0].tolist())}"
        raise FileFormatError(what, "extract the slide again")
    nearest = KDTree(corners).query(corners, 2, p=np.inf)[0][:, 1] if len(corners) > 1 else np.empty(0)
    stride = stride or bag.stride
    if stride is None:
        some = f"; its tiles lie {np.median(nearest):.0f} apart" if len(nearest) else ""
        what = f"{path}: neither patch_size_level0 nor tile_size_um says how far apart its tiles should be{some}"
        raise FileFormatError(what, "give --stride, in level-0 pixels")
    if not 0 < stride < np.inf:
        raise FileFormatError(f"{path}: its attributes say a stride of {stride}", "give --stride, in level-0 pixels")
    _no_contradiction(nearest, stride, path)
    bag = replace(bag, stride=float(stride), extent=float(bag.extent or stride))
    _inside(bag, path)
    return bag


def _no_contradiction(nearest: NDArray[np.float64], stride: float, path: Path) -> None:
    if not len(nearest):
        return
    hint = "its coordinates are not level-0 pixels, or its attributes are wrong; if these are: --stride"
    if np.median(nearest) < 0.75 * stride:
        raise FileFormatError(
            f"{path}: its tiles should lie {stride:.0f} apart and lie {np.median(nearest):.0f} apart",
            f"{hint} {np.median(nearest):.0f}",
        )
    if len(nearest) >= FEW and nearest.min() > 1.25 * stride:
        raise FileFormatError(
            f"{path}: its tiles should lie {stride:.0f} apart and no two lie nearer than {nearest.min():.0f}",
            f"{hint} {nearest.min():.0f}",
        )


def _inside(bag: TileFeatures, path: Path) -> None:
    assert bag.xy is not None
    assert bag.extent is not None
    about = bag.attributes or {}
    far = np.array([about.get("level0_width", np.inf), about.get("level0_height", np.inf)], np.float64)
    out = np.flatnonzero(((bag.xy <= -bag.extent) | (bag.xy >= far)).any(axis=1))
    if len(out):
        size = "" if np.isinf(far).any() else f" of {far[0]:.0f} x {far[1]:.0f}"
        raise FileFormatError(
            f"{path}: {len(out)} tiles lie outside of the slide{size}, the first at {tuple(bag.xy[out[0]].tolist())}",
            "its coordinates are not level-0 pixels; extract the slide again",
        )


def _write(study: Study, bag: TileFeatures, path: Path, key: str) -> None:
    assert bag.xy is not None
    views, features = study.views(bag.name), study.features(bag.name)
    with atomic.whole_folder(views) as folder:
        fits = np.abs(bag.features).max() <= HALF_MAX
        np.save(folder / "features.npy", bag.features[None].astype(np.float16 if fits else np.float32))
        np.save(folder / "coords.npy", bag.xy[None].astype(np.int32))
        fingerprints.write_made(folder, key, stride_level0=bag.stride)
    with hdf5.new_h5(features) as file:
        file.create_dataset("coords", data=bag.xy)
        file["coords"].attrs.update(attributes_of(bag, "features"))
        if bag.dataset:
            place, name = hdf5.origin_of(path, bag.dataset)
            file["features"] = h5py.ExternalLink(place, f"/{name}")
        else:
            hdf5.create_features(file, *bag.features.shape)[:] = bag.features
        file.attrs["fingerprint"] = key
