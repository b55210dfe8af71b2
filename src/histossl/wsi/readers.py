"""What OpenSlide, tiffslide, tifffile and Pillow are asked for, behind one small interface that `slide.py` uses."""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from histossl.core.errors import SlideError
from histossl.wsi.geometry import Size
from histossl.wsi.tiff_tiles import TiffTiles

MAX_PLAIN_PIXELS = 2**27
"""A plain picture is held in memory whole; a larger one is refused."""

MAX_TILE_PIXELS = 2**26
"""A tile is decoded whole; one that says it is larger would take the process down that reads it."""

_EIGHT_BITS = "save it as RGB with 8 bits a channel"

# It logs what it then raises, or what check_tiff finds.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

# What the readers and the codecs below them raise on files that are cut short, damaged or of another kind.
FILE_ERRORS = (
    tifffile.TiffFileError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RuntimeError,
    EOFError,
    SyntaxError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class Refused(Exception):
    """A reader does not take a file that may be another one's; the text is empty where that is no news."""


@dataclass(frozen=True, slots=True)
class Level:
    """One level of a pyramid: its size in its own pixels, and how many level-0 pixels one of them is wide."""

    size: Size
    downsample: float


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
        """RGB (height, width, 3) of a rectangle inside a level, white where transparent, and its true corner.

        The corner (x, y) is in pixels of the level: a library that takes level-0 positions cannot begin everywhere.
        """
        ...

    def close(self) -> None: ...


def describe_error(error: BaseException) -> str:
    """An exception's text as one short line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


_ABUTTING = ("aperio", "generic-tiff")  # vendors whose tiles neither overlap nor are placed one by one
_APART = 8  # of 255, on average: what a blur changes; other colours or another place change more


class OpenSlideReader:
    """OpenSlide: Aperio, Hamamatsu, Leica, MIRAX, Philips, Trestle, Ventana, DICOM, tiled TIFF."""

    def __init__(self, path: Path) -> None:
        import openslide

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
            raise Refused  # it would see the first channel of the first level only
        self.levels = tuple(
            Level(Size(*size), down) for size, down in zip(slide.level_dimensions, slide.level_downsamples, strict=True)
        )
        self._slide = slide
        self._path = path
        self._direct: dict[int, bool] = {}

    def read(self, level: int, x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], float, float]:
        if self._agrees(level):
            with suppress(*FILE_ERRORS):  # OpenSlide says better what is wrong
                return self._tiles.read(level, x, y, width, height), float(x), float(y)
        return self._composed(level, x, y, width, height)

    @cached_property
    def _tiles(self) -> TiffTiles:
        return TiffTiles(self._path, [level.size for level in self.levels])

    def _agrees(self, level: int) -> bool:
        """Whether a level's fullest tile, read by itself, shows what OpenSlide shows there.

        At levels whose downsample is no whole number OpenSlide blurs, so colours need not be equal.
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
            picture = picture.convert("RGB")  # Pillow drops what is opaque three times as fast as NumPy
        return _on_white(np.asarray(picture)), corner[0] / down, corner[1] / down

    def close(self) -> None:
        self._slide.close()
        if "_tiles" in self.__dict__:
            self._tiles.close()


class TiffSlideReader:
    """tiffslide: OME-TIFF, and tiled TIFFs that OpenSlide does not know."""

    def __init__(self, path: Path) -> None:
        if not _is_tiff(path):
            raise Refused
        import tiffslide

        with ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of every vendor that it knows in part only
            slide = stack.enter_context(tiffslide.TiffSlide(path))
            properties = slide.properties
            series = slide.ts_tifffile.series[properties["tiffslide.series-index"]]
            page = series.keyframe
            depth = {"YX": 1, "YXS": series.shape[-1], "CYX": series.shape[0]}[properties["tiffslide.series-axes"]]
            if not page.is_tiled or page.dtype != np.uint8 or depth not in (1, 3, 4):
                raise Refused
            self.properties = {key: str(value) for key, value in properties.items() if value is not None}
            self.properties |= _tiff_properties(page)
            self.vendor = str(properties["tiffslide.vendor"] or "generic-tiff")
            self.levels = tuple(
                Level(Size(*size), down)
                for size, down in zip(slide.level_dimensions, slide.level_downsamples, strict=True)
            )
            stack.pop_all()
        self._slide = slide

    def read(self, level: int, x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], float, float]:
        full, own = self.levels[0].size, self.levels[level].size
        # It floors x * own / full: the least level-0 position of the pixel that we mean.
        corner = -(-x * full.width // own.width), -(-y * full.height // own.height)
        pixels = self._slide.read_region(corner, level, (width, height), as_array=True)
        return _on_white(pixels), float(x), float(y)

    def close(self) -> None:
        self._slide.close()


class PlainReader:
    """A picture as a slide of one level: decoded at the first read, and kept until the slide is closed."""

    vendor = "plain"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tiff = _is_tiff(path)
        try:
            size, self.properties = _tiff_header(path) if self._tiff else _picture_header(path)
        except Image.DecompressionBombError as error:
            raise _too_large(path, "so many") from error
        if size.width * size.height > MAX_PLAIN_PIXELS:
            raise _too_large(path, f"{size.width} x {size.height}")
        self.levels = (Level(size, 1.0),)

    @cached_property
    def _pixels(self) -> NDArray[np.uint8]:
        pixels = _decode_tiff(self._path) if self._tiff else _decode_picture(self._path)
        if pixels.shape[:2] != self.levels[0].size.shape:
            raise ValueError(f"holds {pixels.shape[1]} x {pixels.shape[0]} pixels, not what its header says")
        return pixels

    def read(self, level: int, x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], float, float]:
        return self._pixels[y : y + height, x : x + width], float(x), float(y)

    def close(self) -> None:
        self.__dict__.pop("_pixels", None)


