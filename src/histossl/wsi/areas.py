"""The user's own areas of a slide: outlines in files and mask images, in place of all of its tissue."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histossl.core.atomic import whole_buffer
from histossl.core.config import check_choice, fingerprint, to_dict
from histossl.core.errors import LabelError, SettingsError, SlideError
from histossl.core.names import folded
from histossl.wsi.area_shapes import GEOJSON, TABLES, paint_outlines

if TYPE_CHECKING:
    from histossl.wsi.slide import Slide
    from histossl.wsi.tissue import TissueMask

MISSING = ("refuse", "whole", "skip")
OUTLINES, MASKS = (*GEOJSON, *TABLES), (".png", ".tif", ".tiff")
_FINEST = 2048  # pixels of the longer side of the picture that areas are painted into


@dataclass(frozen=True)
class AreaSettings:
    """Which of the user's areas count, and what happens to slides without any.

    Attributes:
        include: names of the classes that count; by default all that `exclude` does not name. In mask images these are
            the values of pixels; by default all but 0.
        exclude: names of the classes that are cut out of the others, or of the whole slide where it has no others.
        missing: what happens to slides without a file: refuse, whole (all of their tissue) or skip.
        each: whether each class has its own tiles and its own vector; else a slide has one, of the union of its areas.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ("exclude", "ignore*")
    missing: str = "refuse"
    each: bool = False

    def __post_init__(self) -> None:
        check_choice("area missing", self.missing, MISSING)


@dataclass(frozen=True)
class SlideAreas:
    """The files of one slide's areas; their union counts, or one class of them.

    Attributes:
        files: of outlines, and mask images.
        settings: which of their areas count.
        only: the class that counts alone, "" for areas without one; None for all that the settings choose.
        note: what is to be said of these areas.
    """

    files: tuple[Path, ...]
    settings: AreaSettings = field(default_factory=AreaSettings)
    only: str | None = None
    note: str = ""

    @property
    def include(self) -> tuple[str, ...]:
        """The classes that count; empty for all that are not excluded."""
        return self.settings.include if self.only is None else (self.only,)

    @property
    def area(self) -> str:
        """What the one class is called in a row of its own; "" for all."""
        return "" if self.only is None else self.only or "area"

    @property
    def made(self) -> str:
        """The fingerprint of the files' contents and of all settings.

        Raises:
            LabelError: a file cannot be read.
        """
        try:
            contents = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in self.files)
        except OSError as error:
            raise LabelError(f"{error.filename}: cannot be read ({error.strerror})") from error
        return fingerprint(self.settings, contents, *([] if self.only is None else [self.only]))


class AreaFolder:
    """A folder of areas: a file belongs to the slide whose name its own begins with.

    `a.geojson`, `a.svs.geojson`, `a-margin.geojson` and `a_2.png` are of the slide `a`, unless slides have these longer
    names.

    Args:
        folder: of the files; its subfolders count.
        settings: which areas count.

    Raises:
        SettingsError: there is no such folder, or it has no file of areas.
    """

    def __init__(self, folder: Path, settings: AreaSettings) -> None:
        self.folder, self.settings = folder, settings
        if not folder.is_dir():
            raise SettingsError(f"{folder}: is no folder of areas", "give a folder of outlines or mask images, or grid")
        found = (Path(root) / name for root, _, names in os.walk(folder) for name in sorted(names))
        self._files = [path for path in found if path.name.lower().endswith((*OUTLINES, *MASKS))]
        self._files = sorted(path for path in self._files if not path.name.startswith("."))
        if not self._files:
            raise SettingsError(f"{folder}: holds no areas", f"endings are {', '.join((*OUTLINES, *MASKS))}")

    @property
    def told(self) -> dict[str, Any]:
        """The settings as a study writes them down."""
        return to_dict(self.settings)

    def of(self, names: Iterable[str]) -> tuple[dict[str, SlideAreas], list[str]]:
        """Find the files of slides.

        Args:
            names: of all slides, without ending.

        Returns:
            The areas of each slide that has any, by name; and the names of files that are of no slide.
        """
        by_name = {folded(name): name for name in names}
        files: dict[str, list[Path]] = {}
        strangers = []
        for path in self._files:
            text = folded(path.name)
            starts = (text[:k] for k in range(len(text), 0, -1) if k == len(text) or text[k] in "-_. ")
            name = next((by_name[start] for start in starts if start in by_name), None)
            if name is None:
                strangers.append(path.name)
            else:
                files.setdefault(name, []).append(path)
        return {name: SlideAreas(tuple(own), self.settings) for name, own in files.items()}, strangers

    def lacking(self, name: str) -> str:
        """What is wrong with a slide that has no file.

        Args:
            name: of the slide.

        Returns:
            The complaint and what to do.
        """
        what = f"has no area: no file in {self.folder} begins with {name!r}"
        return f"{what}; add one, or choose --area.missing whole or skip"

    def chosen(self, paths: Sequence[Path]) -> dict[Path, SlideAreas | None]:
        """The slides that count: those that have areas, and with `missing` at whole the others, too.

        Args:
            paths: of all slides.

        Returns:
            Path -> its areas, None where all of its tissue counts; slides that are skipped are left out.

        Raises:
            SettingsError: slides without a file are refused; or no slide is left.
        """
        given, _ = self.of(path.stem for path in paths)
        lacking = [path for path in paths if path.stem not in given]
        if lacking and self.settings.missing == "refuse":
            more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
            raise SettingsError(f"{lacking[0].name}{more} {self.lacking(lacking[0].stem)}")
        if not given:
            raise SettingsError(f"{self.folder}: none of its files is of one of {len(paths)} slides", "see their names")
        return {path: given.get(path.stem) for path in paths if path not in lacking or self.settings.missing == "whole"}


