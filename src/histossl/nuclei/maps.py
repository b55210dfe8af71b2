"""Overviews of a slide's nuclei: a density map, and a sheet of random nuclei."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from histossl.core.atomic import whole, whole_buffer
from histossl.nuclei.instances import Nuclei
from histossl.wsi.geometry import Region
from histossl.wsi.slide import Slide
from histossl.wsi.tissue import TissueMask

CELL = 100.0
"""µm, side of a square of the density map."""

DENSITY = "-density.tif"
"""What the name of a density map's file ends with."""

_SHEET = (8, 6)  # nuclei across and down
_VIEW = 32.0  # µm, side of the square around each nucleus
_SIDE = 128  # pixels, side of that square


def density_map(parts: Iterable[Nuclei], mask: TissueMask, mpp: float, cell: float = CELL) -> NDArray[np.float32]:
    """Nuclei per mm² of tissue in squares of a slide.

    Args:
        parts: the nuclei in level-0 pixels.
        mask: the slide's tissue, which knows its size.
        mpp: µm per level-0 pixel.
        cell: side of a square, µm; those at the right and lower edge may be cut.

    Returns:
        (rows, columns) float32; NaN where less than a tenth of a square is tissue.
    """
    side = cell / mpp
    columns, rows = (int(np.ceil(n / side)) for n in (mask.size.width, mask.size.height))
    count = np.zeros((rows, columns))
    for part in parts:
        x, y = (part.measures[:, :2].astype(np.float64) / side).astype(np.int64).T
        np.add.at(count, (np.clip(y, 0, rows - 1), np.clip(x, 0, columns - 1)), 1)
    tissue = _tissue(mask, rows, columns, side) * (mpp / 1000) ** 2
    enough = tissue >= 0.1 * (cell / 1000) ** 2
    return np.where(enough, count / np.maximum(tissue, 1e-12), np.nan).astype(np.float32)


def _tissue(mask: TissueMask, rows: int, columns: int, side: float) -> NDArray[np.float64]:
    """(rows, columns) level-0 pixels of tissue in each square; a square of the mask is spread over those it touches."""
    down, across = (
        _shares(length, size, count, side)
        for length, size, count in (
            (mask.mask.shape[0], mask.size.height, rows),
            (mask.mask.shape[1], mask.size.width, columns),
        )
    )
    return down @ mask.mask.astype(np.float64) @ across.T


def _shares(length: int, size: int, count: int, side: float) -> NDArray[np.float64]:
    """(count, length) how many pixels of each step of the mask are in each step of the map, along one axis."""
    edges = np.linspace(0, size, length + 1)
    ours = np.minimum(np.arange(count + 1) * side, size)
    low, high = np.maximum(edges[None, :-1], ours[:-1, None]), np.minimum(edges[None, 1:], ours[1:, None])
    return np.maximum(high - low, 0)


def write_density(path: Path, density: NDArray[np.float32], cell: float = CELL) -> None:
    """Write the map as a float32 TIFF with its resolution, which ImageJ and QuPath read.

    Args:
        path: the file to write, whole or absent.
        density: (h, w) float32 nuclei per mm² of tissue; NaN where there is hardly any tissue.
        cell: side of a cell of the map in µm.
    """
    import tifffile

    with whole(path) as part:
        tifffile.imwrite(
            part,
            density,
            photometric="minisblack",
            resolution=(1e4 / cell, 1e4 / cell),
            resolutionunit="CENTIMETER",
            description="nuclei per mm2 of tissue; NaN: hardly any tissue",
            metadata=None,
        )


def write_sheet(path: Path, slide: Slide, nuclei: Nuclei, rng: np.random.Generator) -> None:
    """A JPEG of random nuclei, each outlined in the middle of 32 µm of its slide, largest first.

    Args:
        path: the file.
        slide: the slide of the nuclei.
        nuclei: in level-0 pixels.
        rng: source of the draw.
    """
    across, down = _SHEET
    sheet = Image.new("RGB", (across * _SIDE, down * _SIDE), "white")
    chosen = rng.choice(len(nuclei), min(len(nuclei), across * down), replace=False) if len(nuclei) else []
    extent = _VIEW / slide.mpp
    for place, k in enumerate(sorted(chosen, key=lambda n: -nuclei.measures[n, 2])):
        x, y = nuclei.measures[k, :2].astype(np.float64) - extent / 2
        tile = _picture(slide, float(x), float(y), extent)
        ring = nuclei.points[nuclei.start[k] : nuclei.start[k + 1]].astype(np.float64)
        points = [tuple(point) for point in ((ring - (x, y)) * _SIDE / extent).tolist()]
        ImageDraw.Draw(tile).line([*points, points[0]], fill=(255, 230, 0), width=1)
        sheet.paste(tile, (place % across * _SIDE, place // across * _SIDE))
    with whole_buffer(path) as file:
        sheet.save(file, "JPEG", quality=90)


def _picture(slide: Slide, x: float, y: float, extent: float) -> Image.Image:
    """A square of the slide, white beyond its edges."""
    tile = Image.new("RGB", (_SIDE, _SIDE), "white")
    left, top = max(x, 0.0), max(y, 0.0)
    width, height = min(x + extent, slide.size.width) - left, min(y + extent, slide.size.height) - top
    scale = _SIDE / extent
    size = round(width * scale), round(height * scale)
    if min(size) > 0:
        shown = slide.read(Region(left, top, width, height), max(slide.mpp, extent * slide.mpp / _SIDE))
        tile.paste(Image.fromarray(shown).resize(size), (round((left - x) * scale), round((top - y) * scale)))
    return tile
