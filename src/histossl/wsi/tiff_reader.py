"""Reads tiled TIFFs of any picture, level and depth, where no library reads the chosen picture."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from histossl.wsi.content import chosen_picture
from histossl.wsi.geometry import Size
from histossl.wsi.plain import picture_of
from histossl.wsi.raster import Level, Refused, is_tiff, on_white, tiff_properties
from histossl.wsi.tiff_tiles import CACHE_BYTES
from histossl.wsi.values import ORIENTATION, depth_of, note_of, orientation_of, scaled, stated_top

_LOOKED_AT = 24  # number of tiles that are read to find how many of sixteen bits are used


class TiffReader:
    """tifffile: the largest picture of a tiled TIFF, its levels in any pages, eight or sixteen bits."""

    def __init__(self, path: Path) -> None:
        file, _ = chosen_picture(path)
        if not is_tiff(file):
            raise Refused
        with ExitStack() as stack:
            tiff = stack.enter_context(tifffile.TiffFile(file))
            picture, note = picture_of(path, tiff)
            page = picture.page
            kind = tifffile.PHOTOMETRIC(page.photometric or 0).name
            readable = kind in ("RGB", "MINISBLACK", "MINISWHITE") or (kind == "YCBCR" and page.compression in (6, 7))
            tiled = all(part.is_tiled and part.imagedepth == 1 for level in picture.levels for part in level)
            if not (readable and tiled and page.dtype in (np.uint8, np.uint16) and picture.depth in (1, 2, 3, 4)):
                raise Refused
            if orientation_of(page.tags.valueof(ORIENTATION)) != 1:
                raise Refused  # `PlainReader` holds the picture in memory and turns it
            self._pages = picture.levels
            self._inverted = kind == "MINISWHITE"
            self.vendor = "generic-tiff"
            self.properties = tiff_properties(page, tiff, picture.image)
            sizes = [Size(level[0].imagewidth, level[0].imagelength) for level in picture.levels]
            self.levels = tuple(Level(size, sizes[0].width / size.width) for size in sizes)
            self.notes: tuple[str, ...] = (note,) if note else ()
            stack.pop_all()
        self._tiff = tiff
        largest = max(p.tilewidth * p.tilelength * p.samplesperpixel * 2 for level in self._pages for p in level)
        self._decoded = functools.lru_cache(max(1, CACHE_BYTES // largest))(self._decode)
        if page.dtype == np.uint16:
            self._find_depth(stated_top({tag.code: tag.value for tag in page.tags}, _pixels(picture.image)))

    def _find_depth(self, stated: int | None) -> None:
        """Find the bits in use by the tags, some tiles of the first level and all of the last level."""
        highest = 0
        for level in {0, len(self._pages) - 1}:
            for plane, page in enumerate(self._pages[level]):
                counts = np.asarray(page.databytecounts)
                some = np.unique(np.linspace(0, len(counts) - 1, _LOOKED_AT).astype(int))
                for index in {*some.tolist(), int(counts.argmax())}:
                    if counts[index]:
                        highest = max(highest, int(self._decoded(level, plane, index).max()))
        self._depth = depth_of(highest, stated)
        note = note_of(self._depth, highest, stated)
        self.notes = (*self.notes, note) if note else self.notes

    def read(self, level: int, x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], float, float]:
        """Read a rectangle, see `Reader.read`.

        Args:
            level: index of the level.
            x: left edge in pixels of the level.
            y: top edge in pixels of the level.
            width: width in pixels of the level.
            height: height in pixels of the level.

        Returns:
            (height, width, 3) uint8 RGB, x and y.
        """
        planes = self._pages[level]
        parts = [self._plane(level, k, x, y, width, height) for k in range(len(planes))]
        pixels = np.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]
        eight = scaled(pixels, self._depth) if pixels.dtype == np.uint16 else pixels
        return on_white(255 - eight if self._inverted else eight), float(x), float(y)

    def _plane(self, level: int, plane: int, x: int, y: int, width: int, height: int) -> NDArray[Any]:
        page = self._pages[level][plane]
        wide, high = page.tilewidth, page.tilelength
        across, down = -(-page.imagewidth // wide), -(-page.imagelength // high)
        apart = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and page.samplesperpixel > 1
        picture = np.empty((height, width, page.samplesperpixel), page.dtype)
        for row in range(y // high, -(-(y + height) // high)):
            for column in range(x // wide, -(-(x + width) // wide)):
                index = row * across + column
                if apart:
                    steps = range(page.samplesperpixel)
                    tile = np.concatenate([self._decoded(level, plane, index + k * across * down) for k in steps], 2)
                else:
                    tile = self._decoded(level, plane, index)
                left, top = column * wide - x, row * high - y
                part = tile[max(0, -top) : height - top, max(0, -left) : width - left]
                picture[max(0, top) :, max(0, left) :][: len(part), : part.shape[1]] = part
        return picture

    def _decode(self, level: int, plane: int, index: int) -> NDArray[Any]:
        page = self._pages[level][plane]
        if not page.databytecounts[index]:
            raise ValueError("a tile is absent")
        self._tiff.filehandle.seek(page.dataoffsets[index])
        encoded = self._tiff.filehandle.read(page.databytecounts[index])
        tile, _, _ = page.decode(encoded, index, jpegtables=page.jpegtables)
        assert tile is not None
        return tile[0]

    def close(self) -> None:
        """Close the file and free all memory."""
        self._tiff.close()
        self._decoded.cache_clear()


def _pixels(image: Any) -> dict[str, str] | None:
    return image.pixels if image is not None else None
