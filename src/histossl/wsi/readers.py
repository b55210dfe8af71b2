"""One small interface over OpenSlide, tiffslide, tifffile, wsidicom, zarr and Pillow, which `slide.py` uses."""

from __future__ import annotations

import logging
import struct
import warnings
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tifffile
from numpy.typing import NDArray

from histossl.core.errors import SlideError
from histossl.wsi.content import chosen_picture
from histossl.wsi.dicom_reader import DicomReader
from histossl.wsi.geometry import Size
from histossl.wsi.plain import PlainReader, picture_of
from histossl.wsi.raster import (
    FILE_ERRORS,
    MAX_PLAIN_PIXELS,
    MAX_TILE_PIXELS,
    Level,
    Refused,
    describe_error,
    is_tiff,
    on_white,
    tiff_properties,
)
from histossl.wsi.tiff_reader import TiffReader
from histossl.wsi.tiff_tiles import TiffTiles
from histossl.wsi.values import ORIENTATION, orientation_of
from histossl.wsi.zarr_reader import ZarrReader

__all__ = ["FILE_ERRORS", "MAX_PLAIN_PIXELS", "READERS", "Level", "Reader", "Refused", "check_tiff", "describe_error"]

# Its log repeats errors that it raises, or that check_tiff finds.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


class Reader(Protocol):
    """An open file; the constructor takes its path, and raises `Refused` or one of FILE_ERRORS.

    Besides the library's own names, `properties` hold the TIFF tags as tiff.XResolution, tiff.YResolution (pixels a
    unit), tiff.ResolutionUnit ("inch", "centimeter") and tiff.ImageDescription.
    """

    levels: tuple[Level, ...]
    vendor: str
    properties: dict[str, str]

    def __init__(self, path: Path) -> None: ...

    def read(self, level: int, x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], float, float]:
        """Read a rectangle inside a level.

        Args:
            level: index of the level, 0 is the largest.
            x: left edge in pixels of the level.
            y: top edge in pixels of the level.
            width: width in pixels of the level.
            height: height in pixels of the level.

        Returns:
            (height, width, 3) uint8 RGB, white where transparent, and the true corner (x, y) in pixels of the level: a
            library that takes level-0 coordinates cannot begin at every pixel.
        """
        ...

    def close(self) -> None:
        """Close the file."""
        ...


_ABUTTING = ("aperio", "generic-tiff")  # vendors whose tiles neither overlap nor are placed one by one
_APART = 8  # of 255, on average: a blur changes less, other colours or another region change more


class OpenSlideReader:
    """OpenSlide: Aperio, Hamamatsu, Leica, MIRAX, Philips, Trestle, Ventana, DICOM, tiled TIFF."""

    def __init__(self, path: Path) -> None:
        import openslide

        path, number = chosen_picture(path)
        self._open = lambda: openslide.OpenSlide(path)
        self._error = openslide.OpenSlideError
        try:
            slide = self._open()
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise Refused from error
        except openslide.OpenSlideError as error:
            raise Refused(describe_error(error)) from error
        self.properties = dict(slide.properties)
        self.vendor = self.properties.get("openslide.vendor", "unknown")
        if self.vendor == "generic-tiff" and "<OME" in self.properties.get("tiff.ImageDescription", ""):
            slide.close()
            raise Refused  # it would read the first channel of the first level only
        self.levels = tuple(
            Level(Size(*size), down) for size, down in zip(slide.level_dimensions, slide.level_downsamples, strict=True)
        )
        if (self.vendor == "generic-tiff" or number is not None) and not _only_picture(path, self.levels, number):
            slide.close()
            raise Refused
        self._slide = slide
        self._path = path
        self._direct: dict[int, bool] = {}

    def read(self, level: int, x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], float, float]:
        """Read a rectangle, see `Reader.read`.

        Args:
            level: index of the level.
            x: left edge in pixels of the level.
            y: top edge in pixels of the level.
            width: width in pixels of the level.
            height: height in pixels of the level.

        Returns:
            (height, width, 3) uint8 RGB and the true corner (x, y).
        """
        if self._agrees(level):
            with suppress(*FILE_ERRORS):  # OpenSlide gives the better error
                return self._tiles.read(level, x, y, width, height), float(x), float(y)
        return self._composed(level, x, y, width, height)

    @cached_property
    def _tiles(self) -> TiffTiles:
        return TiffTiles(self._path, [level.size for level in self.levels])

    def _agrees(self, level: int) -> bool:
        """Whether a level's fullest tile, read by itself, shows what OpenSlide shows there.

        At levels whose downsample is not a whole number OpenSlide blurs, so colours need not be equal.
        """
        if level not in self._direct:
            self._direct[level] = False
            with suppress(*FILE_ERRORS):
                if self.vendor in _ABUTTING and self._tiles.has(level):
                    place = self._tiles.fullest(level)
                    apart = self._tiles.read(level, *place).astype(int) - self._composed(level, *place)[0]
                    self._direct[level] = bool(np.abs(apart).mean() < _APART)
        return self._direct[level]

    def _composed(self, level: int, x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], float, float]:
        down = self.levels[level].downsample
        corner = round(x * down), round(y * down)
        try:
            picture = self._slide.read_region(corner, level, (width, height))
        except self._error as error:
            # An OpenSlide handle answers every later call with its first error.
            self._slide.close()
            self._slide = self._open()
            raise OSError(str(error)) from error
        if picture.getchannel("A").getextrema()[0] == 255:
            picture = picture.convert("RGB")  # Pillow drops the opaque alpha channel three times as fast as NumPy
        return on_white(np.asarray(picture)), corner[0] / down, corner[1] / down

    def close(self) -> None:
        self._slide.close()
        if "_tiles" in self.__dict__:
            self._tiles.close()


