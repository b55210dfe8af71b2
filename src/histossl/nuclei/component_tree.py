"""Component tree: among the components of many thresholds, the disjoint ones that look most like nuclei.

Nuclei differ in contrast, so no single threshold outlines all of them. The components of rising thresholds form a tree
(a component contains those of the next threshold inside it). Every component gets a score by its shape, and the best
disjoint ones are found exactly, from the leaves up. Arteta et al. (MICCAI 2012) do this with a classifier trained on
labels; here the score is geometry. The tree is used twice: on hematoxylin it finds the pseudo-labels that a network is
trained on, and on the network's depth it separates nuclei that touch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray

from histossl.nuclei.settings import TreeSettings


@njit(cache=True)
def _measure(labels, count, slope, sums):
    """Add up area, x, y, xx, yy, xy, length of the outline and slope along it, by label, in sums (count + 1, 8)."""
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
            # The mean of both sides of the outline: the inner pixels alone prefer outlines half a pixel too large.
            for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                y, x = r + dr, c + dc
                if 0 <= y < height and 0 <= x < width and labels[y, x] != k:
                    s[6] += 1
                    s[7] += (slope[r, c] + slope[y, x]) / 2


@njit(cache=True)
def _parents(labels, inner, count):
    """(count + 1,) the label of `labels` that contains each label of `inner`."""
    parents = np.zeros(count + 1, np.int64)
    for r in range(labels.shape[0]):
        for c in range(labels.shape[1]):
            if inner[r, c] > 0:
                parents[inner[r, c]] = labels[r, c]
    return parents


class ComponentTree:
    """The components of a map over many thresholds, which parts of which.

    Args:
        values: (H, W) float32, larger inside nuclei, already as smooth as the outlines should be.
        thresholds: thresholds on `values`, rising.
        mpp: µm per pixel of `values`.
        settings: of them the largest hole that is filled, and whether the slope along outlines is measured.
    """

    def __init__(
        self, values: NDArray[np.float32], thresholds: Sequence[float] | NDArray, mpp: float, settings: TreeSettings
    ) -> None:
        slope = slopes(values) if settings.edges else np.zeros_like(values)
        self.mpp = mpp
        self.levels: list[NDArray[np.int32]] = []
        self._sums: list[NDArray[np.float64]] = []
        self._parents: list[NDArray[np.int64]] = []
        for threshold in thresholds:
            labels, count = _components(values > threshold, settings.hole / mpp**2)
            if self.levels:
                self._parents.append(_parents(self.levels[-1], labels, count))
            sums = np.zeros((count + 1, 8))
            _measure(labels, count, slope, sums)
            self.levels.append(labels)
            self._sums.append(sums)

    def best(self, settings: TreeSettings) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The best disjoint objects.

        Args:
            settings: the score of an object, with the hole and edges of this tree.

        Returns:
            labels: (H, W) int32, 1..n, 0 = none.
            quality: (n + 1,) float32, the score of each label; entry 0 is 0. With `edges` in units of the values per
                pixel.
        """
        quality = [_quality(sums, self.mpp, settings) for sums in self._sums]
        areas = [sums[:, 0] * self.mpp**2 for sums in self._sums]
        return _drawn(self.levels, quality, _choose(quality, areas, self._parents, settings), self._parents)


def best_objects(
    values: NDArray[np.float32], thresholds: Sequence[float] | NDArray, mpp: float, settings: TreeSettings
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The best disjoint objects of a map.

    Args:
        values: (H, W) float32, as of `ComponentTree`.
        thresholds: thresholds on `values`, rising.
        mpp: µm per pixel of `values`.
        settings: the score of an object.

    Returns:
        Labels and quality, as of `ComponentTree.best`.
    """
    return ComponentTree(values, thresholds, mpp, settings).best(settings)


def slopes(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The length of the gradient.

    Args:
        values: (H, W).

    Returns:
        (H, W) float32, units of `values` per pixel.
    """
    rows, columns = np.gradient(values)
    return np.hypot(rows, columns).astype(np.float32)


def filled(mask: NDArray[np.bool_], area: float) -> NDArray[np.bool_]:
    """Fill the small holes of a mask.

    Args:
        mask: (H, W).
        area: largest area of a hole to fill, in pixels.

    Returns:
        (H, W) bool.
    """
    return _components(mask, area)[0] > 0


def _components(mask: NDArray[np.bool_], hole: float) -> tuple[NDArray[np.int32], int]:
    """4-connected components of a mask whose small holes are filled, in the order of their first pixels.

    SciPy finds the same in twice two passes over all pixels; over runs of pixels it takes a third of the time.
    """
    change = np.ones(mask.shape, bool)
    np.not_equal(mask[:, 1:], mask[:, :-1], out=change[:, 1:])
    start = np.append(np.flatnonzero(change), mask.size)
    labels, count = _labels_of_runs(start, mask.ravel()[start[:-1]], mask.shape[1], hole)
    return labels.reshape(mask.shape), count


@njit(cache=True)
def _labels_of_runs(start, inside, width, hole):
    """(pixels,) labels of the components of runs: where each begins and the last ends, and whether it is inside."""
    count = len(inside)
    parents = np.arange(count)
    _join_touching(start, inside, width, parents, False)
    if hole >= 1:
        area = np.zeros(count, np.int64)
        for k in range(count):
            area[_root(parents, k)] += start[k + 1] - start[k]
        for k in range(count):
            inside[k] |= area[_root(parents, k)] <= hole
        _join_touching(start, inside, width, parents, True)
    labels, names, found = np.zeros(start[count], np.int32), np.zeros(count, np.int32), 0
    for k in range(count):
        if inside[k]:
            root = _root(parents, k)
            if root == k:
                found += 1
                names[k] = found
            labels[start[k] : start[k + 1]] = names[root]
    return labels, found


@njit(cache=True)
def _join_touching(start, inside, width, parents, beside):
    """Join runs that touch those of the row above and are as they are; `beside`: those in one row, all inside."""
    above = 0
    for k in range(len(inside)):
        if beside and inside[k] and start[k] % width and inside[k - 1]:
            _join(parents, k - 1, k)
        while start[above + 1] + width <= start[k]:
            above += 1
        other = above
        while start[other] + width < start[k + 1]:
            if inside[other] == inside[k]:
                _join(parents, other, k)
            other += 1


@njit(cache=True)
def _join(parents, a, b):
    a, b = _root(parents, a), _root(parents, b)
    parents[max(a, b)] = min(a, b)


@njit(cache=True)
def _root(parents, k):
    while parents[k] != k:
        parents[k] = parents[parents[k]]
        k = parents[k]
    return k


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
    """Level by level from the leaves: a component is taken where it scores better than the best choice inside it.

    The score of the choice inside is the mean of its qualities, weighted by area.
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
    """The labels and their quality; from the root, a component that is taken hides all components inside it."""
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
