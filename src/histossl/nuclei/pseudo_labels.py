"""What a network learns from without labels: sure nuclei, sure background, and doubtful pixels. No torch."""

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

_SOME = 20  # sure nuclei that are needed to estimate the usual area


@dataclass(frozen=True)
class PseudoLabelSettings:
    """How hematoxylin becomes pseudo-labels.

    Attributes:
        blur: µm, sigma of the Gaussian on hematoxylin.
        levels: thresholds of the tree of objects.
        quality: least quality of a sure object, in units of the slide's steep slopes (their 95th percentile).
        doubt: weight of dark pixels outside sure objects; sure background weighs 1.
        pale: how pale doubtful pixels may be, from 1 (only pixels darker than Otsu's threshold are doubtful)
            down to 0 (all pixels darker than the median of those below that threshold are).
        faint: weight of the pixels between the two thresholds.
        pasted: per mm², sure nuclei that are copied beside others in a second copy of each field, so that the network
            meets touching nuclei whose outlines are known.
        paled: whether there is a third copy of each field, in which sure nuclei are paler than they are, by a factor
            drawn for each, so that the network meets pale and vesicular nuclei whose outlines are known.
        objects: the score of an object by its shape.
    """

    blur: float = 0.2
    levels: int = 32
    quality: float = 0.2
    doubt: float = 0.1
    pale: float = 1.0
    faint: float = 0.02
    pasted: float = 2400.0
    paled: bool = False
    objects: TreeSettings = field(default_factory=TreeSettings)


@dataclass(frozen=True)
class AgreementSettings:
    """How a trained network's nuclei and the tree's become pseudo-labels.

    Attributes:
        sure: least mean confidence of a nucleus that the network alone finds; it weighs `alone`.
        alone: weight of such a nucleus.
        doubted: an object that the tree alone finds is doubtful below this mean confidence.
        background: pixels outside objects of the tree are sure background below this confidence.
        threshold: on the network's confidence; lower than that of the final nuclei, so that pale ones are found.
    """

    sure: float = 0.7
    alone: float = 0.7
    doubted: float = 0.3
    background: float = 0.3
    threshold: float = 0.4


@dataclass(frozen=True)
class SelfTrainingSettings:
    """Settings of the training of the default method.

    Attributes:
        steps: of training.
        batch: crops per step.
        crop: side of a crop in pixels of 0.5 µm.
        rate: highest learning rate.
        weight_decay: of the kernels.
        stain: sigma of the changes of stain: each crop's optical density is scaled, mixed between channels, shifted.
        strength: sigma of the logarithm of a factor on all of a crop's optical density.
        zoom: crops are scaled by a factor of up to e^zoom up or down.
        noise: sigma of noise on the optical density.
        turns: quarter turns over which confidence is averaged: 1, 2 or 4.
        precision: auto (bfloat16 where the hardware multiplies it natively), float32 or bfloat16.
        widths: channels of the network at full, half and quarter resolution.
        seed: of all that is random.
        pseudo_labels: how pseudo-labels are made.
        agreement: how pseudo-labels are made with a trained network.
    """

    steps: int = 800
    batch: int = 12
    crop: int = 128
    rate: float = 4e-3
    weight_decay: float = 1e-3
    stain: float = 0.15
    strength: float = 0.0
    zoom: float = 0.3
    noise: float = 0.02
    turns: int = 2
    precision: str = "auto"
    widths: tuple[int, int, int] = (12, 24, 32)
    seed: int = 0
    pseudo_labels: PseudoLabelSettings = field(default_factory=PseudoLabelSettings)

    FORMER_NAME: ClassVar[str] = "ContrastSettings"
    FORMER_FIELDS: ClassVar[dict[str, str]] = {"lessons": "pseudo_labels"}
    agreement: AgreementSettings = field(default_factory=AgreementSettings)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.turns not in (1, 2, 4):
            raise SettingsError("self-training needs steps >= 1, batch >= 1 and turns of 1, 2 or 4")
        check_choice("self-training.precision", self.precision, PRECISIONS)
        if self.crop < 32 or self.crop % 4:
            raise SettingsError(f"self-training.crop must be a multiple of 4 from 32, got {self.crop}")


@dataclass(frozen=True)
class AdaptSettings:
    """How a trained model is adapted to new slides.

    Attributes:
        steps: of training.
        rate: highest learning rate.
        share: of the way from the old weights to the trained ones, in (0, 1].
        held: every `held`-th field is used to judge, not to learn.
        margin: least improvement of the judgement that the adapted model must reach.
        seed: of all that is random.
    """

    steps: int = 200
    rate: float = 1e-3
    share: float = 0.5
    held: int = 4
    margin: float = 0.002
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.share <= 1 or self.held < 2:
            raise SettingsError("adapting needs steps >= 1, a share in (0, 1] and held >= 2")


