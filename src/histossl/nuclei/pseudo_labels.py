"""What a network learns from without labels: sure nuclei, sure background, and doubtful pixels. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.segmentation import find_boundaries

from histossl.nuclei.component_tree import ComponentTree, slopes
from histossl.nuclei.settings import (
    PseudoLabelSettings,
    TreeSettings,
)
from histossl.wsi.stain import Stains, concentrations, gaussian, optical_density

MPP = 0.5  # µm per pixel that the network sees: a nucleus of 7 µm is 14 px wide, and 20x and 40x slides look alike

FIELDS = 8
"""Of the fields of a slide, how many give the pseudo-labels that the last layer of a network is fitted to."""

SOME = 20
"""Sure nuclei that are needed to estimate the usual area, or to fit the last layer of a network to a slide."""


_KEPT = 1_000_000  # pixels of fields, of which the components are kept instead of being found twice


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


@dataclass(frozen=True)
class SlideTree:
    """How the component tree of hematoxylin tells the sure nuclei of a slide; the same for all of its tiles.

    Attributes:
        levels: thresholds of the tree, rising.
        least: quality from which an object is sure.
        objects: the score of an object, with the usual area of the slide's nuclei.
    """

    levels: NDArray[np.float64]
    least: float
    objects: TreeSettings

    def grown(self, amount: NDArray[np.float32], mpp: float) -> ComponentTree:
        """The components of a tile.

        Args:
            amount: (H, W) hematoxylin, as of `hematoxylin`.
            mpp: µm per pixel.

        Returns:
            The components at the levels of this tree.
        """
        return ComponentTree(amount, self.levels, mpp, self.objects)

    def objects_of(self, grown: ComponentTree) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The best disjoint objects of a tile.

        Args:
            grown: its components.

        Returns:
            labels: (H, W) int32, 1..n.
            quality: (n + 1,) float32 of each; from 1 on an object is a sure nucleus.
        """
        labels, quality = grown.best(self.objects)
        return labels, quality / np.float32(self.least)


@dataclass(frozen=True)
class SureNuclei:
    """What hematoxylin says of a slide without a network.

    Attributes:
        tree: how it tells the slide's sure nuclei.
        labels: the pseudo-labels of fields.
    """

    tree: SlideTree
    labels: list[PseudoLabel]


def sure_nuclei(
    fields: list[NDArray[np.uint8]],
    stains: Stains,
    mpp: float,
    settings: PseudoLabelSettings = PseudoLabelSettings(),
    most: int | None = FIELDS,
) -> SureNuclei:
    """Find the sure nuclei of a slide; thresholds and scales are those of the slide, never of a field.

    Args:
        fields: (h, w, 3) uint8 RGB fields of one slide.
        stains: stains of the slide.
        mpp: µm per pixel of the fields.
        settings: how sure nuclei are found.
        most: of how many fields the pseudo-labels are made; None for all.

    Returns:
        The tree of all fields, where `objects.usual` is the usual area in µm², 0 where there are hardly any sure
        nuclei; and the pseudo-labels of the first fields.
    """
    densities = [optical_density(f, stains.white) for f in fields]
    maps = [hematoxylin(d, stains, mpp, settings) for d in densities]
    steepness = np.concatenate([slopes(m).ravel() for m in maps])
    steep = max(float(np.quantile(steepness, 0.95)), 1e-6)
    low, high = np.quantile(np.concatenate([m.ravel() for m in maps]), [0.1, 0.995])
    tree = SlideTree(np.linspace(low, high, settings.levels), steep * settings.quality, settings.objects)
    areas, kept = np.zeros(0), list[ComponentTree]()
    for amount, end in zip(maps, np.cumsum([m.size for m in maps]), strict=True):
        grown = tree.grown(amount, mpp)
        if end <= _KEPT:  # components take the memory of 32 copies of their field
            kept = [*kept, grown][:most]
        labels, quality = tree.objects_of(grown)
        areas = np.append(areas, np.bincount(labels.ravel(), minlength=len(quality))[quality >= 1] * mpp**2)
    tree = replace(tree, objects=replace(settings.objects, usual=_usual_area(areas)))
    known = [(d / np.float32(stains.scale), m) for d, m in zip(densities[:most], maps, strict=False)]
    return SureNuclei(tree, _labelled(known, kept, tree, mpp, settings))


