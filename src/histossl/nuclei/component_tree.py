"""Objects of a map: of all components of a stack of thresholds those that look most like nuclei, no two overlapping.

A nucleus has its own contrast, so no one threshold outlines all of them. The components of rising thresholds form a
tree (a component holds those of the next threshold inside of it); every component is judged by its shape, and the best
disjoint ones are found exactly, from the leaves up (as Arteta et al., MICCAI 2012, do with a classifier that was
trained on labels; here the judgement is geometry). The same tree serves twice: on hematoxylin it finds what a network
learns from, on the network's inner distance it parts nuclei that touch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import ndimage


@dataclass(frozen=True)
class TreeSettings:
    """What an object must look like.

    Attributes:
        smallest: µm², least area.
        largest: µm², greatest area.
        hole: µm², holes up to this area belong to the object around them.
        roundness: exponent of the area over that of the ellipse of equal moments: 1 for any ellipse, less for what is
            concave, branched or two nuclei.
        longest: ratio of the axes from which nothing is a nucleus; half as long is not yet penalised.
        usual: µm², area of most nuclei there; 0 where nobody knows.
        spread: standard deviation of the logarithm of areas around the usual one: how much what is larger or smaller
            has to be better.
        edges: whether the mean gradient along the outline counts: then of nested outlines the sharpest is chosen.
        whole: how much better parts must be than the whole that they lie in.
        nested: the same for one part in one whole, that is for a tighter outline.
    """

    smallest: float = 6.0
    largest: float = 250.0
    hole: float = 40.0
    roundness: float = 3.0
    longest: float = 6.0
    usual: float = 0.0
    spread: float = 1.25
    edges: bool = True
    whole: float = 1.02
    nested: float = 1.0


@njit(cache=True)
def _measure(labels, count, slope, sums):
    """Per label: area, x, y, xx, yy, xy, length of the outline, slope along it; into sums (count + 1, 8)."""
    height, width = labels.shape
    for r in range(height):
        for c in range(width):
            k = labels[r, c]
            if k == 0:
                continue
            s = sums[k]
            s[0] += 1
            s[1] += c
            s[2] += r
            s[3] += c * c
            s[4] += r * r
            s[5] += c * r
            # On both sides of the outline: by the pixels inside alone it would be sharpest half a pixel too far out.
            for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                y, x = r + dr, c + dc
                if 0 <= y < height and 0 <= x < width and labels[y, x] != k:
                    s[6] += 1
                    s[7] += (slope[r, c] + slope[y, x]) / 2


@njit(cache=True)
def _parents(labels, inner, count):
    """(count + 1) the label in `labels` that holds each label of `inner`."""
    parents = np.zeros(count + 1, np.int64)
    for r in range(labels.shape[0]):
        for c in range(labels.shape[1]):
            if inner[r, c] > 0:
                parents[inner[r, c]] = labels[r, c]
    return parents


def best_objects(
    values: NDArray[np.float32], thresholds: Sequence[float] | NDArray, mpp: float, settings: TreeSettings
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The best disjoint objects of a map.

    Args:
        values: (H, W), larger inside of nuclei, already as smooth as the outlines should be.
        thresholds: rising.
        mpp: µm per pixel of `values`.
        settings: what an object must look like.

    Returns:
        labels: (H, W) int32, 1..n, 0 = none.
        quality: (n + 1,) float32 by label; entry 0 is 0. With `edges` in units of `values` per pixel.
    """
    slope = slopes(values) if settings.edges else np.zeros_like(values)
    levels, quality, areas, parents = [], [], [], []
    for threshold in thresholds:
        labels, count = _components(values > threshold, settings.hole / mpp**2)
        if levels:
            parents.append(_parents(levels[-1], labels, count))
        sums = np.zeros((count + 1, 8))
        _measure(labels, count, slope, sums)
        levels.append(labels)
        areas.append(sums[:, 0] * mpp**2)
        quality.append(_quality(sums, mpp, settings))
    taken = _choose(quality, areas, parents, settings)
    return _drawn(levels, quality, taken, parents)


