"""Finds leaks of a split: patients on both sides, and slides that are there twice."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

from histossl.core.errors import LabelError
from histossl.core.names import barcode, listed, spelling_notes, spellings, zero_suspicions
from histossl.core.tables import number, read_table
from histossl.evaluate.classes import known_name, odd_classes, read_classes
from histossl.evaluate.labels import (
    PATIENT_COLUMNS,
    SCANNER_COLUMNS,
    SITE_COLUMNS,
    SLIDE_COLUMNS,
    find_column,
    unique_lines,
)
from histossl.evaluate.split_files import SIDES, Split

BEYOND = 0.9  # Cramér's V above which site and class are one
IN_PART = 0.5  # above which the site tells most of the class: of two even classes, that of three patients in four


def audit_line(
    slides: Sequence[str],
    patients: np.ndarray,
    balance: str,
    folds: np.ndarray,
    vectors: Iterable[np.ndarray],
    sites: np.ndarray | None = None,
    seen: Collection[str] | None = None,
) -> str:
    """Describe a split in one line: sizes, classes, patients and sites on both sides, near-duplicates.

    Args:
        slides: N names.
        patients: (N,) patient of each slide.
        balance: the classes and their sizes, as text.
        folds: (repeats, N) the fold in which each slide is tested.
        vectors: (N, d) each; a pair of near-duplicates counts where any of them finds it.
        sites: (N,) site of each slide, where known.
        seen: slides that the slide encoder was trained on without labels, where known.

    Returns:
        The line.
    """
    patient = np.unique(patients, return_inverse=True)[1]
    pairs = sorted({pair for values in vectors for pair in near_duplicates(values)})
    pairs = [(a, b) for a, b in pairs if patient[a] != patient[b]]
    some = ", ".join(f"{slides[a]} ~ {slides[b]}" for a, b in pairs[:3])
    notes = [
        f"{len(slides)} slides of {patient.max() + 1} patients ({balance})",
        f"{_straddling(patients, folds) or 'no'} patients on both sides of a fold",
    ]
    if sites is not None:
        of = len(np.unique(sites))
        notes.append(f"{_straddling(sites, folds) or 'none'} of {of} sites on both sides")
    notes.append(
        f"{len(pairs)} pairs of near-duplicate slides of different patients ({some})" if pairs else "no near-duplicates"
    )
    if seen is not None:
        count = len(set(slides) & set(seen))
        notes.append(f"the label-free pretraining used {count or 'none'} of the slides")
    return "; ".join(notes)


def confounding(classes: NDArray, sites: NDArray) -> str:
    """Say how much the site alone tells of the class.

    Args:
        classes: (N,) the class of each slide.
        sites: (N,) its site.

    Returns:
        A sentence with Cramér's V, in [0, 1]; above .9 it begins with CONFOUNDED, and with CONFOUNDED IN PART above
        .5, more than what so many sites of so few slides have by chance.
    """
    counts = pd.crosstab(classes, sites).to_numpy(np.float64)
    expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0) / counts.sum()
    least = min(counts.shape) - 1
    v = float(np.sqrt(((counts - expected) ** 2 / expected).sum() / counts.sum() / least)) if least else 0.0
    by_chance = (counts.shape[0] - 1) * (counts.shape[1] - 1) / counts.sum() / max(1, least)  # of V squared
    if v > BEYOND:
        return (
            f"CONFOUNDED with the site (Cramér's V {v:.2f}): each site has almost one class, so that no model and no "
            "remedy can part the two"
        )
    if v**2 - by_chance > IN_PART**2:
        return (
            f"CONFOUNDED IN PART with the site (Cramér's V {v:.2f}): what takes out the site takes most of the class "
            "with it, so that the figure to believe is that of whole sites held out, without a remedy"
        )
    return f"class and site go together with Cramér's V {v:.2f}"


def _straddling(groups: np.ndarray, folds: np.ndarray) -> int:
    """How many groups (N,) have slides in several folds of any row of `folds` (repeats, N)."""
    names, group = np.unique(groups, return_inverse=True)
    one_of = np.zeros(len(names), int)
    one_of[group] = np.arange(len(group))
    return len(np.unique(group[(folds != folds[:, one_of[group]]).any(axis=0)]))


def near_duplicates(values: np.ndarray, distance: float = 0.05) -> list[tuple[int, int]]:
    """Find pairs of rows that are much nearer than two rows usually are: most likely the same slide twice.

    Distances are between standardised vectors, as a share of the root mean square over all pairs. A cosine does not
    serve: it is near 1 for any two slides that are extreme in the same direction.

    Args:
        values: (N, d); with few features (d < 16) different slides may be as near by chance.
        distance: the share, 0.05 is a twentieth of the usual distance.

    Returns:
        Pairs (a, b) of row indices, a < b.
    """
    x = StandardScaler().fit_transform(values).astype(np.float32)
    square = (x * x).sum(axis=1)
    limit = distance**2 * 2 * square.mean()  # Σ over all pairs |a − b|² / N² = 2 mean |a|², the mean being zero
    found = []
    for start in range(0, len(x) if limit > 0 else 0, 1024):
        block = slice(start, start + 1024)
        alike = x[block] @ x[start:].T
        alike -= square[start:] / 2
        a, b = np.nonzero(alike >= (square[block, None] - limit) / 2)  # |a − b|² ≤ limit
        found += [(int(i + start), int(j + start)) for i, j in zip(a, b, strict=True) if i < j]
    return found


@dataclass(frozen=True)
class CohortTable:
    """What is known of slides: slide -> patient, slide -> site, target -> slide -> class.

    Attributes:
        patients: of every slide of the table.
        sites: of the slides whose site is known; empty where none is.
        classes: of the slides that have one.
        named: where patients come from: "patient_id", "TCGA barcodes", or "" where each slide counts as its own.
        notes: one line each for names in two spellings and a guessed encoding.
        scanners: slide -> scanner, of the slides of which it is known.
        mpps: slide -> µm per pixel, where the table has them.
        odd: one line each for classes that may be none, and patients that may be one.
    """

    patients: dict[str, str]
    sites: dict[str, str]
    classes: dict[str, dict[str, str]]
    named: str
    notes: tuple[str, ...] = ()
    scanners: dict[str, str] = field(default_factory=dict)
    mpps: dict[str, float] = field(default_factory=dict)
    odd: tuple[str, ...] = ()


def read_cohort_table(path: Path) -> CohortTable:
    """Read a table of slides: slide_id, and optional columns patient_id, site, label, scanner and mpp.

    Where patients or sites are not given, they are taken from TCGA barcodes: slide TCGA-A2-A1FZ-01Z-… is of patient
    TCGA-A2-A1FZ of site A2.

    Args:
        path: the table, see `read_table`.

    Returns:
        The cohort by slide; a slide without a patient is a patient of its own.

    Raises:
        LabelError: not such a table, a slide is named twice, or labels cannot be meant, see `read_classes`.
    """
    read = read_table(path, LabelError)
    columns, rows = read.columns, read.rows
    slide, patient, site = (find_column(columns, n) for n in (SLIDE_COLUMNS, PATIENT_COLUMNS, SITE_COLUMNS))
    if slide is None:
        raise LabelError(f"{path.name}: no column slide_id among {', '.join(columns)}", "name the column of slides so")
    lines = unique_lines(path, rows, slide)
    table = {name: rows[line] for name, line in lines.items()}
    codes = {name: barcode(name)[0] for name in table if barcode(name)[0]}
    given = {name: row[patient] for name, row in table.items() if patient and known_name(row[patient])}
    barcodes = {name: code for name, code in codes.items() if name not in given}
    sites = {name: code.split("-")[1] for name, code in codes.items()}
    sites |= {name: row[site] for name, row in table.items() if site and known_name(row[site])}
    label, scanner, mpp = (find_column(columns, names) for names in (("label",), SCANNER_COLUMNS, ("mpp",)))
    of_line = read_classes(path.name, {line: rows[line][label] for line in lines.values()}, label) if label else {}
    classes = {label: {n: of_line[line] for n, line in lines.items() if line in of_line}} if label else {}
    odd = [*(odd_classes(label, of_line) if label else ()), *zero_suspicions("patients", given.values())]
    patients = {name: name for name in table} | barcodes | given
    people, places = spellings(patients.values()), spellings(sites.values())
    notes = (*read.notes, *spelling_notes("patients", people), *spelling_notes("sites", places))
    named = " and ".join([*([patient] if given and patient else []), *(["TCGA barcodes"] if barcodes else [])])
    return CohortTable(
        {name: people[patient] for name, patient in patients.items()},
        {name: places[place] for name, place in sites.items()},
        classes,
        named,
        notes,
        {name: row[scanner].casefold() for name, row in table.items() if scanner and known_name(row[scanner])},
        {name: value for name, row in table.items() if mpp and (value := _mpp(row[mpp]))},
        tuple(odd),
    )


def _mpp(text: str) -> float:
    try:
        return number(text)
    except ValueError:
        return 0.0


def audit_split(
    split: Split, cohort: CohortTable, twins: Iterable[tuple[str, str]] = (), seen: Collection[str] | None = None
) -> dict[str, object]:
    """What the test slides of a split share with those that the model may learn from, train and val together.

    Args:
        split: from `read_splits`.
        cohort: from `read_cohort_table`.
        twins: pairs of near-duplicate slides.
        seen: slides that the slide encoder was trained on without labels; None where unknown.

    Returns:
        `split`; `train`, `val`, `test`: numbers of slides; `slides_shared`: on both sides; `patients_shared`, and
        `test_leaked`, the share in [0, 1] of test slides whose patient also trains; `sites_shared` and `sites`, in the
        test; `twins_shared`: near-duplicate pairs of different patients across the sides; `seen_in_pretraining`: test
        slides, nan where unknown; `classes`: `name train/test` for each, in words.

    Raises:
        LabelError: the split names slides that the table does not have; says in which rows.
    """
    split = split.named_as(cohort.patients)
    absent = [slide for slide in split.sides if slide not in cohort.patients]
    if absent:
        near = difflib.get_close_matches(absent[0], cohort.patients, 1)
        some = listed((f"{slide!r} (row {split.lines[slide]})" for slide in absent), 3, quote=False)
        hint = f"nearest to {absent[0]!r} is {near[0]!r}" if near else "add them to the table"
        raise LabelError(f"{split.name}: slides that the table does not have: {some}", hint)
    learn, test = split.on("train", "val"), split.on("test")
    training = {cohort.patients[slide] for slide in learn}
    leaked = [slide for slide in test if cohort.patients[slide] in training]
    sites = {cohort.sites[slide] for slide in test if slide in cohort.sites}
    here, there = set(learn), set(test)
    across = [
        (a, b)
        for a, b in twins
        if cohort.patients.get(a) != cohort.patients.get(b)
        and ((a in here and b in there) or (b in here and a in there))
    ]
    return {
        "split": split.name,
        **{side: len(split.on(side)) for side in SIDES},
        "slides_shared": len(here & there),
        "patients_shared": len({cohort.patients[slide] for slide in leaked}),
        "test_leaked": len(leaked) / len(test),
        "sites_shared": len(sites & {cohort.sites[slide] for slide in learn if slide in cohort.sites}),
        "sites": len(sites),
        "twins_shared": len(across),
        "seen_in_pretraining": float("nan") if seen is None else len(there & set(seen)),
        "classes": "; ".join(_balance(of, learn, test) for of in cohort.classes.values()),
    }


def _balance(classes: dict[str, str], learn: Sequence[str], test: Sequence[str]) -> str:
    counts = [Counter(classes[slide] for slide in side if slide in classes) for side in (learn, test)]
    return ", ".join(f"{name} {counts[0][name]}/{counts[1][name]}" for name in sorted({*counts[0], *counts[1]}))


def verdicts(found: Sequence[Mapping[str, object]], cohort: CohortTable, twins_known: bool) -> list[str]:
    """Say in sentences what an audit found.

    A sentence that begins with LEAK means that figures from these splits are too high.

    Args:
        found: one row per split, with the counts of what train and test share.
        cohort: the patients and sites of the slides.
        twins_known: whether near-duplicates were searched for.

    Returns:
        One sentence per finding.
    """
    notes = []
    for column, what in (
        ("slides_shared", "slides are on both sides"),
        ("patients_shared", "patients are on both sides"),
        ("twins_shared", "near-duplicate pairs of different patients are on both sides"),
    ):
        hit = [row for row in found if row[column]]
        if hit:
            worst = max(hit, key=lambda row: float(str(row[column])))
            notes.append(
                f"LEAK in {len(hit)} of {len(found)} splits {what}, {worst[column]} of them in {worst['split']}"
            )
    shares = [float(str(row["test_leaked"])) for row in found]
    if any(shares):
        notes.append(f"{min(shares):.1%} to {max(shares):.1%} of the test slides have their patient in training")
    if not cohort.named:
        notes.append("no patients are known, each slide counts as its own: nothing can be said of patients")
    if cohort.sites and all(row["sites"] == row["sites_shared"] for row in found):
        notes.append("every site that is tested also trains: the figure says nothing about other hospitals")
    if not twins_known:
        notes.append("near-duplicates were not looked for (--vectors)")
    if any(float(str(row["seen_in_pretraining"])) > 0 for row in found):
        notes.append("the label-free pretraining used test slides: say so beside the figure")
    return notes
