"""Metrics of predicted survival: concordance, time-dependent AUROC and Brier score, each on many resamples at once."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from histossl.core.errors import LabelError
from histossl.evaluate.score import Samples

STEPS = 24  # of the time, in the integrated Brier score
FOLLOWED = 0.1  # share of the patients that must still be followed at the end of the time that is scored


@dataclass(frozen=True)
class Times:
    """The times at which survival is predicted and scored.

    Attributes:
        horizons: (H,) rising.
        grid: (STEPS,) rising, evenly spaced up to `end`.
        end: where a tenth of the patients is still followed.
    """

    horizons: NDArray[np.float64]
    grid: NDArray[np.float64]
    end: float

    @property
    def all(self) -> NDArray[np.float64]:
        """(H + STEPS,) horizons, then grid."""
        return np.concatenate([self.horizons, self.grid])


def times_of(truth: NDArray[np.float64], horizons: tuple[float, ...]) -> Times:
    """Choose the times at which survival is scored.

    Args:
        truth: (n, 2) time and event of all slides, at least one event.
        horizons: the wanted ones; empty takes the quartiles of the times of the events.

    Returns:
        The times.

    Raises:
        LabelError: a horizon at which nobody is followed any more, or before the first event.
    """
    end = float(np.quantile(truth[:, 0], 1 - FOLLOWED))
    happened = truth[truth[:, 1] > 0, 0]
    end = max(end, float(happened.min()))
    wanted = np.array(sorted(set(horizons))) if horizons else np.unique(np.quantile(happened, [0.25, 0.5, 0.75]))
    wanted = wanted if horizons else np.minimum(wanted, end)
    odd = [time for time in wanted if not happened.min() <= time < truth[:, 0].max()]
    if odd and horizons:
        span = f"events are from {happened.min():g}, and slides are followed to {truth[:, 0].max():g}"
        raise LabelError(f"probe.horizons: nothing can be said at {odd[0]:g}", span)
    return Times(np.unique(wanted), end * np.arange(1, STEPS + 1) / STEPS, end)


def still_followed(truth: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """The probability of being followed until just before given times (Kaplan and Meier, of the censoring).

    Args:
        truth: (n, 2) time and event.
        at: (m,) times.

    Returns:
        (m,) in (0, 1].
    """
    curve = kaplan_meier(np.column_stack([truth[:, 0], 1 - truth[:, 1]]), np.nextafter(at, 0))
    positive = curve[curve > 0]
    return np.maximum(curve, positive.min() if len(positive) else 1.0)


def kaplan_meier(truth: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kaplan and Meier's estimate of the probability of no event until given times.

    Args:
        truth: (n, 2) time and event.
        at: (m,) times.

    Returns:
        (m,) in [0, 1].
    """
    from lifelines import KaplanMeierFitter

    fitted = KaplanMeierFitter().fit(truth[:, 0], truth[:, 1])
    return fitted.survival_function_at_times(at).to_numpy(np.float64)


def survival_samples(
    values: NDArray, truth: NDArray[np.float64], folds: NDArray, patient: NDArray, weights: NDArray, times: Times
) -> Samples:
    """The metrics of one method, each averaged over the repeats.

    Args:
        values: (repeats, n, 1 + T) log hazard ratios, then probabilities of no event until `times.all`.
        truth: (n, 2) time and event.
        folds: (repeats, n) int, the fold in which each slide was tested.
        patient: (n,) int, the column of `weights` of each slide's patient.
        weights: (B, patients) from `auroc.resample`.
        times: of the horizons and the grid.

    Returns:
        Metric -> (B,) float64; `ProbeResult` says what each metric is.
    """
    time, event = truth.T
    once = truth[np.unique(patient, return_index=True)[1]]
    followed = still_followed(once, time)
    inverse = np.where((event > 0) & (time <= times.end), 1 / followed, 0.0)
    errors = _squared_errors(values[:, :, 1:], truth, inverse, once, times)

    def scores(p: NDArray, fold: NDArray) -> Samples:
        risk = p[:, 0]
        harrell = concordance(risk, truth, fold, patient, weights, event)
        uno = concordance(risk, truth, fold, patient, weights, inverse**2)
        areas = {f"auroc@{t:g}": _area(risk, truth, fold, patient, weights, followed, t) for t in times.horizons}
        return {"c_index": harrell, "uno_c": uno, "auroc": np.mean(list(areas.values()), axis=0), **areas}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        each = list(pool.map(scores, values, folds))
    found = {name: np.mean([one[name] for one in each], axis=0) for name in each[0]}
    by_patient = np.stack([np.bincount(patient, row, weights.shape[1]) for row in (errors, np.ones(len(errors)))])
    total, count = (weights @ by_patient.T).T
    return found | {"ibs": total / count}


