"""Points, sizes and regions in level-0 pixels; the only module that converts units of length.

Points and sizes are (x, y) and (width, height) in level-0 pixels; arrays are (row, column); mpp is µm per pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a slide in level-0 pixels, fractions allowed: x to the right, y down."""

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
    """A rectangle in level-0 pixels, fractions allowed; may extend beyond the slide.

    Args:
        x: left side.
        y: upper side.
        width: positive.
        height: positive.

    Raises:
        ValueError: the width or height is not positive.
    """

    x: float
    y: float
    width: float
    height: float

    def __post_init__(self) -> None:
        if not (self.width > 0 and self.height > 0):
            raise ValueError(f"a region needs a positive width and height, got {self.width} x {self.height}")

    def pixels(self, mpp: float, slide_mpp: float) -> Size:
        """The size of a picture of this region.

        Args:
            mpp: µm per pixel of the picture.
            slide_mpp: µm per level-0 pixel of the slide.

        Returns:
            The size in pixels of the picture, at least 1 x 1.
        """
        scale = slide_mpp / mpp
        return Size(max(1, round(self.width * scale)), max(1, round(self.height * scale)))

    @classmethod
    def whole(cls, size: Size) -> Region:
        """The region of a whole slide.

        Args:
            size: of the slide, level-0 pixels.

        Returns:
            The region from (0, 0).
        """
        return cls(0, 0, size.width, size.height)


def level0_length(px: float, mpp: float, slide_mpp: float) -> float:
    """Convert a length to level-0 pixels.

    Args:
        px: length in pixels at `mpp`.
        mpp: µm per pixel of the length.
        slide_mpp: µm per level-0 pixel of the slide.

    Returns:
        Level-0 pixels, fractions included.
    """
    return px * mpp / slide_mpp


def micrometres(level0_px: float, slide_mpp: float) -> float:
    """Convert a length to µm.

    Args:
        level0_px: length in level-0 pixels.
        slide_mpp: µm per level-0 pixel of the slide.

    Returns:
        µm.
    """
    return level0_px * slide_mpp


def tile_units(xy: NDArray, stride: float) -> NDArray[np.float32]:
    """Coordinates of tiles in units of the tile grid's stride, so that neighbours are 1 apart.

    Corners of a grid from (0, 0), which were rounded to pixels, become whole numbers: otherwise a corner that was
    rounded down would fall into the cell of the tile before it.

    Args:
        xy: (N, 2) level-0 pixels, top-left corners, (x, y).
        stride: level-0 pixels from a tile to the next, fractions allowed.

    Returns:
        (N, 2) float32 in (row, column).

    Raises:
        ValueError: the stride is not positive and finite.
    """
    if not (math.isfinite(stride) and stride > 0):
        raise ValueError(f"the stride of a tile grid must be positive, got {stride}")
    units = np.asarray(xy, np.float64)[:, ::-1] / stride
    whole = np.rint(units)
    return np.where(np.abs(units - whole) * stride <= 0.5 + 1e-6, whole, units).astype(np.float32)
