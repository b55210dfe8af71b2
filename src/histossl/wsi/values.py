"""Interprets stored pixel values: how many of sixteen bits are in use, and the orientation of the picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DEPTHS = (8, 10, 12, 14, 16)  # bits of cameras
ORIENTATION = 274  # the orientation tag of TIFF and EXIF

_WAYS = {
    2: "mirrored",
    3: "upside down",
    4: "mirrored and upside down",
    5: "mirrored and turned",
    6: "turned by a quarter to the left",
    7: "mirrored and turned",
    8: "turned by a quarter to the right",
}


def depth_of(highest: int, stated: int | None = None) -> int:
    """The number of bits of a picture's values: what the file states, unless its values exceed that.

    Args:
        highest: largest value in the picture, or in parts of it.
        stated: the largest value that the file's tags allow, or None.

    Returns:
        The number of bits.
    """
    if stated is not None and 255 < stated < 65535 and highest <= _top(stated):
        highest = stated
    return next(bits for bits in _DEPTHS if highest < 2**bits)


def _top(stated: int) -> int:
    return 2 ** int(stated).bit_length() - 1


def note_of(depth: int, highest: int, stated: int | None) -> str:
    """Note the number of bits that 16-bit values are read with.

    Args:
        depth: number of bits in use.
        highest: largest value in the file that was seen.
        stated: largest value that the file's tags allow, or None.

    Returns:
        The note; "" for the full sixteen bits.
    """
    if depth == 16:
        return ""
    why = f"its tags say so, up to {stated}" if stated is not None else f"no value is above {highest}"
    return f"its 16-bit values are read as {depth} bits, white is {2**depth - 1} ({why})"


def stated_top(tags: Mapping[int, Any], pixels: Mapping[str, str] | None = None) -> int | None:
    """The largest value that a TIFF's tags (MaxSampleValue, SMaxSampleValue) or OME's SignificantBits allow.

    Args:
        tags: code of the tag -> value.
        pixels: attributes of OME's Pixels element, or None.

    Returns:
        The value, 255 to 65535; None where nothing usable is stated.
    """
    bits = (pixels or {}).get("SignificantBits", "")
    if bits.isdigit() and 8 <= int(bits) <= 16:
        return 2 ** int(bits) - 1
    for code in (341, 281):
        try:
            value = int(np.max(tags[code]))
        except (KeyError, TypeError, ValueError):
            continue
        if 255 < value < 65535:
            return value
    return None


def scaled(pixels: NDArray[Any], depth: int) -> NDArray[np.uint8]:
    """Scale 16-bit values to eight bits, rounded.

    Args:
        pixels: unsigned integers of any shape.
        depth: number of bits in use; larger values become white.

    Returns:
        uint8 of the same shape.
    """
    top = 2**depth - 1
    if top == 65535:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.minimum((pixels.astype(np.uint32) * 255 + top // 2) // top, 255).astype(np.uint8)


def oriented(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn an array as its orientation tag says.

    Args:
        pixels: (H, W, ...).
        orientation: 1 to 8; 1 leaves the array as it is.

    Returns:
        A view of the array, upright.
    """
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def orientation_note(orientation: int) -> str:
    """Note an orientation tag that was applied.

    Args:
        orientation: 2 to 8.

    Returns:
        The note.
    """
    return f"it is stored {_WAYS[orientation]} (orientation tag {orientation}) and was turned upright"


def orientation_of(value: Any) -> int:
    """The orientation that a tag states.

    Args:
        value: the value of the tag, of any type.

    Returns:
        1 to 8; 1 where the value is not one of the eight.
    """
    try:
        number = int(value)
    except (TypeError, ValueError):
        return 1
    return number if number in _WAYS else 1
