"""Separates the nuclei of a confidence map, outlines and measures them; imports no torch, to keep workers small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.segmentation import watershed

from histossl.nuclei.component_tree import best_objects, filled
from histossl.nuclei.evidence import with_sure_nuclei
from histossl.nuclei.morphology import diameters, eccentricities, spreads
from histossl.nuclei.outline_tracing import trace_outlines
from histossl.nuclei.pseudo_labels import SlideTree
from histossl.nuclei.settings import InstanceSettings
from histossl.wsi.stain import Stains, concentrations, gaussian, optical_density

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_STEPS = 13  # number of thresholds on the depth


def label_instances(
    confidence: NDArray[np.float32],
    mpp: float,
    settings: InstanceSettings = InstanceSettings(),
    learned: bool = True,
    origin: tuple[int, int] = (0, 0),
) -> NDArray[np.int32]:
    """Separate the nuclei of a confidence map.

    A watershed on the depth separates nuclei that touch, with one marker per nucleus. A learned depth is 1 in the
    middle of every nucleus, so that the component tree of `best_objects` can choose the markers; the distance to the
    outline grows with the nucleus, so its local maxima are the markers.

    Args:
        confidence: (2, H, W) in [0, 1]: confidence that a pixel is nucleus, and depth inside it (1 in the middle).
        mpp: µm per pixel.
        settings: how nuclei are separated.
        learned: whether the depth is learned.
        origin: (x, y) of the map on its slide in pixels; breaks ties of the depth independently of the tile.

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
        # Numbered by position, not by height: distant parts of the picture must not change the order.
        markers[tuple(peaks[np.lexsort(peaks.T[::-1])].T)] = np.arange(1, len(peaks) + 1)
    labels = watershed(_tie_breaker(mask.shape, origin) - depth, _with_unmarked(markers, mask), mask=mask)
    areas = np.bincount(labels.ravel()) * mpp**2
    keep = areas >= settings.smallest
    if learned:
        keep &= np.asarray(ndimage.maximum(confidence[1], labels, np.arange(len(areas)))) >= settings.middle
    keep[0] = False
    return (np.cumsum(keep) * keep).astype(np.int32)[labels]


def _tie_breaker(shape: tuple[int, ...], origin: tuple[int, int]) -> NDArray[np.float64]:
    """(H, W) hash of the position on the slide, in [0, 1e-6): among equal depths a watershed's order is arbitrary."""
    x, y = (
        np.arange(start, start + length, dtype=np.uint64) for start, length in zip(origin, shape[::-1], strict=True)
    )
    mixed = (y[:, None] * np.uint64(0x9E3779B97F4A7C15)) ^ (x * np.uint64(0xC2B2AE3D27D4EB4F))
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(40)).astype(np.float64) * 2.0**-44


def _with_unmarked(markers: NDArray[np.int32], mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """The markers, and every component of the mask without a marker as a further marker."""
    components = np.empty(mask.shape, np.int32)
    count = int(ndimage.label(mask, output=components))  # type: ignore[arg-type]
    bare = np.ones(count + 1, bool)
    bare[components[markers > 0]] = False
    bare[0] = False
    names = (np.cumsum(bare) * bare + markers.max()) * bare
    return np.where(markers > 0, markers, names[components]).astype(np.int32)


@dataclass(frozen=True)
class Nuclei:
    """Nuclei as outlines and measures, one row per nucleus.

    Attributes:
        points: (P, 2) float32, the outlines one after another, (x, y) in level-0 pixels, not closed.
        start: (N + 1,) int64, outline n is `points[start[n] : start[n + 1]]`.
        measures: (N, len(MEASURES)) float32, the columns of MEASURES.
    """

    points: NDArray[np.float32]
    start: NDArray[np.int64]
    measures: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.start) - 1

    def shifted(self, x: float, y: float, scale: float = 1.0) -> Nuclei:
        """Nuclei moved, then scaled; in double precision, so that coordinates do not depend on the tile to the byte.

        Args:
            x: offset to the right, in the unit of `points`.
            y: offset down, in the unit of `points`.
            scale: factor of the moved coordinates.

        Returns:
            New outlines and centroids; other measures stay.
        """
        offset = np.array([x, y], np.float64)
        measures = self.measures.copy()
        measures[:, :2] = (measures[:, :2] + offset) * scale
        return Nuclei(((self.points + offset) * scale).astype(np.float32), self.start, measures)

    def chosen(self, keep: NDArray[np.bool_]) -> Nuclei:
        """A selection of nuclei.

        Args:
            keep: (N,) bool.

        Returns:
            The nuclei where `keep` is true, in order.
        """
        lengths = np.diff(self.start)
        points = self.points[np.repeat(keep, lengths)]
        return Nuclei(points, np.concatenate([[0], np.cumsum(lengths[keep])]), self.measures[keep])

    def polygons(self) -> NDArray:
        """(N,) shapely polygons in level-0 pixels."""
        if not len(self):
            return np.zeros(0, object)
        rows = np.repeat(np.arange(len(self)), np.diff(self.start))
        return np.asarray(shapely.polygons(shapely.linearrings(self.points.astype(np.float64), indices=rows)))

    def __repr__(self) -> str:
        area = f", median area {np.median(self.measures[:, 2]):.0f} µm²" if self.measures[:, 2].any() else ""
        return f"Nuclei({len(self)} outlines{area})"

    def to_frame(self) -> pd.DataFrame:
        """One row per nucleus: `MEASURES` and the polygon, `geometry`; a GeoDataFrame if geopandas is installed."""
        from histossl.nuclei.frames import frame_of

        return frame_of(self.polygons(), dict(zip(MEASURES, self.measures.T, strict=True)))

    def plot(self, ax: Axes | None = None, values: NDArray | str | None = None, colour: str | None = None) -> Axes:
        """Draw the outlines on matplotlib axes in level-0 pixels, such as those of `Slide.plot`.

        Args:
            ax: axes to draw on; None makes new ones.
            values: (N,) numbers that fill the outlines, or the name of one of `MEASURES`; None draws the outlines.
            colour: colour of the outlines, or colour map of the values; None takes gold, or "viridis".

        Returns:
            The axes.
        """
        from histossl.wsi.plot import draw_polygons

        values = self.measures[:, MEASURES.index(values)] if isinstance(values, str) else values
        colour = colour or ("gold" if values is None else "viridis")
        return draw_polygons(np.split(self.points, self.start[1:-1]) if len(self) else [], values, colour, ax)


