"""Finds what may be wrong with a table of slides: one line per suspicion, for a person to judge."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from histossl.evaluate.audit import CohortTable
from histossl.evaluate.columns import check_against_label
from histossl.evaluate.labels import Labels
from histossl.evaluate.sources import Source
from histossl.wsi.mpp import jumps

_LEAST = 10  # slides; in smaller tables these patterns occur by chance


def suspicions(cohort: CohortTable, twins: Iterable[tuple[str, str]] = ()) -> list[str]:
    """Find near-duplicates across patients, classes of one site or scanner, odd mpp, odd labels.

    Args:
        cohort: from `read_cohort_table`, in the order of the table.
        twins: pairs of near-duplicate slides.

    Returns:
        One line per suspicion.
    """
    slides = list(cohort.patients)
    across = [(a, b) for a, b in twins if cohort.patients.get(a, a) != cohort.patients.get(b, b)]
    found = []
    if across:
        some = ", ".join(f"{a} ~ {b}" for a, b in across[:3])
        found.append(f"{len(across)} pairs of near-duplicate slides of different patients: {some}")
    for target, classes in cohort.classes.items():
        for what, places in (("site", cohort.sites), ("scanner", cohort.scanners)):
            found += one_place(target, classes, what, places)
        found += ordered(target, [classes[slide] for slide in slides if slide in classes])
    return [*found, *jumps(cohort.mpps), *cohort.odd]


def one_place(target: str, classes: Mapping[str, str], what: str, places: Mapping[str, str]) -> list[str]:
    """Find classes whose slides are all of one site, or scanner, although the table has several.

    Args:
        target: name of the target.
        classes: slide -> class.
        what: what the places are, such as "site" or "scanner".
        places: slide -> its site or scanner, where known.

    Returns:
        One line per class.
    """
    known = {slide: places[slide] for slide in classes if slide in places}
    if len(known) < _LEAST or len(set(known.values())) < 2:
        return []
    found = []
    for name in sorted(set(classes.values())):
        here = [place for slide, place in known.items() if classes[slide] == name]
        if len(here) > 2 and len(set(here)) == 1:
            found.append(
                f"all {len(here)} slides of {target} {name!r} are of one {what}, {here[0]!r}: "
                f"a figure may tell the {what} and not the class"
            )
    return found


def ordered(target: str, labels: Sequence[str]) -> list[str]:
    """Find whether each class is one block of the table's rows, as where labels were filled in by order.

    Args:
        target: name of the target.
        labels: the classes in the order of the rows.

    Returns:
        One line, or nothing.
    """
    kinds = len(set(labels))
    blocks = 1 + sum(a != b for a, b in itertools.pairwise(labels))
    if len(labels) < _LEAST or not 2 <= kinds <= len(labels) // 4 or blocks != kinds:
        return []
    return [f"labels of {target} follow the order of the rows, each class in one block: were they filled in by order?"]


def check_columns(source: Source, labels: Labels) -> list[str]:
    """Run `check_against_label` for each target of a table of vectors.

    Args:
        source: the vectors; without names of columns nothing is checked.
        labels: the labels of its slides.

    Returns:
        One line per suspicion.
    """
    found: list[str] = []
    if not source.columns:
        return found
    name, values = next(iter(source.vectors.items()))
    row_of = {slide: k for k, slide in enumerate(source.ids)}
    for target in labels.targets:
        column = labels.table[target].dropna()
        words = column.to_numpy(dtype=str)
        try:
            truth = words.astype(np.float64)
        except ValueError:
            truth = np.unique(words, return_inverse=True)[1]
        rows = values[[row_of[slide] for slide in map(str, column.index)]]
        found += check_against_label(name, source.columns, rows, truth, target, source.named)
    return found
