"""The tiles that a slide is shown in: which level-0 region each is, as Deep Zoom counts them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from histossl.wsi.geometry import Region, Size

SIDE = 512


class NoTile(LookupError):
    """There is no such tile."""


@dataclass(frozen=True)
class Pyramid:
    """Levels of halves: level 0 is one pixel, the last is the slide's own.

    Attributes:
        size: of the slide at level 0 of its file.
    """

    size: Size

    @property
    def last(self) -> int:
        """The number of the finest level."""
        return math.ceil(math.log2(max(self.size.width, self.size.height)))

    def step(self, level: int) -> int:
        """Pixels of the slide that a pixel of a level is wide.

        Raises:
            NoTile: there is no such level.
        """
        if not 0 <= level <= self.last:
            raise NoTile(f"level {level} of {self.last}")
        return 2 ** (self.last - level)

    def region(self, level: int, column: int, row: int) -> Region:
        """Where a tile lies, in level-0 pixels: whole pixels of its level, so that it may reach beyond the slide.

        Raises:
            NoTile: there is no such tile.
        """
        step = self.step(level)
        x, y = column * SIDE * step, row * SIDE * step
        if not (0 <= x < self.size.width and 0 <= y < self.size.height):
            raise NoTile(f"tile {column}, {row} of level {level}")
        return Region(x, y, _pixels(self.size.width - x, step) * step, _pixels(self.size.height - y, step) * step)


def _pixels(length: int, step: int) -> int:
    return min(SIDE, math.ceil(length / step))
