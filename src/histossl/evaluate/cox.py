"""Cox regression with an L2 penalty, as lifelines defines it, for thousands of patients and features.

lifelines builds the matrix of second derivatives anew in every step, which takes minutes at a thousand features; here
L-BFGS runs along the principal axes, on which it needs few steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.optimize import minimize

from histossl.evaluate.logistic import BLOCK, in_span, principal_axes


@dataclass(frozen=True)
class CoxProblem:
    """Training slides in the order of falling time, with their principal axes; valid for any penalty.

    Attributes:
        x: (n, r) features, see `logistic.in_span`.
        span: (d, r), or None.
        axes: (r, r), the principal axes, weighted by the curvature of the loss at w = 0.
        spread: (r,) the curvature along each.
        event: (n,) int, 1 with an event.
        last: (n,) bool, the last slide of each group of equal times.
    """

    x: NDArray[np.float64]
    span: NDArray[np.float64] | None
    axes: NDArray[np.float64]
    spread: NDArray[np.float64]
    event: NDArray[np.int64]
    last: NDArray[np.bool_]


def prepare_cox(x: NDArray, truth: NDArray[np.float64]) -> CoxProblem:
    """Sort the slides and find the principal axes of their features.

    Args:
        x: (n, d) features.
        truth: (n, 2) time and event, at least one event.

    Returns:
        The problem, for `solve_cox`.
    """
    order, event, last = _sorted(truth)
    x, span = in_span(x[order])
    slope = np.empty(len(x))
    _efron(np.zeros(len(x)), event, last, slope)
    # At w = 0 the curvature is at most the products of the features weighted by the cumulative hazard.
    axes, spread = principal_axes(x, np.maximum(event - slope, 0))
    return CoxProblem(x, span, axes, spread, event, last)


def solve_cox(
    problem: CoxProblem,
    alpha: float,
    most: int = 500,
    tolerance: float = 1e-8,
    start: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Minimise −log partial likelihood + α |w|² / 2, ties as of Efron.

    Args:
        problem: from `prepare_cox`.
        alpha: strength of the penalty, positive; that of lifelines is this divided by n.
        most: maximum number of steps.
        tolerance: of the gradient per slide.
        start: (d,) where to begin, such as the solution with another penalty, which saves steps; None begins at 0.

    Returns:
        (d,) the log hazard ratio of each feature.
    """
    x, n = problem.x, len(problem.x)
    lengths = np.sqrt(problem.spread + alpha)
    turn = problem.axes / lengths
    flat = np.zeros(x.shape[1])
    if start is not None:
        flat = lengths * (problem.axes.T @ (start if problem.span is None else problem.span.T @ start))
    slope = np.empty(n)

    def loss(flat: NDArray) -> tuple[float, NDArray]:
        w = turn @ flat
        risk = np.concatenate([x[start : start + BLOCK] @ w for start in range(0, n, BLOCK)])
        value = alpha / 2 * (w @ w) - _efron(risk, problem.event, problem.last, slope)
        down = alpha * w
        for start in range(0, n, BLOCK):
            down -= slope[start : start + BLOCK] @ x[start : start + BLOCK]
        return float(value) / n, turn.T @ down / n

    options = {"maxiter": most, "gtol": tolerance, "ftol": 1e-14, "maxcor": 20}
    w = turn @ minimize(loss, flat, jac=True, method="L-BFGS-B", options=options).x
    return w if problem.span is None else problem.span @ w


def log_likelihood(risk: NDArray, truth: NDArray[np.float64]) -> float:
    """The log partial likelihood, ties as of Efron.

    Args:
        risk: (n,) log hazard ratios.
        truth: (n, 2) time and event.

    Returns:
        The logarithm, 0 or less.
    """
    order, event, last = _sorted(truth)
    return float(_efron(np.ascontiguousarray(risk[order], np.float64), event, last, np.empty(len(risk))))


def survival_of(
    risk: NDArray, truth: NDArray[np.float64], test: NDArray, times: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The probability of no event until given times, with Breslow's estimate of the baseline hazard.

    Args:
        risk: (n,) log hazard ratios of the slides that train.
        truth: (n, 2) their time and event.
        test: (m,) log hazard ratios of the slides that are asked for.
        times: (T,) the times.

    Returns:
        (m, T) in [0, 1].
    """
    middle = risk.mean()
    order = np.argsort(-truth[:, 0], kind="stable")
    at_risk = np.cumsum(np.exp(np.clip(risk[order] - middle, -50, 50)))
    time, event = truth[order].T
    # Slides of equal time are all at risk at that time.
    first_of = np.searchsorted(-time, -time, side="right") - 1
    steps = event / at_risk[first_of]
    hazard = np.concatenate([[0.0], np.cumsum(steps[::-1])])[np.searchsorted(time[::-1], times, side="right")]
    return np.exp(-np.exp(np.clip(test - middle, -50, 50))[:, None] * hazard)


def _sorted(truth: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """The order of falling time, the events in it, and the last slide of each group of equal times."""
    order = np.argsort(-truth[:, 0], kind="stable")
    time = truth[order, 0]
    return order, truth[order, 1].astype(np.int64), np.append(time[1:] != time[:-1], True)


@njit(cache=True, nogil=True)
def _efron(risk, event, last, slope):
    """The log partial likelihood of risks in the order of falling time; its gradient is written into `slope`."""
    n, shift, value = len(risk), risk.max(), 0.0
    at_risk = dying = 0.0
    count = 0
    each, tied = np.zeros(n), np.zeros(n)  # of the group that ends here
    for k in range(n):
        mass = np.exp(risk[k] - shift)
        at_risk += mass
        if event[k]:
            count += 1
            dying += mass
            value += risk[k] - shift
        if last[k]:
            for j in range(count):
                rest = at_risk - j / count * dying
                value -= np.log(rest)
                each[k] += 1 / rest
                tied[k] += j / count / rest
            count, dying = 0, 0.0
    hazard = share = 0.0
    for k in range(n - 1, -1, -1):
        if last[k]:
            hazard += each[k]
            share = tied[k]
        mass = np.exp(risk[k] - shift)
        slope[k] = event[k] - mass * (hazard - event[k] * share)
    return value
