"""A probe of the labels that there are so far, and which slides to label next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import LabelError
from histossl.evaluate.auroc import macro_auroc, resample
from histossl.evaluate.linear import fit_score
from histossl.evaluate.logistic import predict
from histossl.evaluate.search import directions
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.splits import grouped_folds

CLASSES = 20  # at most; more different labels are numbers or names
_CANDIDATES, _REPRESENTED = 512, 4096  # slides that are compared with each other: a second for any cohort
_BOOTSTRAPS = 1000


@dataclass(frozen=True)
class LabelProbe:
    """What few labels are worth so far, and what to label next.

    Attributes:
        classes: the labels, sorted.
        counts: slides of each.
        patients: of the labelled slides.
        probabilities: (N, classes) of a classifier fitted on all labelled slides; None with fewer than two classes.
        auroc: on patients held out, with its 95 % interval; None where there are too few.
        folds: of whole patients, behind `auroc`.
        why: why there is no `auroc`; "" where there is one.
        suggested: rows to label next, the most useful first.
    """

    classes: tuple[str, ...]
    counts: tuple[int, ...]
    patients: int
    probabilities: NDArray[np.float64] | None
    auroc: tuple[float, float, float] | None
    folds: int
    why: str
    suggested: list[int] = field(default_factory=list)


def probe_so_far(
    vectors: NDArray, labels: Sequence[str], patients: NDArray, count: int = 10, seed: int = 0
) -> LabelProbe:
    """Fit the probe on the slides that are labelled, score it on whole patients held out, and suggest what to label.

    Args:
        vectors: (N, d) of all slides.
        labels: (N,) text, "" where a slide has none.
        patients: (N,) patient of each slide.
        count: slides to suggest.
        seed: of folds, resamples, and of the choice among very many slides.

    Returns:
        The probe.

    Raises:
        LabelError: there are more than 20 different labels.
    """
    text = np.asarray(labels, object)
    known = np.flatnonzero(text != "")
    names, classes = np.unique(text[known].astype(str), return_inverse=True)
    if len(names) > CLASSES:
        raise LabelError(f"{len(names)} different labels", f"this probe is of {CLASSES} classes at most: use `probe`")
    probabilities = None
    if len(names) > 1:
        score = fit_score(vectors[known], classes, names, ProbeSettings(seed=seed))
        probabilities = predict(vectors, score.weights, score.intercept)
    auroc, folds, why = _held_out(vectors[known], classes, patients[known], seed)
    unsure = np.ones(len(text)) if probabilities is None else uncertainty(probabilities)
    suggested = label_next(directions(vectors), unsure, text != "", patients, count, seed)
    of = tuple(map(int, np.bincount(classes, minlength=len(names))))
    kinds = tuple(map(str, names))
    return LabelProbe(kinds, of, len(np.unique(patients[known])), probabilities, auroc, folds, why, suggested)


def uncertainty(probabilities: NDArray) -> NDArray[np.float64]:
    """The entropy of each row's classes.

    Args:
        probabilities: (N, classes) in [0, 1], rows sum to 1, two classes or more.

    Returns:
        (N,) in [0, 1]: 0 where one class is certain, 1 where all are equally likely.
    """
    p = np.clip(probabilities, 1e-12, 1)
    return -(p * np.log(p)).sum(axis=1) / np.log(p.shape[1])


def label_next(
    rows: NDArray, unsure: NDArray, labelled: NDArray, patients: NDArray, count: int = 10, seed: int = 0
) -> list[int]:
    """Choose slides whose labels would tell most: of which the classifier is unsure, and which stand for many others.

    One after the other, the slide with the largest product of its uncertainty and what it covers: the sum over slides
    without a label of their uncertainty times the similarity by which this slide is nearer to them than any that is
    labelled or chosen already. A slide of a patient who has been chosen comes only where no other patient is left.

    Args:
        rows: (N, d) of length 1 or 0, as of `directions`.
        unsure: (N,) in [0, 1].
        labelled: (N,) bool; these are never chosen.
        patients: (N,) patient of each slide.
        count: slides to choose.
        seed: of the choice of slides that are compared, where there are thousands.

    Returns:
        At most `count` rows, the most useful first.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(np.flatnonzero(~labelled))
    others = shuffled[:_REPRESENTED]
    candidates = shuffled[np.argsort(-unsure[shuffled], kind="stable")][:_CANDIDATES]
    if not len(candidates):
        return []
    alike = np.maximum(rows[candidates] @ rows[others].T, 0)
    known = rng.permutation(np.flatnonzero(labelled))[:_REPRESENTED]
    covered = np.maximum(rows[known] @ rows[others].T, 0).max(axis=0, initial=0)
    free, chosen = np.ones(len(candidates), bool), []
    while free.any() and len(chosen) < count:
        gain = np.maximum(alike - covered, 0) @ unsure[others] * unsure[candidates]
        taken = np.isin(patients[candidates], patients[candidates[chosen]])
        allowed = free & ~taken if (free & ~taken).any() else free
        best = int(np.where(allowed, gain, -1).argmax())
        chosen.append(best)
        free[best] = False
        covered = np.maximum(covered, alike[best])
    return [int(row) for row in candidates[chosen]]


def _held_out(
    vectors: NDArray, classes: NDArray, patients: NDArray, seed: int
) -> tuple[tuple[float, float, float] | None, int, str]:
    """AUROC on patients held out, with its interval; the folds; why there is none."""
    kinds = int(classes.max(initial=-1)) + 1
    if kinds < 2:
        return None, 0, "label slides of two classes or more"
    people = min(len(np.unique(patients[classes == kind])) for kind in range(kinds))
    folds, settings = min(5, people), ProbeSettings(seed=seed)
    if folds < 2:
        return None, 0, "label slides of two patients or more in every class"
    try:
        fold = grouped_folds(classes, patients, folds, 1, seed, mixed_patients=True)[0]
    except LabelError as error:
        return None, 0, error.what
    names, found = np.arange(kinds), np.zeros((len(classes), kinds))
    for k in range(folds):
        train, test = fold != k, fold == k
        score = fit_score(vectors[train], classes[train], names, settings)
        found[test] = predict(vectors[test], score.weights, score.intercept)
    patient = np.unique(patients, return_inverse=True)[1]
    weights = resample(int(patient.max()) + 1, _BOOTSTRAPS, np.random.default_rng(seed))
    scores = macro_auroc(found, classes, fold, patient, weights)
    low, high = np.nanpercentile(scores[1:], [2.5, 97.5])
    return (float(scores[0]), float(low), float(high)), folds, ""
