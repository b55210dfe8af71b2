"""Points, sizes and regions in level-0 pixels, and the only place where lengths change their unit.

Points and sizes are (x, y) and (width, height) in level-0 pixels; arrays are (row, column); mpp is µm per pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Point:
    """A place on a slide: x to the right, y down, level-0 pixels, fractions allowed."""

    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Size:
    """A width and a height in whole pixels."""

    width: int
    height: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of an array of this size."""
        return self.height, self.width


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle in level-0 pixels, fractions allowed; may reach beyond the slide."""

    x: float
    y: float
    width: float
    height: float

    def __post_init__(self) -> None:
        if not (self.width > 0 and self.height > 0):
            raise ValueError(f"a region needs a positive width and height, got {self.width} x {self.height}")

    def pixels(self, mpp: float, slide_mpp: float) -> Size:
        """The size of the picture of this region at `mpp`, at least 1 x 1."""
        scale = slide_mpp / mpp
        return Size(max(1, round(self.width * scale)), max(1, round(self.height * scale)))

    @classmethod
    def whole(cls, size: Size) -> Region:
        """The whole of a slide of this size."""
        return cls(0, 0, size.width, size.height)


def level0_length(px: float, mpp: float, slide_mpp: float) -> float:
    """A length of `px` pixels at `mpp`, in level-0 pixels of a slide whose level 0 has `slide_mpp`."""
    return px * mpp / slide_mpp


def micrometres(level0_px: float, slide_mpp: float) -> float:
    """A length in level-0 pixels, in µm."""
    return level0_px * slide_mpp


def tile_units(xy: NDArray, stride: float) -> NDArray[np.float32]:
    """Level-0 positions (N, 2) in (x, y), in units of the tile grid's stride: neighbours are 1 apart.

    Args:
        xy: (N, 2) level-0 pixels, top-left corners.
        stride: level-0 pixels from a tile to the next, fractions allowed.

    Returns:
        (N, 2) float32 in (row, column); whole numbers for corners that are those of a grid from (0, 0), rounded to
        pixels: half a pixel less, rounded down, would be the place of the tile before.
    """
    if not (math.isfinite(stride) and stride > 0):
        raise ValueError(f"the stride of a tile grid must be positive, got {stride}")
    units = np.asarray(xy, np.float64)[:, ::-1] / stride
    whole = np.rint(units)
    return np.where(np.abs(units - whole) * stride <= 0.5 + 1e-6, whole, units).astype(np.float32)
