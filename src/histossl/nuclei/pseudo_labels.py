"""What a network learns from when nobody labelled anything: sure nuclei, sure background, and doubt. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.segmentation import find_boundaries

from histossl.core.config import PRECISIONS, check_choice
from histossl.core.errors import SettingsError
from histossl.nuclei.component_tree import TreeSettings, best_objects, slopes
from histossl.nuclei.stain import Stains, concentrations, gaussian, optical_density

MPP = 0.5  # µm per pixel that the network sees: a nucleus of 7 µm is 14 px wide, and 20x and 40x slides look alike

_SOME = 20  # sure nuclei from which their areas say what is usual


@dataclass(frozen=True)
class PseudoLabelSettings:
    """How hematoxylin becomes pseudo-labels.

    Attributes:
        blur: µm, sigma of the Gaussian on hematoxylin.
        levels: thresholds of the tree of objects.
        quality: of an object from which it is sure, in units of the slide's steep slopes (their 95th percentile).
        doubt: weight of what is dark but no sure object; sure background weighs 1.
        pasted: per mm², sure nuclei that are set beside others in a second copy of each field, so that the network
            meets touching nuclei whose outlines are known.
        objects: what a nucleus must look like.
    """

    blur: float = 0.2
    levels: int = 32
    quality: float = 0.2
    doubt: float = 0.1
    pasted: float = 2400.0
    objects: TreeSettings = field(default_factory=TreeSettings)


@dataclass(frozen=True)
class SelfTrainingSettings:
    """How the default method learns.

    Attributes:
        steps: of training.
        batch: crops a step.
        crop: side of a crop in pixels of 0.5 µm.
        rate: highest learning rate.
        weight_decay: of the kernels.
        stain: sigma of the changes of stain: each crop's optical density is scaled, mixed between channels, shifted.
        zoom: crops are scaled by a factor of up to e^zoom up or down.
        noise: sigma of noise on the optical density.
        turns: quarter turns over which confidence is averaged: 1, 2 or 4.
        precision: auto (bfloat16 where the hardware multiplies it natively), float32 or bfloat16.
        seed: of all that is random.
        pseudo_labels: how they are made.
    """

    steps: int = 800
    batch: int = 12
    crop: int = 128
    rate: float = 4e-3
    weight_decay: float = 1e-3
    stain: float = 0.15
    zoom: float = 0.3
    noise: float = 0.02
    turns: int = 2
    precision: str = "auto"
    seed: int = 0
    pseudo_labels: PseudoLabelSettings = field(default_factory=PseudoLabelSettings)

    FORMER_NAME: ClassVar[str] = "ContrastSettings"
    FORMER_FIELDS: ClassVar[dict[str, str]] = {"lessons": "pseudo_labels"}

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.turns not in (1, 2, 4):
            raise SettingsError("self-training needs steps >= 1, batch >= 1 and turns of 1, 2 or 4")
        check_choice("self-training.precision", self.precision, PRECISIONS)
        if self.crop < 32 or self.crop % 4:
            raise SettingsError(f"self-training.crop must be a multiple of 4 from 32, got {self.crop}")


@dataclass(frozen=True)
class PseudoLabel:
    """A field of a slide and what is known about it.

    Attributes:
        density: (H, W, 3) float32 optical density in units of the slide's scale.
        labels: (H, W) int32, sure nuclei 1..n.
        quality: (n + 1,) float32 of each, 1 = as good as asked for.
        doubtful: (H, W) bool, dark, but no sure nucleus.
    """

    density: NDArray[np.float32]
    labels: NDArray[np.int32]
    quality: NDArray[np.float32]
    doubtful: NDArray[np.bool_]


def make_pseudo_labels(
    fields: list[NDArray[np.uint8]], stains: Stains, mpp: float, settings: PseudoLabelSettings = PseudoLabelSettings()
) -> list[PseudoLabel]:
    """Pseudo-labels of the fields of one slide; thresholds and scales are the slide's, never a field's.

    Args:
        fields: (H, W, 3) uint8 pictures at `mpp`.
        stains: of the slide.
        mpp: µm per pixel.
    """
    densities = [optical_density(f, stains.white) for f in fields]
    maps = [gaussian(concentrations(d, stains)[..., 0], settings.blur / mpp) for d in densities]
    values = np.concatenate([m.ravel() for m in maps])
    steepness = np.concatenate([slopes(m).ravel() for m in maps])
    steep = max(float(np.quantile(steepness, 0.95)), 1e-6)
    low, high = np.quantile(values, [0.1, 0.995])
    levels = np.linspace(low, high, settings.levels)
    dark = threshold_otsu(values)
    least = steep * settings.quality
    objects = replace(settings.objects, usual=_usual_area(maps, levels, mpp, settings.objects, least))
    found = []
    for density, amount in zip(densities, maps, strict=True):
        labels, quality = best_objects(amount, levels, mpp, objects)
        relative = quality / least
        sure = relative >= 1
        names = (np.cumsum(sure) * sure).astype(np.int32)
        doubtful = (names[labels] == 0) & ((labels > 0) | (amount > dark))
        kept = np.concatenate([np.zeros(1, np.float32), relative[sure]])
        found.append(PseudoLabel(density / np.float32(stains.scale), names[labels], kept, doubtful))
    return found


def _usual_area(
    maps: list[NDArray[np.float32]], levels: NDArray, mpp: float, objects: TreeSettings, least: float
) -> float:
    """µm² of the slide's usual nucleus, 0 where hardly any are sure: half of the area of the sure ones is in larger."""
    areas = np.zeros(0)
    for amount in maps:  # each tree is grown again afterwards: all of them at once would be 32 copies of every field
        labels, quality = best_objects(amount, levels, mpp, objects)
        areas = np.append(areas, np.bincount(labels.ravel(), minlength=len(quality))[quality >= least] * mpp**2)
    areas = np.sort(areas)
    total = np.cumsum(areas)
    return float(areas[np.searchsorted(total, total[-1] / 2)]) if len(areas) >= _SOME else 0.0


