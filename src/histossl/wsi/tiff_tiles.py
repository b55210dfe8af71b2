"""Reads the pixels of a tiled TIFF: each tile is decoded once and copied.

OpenSlide composes tiles as if they could overlap, which takes several times as long as to decode a JPEG. The tiles of
most TIFFs do not overlap.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from histossl.wsi.geometry import Size

CACHE_BYTES = 32 * 2**20  # of decoded tiles, as much as OpenSlide's own cache


class TiffTiles:
    """The levels of an open TIFF; for one thread at a time.

    Args:
        path: the file.
        sizes: sizes of its levels in pixels, level 0 first.
    """

    def __init__(self, path: Path, sizes: Sequence[Size]) -> None:
        self._file = tifffile.TiffFile(path)
        pages = [page for page in self._file.pages if isinstance(page, tifffile.TiffPage) and _plain(page)]
        self._levels = [[page for page in pages if Size(page.imagewidth, page.imagelength) == size] for size in sizes]
        largest = max((page.tilewidth * page.tilelength * 3 for page in pages), default=CACHE_BYTES)
        self._decoded = functools.lru_cache(max(1, CACHE_BYTES // largest))(self._decode)

    def has(self, level: int) -> bool:
        """Whether exactly one page holds a level as tiles of 8-bit RGB.

        Args:
            level: index of the level.

        Returns:
            Whether `fullest` and `read` can be called for it.
        """
        return len(self._levels[level]) == 1

    def fullest(self, level: int) -> tuple[int, int, int, int]:
        """The tile with the most bytes, so the most detail.

        Args:
            level: index of a level that `has` confirms.

        Returns:
            x, y, width and height in the level's pixels.
        """
        [page] = self._levels[level]
        row, column = divmod(int(np.argmax(page.databytecounts)), -(-page.imagewidth // page.tilewidth))
        x, y = column * page.tilewidth, row * page.tilelength
        return x, y, min(page.tilewidth, page.imagewidth - x), min(page.tilelength, page.imagelength - y)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read a rectangle inside a level.

        Args:
            level: index of a level that `has` confirms.
            x: left side in the level's pixels.
            y: upper side in the level's pixels.
            width: pixels.
            height: pixels.

        Returns:
            (height, width, 3) uint8 RGB.

        Raises:
            ValueError: a tile is absent; the decoder may raise other errors.
        """
        [page] = self._levels[level]
        wide, high = page.tilewidth, page.tilelength
        picture = np.empty((height, width, 3), np.uint8)
        for row in range(y // high, -(-(y + height) // high)):
            for column in range(x // wide, -(-(x + width) // wide)):
                tile = self._decoded(level, row * -(-page.imagewidth // wide) + column)
                left, top = column * wide - x, row * high - y
                part = tile[max(0, -top) : height - top, max(0, -left) : width - left]
                picture[max(0, top) :, max(0, left) :][: len(part), : part.shape[1]] = part
        return picture

    def close(self) -> None:
        """Close the file and free the cache."""
        self._file.close()
        self._decoded.cache_clear()

    def _decode(self, level: int, index: int) -> NDArray[np.uint8]:
        [page] = self._levels[level]
        if not page.databytecounts[index]:
            raise ValueError("a tile is absent")
        self._file.filehandle.seek(page.dataoffsets[index])
        encoded = self._file.filehandle.read(page.databytecounts[index])
        tile, _, _ = page.decode(encoded, index, jpegtables=page.jpegtables)  # None except for JPEG
        assert tile is not None
        return tile[0]


def _plain(page: tifffile.TiffPage) -> bool:
    """Whether a page holds tiles of 8-bit RGB, interleaved."""
    return (
        page.is_tiled
        and page.dtype == np.uint8
        and page.samplesperpixel == 3
        and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
        and page.imagedepth == 1
    )
