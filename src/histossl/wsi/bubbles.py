"""Finds bubbles of air and edges of coverslips on an overview."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histossl.wsi.density import long_parts, opened, within

_RIM = 0.12  # of a bubble: density over its surroundings
_OVER = 2.5, 1.75  # the same over that of most tissue; a rim must hang together, and not with the tissue
_NEUTRAL = 0.6, 0.72  # of that the least channel over the largest, everywhere and in the median
_BULGES = 0.88, 0.94  # of its convex hull: one side of a line (a disc .99, what lies between two and a border .75), two


def find_bubbles(raw: NDArray[np.float32], tissue: NDArray[np.bool_], mpp: float) -> NDArray[np.bool_]:
    """Air and edges of coverslips: a thin line as dark in all colours, and what it parts from the rest.

    Args:
        raw: (h, w, 3) optical density, not blurred.
        tissue: (h, w), which says how dark thin lines usually are.
        mpp: µm per pixel, about 8.

    Returns:
        (h, w).
    """
    side = round(56 / mpp) | 1
    red, green, blue = (raw[..., k] - opened(raw[..., k], side) for k in range(3))
    lowest = np.minimum(np.minimum(red, green), blue)
    usual = float(np.median(lowest[tissue])) if tissue.any() else 0.0  # dark grey tissue is as neutral
    ratio = lowest / np.maximum(np.maximum(np.maximum(red, green), blue), 1e-3)
    found = np.zeros(lowest.shape, bool)
    for times in _OVER:
        rim = (lowest > max(_RIM, times * usual)) & (ratio > _NEUTRAL[0]) & ~within(found, 40 / mpp)
        rim = np.asarray(ndimage.binary_closing(np.pad(rim, 2)), bool)[2:-2, 2:-2]
        for place, line, _ in long_parts(rim, 200 / mpp, 100 / mpp):
            if np.median(ratio[place][line]) < _NEUTRAL[1]:
                continue
            part = np.zeros(rim.shape, bool)
            part[place] = line
            enclosed = _enclosed(part, (80 / mpp) ** 2)
            if enclosed.sum() > part.sum():
                found |= enclosed | part & within(enclosed, 60 / mpp)  # dark tissue may hang on it
    return within(found, 8 / mpp)


def _enclosed(line: NDArray[np.bool_], area: float) -> NDArray[np.bool_]:
    """(h, w) what a line and the border part from the largest rest, that has an area and bulges.

    What lies between bubbles does not bulge. Of bubbles that overlap, only two sides of the line together do.
    """
    sides = np.empty(line.shape, np.int32)
    ndimage.label(~line, output=sides)
    sizes = np.bincount(sides.ravel())
    sizes[0] = 0
    rest, inside = int(sizes.argmax()), np.zeros(len(sizes), bool)
    large = sizes > area
    large[rest] = False
    for number, place in enumerate(ndimage.find_objects(sides), 1):
        if large[number]:
            inside[number] = sizes[number] > _BULGES[0] * _hull_area(sides[place] == number)
    if large.sum() > 1:
        nearest = ndimage.distance_transform_edt(line, return_distances=False, return_indices=True)
        grown = sides[tuple(nearest)]  # type: ignore[arg-type]
        for pair in _neighbours(grown):
            if large[pair].all() and not inside[pair].all():
                both = np.isin(grown, pair)
                (place,) = ndimage.find_objects(both.view(np.uint8))
                inside[pair] |= both.sum() > _BULGES[1] * _hull_area(both[place])
    return inside[sides]


def _neighbours(numbers: NDArray[np.int32]) -> NDArray[np.int32]:
    """(n, 2) the numbers that lie beside each other."""
    pairs = []
    for one, other in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        different = one != other
        pairs.append(np.stack([one[different], other[different]], 1))
    return np.unique(np.sort(np.concatenate(pairs), 1), axis=0)


def _hull_area(part: NDArray[np.bool_]) -> float:
    """The area of the smallest convex shape around a part that reaches all sides of its box, in pixels."""
    from scipy.spatial import ConvexHull

    rows = np.arange(len(part))
    ends = part.argmax(1), part.shape[1] - part[:, ::-1].argmax(1)
    return float(
        ConvexHull(
            [(row + step, end) for side in ends for step in (0, 1) for row, end in zip(rows, side, strict=True)]
        ).volume
    )