def _squared_errors(
    p: NDArray, truth: NDArray[np.float64], inverse: NDArray, once: NDArray, times: Times
) -> NDArray[np.float64]:
    """(n,) each slide's part in the integrated Brier score, the mean over repeats (Graf et al., 1999)."""
    time = truth[:, 0]
    p, grid = p[:, :, len(times.horizons) :], times.grid
    over = (truth[:, 1] > 0)[:, None] & (time[:, None] <= grid)
    still = (time[:, None] > grid) / still_followed(once, np.nextafter(grid, np.inf))
    errors = (p**2 * (over * inverse[:, None]) + (1 - p) ** 2 * still).mean(axis=0)
    return errors.mean(axis=1)  # the grid is even


def concordance(
    risk: NDArray, truth: NDArray[np.float64], folds: NDArray, patient: NDArray, weights: NDArray, of_event: NDArray
) -> NDArray[np.float64]:
    """The share of pairs within a fold in which the one with the earlier event has the higher risk; ties count half.

    Args:
        risk: (n,) log hazard ratios.
        truth: (n, 2) time and event.
        folds: (n,) int; slides of different folds are not compared, since different models scored them.
        patient: (n,) int, the column of `weights` of each slide's patient.
        weights: (B, patients).
        of_event: (n,) ≥ 0, the weight of the pairs in which this slide's event is the earlier one: the event itself
            gives Harrell's C, the squared inverse of the probability of being followed until then Uno's.

    Returns:
        (B,) in [0, 1]; nan where a resample has no pair.
    """
    sums = np.zeros((2, len(weights)))
    for fold in np.unique(folds):
        rows = np.flatnonzero(folds == fold)
        # Falling time; at equal times those without event first, since they outlived the event.
        rows = rows[np.lexsort([truth[rows, 1], -truth[rows, 0]])]
        time, event = truth[rows].T
        rank = np.unique(risk[rows], return_inverse=True)[1] + 1
        last = np.append((time[1:] != time[:-1]) | (event[1:] != event[:-1]), True)
        _pairs(weights, patient[rows], rank, event > 0, of_event[rows].astype(np.float64), last, sums)
    with np.errstate(invalid="ignore"):
        return sums[0] / sums[1]


def _area(
    risk: NDArray,
    truth: NDArray[np.float64],
    folds: NDArray,
    patient: NDArray,
    weights: NDArray,
    followed: NDArray,
    at: float,
) -> NDArray[np.float64]:
    """(B,) the cumulative, dynamic AUROC: events until `at` against those who outlived it, within folds."""
    over = (truth[:, 1] > 0) & (truth[:, 0] <= at)
    # As a concordance: events until then lie before everything that lasted longer.
    known = over | (truth[:, 0] > at)
    split = np.column_stack([np.where(over, 1.0, 2.0), over.astype(np.float64)])[known]
    of_event = np.where(over, 1 / followed, 0.0)[known]
    return concordance(risk[known], split, folds[known], patient[known], weights, of_event)


@njit(cache=True, nogil=True)
def _pairs(weights, patient, rank, event, of_event, last, sums):
    """Add one fold to `sums` (2, B): the weight of the right pairs, and of all; a Fenwick tree over the ranks."""
    n, size = len(patient), rank.max()
    for b in range(len(weights)):
        tree, alone = np.zeros(size + 1), np.zeros(size + 1)
        total = right = pairs = 0.0
        start = 0
        for k in range(n):
            if event[k] and of_event[k] > 0 and total > 0:
                mine = weights[b, patient[k]] * of_event[k]
                below, i = 0.0, rank[k] - 1
                while i > 0:
                    below += tree[i]
                    i -= i & -i
                right += mine * (below + alone[rank[k]] / 2)
                pairs += mine * total
            if last[k]:
                for j in range(start, k + 1):
                    mass, i = weights[b, patient[j]], rank[j]
                    alone[i] += mass
                    total += mass
                    while i <= size:
                        tree[i] += mass
                        i += i & -i
                start = k + 1
        sums[0, b] += right
        sums[1, b] += pairs
