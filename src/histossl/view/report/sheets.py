"""Sheets of example pictures for the report: similar slides, heatmaps, nuclei."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histossl.core import tables

HEATMAPS = "What the classifier looked at"
ROWS, HITS, PICTURES = 4, 4, 8  # query slides, similar slides of each; pictures in the other sheets


@dataclass(frozen=True)
class Picture:
    """A picture file, its caption, and a second line under it."""

    path: Path
    caption: str
    note: str = ""


@dataclass(frozen=True)
class Sheet:
    """Pictures side by side under a heading; pictures whose files are absent are left out.

    Attributes:
        title: the heading.
        text: the text under it.
        pictures: the pictures, in order.
        layout: "rows" of five, "wide" pictures, or "" for small ones.
        part: whether to show only the most detailed part of each picture, at full resolution.
    """

    title: str
    text: str
    pictures: Sequence[Picture]
    layout: str = ""
    part: bool = False


def hits_sheet(
    vectors: NDArray, ids: Sequence[str], patients: Mapping[str, str], pictures: Mapping[str, Path]
) -> Sheet | None:
    """Some query slides, each followed by the most similar slides of other patients.

    Args:
        vectors: (N, d) finite.
        ids: N slide ids.
        patients: slide id -> patient, "" or absent where unknown: then a slide is a patient of its own.
        pictures: slide id -> picture file.

    Returns:
        The sheet; None for fewer than three slides.
    """
    from histossl.evaluate.search import nearest

    if len(ids) < 3:
        return None
    people = np.array([patients.get(name) or name for name in ids], object)
    shown = []
    for row in np.unique(np.linspace(0, len(ids) - 1, ROWS).astype(int)).tolist():
        found = nearest(vectors, people, row, HITS)
        listed = [(row, "query"), *((hit.row, f"{hit.similarity:.2f}") for hit in found)]
        named = [(str(ids[k]), note) for k, note in listed]
        shown += [Picture(pictures[name], name, note) for name, note in named if name in pictures]
    others = "slides of other patients" if any(patients.values()) else "slides"
    text = (
        f"Each query slide, then the {others} most similar to it, with their similarity: "
        "0 is the similarity that two slides of the cohort have by chance."
    )
    return Sheet("Similar slides", text, shown, "rows")


def heatmaps_sheet(study: Path) -> Sheet | None:
    """Some heatmaps of each target.

    Args:
        study: folder of the study; `histossl heatmap` writes into its subfolder `heatmaps`.

    Returns:
        The sheet; None where there are no heatmaps.
    """
    folders = sorted(folder for folder in (study / "heatmaps").glob("*") if folder.is_dir())
    each = max(1, PICTURES // max(1, len(folders)))
    shown = [
        Picture(path, path.stem, folder.name)
        for folder in folders
        for path in _some(sorted(folder.glob("*.png")), each)
    ]
    text = "What each tile adds to the score of the likeliest class: red speaks for it, blue against."
    return Sheet(HEATMAPS, text, shown, "wide") if shown else None


def nuclei_sheet(study: Path) -> Sheet | None:
    """Some overlays of nuclei, with their counts.

    Args:
        study: folder of the study; `histossl nuclei segment` writes into its subfolder `nuclei`.

    Returns:
        The sheet; None where there are no overlays.
    """
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
    return Sheet("Nuclei", "As found without labels; a part of each slide.", shown, "wide", part=True)


def _some(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count` paths, evenly spaced from first to last."""
    if len(paths) <= count:
        return list(paths)
    return [paths[k] for k in np.linspace(0, len(paths) - 1, count).astype(int)]
