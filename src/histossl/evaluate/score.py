"""Metrics of predictions, each with a 95 % interval from resamples of the patients."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from histossl.evaluate.auroc import macro_ranks

BINS = 10  # of probabilities, in calibration
Samples = dict[str, NDArray[np.float64]]  # metric -> (B,): entry 0 of all patients, then one entry per resample


def samples_of(
    values: NDArray, truth: NDArray, folds: NDArray, patient: NDArray, weights: NDArray, classes: bool
) -> Samples:
    """The metrics of one method, each averaged over the repeats.

    Args:
        values: (repeats, n, classes) probabilities or (repeats, n, 1) numbers.
        truth: (n,) classes as int, or numbers.
        folds: (repeats, n) int, the fold in which each slide was tested.
        patient: (n,) int, the column of `weights` of each slide's patient.
        weights: (B, patients) from `resample`.
        classes: whether the target is a class; otherwise it is a number.

    Returns:
        Metric -> (B,) float64; `ProbeResult` says what each metric is.
    """
    figures: Callable[..., Samples] = _of_classes if classes else _of_numbers
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        each = list(pool.map(lambda v, f: figures(v, truth, f, patient, weights), values, folds))
    return {name: np.mean([found[name] for found in each], axis=0) for name in each[0]}


def interval(samples: NDArray) -> tuple[float, float, float]:
    """The value and its 95 % interval.

    Args:
        samples: (B,): the value of all patients, then of each resample; nan among the resamples does not count.

    Returns:
        The value, and the 2.5 and 97.5 percentiles of the resamples (nan where all are nan).
    """
    low, high = np.nanpercentile(samples[1:], [2.5, 97.5]) if np.isfinite(samples[1:]).any() else (np.nan, np.nan)
    return float(samples[0]), float(low), float(high)


def _of_classes(p: NDArray, y: NDArray, folds: NDArray, patient: NDArray, weights: NDArray) -> Samples:
    """Metrics of (n, classes) probabilities; see `ProbeResult`."""
    count = p.shape[1]
    is_class, called = np.eye(count, dtype=bool)[y], np.eye(count, dtype=bool)[p.argmax(axis=1)]
    kinds = slice(1 if count == 2 else 0, None)
    gaps = np.zeros((len(y), count, BINS))
    rows, columns = np.indices(p.shape)
    gaps[rows, columns, np.minimum((p * BINS).astype(int), BINS - 1)] = p - is_class
    columns = [is_class, called, is_class & called, ((p - is_class) ** 2).sum(axis=1)[:, None], np.ones((len(y), 1))]
    parts = _summed([*columns, gaps[:, kinds].reshape(len(y), -1)], patient, weights)
    true, positive, hits, errors, total, gaps = parts
    auroc, precision = macro_ranks(p, y, folds, patient, weights)
    with np.errstate(invalid="ignore"):
        recall, f1 = hits / true, 2 * hits / (true + positive)
        return {
            "auroc": auroc,
            "balanced_accuracy": recall.mean(axis=1),
            "average_precision": precision,
            "f1": f1[:, kinds].mean(axis=1),
            "brier": errors[:, 0] / total[:, 0],
            "ece": np.abs(gaps).sum(axis=1) / total[:, 0] / (1 if count == 2 else count),
        }


def _summed(columns: list[NDArray], patient: NDArray, weights: NDArray) -> list[NDArray[np.float64]]:
    """Sums of columns (n, m) over the slides of every resample, (B, m) each; one matrix product over the patients."""
    flat = np.hstack(columns).astype(np.float64).T
    by_patient = np.stack([np.bincount(patient, column, weights.shape[1]) for column in flat], axis=1).astype(
        np.float64
    )
    ends = np.cumsum([part.shape[1] for part in columns]).tolist()
    found = np.asarray(weights @ by_patient, np.float64)
    return [found[:, end - part.shape[1] : end] for end, part in zip(ends, columns, strict=True)]


def _of_numbers(p: NDArray, y: NDArray, folds: NDArray, patient: NDArray, weights: NDArray) -> Samples:
    """Metrics of (n, 1) predicted numbers: Spearman after each fold's mean prediction is subtracted, R² and MAE.

    The mean prediction of a fold follows the mean of its training slides, which is the lower the higher the test slides
    are: without any signal, the correlation over all folds would be negative. The mean of the correlations within folds
    is no remedy: on few slides it differs from that of the cohort, and more so in resamples, which repeat slides.
    """
    p = p[:, 0]
    columns = np.column_stack([(p - y) ** 2, np.abs(p - y), y, y**2, np.ones(len(y))])
    errors, absolute, first, second, total = _summed([columns], patient, weights)[0].T
    centred = p - (np.bincount(folds, p) / np.maximum(np.bincount(folds), 1))[folds]
    # In parts, since the ranks of all resamples at once take (B, n) memory several times.
    parts = [spearman(centred, y, some[:, patient]) for some in np.array_split(weights, 1 + len(weights) // 128)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "spearman": np.concatenate(parts),
            "r2": 1 - errors / (second - first**2 / total),
            "mae": absolute / total,
        }


def spearman(a: NDArray, b: NDArray, weights: NDArray) -> NDArray[np.float64]:
    """Spearman's rank correlation on weighted resamples.

    Args:
        a: (n,) values.
        b: (n,) values.
        weights: (B, n), how often each value counts.

    Returns:
        (B,) float64 in [-1, 1], ties at their mean rank; nan where all values of `a` or of `b` are equal.
    """
    x, y = (_ranks(values, weights) for values in (a, b))
    total = weights.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y = (ranks - (weights * ranks).sum(axis=1, keepdims=True) / total for ranks in (x, y))
        spread = np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
        return np.where(spread > 1e-9, (weights * x * y).sum(axis=1) / spread, np.nan)


def _ranks(values: NDArray, weights: NDArray) -> NDArray[np.float64]:
    """(B, n): the rank of each value among values taken that many times, up to a constant."""
    group = rankdata(values, "dense") - 1
    order = np.argsort(group, kind="stable")
    mass = np.add.reduceat(weights[:, order], np.flatnonzero(np.diff(group[order], prepend=-1)), axis=1)
    return (np.cumsum(mass, axis=1) - mass / 2)[:, group]


def reliability(p: NDArray, is_class: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """The points of a calibration curve: one per tenth of the probabilities that has slides.

    Args:
        p: (n,) probabilities of one class, in [0, 1].
        is_class: (n,) bool, whether the slide is of that class.

    Returns:
        The mean probability, the share of slides of the class, and the number of slides, each (tenths,).
    """
    tenth = np.minimum((p * BINS).astype(int), BINS - 1)
    counts = np.bincount(tenth, minlength=BINS)
    held = counts > 0
    means = [np.bincount(tenth, values, BINS)[held] / counts[held] for values in (p, is_class.astype(float))]
    return means[0], means[1], counts[held]
