"""Confidence to separate nuclei, and nuclei to outlines and a row of measures each. All sizes in µm; no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import shapely
from numba import njit
from numpy.typing import NDArray
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.segmentation import watershed

from histossl.nuclei.component_tree import TreeSettings, best_objects, filled
from histossl.nuclei.stain import Stains, concentrations, gaussian, optical_density

_STEPS = 13  # thresholds on the depth


@dataclass(frozen=True)
class InstanceSettings:
    """How confidence becomes nuclei.

    Attributes:
        threshold: of the confidence.
        smallest: µm², least area of a nucleus.
        hole: µm², holes up to this area are filled.
        smooth: µm, sigma of the Gaussian on the depth before nuclei are parted.
        middle: least depth in the middle of a nucleus, where the depth was learned: what is nowhere half as deep as a
            nucleus is no nucleus.
        parts: what the middles of nuclei must look like, where the depth was learned.
        apart: µm, least distance of two middles, where the depth is the plain distance to the outline.
    """

    threshold: float = 0.5
    smallest: float = 8.0
    hole: float = 40.0
    smooth: float = 0.35
    apart: float = 2.0
    middle: float = 0.5
    parts: TreeSettings = field(
        default_factory=lambda: TreeSettings(
            smallest=1.5, largest=300, hole=0, roundness=16, longest=20, edges=False, whole=1.0, nested=1.1
        )
    )


def label_instances(
    confidence: NDArray[np.float32],
    mpp: float,
    settings: InstanceSettings = InstanceSettings(),
    learned: bool = True,
    origin: tuple[int, int] = (0, 0),
) -> NDArray[np.int32]:
    """Separate the nuclei of a confidence map.

    Where the depth has several middles, each becomes a marker of a watershed. Which middles is decided by the tree of
    `best_objects` where the depth was learned and so is 1 in the middle of every nucleus; the plain distance to the
    outline grows with the nucleus, and its local maxima serve.

    Args:
        confidence: (2, H, W) in [0, 1]: that a pixel is nucleus, and how deep inside of one it lies (1 in the middle).
        mpp: µm per pixel.
        settings: how confidence becomes nuclei.
        learned: whether the depth was.
        origin: (x, y) of the map on its slide in pixels: where the depth is even, the place decides who comes first.

    Returns:
        (H, W) int32, 0 = none, 1..n in the order of their first pixels; every nucleus is 4-connected.
    """
    mask = filled(confidence[0] > settings.threshold, settings.hole / mpp**2)
    if not mask.any():
        return np.zeros(mask.shape, np.int32)
    depth = np.where(mask, gaussian(confidence[1], settings.smooth / mpp), 0)
    if learned:
        thresholds = np.concatenate([[1e-6], np.linspace(0.15, 0.85, _STEPS - 1)])
        markers, _ = best_objects(depth.astype(np.float32), thresholds, mpp, settings.parts)
    else:
        markers = np.zeros(mask.shape, np.int32)
        peaks = peak_local_max(depth, min_distance=max(1, round(settings.apart / mpp)), exclude_border=False)
        # By place, not by height: what lies elsewhere in the picture must not change an order.
        markers[tuple(peaks[np.lexsort(peaks.T[::-1])].T)] = np.arange(1, len(peaks) + 1)
    labels = watershed(_by_place(mask.shape, origin) - depth, _with_unmarked(markers, mask), mask=mask)
    areas = np.bincount(labels.ravel()) * mpp**2
    keep = areas >= settings.smallest
    if learned:
        keep &= np.asarray(ndimage.maximum(confidence[1], labels, np.arange(len(areas)))) >= settings.middle
    keep[0] = False
    return (np.cumsum(keep) * keep).astype(np.int32)[labels]


def _by_place(shape: tuple[int, ...], origin: tuple[int, int]) -> NDArray[np.float64]:
    """(H, W) of about a millionth, no two alike nearby: among equals a watershed's order is that of its whole heap."""
    x, y = (
        np.arange(start, start + length, dtype=np.uint64) for start, length in zip(origin, shape[::-1], strict=True)
    )
    mixed = (y[:, None] * np.uint64(0x9E3779B97F4A7C15)) ^ (x * np.uint64(0xC2B2AE3D27D4EB4F))
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(40)).astype(np.float64) * 2.0**-44


