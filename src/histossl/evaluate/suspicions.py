"""What a table of slides looks as if something were wrong with it: one line a suspicion, for a person to judge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from histossl.evaluate.audit import Cohort
from histossl.mpp import jumps

_LEAST = 10  # slides of a table, below which chance does all of this


def suspicions(cohort: Cohort, twins: Iterable[tuple[str, str]] = ()) -> list[str]:
    """Near-duplicates across patients, classes of one site or scanner, mpp that jumps, labels that follow the rows.

    Args:
        cohort: from `read_cohort`, in the order of the table.
        twins: pairs of near-duplicate slides.
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
    return found + jumps(cohort.mpps)


def one_place(target: str, classes: Mapping[str, str], what: str, places: Mapping[str, str]) -> list[str]:
    """Classes all slides of which are of one site, or scanner, where there are several of these."""
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
    """Whether each class stands in one block of the table's rows, as where labels were filled in by order."""
    kinds = len(set(labels))
    blocks = 1 + sum(a != b for a, b in zip(labels, labels[1:], strict=False))
    if len(labels) < _LEAST or not 2 <= kinds <= len(labels) // 4 or blocks != kinds:
        return []
    return [f"labels of {target} follow the order of the rows, each class in one block: were they filled in by order?"]
