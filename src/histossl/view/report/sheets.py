"""Sheets of examples for the report: slides that are alike, heatmaps, nuclei; of each a few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histossl.core import tables

ROWS, HITS, PICTURES = 4, 4, 8


@dataclass(frozen=True)
class Picture:
    """A picture file, its caption, and a second line under it."""

    path: Path
    caption: str
    note: str = ""


@dataclass(frozen=True)
class Sheet:
    """Pictures side by side under a heading; those whose files are not there are passed over.

    Attributes:
        title: the heading.
        text: under it.
        pictures: in order.
        layout: "rows" of five, "wide" pictures, or "" for small ones.
        part: shows of each picture only its richest part, as large as it is: of what whole is too small to see.
    """

    title: str
    text: str
    pictures: Sequence[Picture]
    layout: str = ""
    part: bool = False


def hits_sheet(
    vectors: NDArray, ids: Sequence[str], patients: Mapping[str, str], pictures: Mapping[str, Path]
) -> Sheet | None:
    """Some slides, each followed by the slides of other patients most like it; None of fewer than three slides.

    Args:
        vectors: (N, d) finite.
        ids: N slide ids.
        patients: slide id -> patient, "" or absent where unknown: then a slide is a patient of its own.
        pictures: slide id -> file.
    """
    from histossl.evaluate.search import nearest

    if len(ids) < 3:
        return None
    people = np.array([patients.get(name) or name for name in ids], object)
    shown = []
    for row in np.unique(np.linspace(0, len(ids) - 1, ROWS).astype(int)).tolist():
        found = nearest(vectors, people, row, HITS)
        listed = [(row, "asked for"), *((hit.row, f"{hit.similarity:.2f}") for hit in found)]
        named = [(str(ids[k]), note) for k, note in listed]
        shown += [Picture(pictures[name], name, note) for name, note in named if name in pictures]
    others = "slides of other patients" if any(patients.values()) else "slides"
    text = (
        f"Each slide that was asked for, then the {others} most like it, with their similarity: "
        "0 is what two slides of the cohort have by chance."
    )
    return Sheet("What is alike", text, shown, "rows")


def heatmaps_sheet(study: Path) -> Sheet | None:
    """Of each target some of what `histossl heatmap` wrote."""
    folders = sorted(folder for folder in (study / "heatmaps").glob("*") if folder.is_dir())
    each = max(1, PICTURES // max(1, len(folders)))
    shown = [
        Picture(path, path.stem, folder.name)
        for folder in folders
        for path in _some(sorted(folder.glob("*.png")), each)
    ]
    text = "What each tile adds to the score of the likeliest class: red speaks for it, blue against."
    return Sheet("What the classifier looked at", text, shown, "wide") if shown else None


def nuclei_sheet(study: Path) -> Sheet | None:
    """Some of the overlays that `histossl nuclei segment` wrote into the study, with their counts."""
    folder, ending = study / "nuclei", "-overlay.jpg"
    found = _some(sorted(folder.glob(f"*{ending}")), PICTURES)
    if not found:
        return None
    counts: dict[str, str] = {}
    if (folder / "nuclei.csv").exists():
        rows = tables.read_rows(folder / "nuclei.csv")
        counts = {Path(row.get("file", "")).stem: row.get("nuclei", "") for row in rows}
    names = [path.name.removesuffix(ending) for path in found]
    notes = [f"{int(counts[name]):,} nuclei" if counts.get(name, "").isdecimal() else "" for name in names]
    shown = [Picture(path, name, note) for path, name, note in zip(found, names, notes, strict=True)]
    return Sheet("Nuclei", "As they were found, without labels; of each slide a part.", shown, "wide", part=True)


def _some(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count`, evenly from first to last."""
    if len(paths) <= count:
        return list(paths)
    return [paths[k] for k in np.linspace(0, len(paths) - 1, count).astype(int)]
