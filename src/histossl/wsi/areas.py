"""The user's own areas of a slide: annotations of QuPath and mask images, in place of all of its tissue."""

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

from histossl.core.config import check_choice, fingerprint
from histossl.core.errors import LabelError, SettingsError, SlideError
from histossl.core.names import folded
from histossl.wsi.geojson import read_features

if TYPE_CHECKING:
    from histossl.wsi.slide import Slide
    from histossl.wsi.tissue import TissueMask

MISSING = ("refuse", "whole", "skip")
_OUTLINES, _MASKS = (".geojson", ".geojson.gz", ".json", ".json.gz"), (".png", ".tif", ".tiff")
_NO_AREAS = ("detection", "cell", "tile")  # objects of QuPath
_FINEST = 2048  # pixels of the longer side of the picture that areas are painted into
_OUTSIDE = 0.1  # share of the areas that may lie outside of the slide: a hand draws over its edge


@dataclass(frozen=True)
class AreaSettings:
    """Which of the user's areas count, and what happens to slides without any.

    Attributes:
        include: names of the classes that count; by default all that `exclude` does not name. In mask images these are
            the values of pixels; by default all but 0.
        exclude: names of the classes that are cut out of the others; of a slide that has no others they are cut out of
            the whole slide.
        missing: what happens to slides without a file: refuse, whole (all of their tissue) or skip.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ("exclude", "ignore*")
    missing: str = "refuse"

    def __post_init__(self) -> None:
        check_choice("area missing", self.missing, MISSING)


@dataclass(frozen=True)
class SlideAreas:
    """The files of one slide's areas; their union counts.

    Attributes:
        files: GeoJSON files and mask images.
        settings: which of their areas count.
    """

    files: tuple[Path, ...]
    settings: AreaSettings = field(default_factory=AreaSettings)

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
        return fingerprint(self.settings, contents)


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
            raise SettingsError(f"{folder}: is no folder of areas", "give a folder of GeoJSON files or mask images")
        found = (Path(root) / name for root, _, names in os.walk(folder) for name in sorted(names))
        self._files = [path for path in found if path.name.lower().endswith((*_OUTLINES, *_MASKS))]
        self._files = sorted(path for path in self._files if not path.name.startswith("."))
        if not self._files:
            raise SettingsError(f"{folder}: holds no areas", f"endings are {', '.join((*_OUTLINES, *_MASKS))}")

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
        read = _of_image if path.name.lower().endswith(_MASKS) else _of_outlines
        inside, outside, named = read(path, slide, areas.settings, tissue)
        cut |= outside
        classes |= named
        if inside is not None:
            counted, found = counted | inside, True
    names = ", ".join(path.name for path in areas.files[:3])
    if areas.settings.include and not found:
        there = ", ".join(sorted(name or "areas without a class" for name in classes)[:5])
        what = f"{names}: no area of the class {', '.join(areas.settings.include)}, only {there}"
        raise SlideError(slide.path, what, "name them in --area.include")
    kept = tissue & counted & ~cut if found else tissue & ~cut
    if not kept.any():
        raise SlideError(slide.path, f"there is no tissue inside the areas of {names}", "are they of this slide?")
    return replace(mask, mask=kept)


def _of_outlines(
    path: Path, slide: Slide, settings: AreaSettings, tissue: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_], set[str]]:
    """The pixels of the areas that count, None where the file has none; of those that are cut out; and all classes."""
    shapes, classes = _read(path, slide)
    names = np.array([folded(name) for name in classes])
    out = np.isin(names, [folded(name) for name in settings.exclude])
    chosen = np.isin(names, [folded(name) for name in settings.include]) & ~out if settings.include else ~out
    _check_place(path, slide, shapes)
    scale = np.array([tissue.shape[1] / slide.size.width, tissue.shape[0] / slide.size.height])
    cut = _painted(shapes[out], scale, tissue.shape)
    if not chosen.any():
        return None, cut, set(classes)
    inside = _painted(shapes[chosen], scale, tissue.shape)
    _check_unit(path, slide, inside, shapes[chosen], tissue)
    return inside, cut, set(classes)


def _read(path: Path, slide: Slide) -> tuple[NDArray, list[str]]:
    """The polygons of a GeoJSON in level-0 pixels, and their classes."""
    import shapely

    shapes: list[Any] = []
    classes: list[str] = []
    try:
        for feature in read_features(path):
            about = feature.get("properties") or {}
            kind = str(about.get("objectType") or about.get("object_type") or "").lower()
            if kind in _NO_AREAS or about.get("isMissing") or not feature.get("geometry"):
                continue
            shape = shapely.geometry.shape(feature["geometry"])
            # Part by part, since parts may overlap; a ring that crosses itself is all of its own parts.
            parts = shapely.get_parts(shapely.get_parts(shapely.make_valid(shapely.get_parts(shape))))
            parts = parts[(shapely.get_type_id(parts) == shapely.GeometryType.POLYGON) & ~shapely.is_empty(parts)]
            shapes += parts.tolist()
            classes += [_class_of(about)] * len(parts)
    except LabelError as error:
        raise SlideError(slide.path, error.what, error.hint) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, shapely.errors.ShapelyError) as error:
        raise SlideError(slide.path, f"{path.name}: is no GeoJSON of areas ({error})", "export it anew") from error
    if not shapes:
        raise SlideError(slide.path, f"{path.name}: holds no area", "draw annotations (no points, no cells) and export")
    polygons = np.empty(len(shapes), object)
    polygons[:] = shapes
    return polygons, classes


def _class_of(about: dict[str, Any]) -> str:
    """The class of an annotation, else its name."""
    found = about.get("classification") or about.get("name") or ""
    if isinstance(found, dict):
        found = found.get("name") or found.get("names") or ""
    return ": ".join(map(str, found)) if isinstance(found, list) else str(found)


def _check_place(path: Path, slide: Slide, shapes: NDArray) -> None:
    """Refuse areas that lie outside of the slide: they are of another slide, or in another unit."""
    import shapely

    x, y = shapely.total_bounds(shapes)[2:]
    width, height = slide.size.width, slide.size.height
    hint = "export them from this slide, in pixels of its level 0"
    if max(x, y) <= 1.5 < min(width, height) / 10:
        raise SlideError(slide.path, f"{path.name}: all coordinates lie within the first pixel", hint)
    inside = shapely.area(shapely.clip_by_rect(shapes, 0, 0, width, height)).sum()
    total = shapely.area(shapes).sum()
    if not inside >= (1 - _OUTSIDE) * total > 0:
        what = (
            f"{path.name}: {1 - inside / max(total, 1e-9):.0%} of its areas lie outside of the slide of {width} x "
            f"{height} pixels (they reach to x = {x:.0f}, y = {y:.0f})"
        )
        raise SlideError(slide.path, what, hint)


def _check_unit(
    path: Path, slide: Slide, inside: NDArray[np.bool_], shapes: NDArray, tissue: NDArray[np.bool_]
) -> None:
    """Refuse areas in µm: as pixels they lie on glass, and as µm on tissue."""
    import shapely

    share = (tissue & inside).sum() / max(1, inside.sum())
    x, y = shapely.total_bounds(shapes)[2:] / slide.mpp
    if share > 0.1 or x > slide.size.width * 1.02 or y > slide.size.height * 1.02:
        return
    scale = np.array([tissue.shape[1] / slide.size.width, tissue.shape[0] / slide.size.height]) / slide.mpp
    other = _painted(shapes, scale, tissue.shape)
    if (tissue & other).sum() > 0.5 * other.sum():
        what = f"{path.name}: its coordinates seem to be in µm: as such they lie on tissue, as pixels on glass"
        raise SlideError(slide.path, what, "export them in pixels of level 0")


def _painted(shapes: NDArray, scale: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The pixels whose centres lie in any of the polygons."""
    from skimage.draw import polygon

    inside = np.zeros(shape, bool)
    for area in shapes:
        ring = np.asarray(area.exterior.coords)[:, :2] * scale - 0.5
        if not area.interiors:
            inside[polygon(ring[:, 1], ring[:, 0], shape)] = True
            continue
        low = np.clip(np.floor(ring.min(0)).astype(int), 0, None)
        high = np.clip(np.ceil(ring.max(0)).astype(int) + 1, low, shape[::-1])
        part = np.zeros((high - low)[::-1], bool)
        part[polygon(ring[:, 1] - low[1], ring[:, 0] - low[0], part.shape)] = True
        for hole in area.interiors:
            ring = np.asarray(hole.coords)[:, :2] * scale - 0.5 - low
            part[polygon(ring[:, 1], ring[:, 0], part.shape)] = False
        inside[low[1] : high[1], low[0] : high[0]] |= part
    return inside


def _of_image(
    path: Path, slide: Slide, settings: AreaSettings, tissue: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_], set[str]]:
    """The pixels of a mask image that count, None where it has none; those that are cut out; and all values."""
    try:
        with Image.open(path) as opened:
            _check_aspect(path, slide, *opened.size)
            colours = opened.mode not in ("1", "L", "P", "I", "I;16", "I;16B")
            values = np.asarray(opened.convert("RGB").convert("L") if colours else opened)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SlideError(slide.path, f"{path.name}: is no mask image ({error})", "give a PNG or TIFF") from error
    out = np.isin(values, _numbers(settings.exclude))
    chosen = np.isin(values, _numbers(settings.include)) if settings.include else (values != 0) & ~out
    if not values.any():
        raise SlideError(slide.path, f"{path.name}: all of the mask is 0, so nothing counts", "draw the areas in white")
    inside, cut = (_resized(part, tissue.shape) for part in (chosen & ~out, out))
    return (inside if chosen.any() else None), cut, {str(value) for value in np.unique(values)}


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
