"""Vectors of areas of slides: whose patient they are, and which rows of a table of labels are theirs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from histossl.core.names import barcode, folded

Areas = Mapping[str, tuple[str, str]]
"""slide_id of a vector -> its slide and its area, of the vectors that are of areas."""

AREA_COLUMNS = ("area", "roi", "region")


def areas_of(ids: Sequence[str], columns: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, str]]:
    """The areas of vectors.

    Args:
        ids: of the vectors.
        columns: what is known of them, a value each; `area` and `slide` count.

    Returns:
        As `Areas`; empty where all are of whole slides.
    """
    if not {"area", "slide"} <= set(columns):
        return {}
    found = zip(ids, columns["slide"], columns["area"], strict=True)
    return {name: (slide, area) for name, slide, area in found if area not in ("", "nan")}


def with_slides(
    areas: Areas, patients: Mapping[str, str], lent: Collection[str]
) -> tuple[dict[str, str], frozenset[str]]:
    """Patients of vectors, where the areas of a slide of an unknown patient are of one patient.

    Args:
        areas: of the vectors.
        patients: slide_id of a vector -> patient, "" where unknown.
        lent: the vectors whose patient labels may name otherwise.

    Returns:
        The patients, and the vectors whose patient labels may name.
    """
    alone = {name: barcode(slide)[0] or slide for name, (slide, _) in areas.items() if not patients.get(name)}
    return {**patients, **alone}, frozenset(lent) | set(alone)


def name_rows(rows: Mapping[int, dict[str, str]], slide_column: str, area_column: str | None, areas: Areas) -> None:
    """Give the rows of a table that name a slide and an area the name of that vector, in place.

    Args:
        rows: line -> column -> text.
        slide_column: the column of slides.
        area_column: the column of areas, None where there is none.
        areas: of the vectors.
    """
    if area_column is None or not areas:
        return
    names = {(folded(slide), folded(area)): name for name, (slide, area) in areas.items()}
    slides = {folded(slide) for slide, _ in areas.values()}
    for row in rows.values():
        slide, area = folded(row[slide_column]), folded(row[area_column])
        if slide in slides and area:  # an area that has no vector is told as a slide that has none
            row[slide_column] = names.get((slide, area), f"{row[slide_column]}@{row[area_column]}")


def spread(lines: Mapping[str, int], areas: Areas, known: Collection[str]) -> dict[str, int]:
    """The lines of vectors: what is said of a slide holds for all of its areas that no other line names.

    Args:
        lines: slide or vector -> its line.
        areas: of the vectors.
        known: the vectors that count; others of areas are left out.

    Returns:
        Slide or vector -> its line.
    """
    of_slide: dict[str, list[str]] = {}
    for name, (slide, _) in areas.items():
        of_slide.setdefault(folded(slide), []).append(name)
    found = {name: line for name, line in lines.items() if folded(name) not in of_slide}
    named = {folded(name) for name in found}
    for slide, line in lines.items():
        found |= {name: line for name in of_slide.get(folded(slide), ()) if folded(name) not in named}
    others = {folded(name) for name in areas} - {folded(name) for name in known}
    return {name: line for name, line in found.items() if folded(name) not in others}