def _too_large(path: Path, pixels: str) -> SlideError:
    return SlideError(
        path,
        f"{pixels} pixels are too many for a plain picture, which is held in memory whole",
        "convert it to a tiled pyramid: vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg",
    )


READERS: dict[str, type[Reader]] = {
    "OpenSlide": OpenSlideReader,
    "tiffslide": TiffSlideReader,
    "Pillow": PlainReader,
}
"""In the order in which they are asked."""


def check_tiff(path: Path) -> None:
    """Refuse a TIFF that is cut short, before hours are spent on it; files of other kinds pass, and NDPI's own TIFF.

    All directories, tiles and strips must lie inside the file, and the tags that size and
    describe the picture must be readable, and no tile may be too large to be decoded.

    Raises:
        SlideError: one does not.
    """
    if not _is_tiff(path) or path.suffix.lower() == ".ndpi":
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
    """Which of _TIFF_TAGS a directory has and tifffile could not read: it leaves these out without a word."""
    file.seek(page.offset)
    count = struct.unpack(form.tagnoformat, file.read(form.tagnosize))[0]
    entries = file.read(count * form.tagsize)
    codes = [struct.unpack_from(form.byteorder + "H", entries, k)[0] for k in range(0, len(entries), form.tagsize)]
    return [code for code in codes if code in _TIFF_TAGS and code not in page.tags]


def _is_tiff(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _picture_header(path: Path) -> tuple[Size, dict[str, str]]:
    try:
        picture = _opened(path)
    except UnidentifiedImageError as error:
        raise Refused from error
    with picture:
        if picture.mode == "F":
            raise SlideError(path, "holds fractions, not colours", _EIGHT_BITS)
        properties = {"format": str(picture.format), "mode": picture.mode}
        dpi = picture.info.get("dpi", (0, 0))
        if all(dpi):
            x, y = (repr(float(value)) for value in dpi)
            properties |= {"tiff.XResolution": x, "tiff.YResolution": y, "tiff.ResolutionUnit": "inch"}
        return Size(*picture.size), properties


def _opened(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PLAIN_PIXELS is ours
        return Image.open(path)


def _decode_picture(path: Path) -> NDArray[np.uint8]:
    with _opened(path) as picture:
        if picture.mode.startswith("I"):
            return _on_white(_to_eight_bits(np.asarray(picture)))
        clear = picture.mode in ("LA", "PA", "La", "RGBa", "RGBA") or "transparency" in picture.info
        return _on_white(np.asarray(picture.convert("RGBA" if clear else "RGB")))


def _tiff_header(path: Path) -> tuple[Size, dict[str, str]]:
    with tifffile.TiffFile(path) as tiff:
        series = tiff.series[0]
        page = series.keyframe
        if page.dtype not in (np.bool_, np.uint8, np.uint16):
            raise SlideError(path, f"holds values of type {page.dtype}, not colours", _EIGHT_BITS)
        if series.axes not in ("YX", "YXS", "SYX") and not _planes(series):
            raise SlideError(path, f"holds a stack of {series.shape[0]} pages, not one colour picture", _EIGHT_BITS)
        return Size(page.imagewidth, page.imagelength), _tiff_properties(page)


def _decode_tiff(path: Path) -> NDArray[np.uint8]:
    with tifffile.TiffFile(path) as tiff:
        series = tiff.series[0]
        page = series.keyframe
        kind = tifffile.PHOTOMETRIC(page.photometric or 0).name
        jpeg = kind == "YCBCR" and page.compression in (6, 7)
        if not (jpeg or kind in ("RGB", "MINISBLACK", "MINISWHITE")):
            return _decode_picture(path)  # palettes, CMYK, CIELab
        pixels = series.asarray() if _planes(series) else page.asarray()
        if _planes(series) or page.axes == "SYX":
            pixels = np.moveaxis(pixels, 0, -1)
    pixels = _to_eight_bits(pixels)
    return _on_white(255 - pixels if kind == "MINISWHITE" else pixels)


def _planes(series: Any) -> bool:
    """Whether a TIFF's pages are the colours of one picture."""
    return series.axes == "CYX" and series.shape[0] in (3, 4)


def _to_eight_bits(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind in "ui" and pixels.dtype.itemsize > 1 and pixels.min() >= 0 and pixels.max() < 65536:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    raise ValueError(f"holds values of type {pixels.dtype}; save it with 8 or 16 bits a channel")


def _on_white(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """(H, W), (H, W, 1) grey, (H, W, 2) grey and alpha, (H, W, 3) or (H, W, 4) as opaque (H, W, 3) RGB."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    depth = pixels.shape[2]
    if depth not in (1, 2, 3, 4) or pixels.dtype != np.uint8:
        raise ValueError(f"holds {depth} channels of type {pixels.dtype}, not colours")
    colour = pixels[..., : depth - 1] if depth in (2, 4) else pixels
    if depth in (2, 4) and pixels[..., -1].min() < 255:
        alpha = pixels[..., -1:].astype(np.uint16)
        colour = ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(colour, (*colour.shape[:2], 3)))


def _tiff_properties(page: Any) -> dict[str, str]:
    tags = {"tiff.ImageDescription": page.description or ""}
    for name in ("XResolution", "YResolution"):
        value = page.tags.valueof(name)
        if value and value[1]:
            tags[f"tiff.{name}"] = repr(value[0] / value[1])
    tags["tiff.ResolutionUnit"] = {2: "inch", 3: "centimeter"}.get(int(page.tags.valueof("ResolutionUnit", 2)), "none")
    return {name: value for name, value in tags.items() if value}