def hematoxylin(
    density: NDArray[np.float32], stains: Stains, mpp: float, settings: PseudoLabelSettings = PseudoLabelSettings()
) -> NDArray[np.float32]:
    """The smoothed amount of hematoxylin.

    Args:
        density: (H, W, 3) optical density.
        stains: stains of the slide.
        mpp: µm per pixel.
        settings: the blur.

    Returns:
        (H, W) float32.
    """
    return gaussian(concentrations(density, stains)[..., 0], settings.blur / mpp)


def _usual_area(areas: NDArray[np.floating]) -> float:
    """µm², the area that halves the total area of sure nuclei when they are sorted; 0 where hardly any are sure."""
    areas = np.sort(areas)
    total = np.cumsum(areas)
    return float(areas[np.searchsorted(total, total[-1] / 2)]) if len(areas) >= SOME else 0.0


def _labelled(
    fields: list[tuple[NDArray[np.float32], NDArray[np.float32]]],
    grown: list[ComponentTree],
    tree: SlideTree,
    mpp: float,
    settings: PseudoLabelSettings,
) -> list[PseudoLabel]:
    """The pseudo-labels of fields, of which density and hematoxylin are given, and of the first the components."""
    values = np.concatenate([amount.ravel() for _, amount in fields])
    dark = threshold_otsu(values)
    median = np.median(values[values <= dark])
    pale = median + settings.pale * (dark - median)
    found = []
    for k, (density, amount) in enumerate(fields):
        labels, relative = tree.objects_of(grown[k] if k < len(grown) else tree.grown(amount, mpp))
        sure = relative >= 1
        names = (np.cumsum(sure) * sure).astype(np.int32)
        doubtful = (names[labels] == 0) & ((labels > 0) | (amount > dark))
        kept = np.concatenate([np.zeros(1, np.float32), relative[sure]])
        faint = (names[labels] == 0) & ~doubtful & (amount > pale)
        found.append(PseudoLabel(density, names[labels], kept, doubtful, faint))
    return found


def targets(labelled: PseudoLabel, settings: PseudoLabelSettings = PseudoLabelSettings()) -> NDArray[np.float32]:
    """What the network learns to predict at each pixel of a field.

    Args:
        labelled: the pseudo-labels of the field, (H, W).
        settings: weights of doubtful and of faint pixels.

    Returns:
        (3, H, W) float32: nucleus (0 or 1), depth inside it (1 in the middle of each nucleus), and weight of the pixel.
    """
    labels = labelled.labels
    nucleus, depth = labels > 0, depth_inside(labels)
    # Dark pixels beside a sure nucleus count as background: as doubtful ones they would push outlines outwards.
    beside = np.asarray(ndimage.binary_dilation(nucleus, iterations=2), bool)
    weight = np.where(labelled.doubtful & ~beside, settings.doubt, 1)
    weight[labelled.faint & ~beside] = settings.faint
    weight[nucleus] = np.clip(labelled.quality * 2 / 3, 0, 1.5)[labels[nucleus]]
    return np.stack([nucleus, depth, weight]).astype(np.float32)


def depth_inside(labels: NDArray[np.int32]) -> NDArray[np.float32]:
    """The depth inside of nuclei.

    Args:
        labels: (H, W) int32, 1..n, 0 = none.

    Returns:
        (H, W) float32: 1 in the middle of each nucleus, 0 outside.
    """
    nucleus = labels > 0
    inner = nucleus & ~find_boundaries(labels, mode="inner")
    distance = np.asarray(ndimage.distance_transform_edt(inner), np.float32) + np.float32(0.5)
    middle = np.asarray(ndimage.maximum(distance, labels, np.arange(labels.max(initial=0) + 1)), np.float32)
    return np.where(nucleus, distance / np.maximum(middle[labels], np.float32(0.5)), np.float32(0))
