"""How much of a label is in the vectors: linear probes side by side, split by patient, with intervals."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, f1_score, recall_score
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

import histossl
from histossl.config import to_dict
from histossl.errors import FileFormatError, LabelError, SettingsError
from histossl.evaluate.audit import audit_line
from histossl.evaluate.auroc import macro_auroc, resample
from histossl.evaluate.labels import Labels
from histossl.evaluate.logistic import predict, prepare, solve
from histossl.evaluate.splits import draw_shots, grouped_folds
from histossl.store import whole

# Each with its words in a paragraph of method; `histossl.evaluate.rivals` makes them.
METHODS = {
    "knn": "Nearest neighbours: the 10 nearest labelled slides by the cosine of standardised features, by distance.",
    "deviation": "Mean and deviation: the same regression on mean and standard deviation of the tiles' features.",
    "max": "Max pooling: the same regression on the maximum of the tiles' features.",
    "attention": "Attention MIL: gated attention over tiles, trained on the labels by one fixed recipe.",
    "sparse": "SparseConvMIL: sparse convolutions on the map of tiles, trained on the labels by the same recipe.",
    "finetune": "Fine-tuned encoder: the pretrained slide encoder, all of it trained on by the same recipe.",
}

# (rows that train (n,), their classes (n,) int, rows to test (m,), seed) -> (m, classes) probabilities. Rows are those
# of the embeddings; every class is among those that train.
Rival = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class ProbeSettings:
    """How the linear probe is trained and scored.

    Args:
        targets: columns of the label table to predict; empty takes `label`, or all columns where there is none.
        folds: folds of the cross-validation; every class needs at least as many patients.
        repeats: times that the patients are dealt into folds anew.
        C: inverse strength of the L2 penalty.
        choose_C: values of C to choose among for every fit, by 3 folds of the training patients; empty takes C.
        balanced: weight the classes by the inverse of their frequency.
        shots: numbers of labelled slides for the curve of few labels; those that a fold cannot give are left out.
        bootstraps: resamples of the patients behind each interval.
        rivals: further methods on the same labels and folds: knn, deviation, max; and trained on the labels, which
            takes minutes: attention, sparse, finetune.
        mixed_patients: allow slides of one patient to have different classes, as tumour and normal have.
        seed: of the folds, the shots and the resamples.
    """

    targets: tuple[str, ...] = ()
    folds: int = 5
    repeats: int = 5
    C: float = 10.0
    choose_C: tuple[float, ...] = ()
    balanced: bool = True
    shots: tuple[int, ...] = (25, 50, 100)
    bootstraps: int = 1000
    rivals: tuple[str, ...] = ()
    mixed_patients: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {"folds": (self.folds, 2), "repeats": (self.repeats, 1), "bootstraps": (self.bootstraps, 100)}
        for name, (value, least) in limits.items():
            if value < least:
                raise SettingsError(f"probe.{name} is {value}", f"it must be {least} or more")
        if not all(C > 0 for C in (self.C, *self.choose_C)):
            raise SettingsError(f"probe.C is {self.C}, choose_C {self.choose_C}", "it must be positive")
        if any(n < 2 for n in self.shots):
            raise SettingsError(f"probe.shots is {self.shots}", "each must be 2 or more")
        if unknown := [name for name in self.rivals if name not in METHODS]:
            raise SettingsError(f"probe.rivals: no {unknown[0]!r}", f"there are {', '.join(METHODS)}")


@dataclass(frozen=True)
class ProbeResult:
    """What `probe` found.

    Attributes:
        table: one row for each target, number of labels and embedding, in that order. `target`, `embedding`,
            `n_labelled` (text: a number of slides, or "all" of the training folds), `auroc` with its 95 % interval
            `low`, `high`; `difference` with `difference_low`, `difference_high`: how far the first embedding is ahead
            of this one, resampled as a pair (empty for the first itself); `balanced_accuracy`; `average_precision`
            within folds and `f1`, of two classes those of the second by name, of several the mean; `brier`, the mean
            over slides of the squared errors of the probabilities, summed over the classes, in [0, 2]; `n_slides`,
            `n_patients`, `n_classes`, `repeats`.
        predictions: out-of-fold predictions with all labels, one row for each target, embedding and slide:
            `target`, `embedding`, `slide_id`, `patient_id`, `truth`, `predicted` and `p(CLASS)`, the probability of
            each class, mean over the repeats.
        audit: one line a target: classes, patients on both sides, near-duplicate slides.
        complaints: one line each for what was passed over.
        settings: what it was asked.
    """

    table: pd.DataFrame
    predictions: pd.DataFrame
    audit: tuple[str, ...]
    complaints: tuple[str, ...]
    settings: ProbeSettings


def probe(
    embeddings: Mapping[str, np.ndarray],
    ids: Sequence[str],
    labels: Labels,
    settings: ProbeSettings = ProbeSettings(),
    rivals: Mapping[str, Rival] | None = None,
) -> ProbeResult:
    """Compare embeddings of the same slides by a logistic regression on each, on the same splits.

    Every feature is standardised and divided by √d, with means and deviations of the training slides alone. A row then
    has length 1 in the mean, like the normalised slide vectors that the paper's C = 10 was chosen for, whatever
    d and the units are; the rule is one for all embeddings, so that none is favoured by its scale.

    AUROC is the share of rightly ordered pairs (ties count half) among the slides of different class *that the same
    model scored*, that is within a fold, pooled over the folds: scores of different models have no common zero, and a
    shift between them says nothing about the embedding. Several classes: mean of one against the rest. Its interval:
    percentiles over resamples of the patients of the mean over repeats; resamples that lost a class do not count.
    They are the same for all embeddings, which makes the differences paired.

    Args:
        embeddings: name -> (N, d) finite floats; the first is the one to compare the others with.
        ids: N unique slide ids, the order of the rows.
        labels: from `read_labels`.
        settings: see there; what is to stand for `settings.rivals` is up to the caller.
        rivals: name -> a method that is not a linear model on vectors; judged on the same slides.

    Raises:
        FileFormatError: rows that do not fit `ids`, or values that are not finite.
        LabelError: too few patients or classes, see `grouped_folds`. Where the targets were found rather than named,
            a target that cannot be probed is passed over with a complaint as long as another can.
    """
    vectors = {name: _check(name, values, ids) for name, values in embeddings.items()}
    tables, predictions, audit, complaints, failed = [], [], [], list(labels.complaints), []
    for target in labels.targets:
        try:
            task = _task(target, ids, labels, settings)
        except LabelError as error:
            if labels.chosen:
                raise
            failed.append(str(error))
            continue
        scores, note = _out_of_fold(task, vectors, settings, rivals or {})
        tables.append(_score(task, scores, settings))
        predictions.append(_predictions(task, {name: scores[name, n] for name, n in scores if n == "all"}))
        here = (values[task.rows] for values in vectors.values())
        line = audit_line(list(task.slides), task.patients, task.names[task.classes], task.folds, here)
        audit.append(f"{target}: {line}{note}")
    if not tables:
        raise LabelError("no target can be probed: " + "; ".join(failed), "name one with --probe.targets")
    complaints += [f"left out: {what}" for what in failed]
    return ProbeResult(
        pd.concat(tables, ignore_index=True),
        pd.concat(predictions, ignore_index=True),
        tuple(audit),
        tuple(complaints),
        settings,
    )


@dataclass(frozen=True)
class _Task:
    """One target: the slides that have it, by their rows in the embeddings."""

    target: str
    rows: np.ndarray  # (n,) int
    slides: np.ndarray  # (n,) text
    patients: np.ndarray  # (n,) text
    names: np.ndarray  # (classes,) text, sorted
    classes: np.ndarray  # (n,) int
    folds: np.ndarray  # (repeats, n) int


def _check(name: str, values: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or len(values) != len(ids) or len(set(ids)) != len(ids):
        raise FileFormatError(f"{name}: {values.shape} values for {len(set(ids))} different slides", "one row a slide")
    bad = [ids[k] for k in range(len(ids)) if not np.isfinite(values[k]).all()]
    if bad:
        raise FileFormatError(f"{name}: {len(bad)} vectors are not finite, first {bad[:3]}", "embed these slides again")
    return values


def _task(target: str, ids: Sequence[str], labels: Labels, settings: ProbeSettings) -> _Task:
    column = labels.table[target].dropna()
    rows = np.flatnonzero(pd.Index(ids).isin(column.index))
    slides = np.asarray(ids, dtype=object)[rows]
    names, classes = np.unique(column.loc[slides].to_numpy(dtype=str), return_inverse=True)
    patients = labels.table["patient_id"].loc[slides].to_numpy(dtype=str)
    if len(names) > max(20, len(rows) // 2):
        raise LabelError(f"{target}: {len(names)} different values on {len(rows)} slides", "give it as classes")
    try:
        folds = grouped_folds(
            classes, patients, settings.folds, settings.repeats, settings.seed, settings.mixed_patients
        )
    except LabelError as error:
        raise LabelError(f"{target}: {error.what}", error.hint) from error
    return _Task(target, rows, slides, patients, names, classes, folds)


def _out_of_fold(
    task: _Task, vectors: dict[str, np.ndarray], settings: ProbeSettings, rivals: Mapping[str, Rival]
) -> tuple[dict[tuple[str, str], np.ndarray], str]:
    """(embedding, n_labelled) -> (repeats, n, classes) probabilities by models that did not see the patient; a note."""
    training = min((task.folds != fold).sum(axis=1).min() for fold in range(settings.folds))
    counts = [*(str(n) for n in sorted(set(settings.shots)) if len(task.names) <= n < training), "all"]
    shape = (*task.folds.shape, len(task.names))
    scores = {(name, n): np.empty(shape) for n in counts for name in (*vectors, *rivals)}
    places = [(repeat, fold) for repeat in range(settings.repeats) for fold in range(settings.folds)]

    def fit_vectors(place: tuple[int, int]) -> int:
        unfinished, test = 0, np.flatnonzero(task.folds[place[0]] == place[1])
        for n in counts:
            train = _labelled(task, *place, n, settings)
            for name, values in vectors.items():
                x, y = values[task.rows[train]], task.classes[train]
                found, finished = _fit(x, y, task.patients[train], values[task.rows[test]], settings)
                scores[name, n][place[0], test] = found
                unfinished += not finished
        return unfinished

    # The steps are too small for threads of BLAS; whole fits side by side keep the cores busy.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        unfinished = sum(pool.map(fit_vectors, places))
    for (name, n), out in scores.items() if rivals else ():
        for repeat, fold in places if name in rivals else ():
            test, train = np.flatnonzero(task.folds[repeat] == fold), _labelled(task, repeat, fold, n, settings)
            seed = int(np.random.SeedSequence([settings.seed, repeat, fold]).generate_state(1)[0])
            out[repeat, test] = rivals[name](task.rows[train], task.classes[train], task.rows[test], seed)
    return scores, f"; {unfinished} fits did not converge" if unfinished else ""


def _labelled(task: _Task, repeat: int, fold: int, n: str, settings: ProbeSettings) -> np.ndarray:
    """The slides that train where `fold` is tested: all others, or n of them."""
    pool = np.flatnonzero(task.folds[repeat] != fold)
    if n == "all":
        return pool
    rng = np.random.default_rng([settings.seed, repeat, fold, int(n)])
    return pool[draw_shots(task.classes[pool], int(n), rng)]


def _fit(
    x: np.ndarray, y: np.ndarray, patients: np.ndarray, x_test: np.ndarray, settings: ProbeSettings
) -> tuple[np.ndarray, bool]:
    scaler = StandardScaler().fit(x)
    root = x.shape[1] ** 0.5
    x = scaler.transform(x) / root
    C = _choose(x, y, patients, settings) if settings.choose_C else settings.C
    w, b, finished = solve(prepare(x, y, settings.balanced), C)
    return predict(scaler.transform(x_test) / root, w, b), finished


def _choose(x: np.ndarray, y: np.ndarray, patients: np.ndarray, settings: ProbeSettings) -> float:
    """The C with the least cross-entropy on patients held out of the training slides; `settings.C` for too few."""
    try:
        folds = grouped_folds(y, patients, 3, 1, settings.seed, mixed_patients=True)[0]
    except LabelError:
        return settings.C
    losses = np.zeros(len(settings.choose_C))
    weights = 1 / np.bincount(y)[y] if settings.balanced else np.ones(len(y))
    for fold in range(3):
        train, held = folds != fold, np.flatnonzero(folds == fold)
        problem = prepare(x[train], y[train], settings.balanced)
        for k, C in enumerate(settings.choose_C):
            w, b, _ = solve(problem, C)
            losses[k] -= weights[held] @ np.log(
                np.maximum(predict(x[held], w, b)[np.arange(len(held)), y[held]], 1e-12)
            )
    return settings.choose_C[int(losses.argmin())]


def _score(task: _Task, scores: dict[tuple[str, str], np.ndarray], settings: ProbeSettings) -> pd.DataFrame:
    patient = np.unique(task.patients, return_inverse=True)[1]
    weights = resample(patient.max() + 1, settings.bootstraps, np.random.default_rng([settings.seed, 1]))
    reference = next(iter(scores))[0]
    rows, first = [], np.empty(0)
    for (name, n), values in scores.items():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            each = pool.map(lambda s, f: macro_auroc(s, task.classes, f, patient, weights), values, task.folds)
            samples = np.mean(list(each), axis=0)
        if name == reference:
            first = samples
        rows.append(
            {"target": task.target, "n_labelled": n, "embedding": name}
            | dict(zip(("auroc", "low", "high"), _interval(samples), strict=True))
            | dict(
                zip(
                    ("difference", "difference_low", "difference_high"),
                    _interval(first - samples) if name != reference else (np.nan,) * 3,
                    strict=True,
                )
            )
            | {
                **_further(values, task),
                "n_slides": len(task.rows),
                "n_patients": patient.max() + 1,
                "n_classes": len(task.names),
                "repeats": len(values),
            }
        )
    return pd.DataFrame(rows)


def _interval(samples: np.ndarray) -> tuple[float, float, float]:
    """The value itself (resample 0) and the 95 % interval of the others."""
    low, high = np.nanpercentile(samples[1:], [2.5, 97.5]) if np.isfinite(samples[1:]).any() else (np.nan, np.nan)
    return float(samples[0]), float(low), float(high)


def _further(values: np.ndarray, task: _Task) -> dict[str, float]:
    """Figures without interval of (repeats, n, classes) probabilities: means over the repeats."""
    y, kinds = task.classes, range(1 if len(task.names) == 2 else 0, len(task.names))
    truth = np.eye(len(task.names))[y]
    predicted = values.argmax(axis=2)
    precision = [
        average_precision_score(y[fold_of == fold] == kind, scores[fold_of == fold, kind])
        for scores, fold_of in zip(values, task.folds, strict=True)
        for fold in np.unique(fold_of)
        for kind in kinds
        if (y[fold_of == fold] == kind).any()
    ]
    f1 = [f1_score(y == kind, p == kind, zero_division=0.0) for p in predicted for kind in kinds]  # type: ignore[arg-type]
    return {
        "balanced_accuracy": float(np.mean([recall_score(y, p, average="macro") for p in predicted])),
        "average_precision": float(np.mean(precision)),
        "f1": float(np.mean(f1)),
        "brier": float(((values - truth) ** 2).sum(axis=2).mean()),
    }


def _predictions(task: _Task, scores: dict[str, np.ndarray]) -> pd.DataFrame:
    parts = []
    for name, values in scores.items():
        mean = values.mean(axis=0)
        part = pd.DataFrame(mean, columns=pd.Index([f"p({c})" for c in task.names]))
        part.insert(0, "predicted", task.names[mean.argmax(axis=1)])
        part.insert(0, "truth", task.names[task.classes])
        part.insert(0, "patient_id", task.patients)
        part.insert(0, "slide_id", task.slides)
        part.insert(0, "embedding", name)
        part.insert(0, "target", task.target)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def describe(settings: ProbeSettings) -> str:
    """A paragraph of method, in words, for a paper."""
    weights = ", classes weighted by their inverse frequency" if settings.balanced else ""
    shots = " Smaller numbers of labelled slides are drawn from the training folds in the proportions of the classes."
    grid = ", ".join(f"{C:g}" for C in settings.choose_C)
    C = f"C of {grid} by 3 folds of the training patients" if grid else f"C = {settings.C:g}"
    return (
        f"Logistic regression (L2 penalty, {C}{weights}; histossl {histossl.__version__}) on "
        "features standardised and divided by the root of their number, by the training slides alone. "
        f"{settings.folds} folds of whole patients, stratified by class, dealt {settings.repeats} times."
        f"{shots if settings.shots else ''} AUROC (of several classes the mean of one against the rest) compares "
        "slides within a test fold and is averaged over the repeats; its intervals and those of the differences are "
        f"the 2.5 and 97.5 percentiles of {settings.bootstraps} bootstrap resamples of the patients, the same for all "
        "embeddings. They tell what other patients would change, not what other labelled slides would. "
        f"Seed {settings.seed}.{' ' if settings.rivals else ''}"
        + " ".join(METHODS[name] for name in dict.fromkeys(settings.rivals))
    )


def write_probe(result: ProbeResult, folder: Path) -> None:
    """Write probe.csv (the table), predictions.csv, probe.json (the rest, with the method in words), and figures."""
    from histossl.evaluate.figures import write_figures

    content = {
        "histossl": histossl.__version__,
        "settings": to_dict(result.settings),
        "method": describe(result.settings),
        "audit": result.audit,
        "complaints": result.complaints,
        "table": [{k: None if v != v else v for k, v in row.items()} for row in result.table.to_dict("records")],
    }
    with whole(Path(folder) / "probe.csv") as path:
        result.table.to_csv(path, index=False, float_format="%.6f")
    with whole(Path(folder) / "predictions.csv") as path:
        result.predictions.to_csv(path, index=False, float_format="%.6f")
    with whole(Path(folder) / "probe.json") as path:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    write_figures(result.table, result.predictions, Path(folder))
