"""A regular grid of tiles, equal in µm, on the tissue of a slide."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from histossl.core.errors import SettingsError
from histossl.wsi.areas import SlideAreas, restrict
from histossl.wsi.artefacts import COLOURS, KINDS, OVERVIEW, TileArtefacts, are_dropped, judge
from histossl.wsi.geometry import Region, Size, level0_length
from histossl.wsi.mpp import MPP_RANGE, RANGE_TEXT
from histossl.wsi.slide import Slide
from histossl.wsi.tissue import TissueMask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TileSpec:
    """Size, resolution and least tissue of tiles.

    Attributes:
        px: side of a tile in its own pixels.
        mpp: µm per pixel of a tile.
        overlap: pixels that neighbouring tiles share, 0 to px - 1.
        min_tissue: least share of tissue in a tile's area, 0 to 1.

    Raises:
        SettingsError: a value is out of range.
    """

    px: int = 224
    mpp: float = 1.0
    overlap: int = 0
    min_tissue: float = 0.5

    def __post_init__(self) -> None:
        if not self.px > 0:
            raise SettingsError(f"a tile of {self.px} pixels is none", "px must be at least 1")
        if not MPP_RANGE[0] <= self.mpp <= MPP_RANGE[1]:
            raise SettingsError(f"a tile mpp of {self.mpp} is out of range", f"it must lie in {RANGE_TEXT}")
        if not 0 <= self.overlap < self.px:
            raise SettingsError(f"tiles of {self.px} pixels cannot overlap by {self.overlap}", f"0 to {self.px - 1}")
        if not 0 <= self.min_tissue <= 1:
            raise SettingsError(f"min_tissue of {self.min_tissue} is no part of a tile", "it must lie in 0 to 1")


@dataclass(frozen=True)
class TileGrid:
    """The tiles of a slide, row by row.

    Attributes:
        spec: size and resolution of the tiles.
        xy: (N, 2) int64, top-left corners (x, y) in level-0 pixels: `ij * stride`, rounded.
        ij: (N, 2) int64, steps of the grid (row, column).
        stride: level-0 pixels from a tile to the next, fractions included.
        extent: side of a tile in level-0 pixels, fractions included.
        size: size of the slide's level 0.
        mpp: µm per pixel of the slide's level 0.
        artefacts: what an overview shows of each tile, and how many were left out; None where nobody looked.
    """

    spec: TileSpec
    xy: NDArray[np.int64]
    ij: NDArray[np.int64]
    stride: float
    extent: float
    size: Size
    mpp: float
    artefacts: TileArtefacts | None = None

    def __len__(self) -> int:
        return len(self.xy)

    def __repr__(self) -> str:
        return (
            f"TileGrid({len(self)} tiles of {self.spec.px} px at mpp {self.spec.mpp:g}, "
            f"slide of {self.size.width} x {self.size.height} at mpp {self.mpp:g})"
        )

    def plot(self, ax: Axes | None = None, values: NDArray | None = None, colour: str | None = None) -> Axes:
        """Draw the tiles: their frames, or filled by a value each.

        Args:
            ax: matplotlib axes in level-0 pixels, such as those of `Slide.plot`; None makes new ones.
            values: (N,) numbers that colour the tiles, or None for frames.
            colour: of the frames, or the colour map of the values; None takes blue, or "viridis".

        Returns:
            The axes.

        Raises:
            SettingsError: there is not one value for each tile.
        """
        from histossl.wsi.plot import draw_squares

        if values is not None and np.shape(values) != (len(self),):
            raise SettingsError(f"values of shape {np.shape(values)} for {len(self)} tiles", "give one for each tile")
        colour = colour or ("tab:blue" if values is None else "viridis")
        return draw_squares(self.xy, self.extent, self.size, values, colour, ax)

    def region(self, k: int) -> Region:
        """The region of a tile.

        Args:
            k: index of the tile, 0 to N - 1.

        Returns:
            The region in level-0 pixels.
        """
        return Region(float(self.xy[k, 0]), float(self.xy[k, 1]), self.extent, self.extent)

    def regions(self) -> Iterator[Region]:
        """The regions of all tiles, in order."""
        return (self.region(k) for k in range(len(self)))


def tile_grid(slide: Slide, mask: TissueMask, spec: TileSpec, areas: Sequence[str | Path] = ()) -> TileGrid:
    """The tiles of a regular grid, from the slide's top-left corner, that hold enough tissue and no dropped artefact.

    Tiles lie inside the slide. A slide that is smaller than a tile still has one along that side, which extends beyond
    the slide and is white there, so that small fields are not lost. The share of tissue refers to the part of a tile on
    the slide, and is exact to fractions of the mask's pixels.

    Args:
        slide: the slide.
        mask: its tissue, from `find_tissue`.
        spec: size, resolution and least tissue of the tiles.
        areas: GeoJSON files and mask images of the areas that tissue counts in; none for the whole slide.

    Returns:
        The grid, in the order of (row, column); empty where there is no tissue.

    Raises:
        SlideError: the areas do not fit the slide, or hold no tissue.
    """
    if areas:
        mask = restrict(mask, slide, SlideAreas(tuple(map(Path, areas))))
    extent = level0_length(spec.px, spec.mpp, slide.mpp)
    stride = level0_length(spec.px - spec.overlap, spec.mpp, slide.mpp)
    if spec.mpp < 0.8 * slide.mpp:
        log.warning(
            "%s: its pixels of %.3g µm are enlarged to tiles of %.3g µm per pixel and gain no detail",
            slide.path.name, slide.mpp, spec.mpp,
        )  # fmt: skip
    left, top = _starts(slide.size.width, stride, extent), _starts(slide.size.height, stride, extent)
    tissue = _shares(mask.mask, slide.size, left, top, extent)
    rows, columns = np.nonzero((tissue >= spec.min_tissue - 1e-9) & (tissue > 0))
    xy = np.stack([left[columns], top[rows]], 1).astype(np.int64)
    ij = np.stack([rows, columns], 1).astype(np.int64)
    scores = np.full((len(xy), len(KINDS)), np.nan, np.float32)
    for k in range(len(OVERVIEW)):
        here = mask.kinds == k + 1
        scores[:, k] = _shares(here, slide.size, left, top, extent)[rows, columns] if here.any() else 0
    kept, artefacts = judge(scores, mask.drop)
    return TileGrid(spec, xy[kept], ij[kept], stride, extent, slide.size, slide.mpp, artefacts)


def _starts(length: int, stride: float, extent: float) -> NDArray[np.float64]:
    """The first pixels of the tiles along a side of the slide."""
    starts = np.rint(np.arange(int(length / stride) + 1) * stride)
    inside = starts[starts + extent <= length + 1e-6]
    return inside if len(inside) else starts[:1]


def _shares(
    mask: NDArray[np.bool_], size: Size, left: NDArray[np.float64], top: NDArray[np.float64], extent: float
) -> NDArray[np.float64]:
    """(rows, columns) the share of each tile's area on the slide that lies in a mask of the slide, in [0, 1]."""
    height, width = mask.shape
    x = np.stack([left, np.minimum(left + extent, size.width)]) * (width / size.width)
    y = np.stack([top, np.minimum(top + extent, size.height)]) * (height / size.height)
    integral = np.zeros((height + 1, width + 1))
    integral[1:, 1:] = mask.cumsum(0).cumsum(1)
    # Within a pixel the integral of the mask is linear along each axis, so linear interpolation is exact.
    bands = np.diff([_between(integral, edge) for edge in y], axis=0)[0]
    areas = np.diff([_between(bands.T, edge).T for edge in x], axis=0)[0]
    return areas / ((y[1] - y[0])[:, None] * (x[1] - x[0])[None])