class TiffSlideReader:
    """tiffslide: OME-TIFF, and tiled TIFFs that OpenSlide does not know."""

    def __init__(self, path: Path) -> None:
        path, number = chosen_picture(path)
        if number is not None or not is_tiff(path):
            raise Refused
        import tiffslide

        with ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of every vendor that it supports only in part
            slide = stack.enter_context(tiffslide.TiffSlide(path))
            properties = slide.properties
            series = slide.ts_tifffile.series[properties["tiffslide.series-index"]]
            page = series.keyframe
            depth = {"YX": 1, "YXS": series.shape[-1], "CYX": series.shape[0]}[properties["tiffslide.series-axes"]]
            if not page.is_tiled or page.dtype != np.uint8 or depth not in (1, 3, 4):
                raise Refused
            self.properties = {key: str(value) for key, value in properties.items() if value is not None}
            self.properties |= tiff_properties(page)
            self.vendor = str(properties["tiffslide.vendor"] or "generic-tiff")
            self.levels = tuple(
                Level(Size(*size), down)
                for size, down in zip(slide.level_dimensions, slide.level_downsamples, strict=True)
            )
            if not _only_picture(path, self.levels, None):
                raise Refused
            stack.pop_all()
        self._slide = slide

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
        full, own = self.levels[0].size, self.levels[level].size
        # tiffslide floors x * own / full: this is the least level-0 coordinate of the requested pixel.
        corner = -(-x * full.width // own.width), -(-y * full.height // own.height)
        pixels = self._slide.read_region(corner, level, (width, height), as_array=True)
        return on_white(pixels), float(x), float(y)

    def close(self) -> None:
        self._slide.close()


def _only_picture(path: Path, levels: tuple[Level, ...], number: int | None) -> bool:
    """Whether a library reads the one picture of a TIFF, upright and with all of its levels.

    Where there are others, it may have taken the first one, and its mpp, for the slide's.
    """
    if number is not None or not is_tiff(path):
        return False
    with tifffile.TiffFile(path) as tiff:
        picture, note = picture_of(path, tiff)
        page = picture.page
        plain = orientation_of(page.tags.valueof(ORIENTATION)) == 1 and page.dtype == np.uint8
        return not note and plain and levels[0].size == picture.size and len(levels) >= len(picture.levels)


READERS: dict[str, type[Reader]] = {
    "zarr": ZarrReader,
    "wsidicom": DicomReader,  # the same pixels as OpenSlide, in two thirds of the time
    "OpenSlide": OpenSlideReader,
    "tiffslide": TiffSlideReader,
    "tifffile": TiffReader,
    "Pillow": PlainReader,
}
"""In the order in which they are tried."""


def check_tiff(path: Path) -> None:
    """Refuse a TIFF that is cut short, before hours are spent on it; other files pass, and so does NDPI's own TIFF.

    All directories, tiles and strips must lie inside the file, the tags that size and describe the picture must be
    readable, and no tile may be too large to be decoded.

    Args:
        path: the slide, with or without the number of a picture.

    Raises:
        SlideError: one of these does not hold.
    """
    path = chosen_picture(path)[0]
    if not is_tiff(path) or path.suffix.lower() == ".ndpi":
        return
    with tifffile.TiffFile(path) as tiff:
        pages = list(tiff.pages)
        pages += [below for page in pages for below in page.pages or ()]
        whole = [page for page in pages if isinstance(page, tifffile.TiffPage) and page.is_tiled]
        bombs = [page for page in whole if page.tilewidth * page.tilelength > MAX_TILE_PIXELS]
        if bombs:
            what = f"says that its tiles have {bombs[0].tilewidth} x {bombs[0].tilelength} pixels"
            raise SlideError(path, what, "the file is damaged, or meant to harm")
        file, form = tiff.filehandle, tiff.tiff
        file.seek(tiff.pages.next_page_offset or 0)
        places = [struct.unpack(form.offsetformat, file.read(form.offsetsize))[0]]
        stretches = (zip(page.dataoffsets, page.databytecounts, strict=False) for page in pages)
        places += [start + max(0, length - 1) for stretch in stretches for start, length in stretch]
        if max(places) >= file.size:
            what = f"it has {file.size} bytes and says that it goes on at byte {max(places)}"
        elif lost := [_TIFF_TAGS[code] for page in pages for code in _lost_tags(page, file, form)]:
            what = f"its {lost[0]} cannot be read"
        else:
            return
    raise SlideError(path, f"is cut short or damaged: {what}", "copy the file again")


_TIFF_TAGS = {256: "width", 257: "height", 270: "description", 273: "list of strips", 324: "list of tiles"}


def _lost_tags(page: Any, file: Any, form: Any) -> list[int]:
    """Which of _TIFF_TAGS a directory has and tifffile could not read: it leaves these out silently."""
    file.seek(page.offset)
    count = struct.unpack(form.tagnoformat, file.read(form.tagnosize))[0]
    entries = file.read(count * form.tagsize)
    codes = [struct.unpack_from(form.byteorder + "H", entries, k)[0] for k in range(0, len(entries), form.tagsize)]
    return [code for code in codes if code in _TIFF_TAGS and code not in page.tags]
