"""The areas of a slide by name, for a vector each: the classes in the user's files, or the cores of a microarray."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from histossl.core.config import fingerprint, to_dict
from histossl.core.errors import HistosslError, SlideError
from histossl.core.names import folded
from histossl.wsi.area_shapes import read_outlines
from histossl.wsi.areas import MASKS, AreaFolder, AreaSettings, SlideAreas, read_mask
from histossl.wsi.cores import find_cores, read_made, write_cores
from histossl.wsi.slide import open_slide, slide_state
from histossl.wsi.tissue import TissueSettings, find_tissue

GRID = "grid"  # as `--areas grid`; a folder of this name is ./grid
_MOST_VALUES = 64  # of a mask image; more are grey edges, not classes
_OVERLAP = 0.01  # of an area; less is the width of a drawn line


class CoreGrid:
    """Given in the place of a folder of areas: the cores of tissue microarrays, an area each.

    Args:
        settings: whose `each` is true whatever it says; nothing is included or excluded by name.
    """

    def __init__(self, settings: AreaSettings) -> None:
        self.settings = replace(settings, each=True, missing="refuse")

    @property
    def told(self) -> dict[str, Any]:
        """The settings as a study writes them down."""
        return {"cores": True, **to_dict(self.settings)}


def open_areas(areas: Path | None, settings: AreaSettings) -> AreaFolder | CoreGrid | None:
    """What `--areas` names: a folder, or `grid` for the cores of microarrays.

    Args:
        areas: as given; None for all tissue.
        settings: which areas count.

    Raises:
        SettingsError: there is no such folder, or it has no file of areas.
    """
    if areas is None:
        return None
    return CoreGrid(settings) if str(areas) == GRID else AreaFolder(areas, settings)


@dataclass(frozen=True)
class NameJob:
    """What a worker needs to name the areas of a slide.

    Attributes:
        path: the slide.
        areas: its files; None for the cores of a tissue microarray.
        mpp, mpp_default: as of `open_slide`.
        tissue: how tissue is found.
        cores: the GeoJSON that the cores are written to.
    """

    path: Path
    areas: SlideAreas | None
    mpp: float | None = None
    mpp_default: float | None = None
    tissue: TissueSettings = TissueSettings()
    cores: Path = Path()


def name_areas(job: NameJob) -> dict[str, SlideAreas]:
    """Find the areas of a slide that get a vector each.

    Args:
        job: the slide and its files.

    Returns:
        Class -> the area that it is, in the order in which they are first written; "" for areas without a class. Empty
        where the files only cut areas out.

    Raises:
        SlideError: a file cannot be read, none of its classes is asked for, or there are no cores in a grid.
    """
    areas = job.areas or SlideAreas((_cores_of(job),), AreaSettings(each=True))
    try:
        shapes = [read_outlines(path) for path in areas.files if not path.name.lower().endswith(MASKS)]
        values = [_values_of(path, areas.settings) for path in areas.files if path.name.lower().endswith(MASKS)]
    except HistosslError as error:
        raise SlideError(job.path, error.what, error.hint) from error
    found = dict.fromkeys(name for names in (*(kinds for _, kinds in shapes), *values) for name in names)
    out, wanted = ({folded(name) for name in names} for names in (areas.settings.exclude, areas.settings.include))
    names = {folded(name): name for name in found if folded(name) not in out}
    if wanted and names and not wanted & set(names):
        what = f"{', '.join(path.name for path in areas.files[:3])}: no area of the class "
        what += f"{', '.join(areas.settings.include)}, only {', '.join(sorted(names.values())[:5])}"
        raise SlideError(job.path, what, "name them in --area.include")
    kept = [name for key, name in names.items() if not wanted or key in wanted]
    notes = _overlaps(shapes, kept) if job.areas else {}
    return {name: replace(areas, only=name, note=notes.get(name, "")) for name in kept}


def area_ids(slide_id: str, names: Sequence[str]) -> dict[str, str]:
    """Name what is made of each area, such as `a@tumour`; names in files are data, and no paths.

    Args:
        slide_id: the slide.
        names: of its areas, each once.

    Returns:
        Area -> slide_id of its row; the part behind the `@` holds no other one.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        plain = re.sub(r"[^\w.+ -]+", "-", name).strip(". -")[:60] or "area"
        text, number = plain, 1
        while folded(text) in taken:
            number += 1
            text = f"{plain}-{number}"
        taken.add(folded(text))
        found[name] = f"{slide_id}@{text}"
    return found


def slide_of(slide_id: str, area: str) -> str:
    """The slide of a row of slides.csv.

    Args:
        slide_id: of the row.
        area: of the row, "" for a whole slide.
    """
    return (slide_id.rpartition("@")[0] if area else "") or slide_id


def _cores_of(job: NameJob) -> Path:
    """The GeoJSON of the cores, written anew where the slide or the settings are others than those that made it."""
    with open_slide(job.path, job.mpp, job.mpp_default) as slide:
        made = fingerprint(slide_state(job.path), slide.mpp, job.tissue)
        if read_made(job.cores) != made:
            write_cores(job.cores, find_cores(slide, find_tissue(slide, job.tissue)), made)
    return job.cores


def _values_of(path: Path, settings: AreaSettings) -> list[str]:
    values = [str(value) for value in np.unique(read_mask(path)) if value]
    if len(values) > _MOST_VALUES and not settings.include:
        what = f"{path.name}: has {len(values)} values, which are too many for classes"
        raise SlideError(path, what, "save it without soft edges, or name the values: --area.include")
    return values


def _overlaps(shapes: Sequence[tuple[np.ndarray, list[str]]], names: Sequence[str]) -> Mapping[str, str]:
    """What is to be said of areas that share ground with others: their tiles count in both."""
    import shapely

    if not shapes or len(names) < 2:
        return {}
    every = np.concatenate([polygons for polygons, _ in shapes])
    kinds = np.array([folded(kind) for _, own in shapes for kind in own])
    unions = {name: shapely.union_all(every[kinds == folded(name)]) for name in names}
    notes: dict[str, str] = {}
    for name, own in unions.items():
        shares = {
            other: shapely.intersection(own, its).area / max(own.area, 1e-9)
            for other, its in unions.items()
            if other != name
        }
        told = [f"{share:.0%} with {other}" for other, share in shares.items() if share >= _OVERLAP]
        if told:
            notes[name] = f"shares ground with other areas ({', '.join(told)}): tiles there count in each"
    return notes