MEASURES = (
    "x", "y", "area_um2", "perimeter_um", "eccentricity", "solidity", "hematoxylin_od", "eosin_od", "confidence",
    "circularity", "max_diameter_um", "min_diameter_um", "hematoxylin_std", "hematoxylin_min", "hematoxylin_max",
    "eosin_std", "eosin_min", "eosin_max",
)  # fmt: skip
"""Columns of `Nuclei.measures`; x and y are the centroid in level-0 pixels, the stains are in optical density, their
deviation, minimum and maximum are those of a nucleus's pixels, circularity is 4 π area / perimeter² (1 for a disc)."""


def concatenate(parts: list[Nuclei]) -> Nuclei:
    """Join several sets of nuclei.

    Args:
        parts: the sets; may be empty.

    Returns:
        All nuclei, in order.
    """
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
    """Outlines and measures of labelled nuclei.

    Between a pixel inside and a pixel outside, the outline passes where the confidence crosses the threshold, which is
    finer than the pixels; between two nuclei it passes half way. Outlines are rounded to 1/64 and centroids to 1/1024
    of a pixel, which float32 stores exactly: a nucleus is the same to the byte anywhere in a tile.

    Args:
        labels: (H, W) int32, 1..n, each 4-connected.
        confidence: (H, W) float32 in [0, 1].
        stain: (H, W, 2) hematoxylin and eosin in optical density.
        mpp: µm per pixel.
        threshold: threshold on the confidence, 0 to 1.

    Returns:
        The nuclei in the order of their labels; outlines and centroids in pixels of the labels.
    """
    count = int(labels.max(initial=0))
    if not count:
        return concatenate([])
    points, start = trace_outlines(labels, confidence, threshold)
    nuclei = Nuclei(points, start, np.zeros((count, len(MEASURES)), np.float32))
    shapes = nuclei.polygons()
    area = shapely.area(shapes)
    centres = np.rint(shapely.get_coordinates(shapely.centroid(shapes)) * 1024) / 1024
    inside = labels.ravel() > 0
    names = labels.ravel()[inside]
    hematoxylin, eosin, sure = (
        spreads(names - 1, values.ravel()[inside], count) for values in (stain[..., 0], stain[..., 1], confidence)
    )
    hulls = shapely.convex_hull(shapes)
    length = shapely.length(shapes)
    wide = diameters(hulls) * mpp
    columns = [
        centres[:, 0], centres[:, 1], area * mpp**2, length * mpp, eccentricities(labels, count),
        area / np.maximum(shapely.area(hulls), 1e-9), hematoxylin[:, 0], eosin[:, 0], sure[:, 0],
        np.minimum(4 * np.pi * area / np.maximum(length, 1e-9) ** 2, 1), wide[:, 0], wide[:, 1],
        *hematoxylin[:, 1:].T, *eosin[:, 1:].T,
    ]  # fmt: skip
    return Nuclei(points, start, np.stack(columns, 1).astype(np.float32))


def nuclei_of_tile(
    rgb: NDArray[np.uint8],
    confidence: NDArray[np.uint8],
    stains: Stains,
    mpp: float,
    settings: InstanceSettings,
    core: tuple[int, int, int, int],
    learned: bool,
    origin: tuple[int, int] = (0, 0),
    tree: SlideTree | None = None,
    tile_mpp: float | None = None,
) -> Nuclei:
    """The nuclei of a tile whose centroids lie in its core: tiles overlap, their cores do not.

    Args:
        rgb: (H, W, 3) uint8 RGB.
        confidence: (2, H, W) uint8, confidence and depth as of `label_instances`, times 255.
        stains: stains of the slide.
        mpp: µm per pixel that the settings and the tree mean.
        settings: how nuclei are separated.
        core: x0, y0, x1, y1 in pixels of the tile; x1 and y1 are excluded.
        learned: whether the depth is learned.
        origin: (x, y) of the tile on its slide in pixels.
        tree: how hematoxylin tells the slide's sure nuclei, which then support the network; None leaves it alone.
        tile_mpp: µm per pixel in truth, by which nuclei are measured; None is `mpp`.

    Returns:
        The nuclei, in pixels of the tile.
    """
    certain = confidence.astype(np.float32) / np.float32(255)
    if tree is not None:
        certain = with_sure_nuclei(certain, rgb, stains, tree, mpp)
    labels = label_instances(certain, mpp, settings, learned, origin)
    if not labels.any():
        return concatenate([])
    amounts = concentrations(optical_density(rgb, stains.white), stains)
    nuclei = outline_instances(labels, certain[0], amounts, tile_mpp or mpp, settings.threshold)
    x, y = nuclei.measures[:, 0], nuclei.measures[:, 1]
    return nuclei.chosen((x >= core[0]) & (x < core[2]) & (y >= core[1]) & (y < core[3]))
