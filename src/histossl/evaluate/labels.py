"""Reads tables of labels and checks them: slide, patient and class of each row."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from histossl.core.errors import LabelError
from histossl.core.names import (
    Known,
    barcode,
    bare,
    folded,
    listed,
    row_list,
    spelling_notes,
    spellings,
    without_zeros,
    zero_suspicions,
)
from histossl.core.tables import read_table
from histossl.evaluate.area_labels import AREA_COLUMNS, Areas, name_rows, spread
from histossl.evaluate.classes import known_name, odd_classes, read_classes
from histossl.evaluate.outcomes import Outcome, find_outcomes, odd_times, read_outcome

SLIDE_COLUMNS = ("slide_id", "id", "slide")  # `ID,label` is the table of Giga-SSL's authors
PATIENT_COLUMNS = ("patient_id", "case_id", "patient")  # CLAM and TRIDENT say case_id
SITE_COLUMNS = ("site", "site_id", "center", "centre", "institution", "hospital")
# Of slides.csv and of split files: no targets unless they are named.
_NO_TARGETS = frozenset(
    ["", "index", "path", "file", "filename", "mpp", "width", "height", "tiles", "status", "error", "made", "note",
     "content", "artefacts", "stains", "split", "set", "fold", *AREA_COLUMNS]
)  # fmt: skip
SCANNER_COLUMNS = ("scanner", "scanner_id", "device", "vendor")


@dataclass(frozen=True)
class Labels:
    """Labels of known slides.

    Attributes:
        table: one row a labelled slide in the order of the file, index `slide_id` (text), columns `patient_id` (text)
            and one a target: the class as text (of a survival target the time, "12.5" with an event and "12.5+" without
            one, see `outcomes.followed`), None where the slide has no label for that target.
        targets: the names of the target columns.
        chosen: whether the targets were named (by setting, or as `label`) rather than found.
        complaints: one line each for what was left out: absent slides, slides without labels, missing patients. The
            run went on without them, and should end with a non-zero exit code.
        sites: slide -> where it was made, for the slides of which that is known.
        lines: slide -> the row of the file that names it, the header being row 1; empty where there is no file.
        notes: one line each for what was not read as it is written: names in two spellings, a guessed encoding.
        outcomes: of the targets that are survival, the unit of the time; "" where no column says it.
        suspicions: one line each for what a person should look at: classes that may be none, patients that may be one.
        weights: of slides among those of their patient, where a column says them; other slides then have 0.
    """

    table: pd.DataFrame
    targets: tuple[str, ...]
    chosen: bool = True
    complaints: tuple[str, ...] = ()
    sites: Mapping[str, str] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    outcomes: Mapping[str, str] = field(default_factory=dict)
    suspicions: tuple[str, ...] = ()
    weights: Mapping[str, float] | None = None

    def where(self, slides: Sequence[str]) -> str:
        """Name slides by their rows in the file, or by name where they are in no row.

        Args:
            slides: the slides; three are named, the others counted.

        Returns:
            Text such as "rows 2, 5, 6 and 3 more".
        """
        lines = [self.lines[slide] for slide in slides if slide in self.lines]
        return row_list(lines) if lines else listed(slides, 3)


def read_labels(
    path: str | Path,
    slide_ids: Sequence[str],
    targets: Sequence[str] = (),
    patients: Mapping[str, str] | None = None,
    lent: Collection[str] = (),
    outcome: tuple[str, str] = ("", ""),
    areas: Areas | None = None,
    weighing: str = "",
) -> Labels:
    """Read a table of labels and match it to the known slides.

    Columns: `slide_id`, optional `patient_id` and `site`; or `patient_id` without `slide_id`, then a row holds for all
    known slides of its patient. The targets are `targets` where given, else `label` where
    there is such a column, else every other column. Text of any encoding and separator, see `read_table`. Every value
    is text: slide "007" stays "007"; numbers written differently ("1", "1.0", "1,0") are one class. Names of slides,
    patients and sites are equal in every spelling with the same `folded` form.

    Args:
        path: the file.
        slide_ids: the known slides, those with a vector.
        targets: names of the columns to take.
        patients: slide_id -> patient_id as known otherwise (slides.csv); empty values are ignored. Where neither the
            file nor this names a patient, a TCGA barcode does (TCGA-A2-A1FZ-01Z-… is patient TCGA-A2-A1FZ of site A2),
            and else the slide counts as a patient of its own.
        lent: slides whose patient in `patients` came from earlier labels: the file may name another.
        outcome: names of the columns of the time and of the event of a survival target; empty to find such pairs, such
            as os_months and os_event, see `find_outcomes`.
        areas: of the vectors of areas; a row holds for all areas of its slide, or for the one in its column `area`.
        weighing: a column that weighs or chooses slides, and is no target unless it is named.

    Returns:
        The labels of the known slides, and complaints about rows and slides that were left out.

    Raises:
        LabelError: the file cannot be read as such a table, an id occurs twice or differs from a slide only in its
            extension, a column mixes numbers and words, or no label fits any slide. Names the rows, counted as lines of
            the file with the header as row 1.
    """
    path = Path(path)
    found = read_table(path, LabelError)
    rows, columns = found.rows, [name for name in found.columns if name != weighing or name in targets]
    slide_column, patient_column, site_column, names, chosen, outcomes = _columns(path, columns, targets, outcome)
    name_rows(rows, slide_column or "", find_column(found.columns, AREA_COLUMNS), areas or {})
    written = _written(path, rows, slide_column, patient_column, slide_ids, patients or {})
    written = spread(written, areas or {}, slide_ids)
    spelt = _spelt(path, written, slide_ids)
    lost = {slide: line for slide, line in written.items() if slide not in spelt}
    complaints = absent_slides(path.name, lost, slide_ids, set(spelt.values()))
    lines = {spelt.get(slide, slide): line for slide, line in written.items()}

    values, notes = _values(path, rows, names, outcomes)
    complaints += notes
    records, sites, unnamed, known = {}, {}, [], set(slide_ids)
    for slide, line in lines.items():
        if slide in known:
            here = known_name(rows[line][patient_column]) if patient_column else ""
            elsewhere = {} if here and slide in lent else patients or {}
            patient, was_named = _patient(path, line, slide, here, elsewhere)
            records[slide] = {"patient_id": patient} | {name: values[name].get(line) for name in names}
            sites[slide] = (known_name(rows[line][site_column]) if site_column else "") or barcode(slide)[1]
            if patient_column and not was_named:
                unnamed.append(line)
    notes = [*found.notes, *spelling_notes("slides", spelt), *_one_spelling(records, sites)]
    labelled = {slide: row for slide, row in records.items() if any(row[name] is not None for name in names)}
    index = pd.Index(list(labelled), dtype=object, name="slide_id")
    table = pd.DataFrame(list(labelled.values()), index=index, dtype=object)
    complaints += _unlabelled(path, unnamed, known, labelled, written)
    sites = {slide: site for slide, site in sites.items() if site and slide in labelled}
    units = {name: outcomes[name].unit for name in names if name in outcomes}
    odd = [line for name in names if name not in outcomes for line in odd_classes(name, values[name])]
    odd += [*odd_times(outcomes, values), *zero_suspicions("patients", map(str, table["patient_id"].tolist()))]
    about, suspected = (tuple(f"{path.name}: {what}" for what in those) for those in (notes, odd))
    return Labels(table, tuple(names), chosen, tuple(complaints), sites, lines, about, units, suspected)


def _values(
    path: Path, rows: dict[int, dict[str, str]], names: Sequence[str], outcomes: Mapping[str, Outcome]
) -> tuple[dict[str, dict[int, str]], list[str]]:
    """Target -> line -> its value, and complaints about rows that are left out."""
    followed = {name: read_outcome(path.name, rows, outcomes[name]) for name in names if name in outcomes}
    values = {name: followed[name][0] for name in followed}
    values |= {name: read_classes(path.name, _column(rows, name), name) for name in names if name not in followed}
    return values, [line for _, notes in followed.values() for line in notes]


def _written(
    path: Path,
    rows: dict[int, dict[str, str]],
    slide_column: str | None,
    column: str | None,
    slide_ids: Sequence[str],
    patients: Mapping[str, str],
) -> dict[str, int]:
    """Slide -> its line; in a table with one row a patient that of its patient. Patients without a slide stay."""
    if slide_column is not None or column is None:
        return unique_lines(path, rows, str(slide_column))
    lines = {folded(patient): line for patient, line in unique_lines(path, rows, column, "patient").items()}
    people = {slide: known_name(str(patients.get(slide) or "")) or barcode(slide)[0] for slide in slide_ids}
    found = {slide: lines[folded(name)] for slide, name in people.items() if folded(name) in lines}
    if not found:
        what = f"{path.name}: no column slide_id, and none of its patients is one of the slides' patients"
        raise LabelError(what, f"name the column of slides slide_id; patients are called {listed(people.values(), 3)}")
    taken = set(found.values())
    return found | {rows[line][column]: line for line in lines.values() if line not in taken}


def _column(rows: dict[int, dict[str, str]], name: str) -> dict[int, str]:
    return {line: row[name] for line, row in rows.items()}


def check_labels(
    path: Path, targets: Sequence[str] = (), outcome: tuple[str, str] = ("", ""), weighing: str = ""
) -> None:
    """Check a table of labels before its slides have vectors: it can be read, and names slides and the targets.

    Args:
        path: the file.
        targets: names of the columns to take, as of `read_labels`.
        outcome: the columns of a survival target, as of `read_labels`.
        weighing: a column that is no target, as of `read_labels`.

    Raises:
        LabelError: see `read_labels`.
    """
    found = read_table(path, LabelError)
    columns = [name for name in found.columns if name != weighing or name in targets]
    slide, patient, _, names, _, outcomes = _columns(path, columns, targets, outcome)
    unique_lines(path, found.rows, str(slide or patient), "slide" if slide else "patient")
    if not any(_values(path, found.rows, names, outcomes)[0].values()):
        raise LabelError(f"{path.name}: no label in {listed(names)}", "fill the column")


def _columns(
    path: Path, columns: list[str], targets: Sequence[str], outcome: tuple[str, str]
) -> tuple[str | None, str | None, str | None, list[str], bool, dict[str, Outcome]]:
    """The columns of slides, patients and sites, the targets, whether these were named, and the survival targets."""
    slide, patient = find_column(columns, SLIDE_COLUMNS), find_column(columns, PATIENT_COLUMNS)
    if slide is None and patient is None:
        what = f"{path.name}: no column slide_id among {listed(columns)}"
        raise LabelError(what, "name the column of slides slide_id")
    site = find_column([name for name in columns if name not in targets], SITE_COLUMNS)
    free = [name for name in columns if name not in (slide, patient, site)]
    outcomes = find_outcomes(path.name, free, *outcome)
    return slide, patient, site, *_choose_targets(path, free, outcomes, targets, bool(outcome[0])), outcomes


def _unlabelled(
    path: Path, unnamed: list[int], known: set[str], labelled: Collection[str], written: Collection[str]
) -> list[str]:
    """Complaints about rows without a patient and slides without a label; without any label it is an error."""
    count = len(written)
    if not labelled:
        raise LabelError(
            f"{path.name}: none of its {count} slides has both a label and a vector: {listed(written, 3)}",
            f"write slide_id as the slides are called: {listed(sorted(known), 3)}",
        )
    found = []
    if unnamed:
        what = f"{path.name}: no patient in {row_list(unnamed)}; each of these slides counts as its own patient"
        found.append(f"{what}: name it in each row, also where cells were merged")
    lost = sorted(known - set(labelled))
    if lost:
        found.append(f"{path.name}: no label for {len(lost)} of {len(known)} slides: {listed(lost)}")
    return found


def _one_spelling(records: dict[str, dict], sites: dict[str, str]) -> list[str]:
    """Give each patient and each site its first spelling, in place; returns notes on the changes."""
    patients = spellings(str(row["patient_id"]) for row in records.values())
    places = spellings(site for site in sites.values() if site)
    for row in records.values():
        row["patient_id"] = patients[row["patient_id"]]
    for slide, site in sites.items():
        sites[slide] = places.get(site, site)
    return [*spelling_notes("patients", patients), *spelling_notes("sites", places)]


def _spelt(path: Path, lines: dict[str, int], slide_ids: Sequence[str]) -> dict[str, str]:
    """Name in the file -> known slide, for those that are known in any spelling."""
    exact, known = set(slide_ids), Known(slide_ids)
    found = {name: name if name in exact else known.get(name) for name in lines}
    return {name: slide for name, slide in found.items() if slide is not None}


def find_column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """Find a column under one of several names; case, spaces, hyphens and underscores do not count.

    Args:
        columns: the columns of the table.
        names: accepted names, the preferred one first.

    Returns:
        The column as the table writes it, or None.
    """
    lowered = {bare(column): column for column in reversed(columns)}
    return next((lowered[bare(name)] for name in names if bare(name) in lowered), None)


def _choose_targets(
    path: Path, free: Sequence[str], outcomes: Mapping[str, Outcome], wanted: Sequence[str], named: bool
) -> tuple[list[str], bool]:
    """The targets, and whether they were named; `named` says that the outcomes were."""
    halves = {column for outcome in outcomes.values() for column in (outcome.time, outcome.event)}
    offered = [*outcomes, *(c for c in free if c not in halves and not _no_target(c))]
    missing = [name for name in wanted if name not in {*offered, *free}]
    if missing:
        raise LabelError(f"{path.name}: no target {listed(missing)}", f"it has {listed(offered)} (--probe.targets)")
    if wanted or named:
        return list(dict.fromkeys(wanted or outcomes)), True
    label = find_column(free, ("label",))
    if not offered:
        raise LabelError(f"{path.name}: no column of labels", "add a column label")
    return ([label], True) if label else (offered, False)


def _no_target(column: str) -> bool:
    return bare(column) in _NO_TARGETS or column.startswith("Unnamed: ")


def unique_lines(path: Path, rows: dict[int, dict[str, str]], column: str, kind: str = "slide") -> dict[str, int]:
    """Find the line of each slide.

    Args:
        path: the file, for the errors.
        rows: line number -> column -> text.
        column: the column of slides.
        kind: what a row is, slide or patient.

    Returns:
        Slide -> its line.

    Raises:
        LabelError: there is no row, a row names no slide, or a slide is named twice, in any spelling.
    """
    if not rows:
        raise LabelError(f"{path.name}: there is no row below the header", "give the whole table")
    lines = defaultdict(list)
    for line, row in rows.items():
        lines[folded(row[column])].append(line)
    if "" in lines:
        raise LabelError(f"{path.name}: no {kind}_id in {row_list(lines[''])}", f"name the {kind} of these rows")
    twice = [f"{rows[found[0]][column]!r} ({row_list(found)})" for found in lines.values() if len(found) > 1]
    if twice:
        hint = "" if kind == "slide" else "; where the rows are slides, name the column of slides slide_id"
        raise LabelError(
            f"{path.name}: {kind}s named twice: {listed(twice, 3, quote=False)}", f"keep one row a {kind}{hint}"
        )
    return {rows[found[0]][column]: found[0] for found in lines.values()}


def absent_slides(
    where: str,
    lines: dict[str, int],
    slide_ids: Sequence[str],
    there: Collection[str] = (),
    what: str = "labelled slides",
) -> list[str]:
    """Complain about slides of a table that are not known; names that are almost those of slides are an error.

    Args:
        where: name of the table.
        lines: unknown slide -> its row.
        slide_ids: the known slides.
        there: those of the known slides that the table has; other names are not taken for these.
        what: what the message calls the slides.

    Returns:
        One line; nothing where `lines` is empty.

    Raises:
        LabelError: some names differ from a known slide only in their extension, folder or leading zeros.
    """
    if not lines:
        return []
    loose = {_loose(slide): slide for slide in slide_ids if slide not in there}
    meant = {slide: loose[_loose(slide)] for slide in lines if _loose(slide) in loose}
    if meant:
        some = listed((f"{a!r} (row {lines[a]}; is it {b!r}?)" for a, b in meant.items()), 3, quote=False)
        extended = all(folded(a).startswith(folded(b)) for a, b in meant.items())
        why = "extension" if extended else "folder, extension or leading zeros"
        what = f"{where}: {len(meant)} ids differ from a slide by their {why}: {some}"
        raise LabelError(what, "write slide_id as slides.csv has it")
    first = next(iter(lines))
    near = difflib.get_close_matches(first, slide_ids, 1)
    hint = f"; nearest to {first!r} is {near[0]!r}" if near else ""
    return [f"{where}: {len(lines)} {what} are absent ({row_list(lines.values())}): {listed(lines)}{hint}"]


def _loose(slide: str) -> str:
    """A name without folder, leading zeros and an extension of letters: 'x/A-01.SVS' is 'a-1'; 'a.1' is not 'a.2'."""
    name = without_zeros(re.split(r"[/\\]", slide)[-1])
    return re.sub(r"(?<=.)\.[^\W\d_][^\W_]{1,4}$", "", name)


def _patient(path: Path, line: int, slide: str, here: str, elsewhere: Mapping[str, str]) -> tuple[str, bool]:
    """The patient of a slide, and whether it was named anywhere."""
    there = known_name(str(elsewhere.get(slide) or ""))
    if here and there and folded(here) != folded(there):
        raise LabelError(
            f"{path.name}: row {line}: slide {slide!r} is of patient {here!r}, in slides.csv of {there!r}",
            "correct one of the two",
        )
    named = there or here or barcode(slide)[0]
    return named or slide, bool(named)
