"""Measures how well vectors predict a label: linear models, on whole patients held out, with intervals."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

import histossl
from histossl.core.atomic import whole
from histossl.core.config import to_dict
from histossl.core.errors import FileFormatError, LabelError
from histossl.core.tables import write_frame
from histossl.evaluate.audit import audit_line, confounding
from histossl.evaluate.auroc import resample
from histossl.evaluate.labels import Labels
from histossl.evaluate.linear import choose_C, fit_ridge
from histossl.evaluate.logistic import predict, prepare, solve
from histossl.evaluate.methods import describe
from histossl.evaluate.risk_groups import risk_groups
from histossl.evaluate.scaling import scaled
from histossl.evaluate.score import interval, samples_of
from histossl.evaluate.settings import ProbeResult, ProbeSettings, Rival
from histossl.evaluate.site_remedies import remedied
from histossl.evaluate.steady import Steady
from histossl.evaluate.summary import NEW_SITES
from histossl.evaluate.survival import WITHOUT, fit_survival, no_features, ranks_in_folds, with_survival
from histossl.evaluate.survival_score import survival_samples
from histossl.evaluate.targets import Task, labelled, make_task, numbers_of_labels


def probe(
    embeddings: Mapping[str, np.ndarray],
    ids: Sequence[str],
    labels: Labels,
    settings: ProbeSettings = ProbeSettings(),
    rivals: Mapping[str, Rival] | None = None,
    seen: Collection[str] | None = None,
    maps: Mapping[str, Steady] | None = None,
) -> ProbeResult:
    """Compare embeddings of the same slides by a linear model on each, on the same splits.

    Every feature is centred, and all are divided by one number, by the training slides alone. A row then has a mean
    square length of 1, like the normalised slide vectors that the paper's C = 10 was chosen for, whatever d and the
    unit are, and features keep their proportions; the rule is one for all embeddings, so that none is favoured by its
    scale. `settings.scale` gives each feature variance 1 instead.

    AUROC is the share of rightly ordered pairs (ties count half) among the slides of different class *that the same
    model scored*, that is within a fold, pooled over the folds: scores of different models have no common zero, and a
    shift between them says nothing about the embedding. Several classes: mean of one against the rest. Intervals:
    percentiles over resamples of the patients of the mean over repeats; resamples that lost a class do not count. They
    are the same for all embeddings, which makes the differences paired.

    Args:
        embeddings: name -> (N, d) finite floats; the first is the one to compare the others with.
        ids: N unique slide ids, the order of the rows.
        labels: from `read_labels`.
        settings: see there; the caller adds what `settings.rivals` requests.
        rivals: name -> a method that is not a linear model on vectors; judged on the same slides.
        seen: slides that the slide encoder was trained on without labels, where known: the audit names their number.
        maps: embedding -> what is done to it before survival is learned from it.

    Returns:
        Scores with intervals, out-of-fold predictions, audit and complaints.

    Raises:
        FileFormatError: rows that do not match `ids`, or values that are not finite.
        LabelError: too few patients, sites or classes, see `make_task`. Where the targets were found rather than named,
            a target that cannot be probed is left out with a complaint as long as another can.
    """
    vectors = {name: _check(name, values, ids) for name, values in embeddings.items()}
    tables: dict[str, list[pd.DataFrame]] = {"classes": [], "numbers": [], "survival": []}
    predictions, audit, complaints, failed = [], [], list(labels.complaints), []
    for target in labels.targets:
        try:
            task = make_task(target, ids, labels, settings)
        except LabelError as error:
            if labels.chosen:
                raise
            failed.append(str(error))
            continue
        moved = maps or {} if task.times is not None else {}
        mapped = {name: moved[name](values) if name in moved else values for name, values in vectors.items()}
        scores, note = _out_of_fold(task, mapped, settings, rivals or {})
        beside, why = _at_new_sites(task, mapped, ids, labels, settings)
        tables[task.kind].append(_score({key: (task, values) for key, values in scores.items()} | beside, settings))
        predictions.append(_predictions(task, {name: scores[name, n] for name, n in scores if n == "all"}))
        here = (values[task.rows] for values in vectors.values())
        line = audit_line(list(task.slides), task.patients, task.balance(), task.folds, here, task.sites, seen)
        audit.append(f"{target}: {line}{_about_sites(task, settings)}{why}{note}")
    if not predictions:
        raise LabelError("no target can be probed: " + "; ".join(failed), "name one with --probe.targets")
    complaints += [f"left out: {what}" for what in failed]
    each = (pd.concat(found, ignore_index=True) if found else pd.DataFrame() for found in tables.values())
    classes, numbers, survival = each
    found = pd.concat(predictions, ignore_index=True)
    return ProbeResult(classes, numbers, survival, found, tuple(audit), tuple(complaints), settings)


def _about_sites(task: Task, settings: ProbeSettings) -> str:
    """What the audit says of the sites of a target's slides."""
    if task.sites is None:
        return ""
    counts, line = np.unique(task.sites, return_counts=True)[1], ""
    if task.names is not None and len(counts) > 1:
        line = f"; {confounding(task.names[task.truth], task.sites)}"
    alone = int((counts == 1).sum()) if settings.site_remedy != "none" else 0
    return f"{line}; {alone} slides are alone at their site and stay as they are" if alone else line


