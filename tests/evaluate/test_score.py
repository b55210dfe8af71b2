"""Figures on resamples are those that scikit-learn and scipy find on the slides written out as often as drawn."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
)

from histossl.evaluate.auroc import resample
from histossl.evaluate.ridge import ridge
from histossl.evaluate.score import interval, reliability, samples_of

ONE_FOLD = np.zeros((1, 90), int)


def calibration_error(p, of_class, columns):
    """Straight from the definition, tenth by tenth."""
    found = []
    for c in columns:
        gap = 0.0
        for tenth in range(10):
            inside = (p[:, c] >= tenth / 10) & ((p[:, c] < (tenth + 1) / 10) | (tenth == 9))
            if inside.any():
                gap += inside.mean() * abs(p[inside, c].mean() - of_class[inside, c].mean())
        found.append(gap)
    return np.mean(found)


@pytest.mark.parametrize("count", [2, 4])
def test_figures_of_classes(count):
    rng = np.random.default_rng(count)
    patient, y = np.arange(90) // 3, rng.integers(count, size=90)
    p = rng.dirichlet(np.ones(count), size=90) + np.eye(count)[y] * 0.4
    p /= p.sum(axis=1, keepdims=True)
    weights = resample(30, 6, rng)
    found = samples_of(p[None], y, ONE_FOLD, patient, weights, True)
    for b, drawn in enumerate(weights.astype(int)):
        rows = np.repeat(np.arange(90), drawn[patient])
        q, z = p[rows], y[rows]
        of_class, called = np.eye(count)[z], q.argmax(axis=1)
        columns = [1] if count == 2 else range(count)
        expected = {
            "auroc": np.mean([roc_auc_score(z == c, q[:, c]) for c in columns]),
            "average_precision": np.mean([average_precision_score(z == c, q[:, c]) for c in columns]),
            "balanced_accuracy": balanced_accuracy_score(z, called),
            "f1": np.mean([f1_score(z == c, called == c) for c in columns]),
            "brier": ((q - of_class) ** 2).sum(axis=1).mean(),
            "ece": calibration_error(q, of_class, columns),
        }
        assert {name: values[b] for name, values in found.items()} == pytest.approx(expected)


def test_figures_of_numbers():
    rng = np.random.default_rng(0)
    patient, y = np.arange(90) // 3, rng.integers(12, size=90).astype(float)
    p = y + rng.normal(size=90).round() * 4
    weights = resample(30, 6, rng)
    found = samples_of(p[None, :, None], y, ONE_FOLD, patient, weights, False)
    for b, drawn in enumerate(weights.astype(int)):
        rows = np.repeat(np.arange(90), drawn[patient])
        expected = {
            "spearman": spearmanr(p[rows] - p.mean(), y[rows])[0],
            "r2": r2_score(y[rows], p[rows]),
            "mae": mean_absolute_error(y[rows], p[rows]),
        }
        assert {name: values[b] for name, values in found.items()} == pytest.approx(expected)


def test_where_nothing_was_learned_spearman_is_nothing():
    """Models that know but the mean of their training slides, which is the lower the higher those that are tested."""
    rng = np.random.default_rng(1)
    found, pooled = [], []
    for _ in range(300):
        y, folds = rng.normal(size=40), rng.permutation(np.arange(40) % 5)
        means = np.array([y[folds != fold].mean() for fold in range(5)])
        p = means[folds] + 0.01 * rng.normal(size=40)
        found.append(
            samples_of(p[None, :, None], y, folds[None], np.arange(40), np.ones((1, 40)), False)["spearman"][0]
        )
        pooled.append(spearmanr(p, y)[0])
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(300)
    assert np.mean(pooled) < -0.2


def test_a_lost_class_does_not_count_and_repeats_are_averaged():
    y, p = np.array([0, 0, 1, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.1, 0.9]])
    weights = np.array([[1, 1, 1, 1], [2, 2, 0, 0], [0, 1, 1, 2]], float)
    found = samples_of(np.stack([p, p[:, ::-1]]), y, np.zeros((2, 4), int), np.arange(4), weights, True)
    assert found["auroc"][0] == 0.5  # one way round and the other
    assert np.isnan(found["auroc"][1])
    assert np.isnan(found["balanced_accuracy"][1])
    assert found["brier"][1] == pytest.approx(np.mean([0.02, 1.28, 1.62, 0.08]))
    assert interval(np.array([0.5, np.nan, 0.2, 0.4])) == pytest.approx((0.5, 0.205, 0.395))


def test_reliability_leaves_out_empty_tenths():
    at, share, counts = reliability(np.array([0.05, 0.07, 0.95, 1.0, 1.0]), np.array([False, True, True, True, False]))
    np.testing.assert_allclose(at, [0.06, 2.95 / 3])
    np.testing.assert_allclose(share, [0.5, 2 / 3])
    assert counts.tolist() == [2, 3]


@pytest.mark.parametrize(("n", "d"), [(30, 50), (80, 20), (20, 20)])
def test_ridge_is_the_solution_that_scikit_learn_finds(n, d):
    rng = np.random.default_rng(n)
    x, y, alphas = rng.normal(size=(n, d)) + 3, rng.normal(size=n) + 5, np.array([0.1, 5.0, 1e4])
    w, b = ridge(x, y, alphas)
    for k, alpha in enumerate(alphas):
        model = Ridge(alpha=alpha).fit(x, y)
        np.testing.assert_allclose(w[:, k], model.coef_, atol=1e-10)
        assert b[k] == pytest.approx(model.intercept_)
