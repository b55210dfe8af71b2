"""Augmentations of pseudo-labels: copies of fields in which nuclei are crowded, paler or vesicular. No torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histossl.nuclei.pseudo_labels import PseudoLabel, targets


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
