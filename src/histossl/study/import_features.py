"""Imports features of another tool, or of another study, into a study.

The features are not copied: the study's HDF5 files link to them. Only views/, which training reads at random, is
written, in 16 bits.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from histossl.core import atomic, fingerprints, hdf5
from histossl.core.config import fingerprint, to_dict
from histossl.core.console import progress_bar
from histossl.core.errors import FileFormatError, HistosslError, SettingsError, StudyError
from histossl.core.interchange import TileFeatures, attributes_of, read_tile_features
from histossl.core.names import folded
from histossl.core.npy import read_npy
from histossl.core.sidecars import files_of
from histossl.encoders.external import hash_of
from histossl.execution.failures import fail, failure_reason, report_failures
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.pretrain_settings import PretrainSettings, trained_as
from histossl.gigassl.published import load_published
from histossl.gigassl.views import ViewSettings
from histossl.study.folder import COLUMNS, Row, Study, slide_names
from histossl.wsi.slide import find_slides, open_slide

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


def import_features(study: Study, origin: FeatureOrigin, spatial: bool = True) -> int:
    """Import a folder of features into a study: slides.csv, features/ and views/.

    Files that cannot be used are left out, with the reason in slides.csv. Slides that were imported before and have not
    changed are kept.

    Args:
        study: the study, locked; empty, or imported from the same folder before.
        origin: the features, of histossl, TRIDENT, CLAM (h5 and pt) or STAMP.
        spatial: whether the slide encoder needs coordinates; if not, files without them are accepted.

    Returns:
        The number of slides that were left out.

    Raises:
        StudyError: the folder has no features, or the study was made from other data.
        FileFormatError: the features have two lengths that are equally frequent.
    """
    files = feature_files(origin.folder)
    if "inspect" in study.settings():
        raise StudyError(f"{study.folder}: made from slides, not from features", "use another --out")
    about = {"adopted": os.path.abspath(origin.folder), "stride": origin.stride, "mpp": origin.mpp}
    study.settle("encode", about, study.folder / "features")
    pictures = {} if origin.slides is None else {folded(path.stem): path for path in find_slides(origin.slides)}
    rows = _rows(study, files, pictures)
    dims: dict[str, int] = {}
    with progress_bar("slides", len(rows)) as bar:
        for row, path in rows:
            bar.advance(1)
            if path is None:
                continue
            try:
                dims[row["slide_id"]] = _import_one(study, row, path, origin, spatial)
            except (HistosslError, OSError) as error:
                fail(row, failure_reason(error))
    table = [row for row, _ in rows]
    study.write_slides(table)
    if dims:
        _leave_out_other_encoders(study, {row["slide_id"]: row for row in table}, dims)
        study.write_slides(table)
    return report_failures(table)


def take_encoder(study: Study, weights: Path) -> None:
    """Use a slide encoder that was trained elsewhere as that of a study: slide-encoder/.

    Args:
        study: the study, locked.
        weights: the slide-encoder folder of another study, or a checkpoint published by the authors of Giga-SSL; views
            then have five random tiles, as in their code.

    Raises:
        StudyError: the study already has another slide encoder.
        FileFormatError: no slide encoder can be read from `weights`.
    """
    if weights.is_dir():
        encoder, about = SlideEncoder.load(weights), trained_as(weights)
    else:
        encoder = load_published(weights)
        view = ViewSettings(tiles=5, windows=0, scale_min=0.5, scale_max=2.0, any_angle=True)
        settings = to_dict(PretrainSettings(view=view, encoder=encoder.settings))
        about = {"fingerprint": hash_of(encoder), "features": "published", "slides": None, "pretrain": settings}
    if study.slide_encoder.is_dir():
        if trained_as(study.slide_encoder)["fingerprint"] == about["fingerprint"]:
            return
        hint = f"use another --out, or remove {study.slide_encoder}"
        raise StudyError(f"{study.slide_encoder}: another slide encoder than {weights}", hint)
    encoder.save(study.slide_encoder, about, *encoder.rival)


def feature_files(folder: Path) -> list[Path]:
    """The files of features in a folder, or in its subfolders as CLAM names them.

    Args:
        folder: the folder.

    Returns:
        One file per slide, .h5 rather than .pt, sorted by name.

    Raises:
        StudyError: there are no such files.
    """
    for place in (folder, folder / "h5_files", folder / "features", folder / "pt_files"):
        found = {path.stem: path for kinds in ((".pt",), (".h5", ".hdf5")) for path in files_of(place, kinds)[0]}
        if found:
            return [found[name] for name in sorted(found)]
    raise StudyError(f"{folder}: no .h5 or .pt files of features", "give a folder with one file per slide")


def _rows(study: Study, files: list[Path], pictures: dict[str, Path]) -> list[tuple[Row, Path | None]]:
    """One row per file, which keeps what users wrote, and a failed row for each slide whose file no longer exists."""
    known = {folded(row["slide_id"]): row for row in study.slides()}
    rows: list[tuple[Row, Path | None]] = []
    for path, (name, complaint) in zip(files, slide_names(files), strict=True):
        row = known.pop(folded(name), dict.fromkeys(COLUMNS, "") | {"slide_id": name})
        row["path"] = str(pictures.get(folded(name), row["path"]))
        row |= {"status": "", "error": ""}
        if complaint:
            fail(row, complaint)
        rows.append((row, None if complaint else path))
    for row in known.values():
        fail(row, f"{row['slide_id']}: its features are no longer there; put them back: its row is kept until then")
        rows.append((row, None))
    return rows


def _import_one(study: Study, row: Row, path: Path, origin: FeatureOrigin, spatial: bool) -> int:
    """Import one file, unless that was done before; returns the length of its features."""
    features, views = study.features(row["slide_id"]), study.views(row["slide_id"])
    mpp, stat = _mpp(row, origin), path.stat()
    of = (str(path.absolute()), stat.st_size, stat.st_mtime_ns, origin.stride, spatial)
    key = fingerprint(*of, mpp if mpp is not None else _attributes(features).get("mpp"))
    if any(fingerprints.fingerprint_of(product) != key for product in (features, views)):
        bag = check_coordinates(_placed(read_tile_features(path, mpp, in_um=True), path, spatial), path, origin.stride)
        _write(study, bag, path, fingerprint(*of, bag.mpp))
    about = _attributes(features)
    values = read_npy(views / "features.npy", f"remove {views}")
    row |= {"width": str(about["level0_width"]), "height": str(about["level0_height"]), "tiles": str(values.shape[1])}
    row |= {"mpp": row["mpp"] or repr(float(about["mpp"])) if "mpp" in about else "", "status": "encoded"}
    return values.shape[2]


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
    with atomic.whole(features) as part, h5py.File(part, "w") as file:
        file.create_dataset("coords", data=bag.xy)
        file["coords"].attrs.update(attributes_of(bag, "features"))
        if bag.dataset:
            place, name = hdf5.origin_of(path, bag.dataset)
            file["features"] = h5py.ExternalLink(place, f"/{name}")
        else:
            hdf5.create_features(file, *bag.features.shape)[:] = bag.features
        file.attrs["fingerprint"] = key


def _leave_out_other_encoders(study: Study, rows: dict[str, Row], dims: dict[str, int]) -> None:
    """Mark as failed the slides whose features have another length than most: another encoder made them."""
    (most, count), *others = Counter(dims.values()).most_common()
    if others and others[0][1] == count:
        raise FileFormatError(
            f"{study.folder}: {count} slides have features of {most} numbers and {count} of {others[0][0]}",
            "they are of two encoders; put them into two folders",
        )
    for name, dim in dims.items():
        if dim != most:
            fail(rows[name], f"{name}: features of {dim} numbers among others of {most}; use one tile encoder for all")