def slopes(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(H, W) the length of the gradient, per pixel."""
    rows, columns = np.gradient(values)
    return np.hypot(rows, columns).astype(np.float32)


def filled(mask: NDArray[np.bool_], area: float) -> NDArray[np.bool_]:
    """The mask with its holes of up to `area` pixels filled."""
    if area < 1:
        return mask
    holes = np.empty(mask.shape, np.int32)
    ndimage.label(~mask, output=holes)
    small = np.bincount(holes.ravel()) <= area
    small[0] = False
    return mask | small[holes]


def _components(mask: NDArray[np.bool_], hole: float) -> tuple[NDArray[np.int32], int]:
    """4-connected components of a mask whose small holes are filled."""
    labels = np.empty(mask.shape, np.int32)
    count = ndimage.label(filled(mask, hole), output=labels)
    return labels, int(count)  # type: ignore[call-overload]


def _quality(sums: NDArray, mpp: float, settings: TreeSettings) -> NDArray[np.float64]:
    area = np.maximum(sums[:, 0], 1)
    x, y = sums[:, 1] / area, sums[:, 2] / area
    # A pixel is a square, not a point: its own second moment is 1/12.
    xx, yy = sums[:, 3] / area - x**2 + 1 / 12, sums[:, 4] / area - y**2 + 1 / 12
    xy = sums[:, 5] / area - x * y
    determinant = np.maximum(xx * yy - xy**2, 1e-6)
    middle, spread = (xx + yy) / 2, np.sqrt(np.maximum((xx - yy) ** 2 / 4 + xy**2, 0))
    aspect = np.sqrt((middle + spread) / np.maximum(middle - spread, 1e-3))
    roundness = np.minimum(area / (4 * np.pi * np.sqrt(determinant)), 1)
    quality = roundness**settings.roundness * np.clip(2 - 2 * aspect / settings.longest, 0, 1)
    if settings.edges:
        quality *= sums[:, 7] / np.maximum(sums[:, 6], 1)
    size = sums[:, 0] * mpp**2
    if settings.usual:
        quality *= np.exp(-((np.log(np.maximum(size, 1e-3) / settings.usual) / settings.spread) ** 2) / 2)
    return np.where((size >= settings.smallest) & (size <= settings.largest), quality, 0)


def _choose(
    quality: list[NDArray], areas: list[NDArray], parents: list[NDArray], settings: TreeSettings
) -> list[NDArray[np.bool_]]:
    """Level by level from the leaves: a component is taken where it is better than the best choice inside of it.

    The choice inside counts with the mean of its qualities, weighted by area.
    """
    taken: list[NDArray[np.bool_]] = [np.zeros(0, bool)] * len(quality)
    inside, covered = np.zeros(0), np.zeros(0)
    for k in range(len(quality) - 1, -1, -1):
        count = len(quality[k])
        best, weight, parts = np.zeros(count), np.zeros(count), np.zeros(count)
        if k + 1 < len(quality):
            weight = np.bincount(parents[k], covered, count)
            best = np.bincount(parents[k], inside * covered, count) / np.maximum(weight, 1e-9)
            parts = np.bincount(parents[k], covered > 0, count)
        favour = np.where(parts > 1, settings.whole, settings.nested)
        taken[k] = (quality[k] > 0) & (quality[k] * favour >= best)
        taken[k][0] = False
        inside = np.where(taken[k], quality[k], best)
        covered = np.where(taken[k], areas[k], weight)
        covered[0] = 0
    return taken


def _drawn(
    levels: list[NDArray[np.int32]], quality: list[NDArray], taken: list[NDArray[np.bool_]], parents: list[NDArray]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """From the root: what is taken hides all inside of it."""
    labels = np.zeros_like(levels[0])
    kept: list[NDArray] = [np.zeros(1)]
    hidden = np.zeros(len(taken[0]), bool)
    total = 0
    for k, level in enumerate(levels):
        if k:
            hidden = (hidden | taken[k - 1])[parents[k - 1]]
        ids = np.flatnonzero(taken[k] & ~hidden)
        names = np.zeros(len(taken[k]), np.int32)
        names[ids] = np.arange(1, len(ids) + 1) + total
        if len(ids):
            labels += names[level]
        kept.append(quality[k][ids])
        total += len(ids)
    return labels, np.concatenate(kept).astype(np.float32)
