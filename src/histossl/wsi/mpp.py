"""Finds the µm per pixel of a slide, in any field of a file that states it; it is never guessed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from histossl.core.errors import SlideError
from histossl.wsi.safe_xml import ome_images

MPP_RANGE = (0.05, 10.0)
RANGE_TEXT = f"{MPP_RANGE[0]:g} to {MPP_RANGE[1]:g} µm per pixel"

_HINT = (
    "in a study write the true one in slides.csv's mpp column, or pass --mpp-default for the slides without one; in "
    "Python pass mpp, or mpp_default"
)
_OVERRIDE_HINT = "write the true one in slides.csv's mpp column"
_VENDOR_FIELDS = (
    ("openslide.mpp-x", "openslide.mpp-y"),
    ("tiffslide.mpp-x", "tiffslide.mpp-y"),
    ("aperio.MPP", "aperio.MPP"),
    ("ventana.ScanRes", "ventana.ScanRes"),
)
# Readers fill these from the resolution tags too: where both are alike, they add nothing to the tags.
_FROM_TAGS = ("openslide.mpp-x", "tiffslide.mpp-x", "ImageJ scale")
# Keys are casefolded, which makes one of the two signs for µ; "âμm" is µm in UTF-8 that was read as Latin-1.
_MICROMETRES = dict.fromkeys(
    ["μm", "um", "âμm", "\\u00b5m", "micron", "microns", "micrometer", "micrometers", "micrometre", "micrometres"], 1.0
) | {"nm": 1e-3, "å": 1e-4, "mm": 1e3, "cm": 1e4, "m": 1e6, "inch": 25400.0, "in": 25400.0}
_TAG_MICROMETRES = {"inch": 25400.0, "centimeter": 1e4}


def usable(mpp: float) -> bool:
    """Whether an mpp is within MPP_RANGE.

    Args:
        mpp: µm per pixel; NaN is not usable.

    Returns:
        True for a usable mpp.
    """
    return MPP_RANGE[0] <= mpp <= MPP_RANGE[1]  # False for nan


def stated_mpp(path: Path, properties: dict[str, str], default: float | None) -> float:
    """The mpp that a file's metadata state: a vendor's field, else OME-XML's, ImageJ's, else the resolution tags'.

    A resolution tag outside MPP_RANGE is a printer's (72 dpi), not a microscope's, and is ignored.

    Args:
        path: the file, for the errors.
        properties: the file's metadata as text, by name.
        default: mpp where nothing states one; None to refuse the file.

    Returns:
        µm per level-0 pixel.

    Raises:
        SlideError: a vendor's field is outside MPP_RANGE, the pixels are not square, or nothing states an mpp and there
            is no default.
    """
    tags = _tag_mpp(properties)
    for name, stated in _statements(properties):
        if name in _FROM_TAGS and tags is not None and _alike(stated, tags, 1e-3):
            continue
        for value in stated:
            if not usable(value):
                raise SlideError(
                    path, f"its {name} says {value:g} µm per pixel, outside of {RANGE_TEXT}", _OVERRIDE_HINT
                )
        return _square(path, stated)
    if tags is not None and all(map(usable, tags)):
        return _square(path, tags)
    if default is not None:
        return default
    power = objective(properties)
    guess = f" (its objective, {power:g}x, suggests about {10 / power:.2g}, but nothing says so)" if power else ""
    raise SlideError(path, f"carries no mpp{guess}", _HINT)


def objective(properties: dict[str, str]) -> float | None:
    """The magnification of the objective.

    Args:
        properties: the file's metadata as text, by name.

    Returns:
        The magnification, such as 40; None where the file states none.
    """
    for name in ("openslide.objective-power", "tiffslide.objective-power", "aperio.AppMag"):
        power = _number(properties.get(name))
        if power and math.isfinite(power) and power > 0:
            return power
    return None


def _statements(properties: dict[str, str]) -> list[tuple[str, tuple[float, float]]]:
    found = [
        (x, (_number(properties.get(x)), _number(properties.get(y, properties.get(x))))) for x, y in _VENDOR_FIELDS
    ]
    found += [("PhysicalSizeX", _ome_mpp(properties)), ("ImageJ scale", _imagej_mpp(properties))]
    return [(name, (x, y)) for name, (x, y) in found if x is not None and y is not None]


def _unit(name: str) -> float | None:
    """µm of a unit of length, in any spelling or misspelling."""
    return _MICROMETRES.get(name.strip().casefold())


def _ome_mpp(properties: dict[str, str]) -> tuple[float | None, float | None]:
    if "ome.Name" in properties:  # the reader knows which of several images was chosen
        attributes = {name[4:]: value for name, value in properties.items() if name.startswith("ome.")}
    else:
        images = ome_images(properties.get("tiff.ImageDescription", ""))
        attributes = images[0].pixels if images else {}

    def along(axis: str) -> float | None:
        factor = _unit(attributes.get(f"PhysicalSize{axis}Unit", "µm"))
        value = _number(attributes.get(f"PhysicalSize{axis}"))
        return value * factor if factor and value is not None else None

    return along("X"), along("Y")


def _imagej_mpp(properties: dict[str, str]) -> tuple[float | None, float | None]:
    text = properties.get("tiff.ImageDescription", "")
    unit = re.search(r"^unit=(.*?)\s*$", text, re.MULTILINE) if text.startswith("ImageJ=") else None
    factor = _unit(unit[1]) if unit else None
    x, y = _number(properties.get("tiff.XResolution")), _number(properties.get("tiff.YResolution"))
    return (factor / x, factor / y) if factor and x and y else (None, None)


def _tag_mpp(properties: dict[str, str]) -> tuple[float, float] | None:
    x, y = _number(properties.get("tiff.XResolution")), _number(properties.get("tiff.YResolution"))
    unit = _TAG_MICROMETRES.get(properties.get("tiff.ResolutionUnit", "").lower())
    return (unit / x, unit / y) if unit and x and y else None


def _square(path: Path, mpp: tuple[float, float]) -> float:
    if not _alike(mpp[:1], mpp[1:], 0.05):
        raise SlideError(path, f"its pixels are not square: {mpp[0]:g} by {mpp[1]:g} µm", _OVERRIDE_HINT)
    return mpp[0] if mpp[0] == mpp[1] else math.sqrt(mpp[0] * mpp[1])


def _alike(a: tuple[float, ...], b: tuple[float, ...], tolerance: float) -> bool:
    return all(abs(p - q) <= tolerance * min(abs(p), abs(q)) for p, q in zip(a, b, strict=True))


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text.replace(",", "."))
    except ValueError:
        return None


def jumps(mpps: Mapping[str, float]) -> list[str]:
    """Find slides whose mpp is far from that of most, as where a unit was mistaken.

    Args:
        mpps: slide -> µm per pixel.

    Returns:
        One line, or nothing where all are alike or there are fewer than three slides.
    """
    values = sorted(mpps.values())
    if len(values) < 3:
        return []
    middle = values[len(values) // 2]
    far = {slide: mpp for slide, mpp in mpps.items() if not middle / 1.9 <= mpp <= middle * 1.9}
    if not far:
        return []
    some = ", ".join(f"{slide} {mpp:g}" for slide, mpp in list(far.items())[:3])
    more = f" and {len(far) - 3} more" if len(far) > 3 else ""
    return [f"mpp jumps: most slides have about {middle:g}, and {some}{more} have not: are their tiles as large?"]
