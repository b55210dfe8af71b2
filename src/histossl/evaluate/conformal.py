"""What lets one prediction be trusted or not: calibrated probabilities, conformal limits, and how far a slide lies off.

All of it counts patients, not slides: each has the weight 1, shared by its slides. A limit then holds for a slide of a
new patient that is drawn as the known ones were (Dunn, Wasserman and Ramdas, 2023), for whatever model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

NEAR = 5  # patients to whom the distance is taken
BLOCK = 128  # rows whose distances to all are in memory at once


def patient_weights(patients: NDArray) -> NDArray[np.float64]:
    """One over the number of slides of the slide's patient.

    Args:
        patients: (n,) patient of each slide.

    Returns:
        (n,) in (0, 1].
    """
    _, group, counts = np.unique(patients, return_inverse=True, return_counts=True)
    return 1 / counts[group]


def conformal_limit(scores: NDArray, patients: NDArray, coverage: float) -> float:
    """The limit that the score of a slide of a new patient keeps within, with a probability of `coverage` or more.

    Args:
        scores: (n,) nonconformity of known slides, by models that did not see their patients.
        patients: (n,) patient of each slide.
        coverage: in (0, 1).

    Returns:
        The limit; infinite where the patients are too few for such a coverage.
    """
    weights = patient_weights(patients)
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum(weights[order])
    wanted = coverage * (round(weights.sum()) + 1)  # the new patient is one of them
    found = int(np.searchsorted(reached, wanted - 1e-9))
    return float(scores[order[found]]) if found < len(scores) else float("inf")


def share_beyond(scores: NDArray, patients: NDArray, new: NDArray) -> NDArray[np.float64]:
    """The conformal p-value of new scores: the share of patients, the new one counted, with a score as high.

    Args:
        scores: (n,) of known slides.
        patients: (n,) patient of each.
        new: (m,) scores of new slides.

    Returns:
        (m,) in (0, 1]; the least is one over the number of patients plus one.
    """
    weights = patient_weights(patients)
    order = np.argsort(scores)
    total = np.append(np.cumsum(weights[order][::-1])[::-1], 0.0)
    return (1 + total[np.searchsorted(scores[order], new)]) / (round(weights.sum()) + 1)


def fit_calibration(log_p: NDArray, truth: NDArray[np.int64], patients: NDArray) -> tuple[float, NDArray[np.float64]]:
    """Calibrate probabilities by one slope of their logarithms and an offset of each class (Platt, 1999, for two).

    The truth is smoothed as Platt's, by one slide more of each class, so that classes that are told without an error
    do not get a certainty that so few slides cannot give.

    Args:
        log_p: (n, K) logarithms of out-of-fold probabilities.
        truth: (n,) int classes, each of which occurs.
        patients: (n,) patient of each slide.

    Returns:
        The slope, 0 or more, and the offsets (K,): calibrated are the softmax of slope * log_p + offsets.
    """
    weights, kinds = patient_weights(patients), log_p.shape[1]
    counts = np.bincount(truth, weights, minlength=kinds)
    wanted = np.full((kinds, kinds), 1.0) + np.diag(counts)
    aims = (wanted / wanted.sum(axis=1, keepdims=True))[truth] * weights[:, None]

    def loss(flat: NDArray) -> tuple[float, NDArray]:
        log_q = log_softmax(flat[0] * log_p + flat[1:], axis=1)
        gap = np.exp(log_q) * weights[:, None] - aims
        return -float((aims * log_q).sum()), np.append((gap * log_p).sum(), gap.sum(axis=0))

    begin = np.append(1.0, np.zeros(kinds))
    found = minimize(loss, begin, jac=True, method="L-BFGS-B", bounds=[(0, None)] + [(None, None)] * kinds).x
    return float(found[0]), found[1:] - found[1:].mean()


def calibrated(log_p: NDArray, slope: float, offsets: NDArray) -> NDArray[np.float64]:
    """Apply a calibration.

    Args:
        log_p: (n, K) logarithms of probabilities.
        slope: of `fit_calibration`.
        offsets: (K,) likewise.

    Returns:
        (n, K) probabilities, rows sum to 1.
    """
    return np.exp(log_softmax(slope * log_p + offsets, axis=1))


def nearest_patients(
    vectors: NDArray, known: NDArray, patients: NDArray, own: NDArray | None = None
) -> tuple[NDArray[np.str_], NDArray[np.float32]]:
    """The nearest patients: each as far as the nearest of its slides, the features standardised over the known slides.

    Memory grows with the number of slides, not with its square.

    Args:
        vectors: (m, d) to measure from.
        known: (n, d) of the known slides.
        patients: (n,) patient of each known slide.
        own: (m,) patient of each vector, who is not counted; None where none is known.

    Returns:
        (m, k) the nearest k = 5 patients, or as many as there are, the nearest first; and their distances, divided by
        √d: about 1.4 between unrelated slides of the cohort, infinite to the own patient.
    """
    mean, deviation = known.mean(axis=0, dtype=np.float64), known.std(axis=0, dtype=np.float64)
    unit = np.where(deviation > 1e-9 * np.abs(known).max(initial=0), deviation, np.inf) * known.shape[1] ** 0.5
    order = np.argsort(patients, kind="stable")
    names, first = np.unique(patients[order], return_index=True)
    to = ((known[order] - mean) / unit).astype(np.float32)
    lengths, shape = (to**2).sum(axis=1), (len(vectors), min(NEAR, len(names)))
    found, far = np.empty(shape, names.dtype), np.empty(shape, np.float32)
    for start in range(0, len(vectors), BLOCK):
        rows = slice(start, start + BLOCK)
        x = ((vectors[rows] - mean) / unit).astype(np.float32)
        squares = (x**2).sum(axis=1)[:, None] + lengths - 2 * x @ to.T
        distances = np.sqrt(np.maximum(np.minimum.reduceat(squares, first, axis=1), 0))
        if own is not None:
            distances[own[rows, None] == names] = np.inf
        near = np.argsort(distances, axis=1, kind="stable")[:, : shape[1]]
        found[rows], far[rows] = names[near], np.take_along_axis(distances, near, axis=1)
    return found, far


def strangeness(distances: NDArray) -> NDArray[np.float64]:
    """How far slides lie off: the mean distance to the nearest patients.

    Args:
        distances: (m, k) of `nearest_patients`.

    Returns:
        (m,); infinite distances do not count.
    """
    there = np.isfinite(distances)
    return np.where(there, distances, 0).sum(axis=1, dtype=np.float64) / np.maximum(there.sum(axis=1), 1)