def restrict(mask: TissueMask, slide: Slide, areas: SlideAreas) -> TissueMask:
    """The part of a slide's tissue that lies inside its areas.

    Args:
        mask: the tissue.
        slide: the slide.
        areas: its areas.

    Returns:
        The tissue inside, of as many pixels as the tissue's mask or an integer multiple.

    Raises:
        SlideError: the areas do not fit the slide, or hold no tissue; the message names the file.
    """
    finer = max(1, -(-_FINEST // max(mask.mask.shape)))
    tissue = mask.mask.repeat(finer, 0).repeat(finer, 1)
    counted, cut = np.zeros((2, *tissue.shape), bool)
    found, classes = False, set[str]()
    for path in areas.files:
        read = _of_image if path.name.lower().endswith(MASKS) else paint_outlines
        inside, outside, named = read(path, slide, areas.include, areas.settings.exclude, tissue)
        cut |= outside
        classes |= named
        if inside is not None:
            counted, found = counted | inside, True
    names = ", ".join(path.name for path in areas.files[:3])
    if areas.include and not found:
        there = ", ".join(sorted(name or "areas without a class" for name in classes)[:5])
        what = f"{names}: no area of the class {', '.join(areas.include)}, only {there}"
        raise SlideError(slide.path, what, "name them in --area.include")
    drawn = counted & ~cut if found else ~cut
    kept = tissue & drawn
    if not kept.any():
        raise SlideError(slide.path, f"there is no tissue inside the areas of {names}", "are they of this slide?")
    return replace(mask, mask=kept, areas=drawn)


_DRAWN = 128  # of 255, in the picture of areas: inside them, but no tissue


def write_inside(path: Path, mask: TissueMask) -> None:
    """Write the picture of a slide's areas and of the tissue inside, whole or absent.

    Args:
        path: the PNG; white where there is tissue, grey in the rest of the areas, black outside.
        mask: from `restrict`.

    Raises:
        OSError: it cannot be written.
    """
    assert mask.areas is not None
    values = np.where(mask.mask, 255, np.where(mask.areas, _DRAWN, 0)).astype(np.uint8)
    with whole_buffer(path) as file:
        Image.fromarray(values).save(file, format="PNG")


def read_inside(path: Path) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Read what `write_inside` wrote.

    Args:
        path: the PNG.

    Returns:
        (h, w) the areas, and (h, w) the tissue inside.

    Raises:
        LabelError: it is no image.
    """
    values = read_mask(path)
    return values != 0, values > _DRAWN


def _of_image(
    path: Path, slide: Slide, include: Sequence[str], exclude: Sequence[str], tissue: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_], set[str]]:
    """The pixels of a mask image that count, None where it has none; those that are cut out; and all values."""
    try:
        values = read_mask(path)
    except LabelError as error:
        raise SlideError(slide.path, error.what, error.hint) from error
    _check_aspect(path, slide, *values.shape[::-1])
    out = np.isin(values, _numbers(exclude))
    chosen = np.isin(values, _numbers(include)) if include else (values != 0) & ~out
    if not values.any():
        raise SlideError(slide.path, f"{path.name}: all of the mask is 0, so nothing counts", "draw the areas in white")
    inside, cut = (_resized(part, tissue.shape) for part in (chosen & ~out, out))
    return (inside if chosen.any() else None), cut, {str(value) for value in np.unique(values)}


def read_mask(path: Path) -> NDArray:
    """Read a mask image.

    Args:
        path: a PNG or TIFF; colours count by their brightness.

    Returns:
        (h, w) integers.

    Raises:
        LabelError: it is no image.
    """
    try:
        with Image.open(path) as opened:
            colours = opened.mode not in ("1", "L", "P", "I", "I;16", "I;16B")
            return np.asarray(opened.convert("RGB").convert("L") if colours else opened)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise LabelError(f"{path.name}: is no mask image ({error})", "give a PNG or TIFF") from error


def _check_aspect(path: Path, slide: Slide, width: int, height: int) -> None:
    expected = width * slide.size.height / slide.size.width
    if abs(height - expected) > max(1.5, 0.01 * expected):
        what = (
            f"{path.name}: a mask of {width} x {height} pixels has another shape than the slide of "
            f"{slide.size.width} x {slide.size.height}"
        )
        raise SlideError(slide.path, what, f"at this width it would be {expected:.0f} pixels high")


def _numbers(names: Sequence[str]) -> list[int]:
    return [int(name) for name in names if name.isascii() and name.isdigit()]


def _resized(mask: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Each pixel's value at its centre."""
    rows, columns = (((np.arange(n) + 0.5) * old / n).astype(int) for n, old in zip(shape, mask.shape, strict=True))
    return mask[np.ix_(rows, columns)]
