"""AUROC on many resamples of the patients at once."""

from __future__ import annotations

import numpy as np


def resample(patients: int, times: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap the patients: (times + 1, patients) float64, how often each is drawn; row 0 is all of them once."""
    weights = np.ones((times + 1, patients))
    for row in weights[1:]:
        row[:] = np.bincount(rng.integers(patients, size=patients), minlength=patients)
    return weights


def macro_auroc(
    probabilities: np.ndarray, classes: np.ndarray, folds: np.ndarray, patient: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """AUROC within folds on many resamples at once; of several classes the mean of one against the rest.

    Args:
        probabilities: (n, classes).
        classes: (n,) int.
        folds: (n,) int; slides of different folds are not compared.
        patient: (n,) int column of `weights`.
        weights: (B, patients) from `resample`.

    Returns:
        (B,) float64; nan where a resample holds no pair for some class.
    """
    columns = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    return np.mean([_auroc(probabilities[:, c], classes == c, folds, patient, weights) for c in columns], axis=0)


def _auroc(
    score: np.ndarray, positive: np.ndarray, folds: np.ndarray, patient: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Count, for each positive, the negatives below and not above it by one running sum over the sorted negatives.

    Resamples run along the second axis, so that every step takes whole rows of memory. Counts are integers: exact.
    """
    by_patient = np.ascontiguousarray(weights.T)
    ordered, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for fold in np.unique(folds):
        up = np.flatnonzero((folds == fold) & positive)
        down = np.flatnonzero((folds == fold) & ~positive)
        up, down = up[np.argsort(score[up])], down[np.argsort(score[down])]
        below = np.zeros((len(down) + 1, len(weights)))
        np.cumsum(by_patient[patient[down]], axis=0, out=below[1:])
        mass = by_patient[patient[up]]
        for side in ("left", "right"):
            ordered += np.einsum("ib,ib->b", mass, below[np.searchsorted(score[down], score[up], side)]) / 2
        pairs += mass.sum(axis=0) * below[-1]
    with np.errstate(invalid="ignore"):
        return ordered / pairs
