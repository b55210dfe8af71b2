"""AUROC and its interval against counting, against scikit-learn, and against how often it is right."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from histossl.evaluate.auroc import macro_auroc, resample


def pair_counting(score, positive, folds, weight):
    ordered = pairs = 0.0
    for a in range(len(score)):
        for b in range(len(score)):
            if positive[a] and not positive[b] and folds[a] == folds[b]:
                pairs += weight[a] * weight[b]
                ordered += weight[a] * weight[b] * ((score[a] > score[b]) + (score[a] == score[b]) / 2)
    return ordered / pairs if pairs else np.nan


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 30), st.integers(1, 3), st.integers(1, 6))
def test_auroc_is_the_count_of_ordered_pairs_with_ties_and_weights(seed, n, folds, levels):
    rng = np.random.default_rng(seed)
    classes, fold_of, patient = rng.integers(2, size=n), rng.integers(folds, size=n), rng.integers(5, size=n)
    score = rng.integers(levels, size=n) / levels
    weights = resample(5, 4, rng)
    found = macro_auroc(np.stack([1 - score, score], axis=1), classes, fold_of, patient, weights)
    expected = [pair_counting(score, classes == 1, fold_of, row[patient]) for row in weights]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_macro_auroc_equals_scikit_learn_within_one_fold():
    rng = np.random.default_rng(0)
    classes = rng.integers(4, size=200)
    probabilities = rng.dirichlet(np.ones(4), size=200).round(2) + np.eye(4)[classes] * 0.2
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    once = np.ones((1, 200))
    found = macro_auroc(probabilities, classes, np.zeros(200, int), np.arange(200), once)[0]
    expected = roc_auc_score(classes, probabilities, multi_class="ovr", average="macro")
    assert found == pytest.approx(expected, abs=1e-12)
    two = probabilities[:, :2] / probabilities[:, :2].sum(axis=1, keepdims=True)
    keep = classes < 2
    found = macro_auroc(
        two[keep], classes[keep], np.zeros(keep.sum(), int), np.arange(keep.sum()), once[:, : keep.sum()]
    )
    assert found[0] == pytest.approx(roc_auc_score(classes[keep], two[keep, 1]), abs=1e-12)


def test_resamples_draw_as_many_patients_as_there_are_and_begin_with_the_sample():
    weights = resample(37, 2000, np.random.default_rng(0))
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 37).all()
    assert abs(weights[1:].mean() - 1) < 1e-12
    assert abs((weights[1:] == 0).mean() - (1 - 1 / 37) ** 37) < 0.01


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """120 patients with 1 to 4 slides that share half of their noise; the true AUROC by numerical integration."""
    rng = np.random.default_rng(0)
    shift, covered, naive = 1.0, 0, 0
    truth = roc_auc_score(np.repeat([0, 1], 200_000), rng.normal(size=400_000) + shift * np.repeat([0, 1], 200_000))
    trials = 300
    for _ in range(trials):
        patient = np.repeat(np.arange(120), rng.integers(1, 5, size=120))
        classes = (np.arange(120) % 2)[patient]
        score = (rng.normal(size=120)[patient] + rng.normal(size=len(patient))) / np.sqrt(2) + shift * classes
        both, folds = np.stack([-score, score], axis=1), np.zeros(len(patient), int)
        for unit, weights in (
            (patient, resample(120, 300, rng)),
            (np.arange(len(patient)), resample(len(patient), 300, rng)),
        ):
            low, high = np.percentile(macro_auroc(both, classes, folds, unit, weights)[1:], [2.5, 97.5])
            if unit is patient:
                covered += low <= truth <= high
            else:
                naive += low <= truth <= high
    assert 0.91 <= covered / trials <= 0.98
    assert naive < covered  # resampling slides pretends to know more than it does