def _at_new_sites(
    task: Task, vectors: Mapping[str, np.ndarray], ids: Sequence[str], labels: Labels, settings: ProbeSettings
) -> tuple[dict[tuple[str, str], tuple[Task, np.ndarray]], str]:
    """The predictions of the first vectors with whole sites held out, as `_score` takes them; or why there are none."""
    known = len({labels.sites[slide] for slide in task.slides if labels.sites.get(slide)})
    if settings.hold_out == "sites" or known < 2:
        return {}, ""
    name = next(iter(vectors))
    settings = replace(settings, hold_out="sites", folds=min(settings.folds, known), shots=())
    try:
        held = make_task(task.target, ids, labels, settings)
    except LabelError as error:
        return {}, f"; whole sites cannot be held out: {error.what.removeprefix(f'{task.target}: ')}"
    scores, _ = _out_of_fold(held, {name: vectors[name]}, settings, {})
    return {(f"{name}{NEW_SITES}", "all"): (held, scores[name, "all"])}, ""


def _check(name: str, values: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or len(values) != len(ids) or len(set(ids)) != len(ids):
        raise FileFormatError(f"{name}: {values.shape} values for {len(set(ids))} different slides", "one row a slide")
    bad = [ids[k] for k in range(len(ids)) if not np.isfinite(values[k]).all()]
    if bad:
        raise FileFormatError(f"{name}: {len(bad)} vectors are not finite, first {bad[:3]}", "embed these slides again")
    return values


def _out_of_fold(
    task: Task, vectors: dict[str, np.ndarray], settings: ProbeSettings, rivals: Mapping[str, Rival]
) -> tuple[dict[tuple[str, str], np.ndarray], str]:
    """(method, n_labelled) -> (repeats, n, outputs) predictions by models that did not see the patient; a note."""
    counts = numbers_of_labels(task, settings)
    rivals = dict(rivals) | ({} if task.times is None else {WITHOUT: no_features(task.times)})
    shape = (*task.folds.shape, task.outputs)
    scores = {(name, n): np.empty(shape) for n in counts for name in (*vectors, *rivals)}
    places = [(repeat, fold) for repeat in range(settings.repeats) for fold in range(settings.folds)]
    fit = _fit_classes if task.names is not None else _fit_numbers
    if task.times is not None:
        fit = partial(fit_survival, times=task.times)

    def fit_vectors(place: tuple[int, int]) -> int:
        unfinished, test = 0, np.flatnonzero(task.folds[place[0]] == place[1])
        trains = {n: labelled(task, *place, n, settings) for n in counts}
        for name, values in vectors.items():
            x = values[task.rows]
            if task.sites is not None and settings.site_remedy != "none":
                x = remedied(x, task.sites, settings.site_remedy, trains["all"])  # which takes no label
            for n, train in trains.items():
                found, finished = fit(x[train], task.truth[train], task.patients[train], x[test], settings)
                scores[name, n][place[0], test] = found
                unfinished += not finished
        return unfinished

    # The steps are too small for threads of BLAS; whole fits side by side keep the cores busy.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        unfinished = sum(pool.map(fit_vectors, places))
    for (name, n), out in scores.items() if rivals else ():
        for repeat, fold in places if name in rivals else ():
            test, train = np.flatnonzero(task.folds[repeat] == fold), labelled(task, repeat, fold, n, settings)
            seed = int(np.random.SeedSequence([settings.seed, repeat, fold]).generate_state(1)[0])
            method = rivals[name] if task.times is None else with_survival(rivals[name], task.times)
            out[repeat, test] = method(task.rows[train], task.truth[train], task.rows[test], seed)
    return scores, f"; {unfinished} fits did not converge" if unfinished else ""


def _fit_classes(
    x: np.ndarray, y: np.ndarray, patients: np.ndarray, x_test: np.ndarray, settings: ProbeSettings
) -> tuple[np.ndarray, bool]:
    """(m, classes) probabilities, and whether the fit converged."""
    x, x_test = scaled(x, x_test, settings)
    w, b, finished = solve(prepare(x, y, settings.balanced), choose_C(x, y, patients, settings))
    return predict(x_test, w, b), finished


def _fit_numbers(
    x: np.ndarray, y: np.ndarray, patients: np.ndarray, x_test: np.ndarray, settings: ProbeSettings
) -> tuple[np.ndarray, bool]:
    """(m, 1) numbers, and True: ridge regression has a closed form."""
    x, x_test = scaled(x, x_test, settings)
    w, b = fit_ridge(x, y, patients, settings)
    return x_test @ w + b, True


def _score(scores: Mapping[tuple[str, str], tuple[Task, np.ndarray]], settings: ProbeSettings) -> pd.DataFrame:
    """A row for each method and number of labels: of the same slides, in the folds of the task that it comes with."""
    (reference, _), (task, _) = next(iter(scores.items()))
    patient = np.unique(task.patients, return_inverse=True)[1]
    weights = resample(patient.max() + 1, settings.bootstraps, np.random.default_rng([settings.seed, 1]))
    rows, first = [], np.empty(0)
    for (name, n), (task, values) in scores.items():
        if task.times is not None:
            found = survival_samples(values, task.truth, task.folds, patient, weights, task.times)
        else:
            found = samples_of(values, task.truth, task.folds, patient, weights, task.names is not None)
        main, *others = found
        first = found[main] if name == reference else first
        row: dict[str, object] = {"target": task.target, "n_labelled": n, "embedding": name}
        row |= dict(zip((main, "low", "high"), interval(found[main]), strict=True))
        ahead = interval(first - found[main]) if name != reference else (np.nan,) * 3
        row |= dict(zip(("difference", "difference_low", "difference_high"), ahead, strict=True))
        for figure in others:
            row |= dict(zip((figure, f"{figure}_low", f"{figure}_high"), interval(found[figure]), strict=True))
        row |= {"n_slides": len(task.rows), "n_patients": patient.max() + 1}
        row |= {} if task.names is None else {"n_classes": len(task.names)}
        row |= {} if task.times is None else {"unit": task.unit}
        rows.append(row | {"repeats": len(values)})
    return pd.DataFrame(rows)


def _predictions(task: Task, scores: dict[str, np.ndarray]) -> pd.DataFrame:
    parts = []
    for name, values in scores.items():
        mean = values.mean(axis=0)
        about = {"target": task.target, "embedding": name, "slide_id": task.slides, "patient_id": task.patients}
        if task.times is not None:
            endings = np.where(task.truth[:, 1] > 0, "", "+")
            about["truth"] = [f"{time:g}{end}" for time, end in zip(task.truth[:, 0], endings, strict=True)]
            about["predicted"] = ranks_in_folds(values[:, :, 0], task.folds)
            soon = enumerate(task.times.horizons, 1)
            parts.append(pd.DataFrame(about | {f"s({time:g})": mean[:, k] for k, time in soon}))
            continue
        if task.names is None:
            parts.append(pd.DataFrame(about | {"truth": task.truth, "predicted": mean[:, 0]}))
            continue
        about |= {"truth": task.names[task.truth], "predicted": task.names[mean.argmax(axis=1)]}
        parts.append(pd.DataFrame(about | {f"p({c})": mean[:, k] for k, c in enumerate(task.names)}))
    return pd.concat(parts, ignore_index=True)


def write_probe(result: ProbeResult, folder: Path) -> None:
    """Write a probe into a folder; a table without rows is not written.

    The files are probe.csv (the table), numbers.csv, survival.csv, predictions.csv, probe.json (the rest, with the
    method in words) and the figures.

    Args:
        result: of `probe`.
        folder: made where it does not exist.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    from histossl.evaluate.plots import write_figures

    tables = {"probe.csv": result.table, "numbers.csv": result.numbers, "survival.csv": result.survival}
    tables["predictions.csv"] = result.predictions
    scores = result.table, result.numbers, result.survival
    content = {
        "histossl": histossl.__version__,
        "settings": to_dict(result.settings),
        "method": describe(
            result.settings, *(not table.empty for table in scores), new_sites=any(map(_stands, scores))
        ),
        "audit": result.audit,
        "complaints": result.complaints,
        "table": _plain(result.table),
        "numbers": _plain(result.numbers),
        "survival": _plain(result.survival),
        "risk_groups": _risk_groups(result),
    }
    for name, table in tables.items():
        if table.empty:
            (Path(folder) / name).unlink(missing_ok=True)
            continue
        with whole(Path(folder) / name) as path:
            write_frame(path, table)
    with whole(Path(folder) / "probe.json") as path:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    write_figures(result, Path(folder))


def _stands(table: pd.DataFrame) -> bool:
    """Whether a table has a row of whole sites held out."""
    return not table.empty and bool(table["embedding"].str.endswith(NEW_SITES).any())


def _risk_groups(result: ProbeResult) -> dict[str, object]:
    """Survival target -> the curves of its risk groups by the first embedding."""
    found = {}
    for target, rows in result.survival.groupby("target", sort=False) if len(result.survival) else ():
        chosen = (result.predictions["target"] == target) & (
            result.predictions["embedding"] == rows["embedding"].iloc[0]
        )
        parted = risk_groups(pd.DataFrame(result.predictions[chosen]))
        p = None if parted["p"] != parted["p"] else parted["p"]
        found[str(target)] = parted | {"p": p, "unit": rows["unit"].iloc[0]}
    return found


def _plain(table: pd.DataFrame) -> list[dict[str, object]]:
    return [{str(k): None if v != v else v for k, v in row.items()} for row in table.to_dict("records")]
