"""AUROC and average precision on many bootstrap resamples of the patients at once."""

from __future__ import annotations

import numpy as np
from numba import njit


def resample(patients: int, times: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap the patients.

    Args:
        patients: number of patients.
        times: number of resamples.
        rng: source of the draws.

    Returns:
        (times + 1, patients) float64: how often each patient is drawn; row 0 has every patient once.
    """
    weights = np.ones((times + 1, patients))
    for row in weights[1:]:
        row[:] = np.bincount(rng.integers(patients, size=patients), minlength=patients)
    return weights


def macro_auroc(
    probabilities: np.ndarray, classes: np.ndarray, folds: np.ndarray, patient: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """AUROC alone; arguments as in `macro_ranks`.

    Args:
        probabilities: (n, classes).
        classes: (n,) int.
        folds: (n,) int.
        patient: (n,) int.
        weights: (B, patients).

    Returns:
        (B,) float64.
    """
    return macro_ranks(probabilities, classes, folds, patient, weights)[0]


def macro_ranks(
    probabilities: np.ndarray, classes: np.ndarray, folds: np.ndarray, patient: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision within folds, on every resample.

    With two classes both are of class 1; with more they are the mean over the classes, each against the rest.

    Args:
        probabilities: (n, classes) in [0, 1].
        classes: (n,) int, 0 to classes - 1.
        folds: (n,) int; slides of different folds are not compared, since different models scored them.
        patient: (n,) int, the column of `weights` of each slide's patient.
        weights: (B, patients) from `resample`.

    Returns:
        AUROC (B,) float64: the share of correctly ordered pairs over all folds, ties count half; nan where a resample
        has no pair for some class. Average precision (B,) float64: Σ (increase of recall) · precision over the
        thresholds, averaged over the folds that contain the class; nan where no fold does.
    """
    columns = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    drawn = np.ascontiguousarray(weights, np.uint16)  # a quarter of the memory that the inner loop reads
    areas, precisions = [], []
    for c in columns:
        sums = np.zeros((4, len(weights)))
        for fold in np.unique(folds):
            rows = np.flatnonzero(folds == fold)
            rows = rows[np.argsort(-probabilities[rows, c], kind="stable")]
            score = probabilities[rows, c]
            last = np.append(score[1:] != score[:-1], True)
            _count(drawn, patient[rows].astype(np.int32), (classes[rows] == c).astype(np.int64), last, sums)
        with np.errstate(invalid="ignore"):
            areas.append(sums[0] / 2 / sums[1])
            precisions.append(sums[2:])
    total, held = np.sum(precisions, axis=0)
    with np.errstate(invalid="ignore"):
        return np.mean(areas, axis=0), total / held


@njit(cache=True, nogil=True)
def _count(drawn, patient, positive, last, sums):
    """Add one fold to `sums` (4, B): twice the ordered pairs, pairs, average precision, 1 where that is defined.

    Slides are sorted by falling score, `last` marks the end of a group of ties. Counts are integers, hence exact.
    """
    for b in range(len(drawn)):
        above = twice = seen = up = down = 0
        area = 0.0
        for k in range(len(patient)):
            weight = np.int64(drawn[b, patient[k]])
            up += weight * positive[k]
            down += weight * (1 - positive[k])
            if last[k]:
                twice += down * (2 * above + up)
                above += up
                seen += up + down
                area += up * above / max(seen, 1)
                up = down = 0
        sums[0, b] += twice
        sums[1, b] += above * (seen - above)
        if above:
            sums[2, b] += area / above
            sums[3, b] += 1
