"""The commands that judge vectors, wherever they come from: parameters are their flags, the number is the exit code."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from histossl.core import answers, atomic, tables
from histossl.core.console import say
from histossl.core.errors import LabelError, SettingsError
from histossl.core.names import Known
from histossl.evaluate.labels import Labels, check_labels
from histossl.evaluate.patients import labels_for, of_area, patients_of
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.sources import Source, read_source, side_by_side
from histossl.evaluate.summary import named, show_probe

if TYPE_CHECKING:
    from histossl.evaluate.search import Hit


def probe_vectors(
    vectors: Path,
    *,
    labels: Path,
    against: Path | None = None,
    splits: Path | None = None,
    pickles: bool = False,
    columns: tuple[str, ...] = (),
    out: Path | None = None,
    probe: ProbeSettings = ProbeSettings(),
) -> int:
    """A linear model on slide vectors, whole patients held out: probe.csv, probe.json, predictions.csv, figures.

    With --splits instead: AUROC on splits that others published, their mean and standard deviation: splits.csv.

    Args:
        vectors: a study, .h5ad, .csv or .parquet, a folder of TRIDENT's slide features, or Giga-SSL's embeddings.npy.
        labels: a CSV with slide_id, optionally patient_id and site, and label; columns of numbers are regressed.
        against: other vectors of the same slides, of any of these kinds: the difference is given with its interval.
        splits: a split file or a folder of them, columns train and test among others.
        pickles: read a .npy file of a dictionary, which is a pickle; nothing in it is executed.
        columns: of a table of vectors, the columns or the prefixes of numbered columns that are the vector.
        out: the folder of the results; of a study the study itself.
        probe: how the model is trained and scored.
    """
    if against is not None and out is None:
        raise SettingsError("a comparison of two files of vectors has no place", "name a folder: --out FOLDER")
    if (vectors / "slides.csv").exists() and out is None:
        from histossl.cli.study_commands import probe_command

        if splits is None:
            return probe_command(vectors, labels=labels, probe=probe)
        out = vectors
    if out is None:
        raise SettingsError(f"{vectors} is not a study, so the results have no place", "name a folder: --out FOLDER")
    check_labels(labels, probe.targets, probe.outcome, probe.weighing)
    for path in (splits, against):
        if path is not None and not path.exists():
            raise SettingsError(f"there is no {path}", "correct the path")
    source = read_source(vectors, pickles, columns)
    if against is not None:
        source = side_by_side(source, read_source(against, pickles, columns), against.stem)
    source = of_area(source, probe.area)
    if splits is not None:
        return _probe_splits(out, source, labels, splits, probe)
    return _probe_into(out, source, labels, probe)


def _probe_into(out: Path, source: Source, labels: Path, settings: ProbeSettings) -> int:
    from histossl.evaluate.fitted import keep_probe
    from histossl.evaluate.probe import write_probe
    from histossl.evaluate.rivals import probe_with_rivals

    table = labels_for(source, labels, settings)
    _tell(source, table)
    result = probe_with_rivals(source, table, settings, out / "logs" / "rivals")
    write_probe(result, out)
    keep_probe(source, table, settings, out / "probe")
    show_probe((result.table, result.numbers, result.survival), result.audit, out)
    return _complain((*result.complaints, *source.passed))


def _probe_splits(out: Path, source: Source, labels: Path, splits: Path, settings: ProbeSettings) -> int:
    from histossl.evaluate.audit import audit_split, read_cohort_table, verdicts
    from histossl.evaluate.given_splits import probe_splits, summary
    from histossl.evaluate.split_files import known_slides, read_splits

    table = labels_for(source, labels, settings)
    named = read_splits(splits)
    _tell(source, table)
    cohort = read_cohort_table(labels)
    known, lost = known_slides(named, set(table.table.index))
    found = probe_splits(source, table, known, settings)
    _write(out / "splits.csv", found)
    answers.give_rows("splits", _named_rows(summary(found)), value=_rows(summary(found)))
    matched = [split.named_as(cohort.patients).only(cohort.patients) for split in known]
    notes = verdicts([audit_split(split, cohort) for split in matched], cohort, False)
    for line in notes:
        say(line, "yellow" if line.startswith("LEAK") else "")
    leaks = any(line.startswith("LEAK") for line in notes)  # then the figures are too high
    return max(_complain((*table.complaints, *lost, *source.passed)), int(leaks))


def _tell(source: Source, labels: Labels | None = None) -> None:
    """Say what was read otherwise than it is written."""
    from histossl.evaluate.suspicions import check_columns

    for line in dict.fromkeys((*source.notes, *(labels.notes if labels else ()))):
        say(f"note: {line}", "yellow")
    for line in (*labels.suspicions, *check_columns(source, labels)) if labels else ():
        say(f"SUSPECT {line}", "yellow")


def search_command(
    vectors: Path,
    slide: str,
    top: int = 9,
    labels: Path | None = None,
    columns: tuple[str, ...] = (),
    out: Path | None = None,
) -> int:
    """The slides of other patients that are most like one slide; with labels, how often such slides share them.

    Args:
        vectors: a study, .h5ad, .csv or .parquet, a folder of TRIDENT's slide features, or Giga-SSL's embeddings.npy.
        slide: the slide_id asked for, or the path of its file.
        top: how many to show.
        labels: a CSV with slide_id, optionally patient_id, and label: retrieval over the whole cohort.
        columns: of a table of vectors, the columns or the prefixes of numbered columns that are the vector.
        out: a folder for hits.csv, hits.jpg and, with labels, retrieval.csv.
    """
    if top < 1:
        raise SettingsError(f"--top {top}", "ask for one or more")
    if labels is not None:
        check_labels(labels)
    from histossl.evaluate.search import nearest, retrieval

    source = read_source(vectors, columns=columns)
    table = None if labels is None else labels_for(source, labels)
    _tell(source, table)
    query, patients = _row_of(source, slide), patients_of(source, table)
    name, values = next(iter(source.vectors.items()))
    hits = nearest(values, patients, query, top)
    found = pd.DataFrame(
        {
            "rank": range(1, len(hits) + 1),
            "slide_id": [source.ids[hit.row] for hit in hits],
            "similarity": [hit.similarity for hit in hits],
            "patient_id": [patients[hit.row] for hit in hits],
        }
    )
    if table is not None:
        for target in table.targets:
            found[target] = table.table[target].reindex(found["slide_id"]).fillna("").to_numpy()
    say(f"{source.ids[query]} among {len(source.ids)} slides by {named(name)}; {_told_patients(source.ids, patients)}")
    answers.give_rows("hits", _rows(found))
    scores = None if table is None else retrieval(source.vectors, source.ids, table)
    if scores is not None:
        answers.give_rows("retrieval", _named_rows(scores), value=_rows(scores))
    if out is not None:
        _write_hits(out, source, query, hits, found)
        if scores is not None:
            _write(out / "retrieval.csv", scores)
    return _complain((*(table.complaints if table else ()), *source.passed))


def _write_hits(out: Path, source: Source, query: int, hits: Sequence[Hit], found: pd.DataFrame) -> None:
    from histossl.evaluate.search import picture

    rows = [query, *(hit.row for hit in hits)]
    texts = [source.ids[query], *(f"{hit.similarity:.2f}  {source.ids[hit.row]}" for hit in hits)]
    frames = [_frame(source, row, text) for row, text in zip(rows, texts, strict=True)]
    with atomic.whole_buffer(out / "hits.jpg") as file:
        picture(frames).save(file, "JPEG", quality=85)
    _write(out / "hits.csv", found)
    say(f"done: {out / 'hits.jpg'}", "green")


def audit(
    splits: Path, table: Path, vectors: Path | None = None, columns: tuple[str, ...] = (), out: Path | None = None
) -> int:
    """What a split has on both of its sides: patients, sites, near-duplicates. Exits with 1 where a split leaks.

    Args:
        splits: a split file or a folder of them: columns train and test, or slide_id and split, or slide_id and fold.
        table: a CSV with slide_id and, where known, patient_id, site and label; TCGA barcodes speak for themselves.
        vectors: slide vectors, as of `histossl probe`, to find slides that are there twice, and those that
            pretraining used, without their labels.
        columns: of a table of vectors, the columns or the prefixes of numbered columns that are the vector.
        out: a CSV, a row a split.
    """
    if vectors is not None and not vectors.exists():
        raise SettingsError(f"there is no {vectors}", "correct the path")
    from histossl.evaluate.audit import audit_split, near_duplicates, read_cohort_table, verdicts
    from histossl.evaluate.split_files import known_slides, read_splits
    from histossl.evaluate.suspicions import suspicions

    cohort, source, twins = read_cohort_table(table), None, set()
    if vectors is not None:
        source = read_source(vectors, columns=columns)
        spelt = Known(cohort.patients)
        names = [spelt.get(name) or name for name in source.ids]
        for values in source.vectors.values():
            twins |= {(names[a], names[b]) for a, b in near_duplicates(values)}
        _tell(source)
    for line in cohort.notes:
        say(f"note: {table.name}: {line}", "yellow")
    named, lost = known_slides(read_splits(splits), set(cohort.patients))
    found = [audit_split(s, cohort, sorted(twins), source.seen if source else None) for s in named]
    rows = pd.DataFrame(found)
    answers.give_rows("splits", _rows(rows.dropna(axis=1, how="all")))
    if out is not None:
        _write(out, rows)
    people = len(set(cohort.patients.values()))
    say(f"{len(cohort.patients)} slides of {people} patients, by {cohort.named or 'nothing: each slide is one'}")
    notes = verdicts(found, cohort, source is not None)
    answers.give("verdicts", notes)
    for line in notes or ["nothing was found against these splits"]:
        say(line, "yellow" if line.startswith("LEAK") else "")
    for line in suspicions(cohort, sorted(twins)):
        say(f"SUSPECT {line}", "yellow")
    leaks = any(line.startswith("LEAK") for line in notes)
    return max(_complain((*lost, *(source.passed if source else ()))), int(leaks))


def sites(
    vectors: Path,
    *,
    labels: Path,
    out: Path | None = None,
    columns: tuple[str, ...] = (),
    probe: ProbeSettings = ProbeSettings(),
) -> int:
    """How much slide vectors know of the site, beside what they know of the label; as they are and after remedies.

    Args:
        vectors: a study, .h5ad, .csv or .parquet, a folder of TRIDENT's slide features, or Giga-SSL's embeddings.npy.
        labels: a CSV with slide_id, site (TCGA barcodes say it themselves), optionally patient_id, and classes.
        out: a folder for sites.csv.
        columns: of a table of vectors, the columns or the prefixes of numbered columns that are the vector.
        probe: how the models are trained and scored.
    """
    check_labels(labels, probe.targets, probe.outcome, probe.weighing)
    from histossl.evaluate.site_effects import site_effects

    source = of_area(read_source(vectors, columns=columns), probe.area)
    table = labels_for(source, labels, probe)
    _tell(source, table)
    found, notes = site_effects(source, table, probe)
    answers.give_rows("sites", _named_rows(found), value=_rows(found))
    answers.give("confounding", notes)
    for line in notes:
        say(line, "yellow" if "CONFOUNDED" in line else "")
    if out is not None:
        _write(out / "sites.csv", found)
    return _complain((*table.complaints, *source.passed))


def _row_of(source: Source, slide: str) -> int:
    known = Known(source.ids)
    for name in (slide, Path(slide).stem):
        if (found := known.get(name)) is not None:
            return source.ids.index(found)
    folded = {name.casefold(): name for name in source.ids}
    near = difflib.get_close_matches(slide.casefold(), folded, 3) or list(folded)[:3]
    some = ", ".join(repr(folded[name]) for name in near)
    raise LabelError(f"no slide {slide!r} among {len(source.ids)}", f"there are {some}")


def _told_patients(ids: Sequence[str], patients: np.ndarray) -> str:
    """Whose slides are left out of a search; where patients are unknown that must be said."""
    unknown = sum(a == b for a, b in zip(ids, patients, strict=True))
    if not unknown:
        return "slides of its own patient are left out"
    whose = "no patient is known" if unknown == len(ids) else f"the patient of {unknown} slides is unknown"
    return f"{whose}: each of these slides counts as its own patient (give --labels with a column patient_id)"


def _rows(found: pd.DataFrame) -> list[dict]:
    return [dict(zip(map(str, found.columns), row, strict=True)) for row in found.itertuples(index=False)]


def _named_rows(found: pd.DataFrame) -> list[dict]:
    return _rows(found.assign(embedding=found["embedding"].map(named)).rename(columns={"embedding": "vectors"}))


def _frame(source: Source, row: int, text: str) -> tuple[str, Path | None, Path | None]:
    name = source.ids[row]
    return text, source.pictures.get(name), source.paths.get(name)


def _write(path: Path, found: pd.DataFrame) -> None:
    with atomic.whole(path) as part:
        tables.write_frame(part, found)


def _complain(complaints: tuple[str, ...]) -> int:
    for line in complaints:
        say(f"LEFT OUT {line.removeprefix('left out: ')}", "yellow")
    return 1 if complaints else 0