def _with_unmarked(markers: NDArray[np.int32], mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """The markers, and every component of the mask that has none as a marker of its own."""
    components = np.empty(mask.shape, np.int32)
    count = int(ndimage.label(mask, output=components))  # type: ignore[arg-type]
    bare = np.ones(count + 1, bool)
    bare[components[markers > 0]] = False
    bare[0] = False
    names = (np.cumsum(bare) * bare + markers.max()) * bare
    return np.where(markers > 0, markers, names[components]).astype(np.int32)


@dataclass(frozen=True)
class Nuclei:
    """Nuclei as outlines and measures, a row a nucleus.

    Attributes:
        points: (P, 2) float32, the outlines one after another, (x, y) in level-0 pixels, not closed.
        start: (N + 1,) int64, outline n is `points[start[n] : start[n + 1]]`.
        measures: (N, len(MEASURES)) float32.
    """

    points: NDArray[np.float32]
    start: NDArray[np.int64]
    measures: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.start) - 1

    def shifted(self, x: float, y: float, scale: float = 1.0) -> Nuclei:
        """Moved by (x, y), then scaled; in double precision, so that the same place has the same bytes wherever its
        tile lay.
        """
        offset = np.array([x, y], np.float64)
        measures = self.measures.copy()
        measures[:, :2] = (measures[:, :2] + offset) * scale
        return Nuclei(((self.points + offset) * scale).astype(np.float32), self.start, measures)

    def chosen(self, keep: NDArray[np.bool_]) -> Nuclei:
        """The rows where `keep` (N,) is true."""
        lengths = np.diff(self.start)
        points = self.points[np.repeat(keep, lengths)]
        return Nuclei(points, np.concatenate([[0], np.cumsum(lengths[keep])]), self.measures[keep])

    def polygons(self) -> NDArray:
        """(N,) shapely polygons in level-0 pixels."""
        if not len(self):
            return np.zeros(0, object)
        rows = np.repeat(np.arange(len(self)), np.diff(self.start))
        return np.asarray(shapely.polygons(shapely.linearrings(self.points.astype(np.float64), indices=rows)))


MEASURES = (
    "x", "y", "area_um2", "perimeter_um", "eccentricity", "solidity", "hematoxylin_od", "eosin_od", "confidence",
)  # fmt: skip
"""Columns of `Nuclei.measures`; x and y are the centroid in level-0 pixels."""


def concatenate(parts: list[Nuclei]) -> Nuclei:
    """Several tables as one."""
    if not parts:
        return Nuclei(np.zeros((0, 2), np.float32), np.zeros(1, np.int64), np.zeros((0, len(MEASURES)), np.float32))
    lengths = np.concatenate([np.diff(part.start) for part in parts])
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Nuclei(np.concatenate([p.points for p in parts]), start, np.concatenate([p.measures for p in parts]))


def outline_instances(
    labels: NDArray[np.int32],
    confidence: NDArray[np.float32],
    stain: NDArray[np.float32],
    mpp: float,
    threshold: float = 0.5,
) -> Nuclei:
    """Outlines and measures of labelled nuclei, in pixels of the labels.

    An outline crosses between a pixel inside and one outside where the confidence crosses the threshold, so that it is
    finer than the pixels; between two nuclei it runs half way. Outlines are rounded to 1/64 and centroids to 1/1024 of
    a pixel, which float32 holds exactly: a nucleus is the same to the byte wherever in a tile it lies.

    Args:
        labels: (H, W) int32, 1..n, each 4-connected.
        confidence: (H, W) in [0, 1].
        stain: (H, W, 2) hematoxylin and eosin in optical density.
        mpp: µm per pixel.
    """
    count = int(labels.max(initial=0))
    if not count:
        return concatenate([])
    padded = np.pad(labels, 1)
    steps = _outline_steps(padded, count)
    start = np.concatenate([[0], np.cumsum(steps)])
    points = np.empty((start[-1], 2), np.float32)
    _trace(padded, np.pad(confidence, 1), np.float32(threshold), start[:-1].copy(), points)
    nuclei = Nuclei(points, start, np.zeros((count, len(MEASURES)), np.float32))
    shapes = nuclei.polygons()
    area = shapely.area(shapes)
    centres = np.rint(shapely.get_coordinates(shapely.centroid(shapes)) * 1024) / 1024
    inside = labels.ravel() > 0
    names = labels.ravel()[inside]
    pixels = np.bincount(names, minlength=count + 1)[1:]
    means = [
        np.bincount(names, values.ravel()[inside], count + 1)[1:] / pixels
        for values in (stain[..., 0], stain[..., 1], confidence)
    ]
    hull = shapely.area(shapely.convex_hull(shapes))
    columns = [
        centres[:, 0], centres[:, 1], area * mpp**2, shapely.length(shapes) * mpp, _eccentricity(labels, count),
        area / np.maximum(hull, 1e-9), *means,
    ]  # fmt: skip
    return Nuclei(points, start, np.stack(columns, 1).astype(np.float32))


def _eccentricity(labels: NDArray[np.int32], count: int) -> NDArray[np.float64]:
    y, x = np.nonzero(labels)
    names = labels[y, x]
    pixels = np.bincount(names, minlength=count + 1)[1:]
    # From the first pixel of each: small whole numbers, the sums of which are exact.
    first = np.zeros(count + 1, np.int64)
    first[names[::-1]] = np.arange(len(names))[::-1]
    y, x = y - y[first[names]], x - x[first[names]]

    def mean(values: NDArray) -> NDArray:
        return np.bincount(names, values, count + 1)[1:] / pixels

    mx, my = mean(x), mean(y)
    xx, yy, xy = mean(x * x) - mx**2 + 1 / 12, mean(y * y) - my**2 + 1 / 12, mean(x * y) - mx * my
    middle, spread = (xx + yy) / 2, np.sqrt((xx - yy) ** 2 / 4 + xy**2)
    return np.sqrt(1 - np.maximum(middle - spread, 0) / (middle + spread))