def targets(labelled: PseudoLabel, settings: PseudoLabelSettings = PseudoLabelSettings()) -> NDArray[np.float32]:
    """(3, H, W): nucleus (0 or 1), depth inside of it (1 in the middle of each nucleus), weight of the pixel."""
    labels = labelled.labels
    nucleus = labels > 0
    inner = nucleus & ~find_boundaries(labels, mode="inner")
    distance = np.asarray(ndimage.distance_transform_edt(inner), np.float32) + 0.5
    middle = np.asarray(ndimage.maximum(distance, labels, np.arange(len(labelled.quality))), np.float32)
    depth = np.where(nucleus, distance / np.maximum(middle[labels], 0.5), 0)
    # Beside a sure nucleus what is dark is none of it: as doubt it would push outlines outwards.
    beside = np.asarray(ndimage.binary_dilation(nucleus, iterations=2), bool)
    weight = np.where(labelled.doubtful & ~beside, settings.doubt, 1)
    weight[nucleus] = np.clip(labelled.quality * 2 / 3, 0, 1.5)[labels[nucleus]]
    return np.stack([nucleus, depth, weight]).astype(np.float32)


def crowd(labelled: PseudoLabel, count: int, rng: np.random.Generator) -> PseudoLabel:
    """A copy in which `count` of the surest nuclei are set again beside others, touching or overlapping them."""
    boxes = ndimage.find_objects(labelled.labels)
    margin = 3
    height, width = labelled.labels.shape
    good = [
        k
        for k, box in enumerate(boxes, 1)
        if labelled.quality[k] >= np.median(labelled.quality[1:])
        and min(box[0].start, box[1].start) >= margin
        and box[0].stop + margin <= height
        and box[1].stop + margin <= width
    ]
    if not good:
        return labelled
    density, labels, doubtful = labelled.density.copy(), labelled.labels.copy(), labelled.doubtful.copy()
    quality = list(labelled.quality)
    for _ in range(count):
        k, beside = int(rng.choice(good)), boxes[int(rng.integers(len(boxes)))]
        rows, columns = (slice(s.start - margin, s.stop + margin) for s in boxes[k - 1])
        turns, mirror = int(rng.integers(4)), int(rng.choice([-1, 1]))
        shape = np.rot90(labelled.labels[rows, columns] == k, turns)[:, ::mirror]
        picture = np.rot90(labelled.density[rows, columns], turns)[:, ::mirror]
        top, left = _beside(beside, shape, rng)
        if top < 0 or left < 0 or top + shape.shape[0] > height or left + shape.shape[1] > width:
            continue
        place = slice(top, top + shape.shape[0]), slice(left, left + shape.shape[1])
        soft = ndimage.gaussian_filter(shape.astype(np.float32), 0.7)[..., None]
        density[place] = soft * picture + (1 - soft) * density[place]
        labels[place][shape] = len(quality)
        doubtful[place] &= ~shape
        quality.append(labelled.quality[k])
    return PseudoLabel(density, labels, np.array(quality, np.float32), doubtful)


def _beside(box: tuple[slice, slice], shape: NDArray[np.bool_], rng: np.random.Generator) -> tuple[int, int]:
    """Top and left of a nucleus so that it about touches the one in `box`."""
    (top, bottom), (left, right) = ((s.start, s.stop) for s in box)
    reach = np.sqrt(shape.sum() / np.pi) + (bottom - top + right - left) / 4
    reach, angle = reach * rng.uniform(0.75, 1.15), rng.uniform(0, 2 * np.pi)
    row, column = (top + bottom) / 2 + reach * np.sin(angle), (left + right) / 2 + reach * np.cos(angle)
    return int(row - shape.shape[0] / 2), int(column - shape.shape[1] / 2)
