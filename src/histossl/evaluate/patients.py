"""Vectors of patients: those of a patient's slides combined, and one label a patient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_array

from histossl.core.errors import LabelError
from histossl.core.names import Known, barcode, folded, listed, row_list, spellings
from histossl.core.tables import EMPTY, number, read_table
from histossl.evaluate.labels import SLIDE_COLUMNS, Labels, find_column, read_labels
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.sources import Source
from histossl.evaluate.steady import Steady, steady


def labels_for(source: Source, path: str | Path, settings: ProbeSettings = ProbeSettings()) -> Labels:
    """Read a table of labels for the slides of a source, see `read_labels`.

    Args:
        source: of the slides, with what it knows of patients and areas.
        path: the file.
        settings: name the targets.

    Raises:
        LabelError: the labels cannot be used.
    """
    about = settings.targets, source.patients, source.lent, settings.outcome
    found = read_labels(path, source.ids, *about, source.areas, settings.weighing)
    if not settings.weighing:
        return found
    return replace(found, weights=weights_in(Path(path), settings.combine, source.ids))


def weights_in(path: Path, how: str, slides: Sequence[str]) -> dict[str, float]:
    """Read the weights of slides among those of their patient.

    Args:
        path: a table with a row a slide.
        how: COLUMN, of numbers, where 0 or an empty cell leaves a slide out; or COLUMN=VALUE, the slides that count.
        slides: known ids.

    Returns:
        Slide -> weight ≥ 0, of the slides that the table has.

    Raises:
        LabelError: no such column, no row of a slide, a cell that is no weight; names the rows.
    """
    column, chosen, value = how.partition("=")
    table, known, found, odd = read_table(path, LabelError), Known(slides), {}, []
    if column not in table.columns:
        offered = f"it takes mean, tiles, or a column: {listed(table.columns)}"
        raise LabelError(f"{path.name}: no column {column!r} for --probe.combine", offered)
    slide_column = find_column(table.columns, SLIDE_COLUMNS)
    if slide_column is None:
        raise LabelError(f"{path.name}: a row is a patient, and no slide has a weight", "add a column slide_id")
    for line, row in table.rows.items():
        text = row[column]
        try:
            weight = float(folded(text) == folded(value)) if chosen else 0.0 if text.lower() in EMPTY else number(text)
        except ValueError:
            weight = -1.0
        if not 0 <= weight < np.inf:
            odd.append(line)
        if (slide := known.get(row[slide_column])) is not None:
            found[slide] = weight
    if odd:
        what = f"{path.name}: {column} is no weight in {row_list(odd)}: {listed(table.rows[k][column] for k in odd)}"
        raise LabelError(what, f"write numbers from 0 on, or choose slides by a word: {column}=WORD")
    if not any(found.values()):
        kinds = listed(dict.fromkeys(row[column] for row in table.rows.values()))
        raise LabelError(f"{path.name}: no slide counts by {how!r}", f"{column} has {kinds}")
    return found


def of_area(source: Source, area: str) -> Source:
    """The vectors of one area of each slide.

    Args:
        source: of the slides.
        area: its name; "" takes all vectors, and notes it where slides have several.

    Raises:
        LabelError: no vector is of that area.
    """
    names = sorted({name for _, name in source.areas.values()})
    if not area:
        several = len(names) > 1 and len({slide for slide, _ in source.areas.values()}) < len(source.areas)
        what = f"slides have vectors of several areas ({listed(names, 3)}), and all count; --probe.area takes one"
        return replace(source, notes=(*source.notes, what)) if several else source
    wanted = [k for k, n in enumerate(source.ids) if folded(source.areas.get(n, ("", ""))[1]) == folded(area)]
    if not wanted:
        raise LabelError(f"no vector is of the area {area!r}", f"there are {listed(names)}" if names else "see --areas")
    ids = tuple(source.ids[k] for k in wanted)
    return replace(source, ids=ids, vectors={name: values[wanted] for name, values in source.vectors.items()})


def combine(values: NDArray, groups: NDArray[np.int64], weights: NDArray | None = None) -> NDArray[np.float32]:
    """The weighted mean of the rows of each group.

    It is linear: a linear score of the mean is the same mean of the slides' scores, so that the shares of their tiles,
    weighted in the same way, still add up to it.

    Args:
        values: (N, d) vectors of slides.
        groups: (N,) int, 0, 1, ...: the patient of each slide; each number occurs.
        weights: (N,) ≥ 0, with a positive sum in each group; None weights all slides equally.

    Returns:
        (groups, d) float32.
    """
    weights = np.ones(len(groups)) if weights is None else np.asarray(weights, np.float64)
    share = weights / np.bincount(groups, weights)[groups]
    return np.asarray(csr_array((share, (groups, np.arange(len(groups))))) @ values, np.float32)


def patients_of(source: Source, labels: Labels | None = None) -> NDArray:
    """The patient of each slide, in one spelling each.

    Args:
        source: of the slides.
        labels: where they name the patient of a slide, they decide.

    Returns:
        (N,) text: as the labels have it, else the source, else a TCGA barcode; a slide without one is its own patient.
    """
    named = {} if labels is None else labels.table["patient_id"].to_dict()
    people = [named.get(n) or source.patients.get(n, "").strip() or barcode(n)[0] or n for n in source.ids]
    spelt = spellings(people)
    return np.array([spelt[name] for name in people])


def by_patient(source: Source, labels: Labels, how: str) -> tuple[Source, Labels, dict[str, list[str]]]:
    """Make a row of each patient: the vectors of all of its slides combined, and its label.

    Slides without a label count too where another slide of the patient has one.

    Args:
        source: of the slides.
        labels: of the slides.
        how: mean: slides count equally; tiles: in proportion to their numbers of tiles; else by `labels.weights`, and a
            patient whose slides all have 0 is left out with a complaint.

    Returns:
        The source and the labels of the patients, the patient being the id; patient -> its slides that count.

    Raises:
        LabelError: slides of a patient have different labels; names the rows.
    """
    patients = patients_of(source, labels)
    weights = slide_weights(source, how, labels.weights)
    counts = np.full(len(patients), True) if weights is None else weights > 0
    names, groups = np.unique(patients[counts], return_inverse=True)
    people = dict(zip(source.ids, patients.tolist(), strict=True))
    members = {str(name): [source.ids[k] for k in np.flatnonzero(counts & (patients == name))] for name in names}
    there: dict[str, list[str]] = {name: [] for name in members}
    for slide in (name for name in labels.table.index if name in people):
        there.setdefault(people[slide], []).append(slide)
    values = {target: _one_each(target, labels, there) for target in labels.targets}
    table = pd.DataFrame({"patient_id": list(there)} | values, index=pd.Index(list(there), name="slide_id"))
    table = table.astype(object).where(table.notna(), None)
    table = table[table[list(labels.targets)].notna().any(axis=1)]
    lost = [name for name in table.index if name not in members]
    complaints = [f"no slide of {len(lost)} patients counts by {how!r}, first {lost[0]!r}"] if lost else []
    sites = {**source.sites, **labels.sites}
    found = replace(
        source,
        ids=tuple(members),
        vectors={
            name: combine(rows[counts], groups, None if weights is None else weights[counts])
            for name, rows in source.vectors.items()
        },
        patients={name: name for name in members},
        sites=_shared(members, sites),
        seen=None if source.seen is None else frozenset(n for n, s in members.items() if source.seen & set(s)),
    )
    lines = {name: labels.lines[slides[0]] for name, slides in there.items() if slides and slides[0] in labels.lines}
    labelled = replace(labels, table=table.drop(lost), sites=found.sites, lines=lines)
    return found, replace(labelled, complaints=(*labels.complaints, *complaints)), members


def steady_maps(source: Source, labels: Labels, settings: ProbeSettings) -> dict[str, Steady]:
    """What a row a patient does to vectors before survival is learned from them, see `steady`.

    Args:
        source: of the slides, not yet combined.
        labels: of the slides.
        settings: `unit`, `combine` and `steady`.

    Returns:
        Name of the vectors -> its map, found by the slides that count; empty where none is wanted.
    """
    if settings.unit != "patient" or not settings.steady:
        return {}
    weights = slide_weights(source, settings.combine, labels.weights)
    counts = np.full(len(source.ids), True) if weights is None else weights > 0
    groups = np.unique(patients_of(source, labels)[counts], return_inverse=True)[1]
    return {name: steady(values[counts], groups) for name, values in source.vectors.items()}


def slide_weights(source: Source, how: str, named: Mapping[str, float] | None = None) -> NDArray[np.float64] | None:
    """The weight of each slide among those of its patient.

    Args:
        source: of the slides.
        how: mean, tiles, or the column that `named` was read from.
        named: slide -> weight; None, as of new slides that nobody weighed, weighs them equally.

    Returns:
        (N,) weights ≥ 0, or None for equal ones.

    Raises:
        LabelError: the number of tiles of some slide is not known.
    """
    if how != "tiles":
        return None if named is None else np.array([named.get(name, 0.0) for name in source.ids], np.float64)
    lost = [name for name in source.ids if not source.tile_counts.get(name)]
    if lost:
        what = f"the numbers of tiles of {len(lost)} slides are not known, first {lost[0]!r}"
        raise LabelError(what, "weight slides equally: --probe.combine mean")
    return np.array([source.tile_counts[name] for name in source.ids], np.float64)


def _one_each(target: str, labels: Labels, there: Mapping[str, Sequence[str]]) -> list[str | None]:
    """The label of each patient; slides without one do not count."""
    column = labels.table[target].to_dict()
    found = {name: dict.fromkeys(v for s in slides if (v := column[s]) is not None) for name, slides in there.items()}
    torn = [name for name, kinds in found.items() if len(kinds) > 1]
    if torn:
        conflicts = []
        for name in torn[:3]:
            rows = {kind: labels.where([s for s in there[name] if column[s] == kind]) for kind in found[name]}
            conflicts.append(f"{name!r} has " + " and ".join(f"{kind!r} in {where}" for kind, where in rows.items()))
        more = f"; and {len(torn) - 3} more" if len(torn) > 3 else ""
        raise LabelError(
            f"{target}: {len(torn)} patients have different labels: {'; '.join(conflicts)}{more}", "correct them"
        )
    return [next(iter(kinds), None) for kinds in found.values()]


def _shared(members: Mapping[str, Sequence[str]], sites: Mapping[str, str]) -> dict[str, str]:
    """Patient -> site, for patients all of whose slides are of one site."""
    of = {name: {sites.get(slide, "") for slide in slides} for name, slides in members.items()}
    return {name: next(iter(found)) for name, found in of.items() if len(found) == 1 and "" not in found}