@dataclass(frozen=True)
class PseudoLabel:
    """The pseudo-labels of a field of a slide.

    Attributes:
        density: (H, W, 3) float32 optical density in units of the slide's scale.
        labels: (H, W) int32, sure nuclei 1..n.
        quality: (n + 1,) float32 of each, 1 = as good as required.
        doubtful: (H, W) bool, dark, but no sure nucleus.
        faint: (H, W) bool, paler than doubtful, but not pale enough for sure background.
    """

    density: NDArray[np.float32]
    labels: NDArray[np.int32]
    quality: NDArray[np.float32]
    doubtful: NDArray[np.bool_]
    faint: NDArray[np.bool_]


def make_pseudo_labels(
    fields: list[NDArray[np.uint8]], stains: Stains, mpp: float, settings: PseudoLabelSettings = PseudoLabelSettings()
) -> list[PseudoLabel]:
    """Pseudo-labels of the fields of one slide; thresholds and scales are those of the slide, never of a field.

    Args:
        fields: (H, W, 3) uint8 pictures at `mpp`.
        stains: stains of the slide.
        mpp: µm per pixel.
        settings: how sure nuclei are found.

    Returns:
        One pseudo-label per field.
    """
    densities = [optical_density(f, stains.white) for f in fields]
    maps = [gaussian(concentrations(d, stains)[..., 0], settings.blur / mpp) for d in densities]
    values = np.concatenate([m.ravel() for m in maps])
    levels, least = _levels(maps, values, settings)
    dark = threshold_otsu(values)
    median = np.median(values[values <= dark])
    pale = median + settings.pale * (dark - median)
    objects = replace(settings.objects, usual=_usual_area(maps, levels, mpp, settings.objects, least))
    found = []
    for density, amount in zip(densities, maps, strict=True):
        labels, quality = best_objects(amount, levels, mpp, objects)
        relative = quality / least
        sure = relative >= 1
        names = (np.cumsum(sure) * sure).astype(np.int32)
        doubtful = (names[labels] == 0) & ((labels > 0) | (amount > dark))
        kept = np.concatenate([np.zeros(1, np.float32), relative[sure]])
        faint = (names[labels] == 0) & ~doubtful & (amount > pale)
        found.append(PseudoLabel(density / np.float32(stains.scale), names[labels], kept, doubtful, faint))
    return found


def usual_area(
    fields: list[NDArray[np.uint8]], stains: Stains, mpp: float, settings: PseudoLabelSettings = PseudoLabelSettings()
) -> float:
    """The usual area of the sure nuclei of a slide.

    Args:
        fields: (h, w, 3) uint8 RGB fields of one slide.
        stains: stains of the slide.
        mpp: µm per pixel of the fields.
        settings: how sure nuclei are found.

    Returns:
        The area in µm²; 0 where there are hardly any sure nuclei.
    """
    maps = [
        gaussian(concentrations(optical_density(f, stains.white), stains)[..., 0], settings.blur / mpp) for f in fields
    ]
    levels, least = _levels(maps, np.concatenate([m.ravel() for m in maps]), settings)
    return _usual_area(maps, levels, mpp, settings.objects, least)


def _levels(
    maps: list[NDArray[np.float32]], values: NDArray[np.float32], settings: PseudoLabelSettings
) -> tuple[NDArray, float]:
    """The thresholds of the tree, and the quality from which an object is sure."""
    steepness = np.concatenate([slopes(m).ravel() for m in maps])
    steep = max(float(np.quantile(steepness, 0.95)), 1e-6)
    low, high = np.quantile(values, [0.1, 0.995])
    return np.linspace(low, high, settings.levels), steep * settings.quality


def _usual_area(
    maps: list[NDArray[np.float32]], levels: NDArray, mpp: float, objects: TreeSettings, least: float
) -> float:
    """µm², the area that halves the total area of sure nuclei when they are sorted; 0 where hardly any are sure."""
    areas = np.zeros(0)
    for amount in maps:  # trees are not kept: all at once would need the memory of 32 copies of every field
        labels, quality = best_objects(amount, levels, mpp, objects)
        areas = np.append(areas, np.bincount(labels.ravel(), minlength=len(quality))[quality >= least] * mpp**2)
    areas = np.sort(areas)
    total = np.cumsum(areas)
    return float(areas[np.searchsorted(total, total[-1] / 2)]) if len(areas) >= _SOME else 0.0


