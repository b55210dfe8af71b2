"""Measures of a nucleus beyond its area: diameters and how its stains vary inside it."""

from __future__ import annotations

import numpy as np
import shapely
from numba import njit
from numpy.typing import NDArray


def diameters(hulls: NDArray) -> NDArray[np.float64]:
    """The diameters of nuclei as QuPath measures them.

    Args:
        hulls: (N,) convex shapely polygons.

    Returns:
        (N, 2) float64: the diameter of the smallest circle around each hull, and its least width.
    """
    points, owner = shapely.get_coordinates(hulls, return_index=True)
    start = np.searchsorted(owner, np.arange(len(hulls) + 1))
    # Relative to the first point of each: a nucleus gives the same bytes anywhere in a tile.
    points = points - points[start[:-1]][owner]
    widths = np.zeros(len(hulls))
    _widths(points, start, widths)
    moved = shapely.polygons(shapely.linearrings(points, indices=owner))
    return np.stack([2 * shapely.minimum_bounding_radius(moved), widths], 1)


@njit(cache=True)
def _widths(points, start, found):
    for n in range(len(start) - 1):
        first, last = start[n], start[n + 1] - 1  # the ring is closed: its last point is the first one again
        narrowest = np.inf
        for i in range(first, last):
            dx, dy = points[i + 1, 0] - points[i, 0], points[i + 1, 1] - points[i, 1]
            length = np.sqrt(dx * dx + dy * dy)
            if length > 0:
                width = 0.0
                for j in range(first, last):
                    x, y = points[j, 0] - points[i, 0], points[j, 1] - points[i, 1]
                    width = max(width, abs(x * dy - y * dx))
                narrowest = min(narrowest, width / length)
        found[n] = narrowest if narrowest < np.inf else 0.0


@njit(cache=True)
def _spread(names, values, count, found):
    for k in range(len(names)):
        n, v = names[k], np.float64(values[k])
        found[n, 0] += v
        found[n, 1] += v * v
        found[n, 2] = min(found[n, 2], v)
        found[n, 3] = max(found[n, 3], v)
        found[n, 4] += 1
    for n in range(count):
        pixels = max(found[n, 4], 1.0)
        mean = found[n, 0] / pixels
        found[n, 0] = mean
        found[n, 1] = np.sqrt(max(found[n, 1] / pixels - mean * mean, 0.0))


def spreads(names: NDArray[np.int32], values: NDArray[np.float32], count: int) -> NDArray[np.float64]:
    """Statistics of the pixels of each nucleus.

    Args:
        names: (P,) 0..count-1, the nucleus of a pixel; each nucleus has at least one.
        values: (P,) value of each pixel.
        count: number of nuclei.

    Returns:
        (count, 4) float64: mean, standard deviation, minimum and maximum.
    """
    found = np.zeros((count, 5))
    found[:, 2], found[:, 3] = np.inf, -np.inf
    _spread(names, values, count, found)
    return found[:, :4]


def eccentricities(labels: NDArray[np.int32], count: int) -> NDArray[np.float64]:
    """The eccentricity of the ellipse with the second moments of each nucleus.

    Args:
        labels: (H, W) int32, 1..count; each label occurs.
        count: number of nuclei.

    Returns:
        (count,) float64 in [0, 1): 0 for a disc.
    """
    y, x = np.nonzero(labels)
    names = labels[y, x]
    pixels = np.bincount(names, minlength=count + 1)[1:]
    # Relative to the first pixel of each nucleus: sums of small whole numbers are exact.
    first = np.zeros(count + 1, np.int64)
    first[names[::-1]] = np.arange(len(names))[::-1]
    y, x = y - y[first[names]], x - x[first[names]]

    def mean(values: NDArray) -> NDArray:
        return np.bincount(names, values, count + 1)[1:] / pixels

    mx, my = mean(x), mean(y)
    xx, yy, xy = mean(x * x) - mx**2 + 1 / 12, mean(y * y) - my**2 + 1 / 12, mean(x * y) - mx * my
    middle, spread = (xx + yy) / 2, np.sqrt((xx - yy) ** 2 / 4 + xy**2)
    return np.sqrt(1 - np.maximum(middle - spread, 0) / (middle + spread))
