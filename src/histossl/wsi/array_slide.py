"""Pictures in memory as slides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import SlideError
from histossl.wsi.geometry import Size
from histossl.wsi.readers import Level
from histossl.wsi.slide import Slide


class _ArrayReader:
    """Reader of a picture in memory: one level."""

    vendor = "array"

    def __init__(self, rgb: NDArray[np.uint8]) -> None:
        self.rgb = rgb
        self.levels = (Level(Size(rgb.shape[1], rgb.shape[0]), 1.0),)
        self.properties: dict[str, str] = {}

    def read(self, level: int, x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], float, float]:
        return self.rgb[y : y + height, x : x + width], float(x), float(y)

    def close(self) -> None:
        pass


def picture_slide(image: NDArray[Any], mpp: float, name: str = "image") -> Slide:
    """A picture in memory as a slide.

    Args:
        image: (H, W, 3) RGB or (H, W, 4) RGBA, which is blended with white; uint8, uint16 (full range) or floats in
            [0, 1].
        mpp: µm per pixel.
        name: name of the slide, for messages.

    Returns:
        The slide.

    Raises:
        SlideError: another shape or data type, or an mpp out of range.
    """
    from histossl.wsi.mpp import RANGE_TEXT, usable

    if not usable(mpp):
        raise SlideError(name, f"an mpp of {mpp:g} is no microscope's", f"it must lie in {RANGE_TEXT}")
    return Slide(Path(name), _ArrayReader(eight_bit_rgb(image, name)), mpp)  # type: ignore[arg-type]


def eight_bit_rgb(image: NDArray[Any], name: str = "image") -> NDArray[np.uint8]:
    """Convert a picture to 8-bit RGB.

    Args:
        image: as of `picture_slide`.
        name: name of the picture, for messages.

    Returns:
        (H, W, 3) uint8, contiguous.

    Raises:
        SlideError: another shape or data type, or floats outside [0, 1].
    """
    if image.ndim != 3 or image.shape[2] not in (3, 4) or 0 in image.shape:
        what = "is greyscale" if image.ndim == 2 else f"has the shape {image.shape}"
        raise SlideError(name, f"{what}, not (rows, columns, 3)", "give an RGB image")
    if image.dtype == np.uint16:
        image = (image.astype(np.uint32) * 255 + 32767) // 65535
    elif image.dtype.kind == "f":
        if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
            raise SlideError(name, "has floats outside of [0, 1]", "scale them, or give uint8")
        image = np.rint(image * 255)
    elif image.dtype != np.uint8:
        raise SlideError(name, f"is of {image.dtype}", "give uint8, uint16 or floats in [0, 1]")
    if image.shape[2] == 4:
        alpha = image[..., 3:].astype(np.float32) / 255
        image = np.rint(image[..., :3] * alpha + 255 * (1 - alpha))
    return np.ascontiguousarray(image.astype(np.uint8)[..., :3])
