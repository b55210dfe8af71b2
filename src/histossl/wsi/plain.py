"""Plain pictures as slides of one level: PNG, JPEG, JPEG 2000, BMP, WebP, and TIFFs that are not tiled."""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from histossl.core.errors import SlideError
from histossl.wsi.content import chosen_picture
from histossl.wsi.geometry import Size
from histossl.wsi.raster import (
    EIGHT_BITS,
    MAX_PLAIN_PIXELS,
    Level,
    Refused,
    is_tiff,
    on_white,
    tiff_properties,
    too_large,
)
from histossl.wsi.tiff_pictures import Picture, chosen, pictures_of
from histossl.wsi.values import (
    ORIENTATION,
    depth_of,
    note_of,
    orientation_note,
    orientation_of,
    oriented,
    scaled,
    stated_top,
)

_ONE_BIT = "holds black and white alone, not colours"
_GREY = "it holds no colours: stains cannot be told apart in it"


class PlainReader:
    """A picture as a slide of one level: decoded at the first read, and kept until the slide is closed.

    In a TIFF with several pictures it is the largest, or the one that the path names. Turned as its orientation tag
    says; values of 16 bits are read with the depth that the camera had.
    """

    vendor = "plain"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file, number = chosen_picture(path)
        self._tiff = is_tiff(self._file)
        if number is not None and not self._tiff:
            raise SlideError(path, "is no TIFF, so it has one picture", f"give {self._file.name}")
        self.notes: tuple[str, ...] = ()
        try:
            header = _tiff_header(path) if self._tiff else _picture_header(path)
        except Image.DecompressionBombError as error:
            raise too_large(path, "so many") from error
        size, self.properties, self._orientation, note = header
        if note:
            self.notes += (note,)
        if size.width * size.height > MAX_PLAIN_PIXELS:
            raise too_large(path, f"{size.width} x {size.height}")
        if self._orientation != 1:
            self.notes += (orientation_note(self._orientation),)
        self._stored = size
        turned = self._orientation >= 5
        self.levels = (Level(Size(size.height, size.width) if turned else size, 1.0),)

    @cached_property
    def _pixels(self) -> NDArray[np.uint8]:
        pixels, note = _decode_tiff(self._path) if self._tiff else _decode_picture(self._file)
        if pixels.shape[:2] != self._stored.shape:
            raise ValueError(f"holds {pixels.shape[1]} x {pixels.shape[0]} pixels, not what its header says")
        if note:
            self.notes = (*self.notes, note)
        return np.ascontiguousarray(oriented(pixels, self._orientation))

    def read(self, level: int, x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], float, float]:
        """Read a rectangle, see `Reader.read`.

        Args:
            level: always 0.
            x: left edge in pixels.
            y: top edge in pixels.
            width: width in pixels.
            height: height in pixels.

        Returns:
            (height, width, 3) uint8 RGB, x and y.
        """
        return self._pixels[y : y + height, x : x + width], float(x), float(y)

    def close(self) -> None:
        """Close the file and free all memory."""
        self.__dict__.pop("_pixels", None)


def _picture_header(path: Path) -> tuple[Size, dict[str, str], int, str]:
    """Size as stored, properties, orientation, and a note."""
    try:
        picture = _opened(path)
    except UnidentifiedImageError as error:
        raise Refused from error
    with picture:
        if picture.mode in ("F", "1"):
            what = "holds fractions, not colours" if picture.mode == "F" else _ONE_BIT
            raise SlideError(path, what, EIGHT_BITS)
        frames = getattr(picture, "n_frames", 1)
        if picture.format in ("GIF", "WEBP") and frames > 1:
            raise SlideError(path, f"is an animation of {frames} pictures", "save the one that is meant as PNG or TIFF")
        note = _GREY if picture.mode in ("L", "LA", "I;16", "I") else ""
        properties = {"format": str(picture.format), "mode": picture.mode}
        dpi = picture.info.get("dpi", (0, 0))
        if all(dpi):
            x, y = (repr(float(value)) for value in dpi)
            properties |= {"tiff.XResolution": x, "tiff.YResolution": y, "tiff.ResolutionUnit": "inch"}
        return Size(*picture.size), properties, orientation_of(picture.getexif().get(ORIENTATION)), note


