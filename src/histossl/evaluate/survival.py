"""Predicts survival: Cox's regression on vectors, and what stands beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from histossl.evaluate.cox import log_likelihood, prepare_cox, solve_cox, survival_of
from histossl.evaluate.scaling import inner_folds, scaled
from histossl.evaluate.survival_score import Times, kaplan_meier

if TYPE_CHECKING:
    from histossl.evaluate.settings import ProbeSettings, Rival

WITHOUT = "no vectors (Kaplan and Meier)"


def fit_survival(
    x: NDArray, truth: NDArray, patients: NDArray, x_test: NDArray, settings: ProbeSettings, times: Times
) -> tuple[NDArray[np.float64], bool]:
    """Cox's regression with an L2 penalty, chosen by 3 folds of the training patients.

    Args:
        x: (n, d) vectors that train.
        truth: (n, 2) time and event.
        patients: (n,) patient of each slide.
        x_test: (m, d) vectors to predict.
        settings: `alphas` and the seed.
        times: when survival is predicted.

    Returns:
        (m, 1 + T) log hazard ratios and probabilities of no event until `times.all`; and whether there was an event to
        learn from: without one the prediction is that of no vectors.
    """
    if not truth[:, 1].any():
        return no_features(times)(x, truth, x_test, 0), False
    x, x_test = scaled(x, x_test, settings)
    w = solve_cox(prepare_cox(x, truth), choose_alpha(x, truth, patients, settings))
    risk = x_test @ w
    return np.column_stack([risk, survival_of(x @ w, truth, risk, times.all)]), True


def choose_alpha(x: NDArray, truth: NDArray, patients: NDArray, settings: ProbeSettings) -> float:
    """The penalty with the largest cross-validated partial likelihood (Verweij and van Houwelingen, 1993).

    Args:
        x: (n, d) scaled features.
        truth: (n, 2) time and event.
        patients: (n,) patient of each slide.
        settings: `alphas` and the seed.

    Returns:
        One of `settings.alphas`; the middle one where the patients are too few for folds.
    """
    alphas = sorted(settings.alphas)
    folds = inner_folds(truth[:, 1].astype(np.int64), patients, settings) if truth[:, 1].min() == 0 else None
    if folds is None:
        late = (truth[:, 0] > np.median(truth[:, 0])).astype(np.int64)
        folds = inner_folds(late, patients, settings)
    if folds is None or len(alphas) == 1 or not all(truth[folds != k, 1].any() for k in range(3)):
        return alphas[len(alphas) // 2]
    gained = np.zeros(len(alphas))
    for fold in range(3):
        kept = folds != fold
        problem, w = prepare_cox(x[kept], truth[kept]), None
        for k, alpha in reversed(list(enumerate(alphas))):
            w = solve_cox(problem, alpha, tolerance=1e-6, start=w)
            risk = x @ w
            gained[k] += log_likelihood(risk, truth) - log_likelihood(risk[kept], truth[kept])
    return alphas[int(gained.argmax())]


def no_features(times: Times) -> Rival:
    """Predict the same for all: Kaplan and Meier's estimate of the slides that train.

    Args:
        times: when survival is predicted.

    Returns:
        A method of the probe.
    """

    def predict(train: NDArray, truth: NDArray, test: NDArray, seed: int) -> NDArray[np.float64]:
        return np.tile(np.append(0.0, kaplan_meier(truth, times.all)), (len(test), 1))

    return predict


def with_survival(rival: Rival, times: Times) -> Rival:
    """Let a method that predicts risks predict survival, too, with the baseline hazard of the slides that train.

    Args:
        rival: gives (m, 1) log hazard ratios, or the complete prediction, which is left as it is.
        times: when survival is predicted.

    Returns:
        A method of the probe, (m, 1 + T).
    """

    def predict(train: NDArray, truth: NDArray, test: NDArray, seed: int) -> NDArray[np.float64]:
        found = rival(train, truth, np.concatenate([train, test]), seed)
        if found.shape[1] > 1:
            return found[len(train) :]
        known, risk = np.split(found[:, 0], [len(train)])
        return np.column_stack([risk, survival_of(known, truth, risk, times.all)])

    return predict


def ranks_in_folds(risk: NDArray, folds: NDArray) -> NDArray[np.float64]:
    """The rank of each slide's risk among those that the same model scored, the mean over repeats.

    Args:
        risk: (repeats, n) log hazard ratios.
        folds: (repeats, n) int, the fold in which each slide was tested.

    Returns:
        (n,) in (0, 1).
    """
    from scipy.stats import rankdata

    found = np.empty(risk.shape)
    for repeat, fold_of in enumerate(folds):
        for fold in np.unique(fold_of):
            rows = fold_of == fold
            found[repeat, rows] = (rankdata(risk[repeat, rows]) - 0.5) / rows.sum()
    return found.mean(axis=0)