def _between(values: NDArray[np.float64], indices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of `values` at fractional indices, interpolated linearly."""
    low = np.clip(indices.astype(np.int64), 0, len(values) - 2)
    part = (indices - low)[:, None]
    return values[low] * (1 - part) + values[low + 1] * part


def qc_picture(slide: Slide, mask: TissueMask, grid: TileGrid, longest: int = 1600) -> NDArray[np.uint8]:
    """A picture of tissue and tiles: tissue outlined, tiles framed and in full colour, the rest pale; and artefacts.

    Each kind of artefact has a colour, which a legend names; `empty` only where it is dropped, as fat and glass in the
    tissue show themselves.

    Args:
        slide: the slide.
        mask: its tissue.
        grid: its tiles.
        longest: most pixels of the longer side.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    picture = slide.thumbnail(longest)
    height, width = picture.shape[:2]
    scale = width / slide.size.width, height / slide.size.height
    edges = [
        (
            round(r.x * scale[0]),
            round(r.y * scale[1]),
            round((r.x + r.width) * scale[0]),
            round((r.y + r.height) * scale[1]),
        )
        for r in grid.regions()
    ]
    kept = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in edges:
        kept[y0:y1, x0:x1] = True
    picture = np.where(kept[..., None], picture, 255 - (255 - picture) // 2)
    frames = Image.new("L", (width, height))
    draw = ImageDraw.Draw(frames)
    for x0, y0, x1, y1 in edges:
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=255)
    # The frames of small tiles are faint, otherwise they would cover the picture.
    strength = float(np.clip(grid.extent * scale[0] / 60, 0.15, 0.8))
    _paint(picture, np.asarray(frames) > 0, (20, 60, 200), strength)
    kinds = np.asarray(Image.fromarray(mask.kinds).resize((width, height), Image.Resampling.NEAREST))
    coloured = are_dropped(mask.drop) | (np.array(KINDS) != "empty")
    shown = [k for k in np.flatnonzero(coloured).tolist() if (kinds == k + 1).any()]
    for k in shown:
        _paint(picture, kinds == k + 1, COLOURS[k], 0.55)
    tissue = np.asarray(Image.fromarray(mask.mask).resize((width, height)))
    thick = max(1, round(max(width, height) / 800))
    outline = tissue & ~np.asarray(ndimage.binary_erosion(tissue, iterations=thick, border_value=1), bool)
    _paint(picture, outline, (0, 120, 40), 1.0)
    return _with_legend(picture, shown)


def _with_legend(picture: NDArray[np.uint8], kinds: list[int]) -> NDArray[np.uint8]:
    """The picture with the names of kinds in their colours, in its upper left corner."""
    image = Image.fromarray(picture)
    draw, size = ImageDraw.Draw(image), max(12, max(picture.shape) // 80)
    font, y = ImageFont.load_default(size), size // 2
    for k in kinds:
        draw.rectangle((size // 2, y, size * 3 // 2, y + size), fill=COLOURS[k], outline=(255, 255, 255))
        place = (2 * size, y - size // 8)
        draw.text(place, KINDS[k], (0, 0, 0), font, stroke_width=max(1, size // 8), stroke_fill=(255, 255, 255))
        y += size * 3 // 2
    return np.asarray(image)


def _paint(picture: NDArray[np.uint8], where: NDArray[np.bool_], colour: tuple[int, int, int], part: float) -> None:
    picture[where] = np.rint(picture[where] * (1 - part) + np.array(colour) * part).astype(np.uint8)
