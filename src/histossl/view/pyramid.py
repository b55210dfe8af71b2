"""Deep Zoom pyramid of a slide: which level-0 region each tile shows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from histossl.wsi.geometry import Region, Size

SIDE = 512  # pixels of a tile


class NoTile(LookupError):
    """The requested tile or level does not exist."""


@dataclass(frozen=True)
class Pyramid:
    """Levels as Deep Zoom numbers them: level 0 is one pixel wide, each level doubles it, the last has full resolution.

    Attributes:
        size: size of the slide, level-0 pixels of its file.
    """

    size: Size

    @property
    def last(self) -> int:
        """The number of the finest level."""
        return math.ceil(math.log2(max(self.size.width, self.size.height)))

    def step(self, level: int) -> int:
        """The width of one pixel of a level, in level-0 pixels of the file.

        Args:
            level: Deep Zoom level, 0 to `last`.

        Returns:
            A power of two, at least 1.

        Raises:
            NoTile: there is no such level.
        """
        if not 0 <= level <= self.last:
            raise NoTile(f"level {level} of {self.last}")
        return 2 ** (self.last - level)

    def region(self, level: int, column: int, row: int) -> Region:
        """The region that a tile shows; it has whole pixels of its level, so it may extend beyond the slide.

        Args:
            level: Deep Zoom level, 0 to `last`.
            column: index of the tile from the left.
            row: index of the tile from the top.

        Returns:
            The region in level-0 pixels of the file.

        Raises:
            NoTile: there is no such tile.
        """
        step = self.step(level)
        x, y = column * SIDE * step, row * SIDE * step
        if not (0 <= x < self.size.width and 0 <= y < self.size.height):
            raise NoTile(f"tile {column}, {row} of level {level}")
        columns, rows = (min(SIDE, math.ceil(left / step)) for left in (self.size.width - x, self.size.height - y))
        return Region(x, y, columns * step, rows * step)
