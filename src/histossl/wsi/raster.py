"""Shared by all readers of slides: levels, errors, and the conversion of pixels to opaque RGB."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histossl.core.errors import SlideError
from histossl.wsi.geometry import Size
from histossl.wsi.safe_xml import OmeImage

MAX_PLAIN_PIXELS = 2**27
"""A plain picture is held in memory whole; a larger one is refused."""

MAX_TILE_PIXELS = 2**26
"""A tile is decoded whole; a larger one could exhaust the memory of the process."""

EIGHT_BITS = "save it as RGB with 8 bits a channel"

# Errors that readers and codecs raise on files that are cut short, damaged or of another kind.
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
    """A reader does not take a file that another one may read; the text is empty where it need not be reported."""


@dataclass(frozen=True, slots=True)
class Level:
    """One level of a pyramid: its size in its own pixels, and the width of one of them in level-0 pixels."""

    size: Size
    downsample: float


def describe_error(error: BaseException) -> str:
    """Shorten an exception's text.

    Args:
        error: the exception.

    Returns:
        One line of at most 160 characters; the name of its class where it has no text.
    """
    return " ".join(str(error).split())[:160] or type(error).__name__


def too_large(path: Path, pixels: str) -> SlideError:
    """The error for a picture that does not fit into memory.

    Args:
        path: the file.
        pixels: number of pixels, or width and height, as text.

    Returns:
        The error, to be raised.
    """
    return SlideError(
        path,
        f"{pixels} pixels are too many for a plain picture, which is held in memory whole",
        "convert it to a tiled pyramid: vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg",
    )


def is_tiff(path: Path) -> bool:
    """Whether a file begins as a TIFF does.

    Args:
        path: the file.

    Returns:
        True for TIFF and BigTIFF, in both byte orders.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as handle:
        return handle.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def on_white(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert pixels to opaque RGB; transparent pixels are blended with white.

    Args:
        pixels: (H, W) or (H, W, 1) grey, (H, W, 2) grey and alpha, (H, W, 3) RGB or (H, W, 4) RGBA, uint8.

    Returns:
        (H, W, 3) uint8 RGB, contiguous.

    Raises:
        ValueError: another number of channels, or another dtype.
    """
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


def tiff_properties(page: Any, tiff: Any = None, image: OmeImage | None = None) -> dict[str, str]:
    """The tags of a page as text.

    Args:
        page: a page of tifffile.
        tiff: the open file of the page; needed with `image`.
        image: the image of the OME-XML that the page belongs to; then its physical size and name are added.

    Returns:
        Name -> text, without empty values.
    """
    tags = {"tiff.ImageDescription": page.description or ""}
    if image is not None:
        first = tiff.pages[0].description or ""
        tags = {"tiff.ImageDescription": first}
        tags |= {f"ome.{name}": value for name, value in image.pixels.items() if name.startswith("Physical")}
        tags["ome.Name"] = image.name or "image"
    for name in ("XResolution", "YResolution"):
        value = page.tags.valueof(name)
        if value and value[1]:
            tags[f"tiff.{name}"] = repr(value[0] / value[1])
    tags["tiff.ResolutionUnit"] = {2: "inch", 3: "centimeter"}.get(int(page.tags.valueof("ResolutionUnit", 2)), "none")
    return {name: value for name, value in tags.items() if value}