def _opened(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PLAIN_PIXELS replaces Pillow's limit
        return Image.open(path)


def _decode_picture(path: Path, page: int = 0) -> tuple[NDArray[np.uint8], str]:
    """The pixels as stored, and a note on their depth."""
    with _opened(path) as picture:
        if page:
            picture.seek(page)
        deep = _deep(path, str(picture.format))
        if deep is not None:
            pixels, note = _to_eight_bits(deep[0], deep[1])
            return on_white(pixels), note
        if picture.mode.startswith("I"):
            pixels, note = _to_eight_bits(np.asarray(picture))
            return on_white(pixels), note
        clear = picture.mode in ("LA", "PA", "La", "RGBa", "RGBA") or "transparency" in picture.info
        return on_white(np.asarray(picture.convert("RGBA" if clear else "RGB"))), ""


def _deep(path: Path, kind: str) -> tuple[NDArray[Any], int | None] | None:
    """The 16-bit values of a PNG or JPEG 2000, which Pillow would cut to the upper eight, and what the file states."""
    if kind == "PNG":
        data = path.read_bytes()
        if data[24] != 16:  # the depth in the header
            return None
        from imagecodecs import png_decode

        at = data.find(b"sBIT", 0, 4096)
        bits = max(data[at + 4 : at + 5]) if at > 0 else 16
        return png_decode(data), 2**bits - 1 if bits < 16 else None
    if kind == "JPEG2000":
        from imagecodecs import jpeg2k_decode

        found = jpeg2k_decode(path.read_bytes())
        return (found, None) if found.dtype == np.uint16 else None
    return None


def picture_of(path: Path, tiff: tifffile.TiffFile) -> tuple[Picture, str]:
    """Choose the picture of an open TIFF that a path means.

    Args:
        path: the path, with or without the number of a picture.
        tiff: the open file.

    Returns:
        The picture, and a note about the others.

    Raises:
        SlideError: the file holds no such picture.
    """
    return chosen(path, pictures_of(tiff), chosen_picture(path)[1])


def _tiff_header(path: Path) -> tuple[Size, dict[str, str], int, str]:
    """As `_picture_header`."""
    with tifffile.TiffFile(chosen_picture(path)[0]) as tiff:
        picture, note = picture_of(path, tiff)
        page = picture.page
        if page.dtype not in (np.uint8, np.uint16):
            what = _ONE_BIT if page.dtype == np.bool_ else f"holds values of type {page.dtype}, not colours"
            raise SlideError(path, what, EIGHT_BITS)
        orientation = orientation_of(page.tags.valueof(ORIENTATION))
        grey = page.samplesperpixel == 1 and len(picture.levels[0]) == 1 and page.photometric in (0, 1)
        note = "; ".join(filter(None, [note, _GREY if grey else ""]))
        return picture.size, tiff_properties(page, tiff, picture.image), orientation, note


def _decode_tiff(path: Path) -> tuple[NDArray[np.uint8], str]:
    """As `_decode_picture`."""
    with tifffile.TiffFile(chosen_picture(path)[0]) as tiff:
        picture, _ = picture_of(path, tiff)
        page, planes = picture.page, picture.levels[0]
        kind = tifffile.PHOTOMETRIC(page.photometric or 0).name
        jpeg = kind == "YCBCR" and page.compression in (6, 7)
        if not (jpeg or kind in ("RGB", "MINISBLACK", "MINISWHITE")):
            return _decode_picture(chosen_picture(path)[0], page.index)  # palettes, CMYK, CIELab
        pixels = np.stack([plane.asarray() for plane in planes]) if len(planes) > 1 else page.asarray()
        if len(planes) > 1 or page.axes == "SYX":
            pixels = np.moveaxis(pixels, 0, -1)
        top = stated_top({tag.code: tag.value for tag in page.tags}, picture.image.pixels if picture.image else None)
    eight, note = _to_eight_bits(pixels, top)
    return on_white(255 - eight if kind == "MINISWHITE" else eight), note


def _to_eight_bits(pixels: NDArray[Any], stated: int | None = None) -> tuple[NDArray[np.uint8], str]:
    """Pixels of any depth as eight bits, and a note on the depth."""
    if pixels.dtype == np.uint8:
        return pixels, ""
    if pixels.dtype.kind in "ui" and pixels.dtype.itemsize > 1 and pixels.min() >= 0 and pixels.max() < 65536:
        highest = int(pixels.max())
        depth = depth_of(highest, stated)
        return scaled(pixels, depth), note_of(depth, highest, stated)
    raise ValueError(f"holds values of type {pixels.dtype}; save it with 8 or 16 bits a channel")
