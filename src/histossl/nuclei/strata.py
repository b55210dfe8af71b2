"""Recall by the area and by the darkness of the true nucleus."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from histossl.core.errors import LabelError
from histossl.wsi.stain import optical_density

BY = ("area", "darkness")
"""What nuclei can be grouped by."""

AREAS = (0.0, 8.0, 15.0, 25.0, 40.0, 60.0, 100.0, np.inf)
"""µm², edges of the groups by area."""

DARKNESS = (0.0, 0.4, 0.6, 0.8, 1.0, 1.3, np.inf)
"""Edges of the groups by darkness: optical density in units of the median nucleus of the same image."""


@dataclass(frozen=True)
class Found:
    """True nuclei and how well each was found.

    Attributes:
        iou: (N,) largest IoU with a predicted nucleus.
        covered: (N,) share of its pixels that any prediction covers.
        area: (N,) µm².
        darkness: (N,) mean optical density in units of the image's median nucleus; NaN without an image.
    """

    iou: NDArray[np.float64]
    covered: NDArray[np.float64]
    area: NDArray[np.float64]
    darkness: NDArray[np.float64]


def found_nuclei(prediction: NDArray, truth: NDArray, mpp: float, density: NDArray[np.float32] | None = None) -> Found:
    """Match every true nucleus with its best prediction.

    Args:
        prediction: (H, W) integers, 0 = background.
        truth: (H, W) integers, 0 = background.
        mpp: µm per pixel of both.
        density: (H, W) how dark the image is, such as the mean optical density of its channels; None leaves out the
            darkness.

    Returns:
        The true nuclei, in the order of their labels.

    Raises:
        LabelError: the shapes differ.
    """
    if prediction.shape != truth.shape or (density is not None and density.shape != truth.shape):
        shapes = [x.shape for x in (prediction, truth, density) if x is not None]
        raise LabelError(f"prediction, truth and image differ in size: {shapes} (rows, columns)")
    ids, t = np.unique(truth, return_inverse=True)
    t, first = t.reshape(truth.shape), int(0 in ids)
    kinds, p = np.unique(prediction, return_inverse=True)
    table = np.bincount(t.ravel() * len(kinds) + p.ravel(), minlength=len(ids) * len(kinds))
    table = table.reshape(len(ids), len(kinds))
    size_t, size_p = table.sum(1), table.sum(0)
    iou = table / np.maximum(size_t[:, None] + size_p[None] - table, 1)
    nuclei = kinds != 0
    best = iou[:, nuclei].max(1, initial=0)
    covered = table[:, nuclei].sum(1) / np.maximum(size_t, 1)
    dark = np.full(len(ids), np.nan)
    if density is not None and len(ids) > first:
        dark = np.asarray(ndimage.mean(density, t, np.arange(len(ids))), np.float64)
        dark = dark / max(float(np.median(dark[first:])), 1e-6)
    return Found(best[first:], covered[first:], size_t[first:] * mpp**2, dark[first:])


@dataclass(frozen=True)
class Group:
    """True nuclei of like area or darkness.

    Attributes:
        by: area or darkness.
        low, high: µm², or units of the image's median nucleus; low <= value < high.
        nuclei: number of true nuclei.
        recall: share matched at IoU > 0.5.
        missed: share of nuclei that predictions cover by less than a tenth.
    """

    by: str
    low: float
    high: float
    nuclei: int
    recall: float
    missed: float


def kinds_of(by: str, images: Path | None) -> list[str]:
    """Parse what nuclei are grouped by.

    Args:
        by: names from BY with commas between them, such as "area,darkness".
        images: the images of the labels, which "darkness" needs; None where they are not given.

    Returns:
        The names as a list.

    Raises:
        LabelError: an unknown name, or the images are missing.
    """
    kinds = [kind.strip() for kind in by.split(",") if kind.strip()]
    for kind in kinds:
        if kind not in BY:
            raise LabelError(f"nuclei cannot be grouped by {kind!r}", f"take {' or '.join(BY)}, or both with a comma")
    if "darkness" in kinds and images is None:
        raise LabelError("darkness needs the images that the labels are of", "give them by --images")
    return kinds


def density_of(images: Path, labels: Path, name: str) -> NDArray[np.float32]:
    """The mean optical density of the image that belongs to a label file.

    Args:
        images: the image file, or a folder that holds an image of the same stem as `labels`.
        labels: the label file.
        name: name of the labels, for the error.

    Returns:
        (H, W) float32, the mean over the colours.

    Raises:
        LabelError: there is no such image, or it cannot be read.
    """
    from histossl.wsi.slide import EXTENSIONS

    path = images
    if images.is_dir():
        stem = labels.name.removesuffix(".gz").removesuffix(".geojson")
        stem = stem if stem != labels.name.removesuffix(".gz") else labels.stem
        there = [p for p in sorted(images.iterdir()) if p.stem == stem and p.suffix.lower() in EXTENSIONS]
        if not there:
            raise LabelError(f"{images} holds no image called {stem}", f"it belongs to the labels of {name}")
        path = there[0]
    try:
        picture = np.asarray(Image.open(path).convert("RGB"))
    except (OSError, ValueError) as error:
        raise LabelError(f"{path}: no image ({error})", "give PNG, JPEG or TIFF of the size of the labels") from error
    return optical_density(picture).mean(-1)


def grouped(found: Sequence[Found], by: str) -> list[Group]:
    """Recall in groups of the nuclei of all images together.

    Args:
        found: one entry per image.
        by: "area" or "darkness".

    Returns:
        The groups in rising order, without groups that have no nuclei.

    Raises:
        LabelError: nuclei cannot be grouped by that.
    """
    if by not in BY:
        raise LabelError(f"nuclei cannot be grouped by {by!r}", f"take {' or '.join(BY)}")
    edges = AREAS if by == "area" else DARKNESS
    values = np.concatenate([getattr(one, by) for one in found]) if found else np.zeros(0)
    iou = np.concatenate([one.iou for one in found]) if found else np.zeros(0)
    covered = np.concatenate([one.covered for one in found]) if found else np.zeros(0)
    groups = []
    for low, high in itertools.pairwise(edges):
        inside = (values >= low) & (values < high)
        if inside.any():
            recall, missed = float((iou[inside] > 0.5).mean()), float((covered[inside] < 0.1).mean())
            groups.append(Group(by, low, high, int(inside.sum()), recall, missed))
    return groups
