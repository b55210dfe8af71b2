"""The probe as a linear function of a slide's vector, its scaling folded into the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from histossl.evaluate.cox import prepare_cox, solve_cox
from histossl.evaluate.logistic import predict, prepare, solve
from histossl.evaluate.ridge import ridge
from histossl.evaluate.scaling import inner_folds, units
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.survival import choose_alpha
from histossl.evaluate.targets import Task


@dataclass(frozen=True)
class LinearScore:
    """A linear probe as a linear function of the slide vector: logits = vector @ weights + intercept.

    Attributes:
        names: the class of each logit: with two classes one logit for the second by name, with more one for each.
        weights: (d, C) float64.
        intercept: (C,) float64.
        trained_on: the slides that it was trained on, as text for people.
    """

    names: tuple[str, ...]
    weights: NDArray[np.float64]
    intercept: NDArray[np.float64]
    trained_on: str = ""

    def __call__(self, vectors: NDArray) -> NDArray[np.float64]:
        """Logits (N, C) of vectors (N, d)."""
        return np.asarray(vectors, np.float64) @ self.weights + self.intercept


def fit_score(
    vectors: NDArray, classes: NDArray[np.int64], names: NDArray, settings: ProbeSettings, trained_on: str = ""
) -> LinearScore:
    """Fit the probe's logistic regression.

    Args:
        vectors: (n, d) slide vectors.
        classes: (n,) int, 0, 1, ...; each class occurs.
        names: (classes,) names of the classes.
        settings: of the probe; `C` and `balanced` are used.
        trained_on: the slides, as text.

    Returns:
        The score.
    """
    x, unit, mean = _scaled(vectors, settings)
    w, b, _ = solve(prepare(x, classes, settings.balanced), settings.C)
    weights = w / unit[:, None]
    spoken = tuple(map(str, names[1:] if len(names) == 2 else names))
    return LinearScore(spoken, weights, b - mean @ weights, trained_on)


def fit_task(
    task: Task, train: NDArray[np.int64], values: NDArray, settings: ProbeSettings, trained_on: str
) -> LinearScore:
    """Fit the linear score of a target, with the penalty that the probe chooses.

    Args:
        task: the target.
        train: (m,) the slides of the task that train.
        values: (n, d) the vectors of its slides.
        settings: of the probe.
        trained_on: the slides, as text.

    Returns:
        The score: logits of classes; `value`, the predicted number; or `risk`, the log hazard ratio to the mean slide.
    """
    vectors, truth, patients = values[train], task.truth[train], task.patients[train]
    if task.names is not None:
        if settings.choose_C:
            settings = replace(settings, C=choose_C(_scaled(vectors, settings)[0], truth, patients, settings))
        return fit_score(vectors, truth, task.names, settings, trained_on)
    x, unit, mean = _scaled(vectors, settings)
    if task.times is not None:
        weights = (solve_cox(prepare_cox(x, truth), choose_alpha(x, truth, patients, settings)) / unit)[:, None]
        return LinearScore(("risk",), weights, np.zeros(1) - mean @ weights, trained_on)
    w, b = fit_ridge(x, truth, patients, settings)
    weights = w / unit[:, None]
    return LinearScore(("value",), weights, b - mean @ weights, trained_on)


def _scaled(
    vectors: NDArray, settings: ProbeSettings
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """As `scaled`, and the units and means of the features."""
    mean, unit = units(vectors, settings)
    return (vectors - mean) / unit, unit, mean


def choose_C(x: NDArray, y: NDArray, patients: NDArray, settings: ProbeSettings) -> float:
    """The C with the least cross-entropy on patients held out of the training slides.

    Args:
        x: (n, d) scaled features.
        y: (n,) int classes.
        patients: (n,) patient of each slide.
        settings: `choose_C`, `C`, `balanced` and the seed.

    Returns:
        One of `settings.choose_C`; `settings.C` where that is empty, or where the patients are too few for folds.
    """
    folds = inner_folds(y, patients, settings) if settings.choose_C else None
    if folds is None:
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


def fit_ridge(
    x: NDArray, y: NDArray, patients: NDArray, settings: ProbeSettings
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ridge regression of a standardised target, with the penalty of least squared error on patients held out.

    Args:
        x: (n, d) scaled features.
        y: (n,) numbers.
        patients: (n,) patient of each slide.
        settings: `alphas` and the seed; the middle one is taken where the patients are too few for folds.

    Returns:
        Weights (d, 1) and intercept (1,), in the unit of `y`.
    """
    middle, unit = y.mean(), y.std() or 1.0
    y, alphas = (y - middle) / unit, np.asarray(settings.alphas)
    best = len(alphas) // 2
    folds = inner_folds(np.argsort(np.argsort(y)) * 3 // len(y), patients, settings)
    if folds is not None and len(alphas) > 1:
        losses = np.zeros(len(alphas))
        for fold in range(3):
            w, b = ridge(x[folds != fold], y[folds != fold], alphas)
            losses += ((x[folds == fold] @ w + b - y[folds == fold][:, None]) ** 2).sum(axis=0)
        best = int(losses.argmin())
    w, b = ridge(x, y, alphas[[best]])
    return w * unit, b * unit + middle