def targets(labelled: PseudoLabel, settings: PseudoLabelSettings = PseudoLabelSettings()) -> NDArray[np.float32]:
    """What the network learns to predict at each pixel of a field.

    Args:
        labelled: the pseudo-labels of the field, (H, W).
        settings: weights of doubtful and of faint pixels.

    Returns:
        (3, H, W) float32: nucleus (0 or 1), depth inside it (1 in the middle of each nucleus), and weight of the pixel.
    """
    labels = labelled.labels
    nucleus = labels > 0
    inner = nucleus & ~find_boundaries(labels, mode="inner")
    distance = np.asarray(ndimage.distance_transform_edt(inner), np.float32) + 0.5
    middle = np.asarray(ndimage.maximum(distance, labels, np.arange(len(labelled.quality))), np.float32)
    depth = np.where(nucleus, distance / np.maximum(middle[labels], 0.5), 0)
    # Dark pixels beside a sure nucleus count as background: as doubtful ones they would push outlines outwards.
    beside = np.asarray(ndimage.binary_dilation(nucleus, iterations=2), bool)
    weight = np.where(labelled.doubtful & ~beside, settings.doubt, 1)
    weight[labelled.faint & ~beside] = settings.faint
    weight[nucleus] = np.clip(labelled.quality * 2 / 3, 0, 1.5)[labels[nucleus]]
    return np.stack([nucleus, depth, weight]).astype(np.float32)


def crowd(labelled: PseudoLabel, count: int, rng: np.random.Generator) -> PseudoLabel:
    """An augmentation: copy some of the surest nuclei so that they touch or overlap others.

    Args:
        labelled: the pseudo-labels of a field; not changed.
        count: how many copies to try; copies that would cross the border of the field are dropped.
        rng: source of randomness.

    Returns:
        The changed copy; `labelled` itself where no nucleus is suited.
    """
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
    density, labels = labelled.density.copy(), labelled.labels.copy()
    doubtful, faint = labelled.doubtful.copy(), labelled.faint.copy()
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
        faint[place] &= ~shape
        quality.append(labelled.quality[k])
    return PseudoLabel(density, labels, np.array(quality, np.float32), doubtful, faint)


def _beside(box: tuple[slice, slice], shape: NDArray[np.bool_], rng: np.random.Generator) -> tuple[int, int]:
    """Top and left of a nucleus so that it about touches the one in `box`."""
    (top, bottom), (left, right) = ((s.start, s.stop) for s in box)
    reach = np.sqrt(shape.sum() / np.pi) + (bottom - top + right - left) / 4
    reach, angle = reach * rng.uniform(0.75, 1.15), rng.uniform(0, 2 * np.pi)
    row, column = (top + bottom) / 2 + reach * np.sin(angle), (left + right) / 2 + reach * np.cos(angle)
    return int(row - shape.shape[0] / 2), int(column - shape.shape[1] / 2)


_AROUND = 4.0  # pixels, sigma of the Gaussian over the surroundings of nuclei


def paled(labelled: PseudoLabel, rng: np.random.Generator) -> PseudoLabel:
    """An augmentation: sure nuclei keep 30 to 100 % of their contrast to their surroundings, some less in the middle.

    Args:
        labelled: the pseudo-labels of a field; not changed.
        rng: source of randomness.

    Returns:
        The copy with another density and the same labels.
    """
    count = len(labelled.quality)
    outside = ndimage.binary_dilation(labelled.labels > 0, iterations=1) == 0
    weight = ndimage.gaussian_filter(outside.astype(np.float32), _AROUND) + np.float32(1e-3)
    around = np.stack(
        [ndimage.gaussian_filter(np.where(outside, labelled.density[..., c], 0), _AROUND) / weight for c in range(3)],
        -1,
    )
    kept, hollow = rng.uniform(0.3, 1, count), rng.uniform(0, 0.6, count) * (rng.random(count) < 0.5)
    kept[0], hollow[0] = 1, 0
    depth = targets(labelled)[1]
    factor = kept[labelled.labels] * (1 - hollow[labelled.labels] * depth)
    factor = ndimage.gaussian_filter(factor.astype(np.float32), 0.7)[..., None]
    contrast = labelled.density - around
    # Only darkness is removed: pixels paler than their surroundings do not change.
    density = np.where(contrast > 0, around + factor * contrast, labelled.density)
    return replace(labelled, density=density.astype(np.float32))