# Directions right, down, left, up: the step of a walk along the cracks between pixels, its nucleus on the right hand.
_DR = np.array([0, 1, 0, -1])
_DC = np.array([1, 0, -1, 0])


@njit(cache=True)
def _first_pixels(labels, count):
    first = np.full((count + 1, 2), -1, np.int64)
    for r in range(labels.shape[0]):
        for c in range(labels.shape[1]):
            k = labels[r, c]
            if k > 0 and first[k, 0] < 0:
                first[k, 0], first[k, 1] = r, c
    return first


@njit(cache=True)
def _walk(labels, k, r, c, confidence, threshold, points, at):
    """Once around nucleus k from the top left corner of its first pixel (r, c); returns the number of cracks.

    With `at` >= 0 the point of every crack goes into points[at:].
    """
    heading, steps = 0, 0
    corner_r, corner_c = r, c
    while True:
        # The pixel on the right of the crack ahead, and the one on its left.
        if heading == 0:
            ir, ic, jr, jc = corner_r, corner_c, corner_r - 1, corner_c
        elif heading == 1:
            ir, ic, jr, jc = corner_r, corner_c - 1, corner_r, corner_c
        elif heading == 2:
            ir, ic, jr, jc = corner_r - 1, corner_c - 1, corner_r, corner_c - 1
        else:
            ir, ic, jr, jc = corner_r - 1, corner_c, corner_r - 1, corner_c - 1
        if at >= 0:
            inner, outer = confidence[ir, ic], confidence[jr, jc]
            part = 0.5
            if labels[jr, jc] == 0 and inner > threshold > outer:
                part = np.rint(min(0.95, max(0.05, (inner - threshold) / (inner - outer))) * 64) / 64
            # Padded by one pixel: a pixel's centre lies at its index minus a half.
            points[at + steps, 0] = ic + (jc - ic) * part - 0.5
            points[at + steps, 1] = ir + (jr - ir) * part - 0.5
        steps += 1
        corner_r += _DR[heading]
        corner_c += _DC[heading]
        # Pixels ahead of the corner, on the right and on the left: turn right if the first is not of the nucleus ...
        if heading == 0:
            ar, ac, br, bc = corner_r, corner_c, corner_r - 1, corner_c
        elif heading == 1:
            ar, ac, br, bc = corner_r, corner_c - 1, corner_r, corner_c
        elif heading == 2:
            ar, ac, br, bc = corner_r - 1, corner_c - 1, corner_r, corner_c - 1
        else:
            ar, ac, br, bc = corner_r - 1, corner_c, corner_r - 1, corner_c - 1
        if labels[ar, ac] != k:
            heading = (heading + 1) % 4
        elif labels[br, bc] == k:
            heading = (heading + 3) % 4
        if corner_r == r and corner_c == c and heading == 0:
            return steps


@njit(cache=True)
def _outline_steps(labels, count):
    first = _first_pixels(labels, count)
    steps = np.zeros(count, np.int64)
    nothing = np.zeros((1, 2), np.float32)
    blank = np.zeros((1, 1), np.float32)
    for k in range(1, count + 1):
        steps[k - 1] = _walk(labels, k, first[k, 0], first[k, 1], blank, np.float32(0), nothing, -1)
    return steps


@njit(cache=True)
def _trace(labels, confidence, threshold, start, points):
    first = _first_pixels(labels, len(start))
    for k in range(1, len(start) + 1):
        _walk(labels, k, first[k, 0], first[k, 1], confidence, threshold, points, start[k - 1])


def nuclei_of_tile(
    rgb: NDArray[np.uint8],
    confidence: NDArray[np.uint8],
    stains: Stains,
    mpp: float,
    settings: InstanceSettings,
    core: tuple[int, int, int, int],
    learned: bool,
    origin: tuple[int, int] = (0, 0),
) -> Nuclei:
    """The nuclei of a tile whose centroids lie in its core, in pixels of the tile.

    Args:
        rgb: (H, W, 3).
        confidence: (2, H, W), 255 = certain.
        stains: of the slide.
        mpp: µm per pixel.
        settings: how confidence becomes nuclei.
        core: x0, y0, x1, y1 with x0 <= x < x1.
        learned: whether the depth was.
        origin: (x, y) of the tile on its slide.
    """
    certain = confidence.astype(np.float32) / np.float32(255)
    labels = label_instances(certain, mpp, settings, learned, origin)
    if not labels.any():
        return concatenate([])
    amounts = concentrations(optical_density(rgb, stains.white), stains)
    nuclei = outline_instances(labels, certain[0], amounts, mpp, settings.threshold)
    x, y = nuclei.measures[:, 0], nuclei.measures[:, 1]
    return nuclei.chosen((x >= core[0]) & (x < core[2]) & (y >= core[1]) & (y < core[3]))
