"""Which slides to label next: never those that are labelled, unsure ones first, and one of each kind."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histossl.core.errors import LabelError
from histossl.evaluate.label_next import label_next, probe_so_far, uncertainty
from histossl.evaluate.search import directions


def clusters(kinds: int, each: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tight clusters far from each other: (N, 16) vectors and the cluster of each."""
    rng = np.random.default_rng(seed)
    kind = np.repeat(np.arange(kinds), each)
    return 8 * np.eye(kinds, 16)[kind] + 0.3 * rng.normal(size=(len(kind), 16)), kind


def alone(count: int) -> np.ndarray:
    return np.arange(count).astype(str).astype(object)


@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 8), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_what_is_chosen_is_new_different_and_of_different_patients(seed, count, wanted, of_one):
    rng = np.random.default_rng(seed)
    rows, labelled = directions(rng.normal(size=(count, 5))), rng.random(count) < 0.4
    patients = (np.arange(count) // of_one).astype(str).astype(object)
    found = label_next(rows, rng.random(count), labelled, patients, wanted, seed)
    assert len(set(found)) == len(found) == min(wanted, count - labelled.sum())
    assert not labelled[found].any()
    people = len(np.unique(patients[~labelled]))
    assert len(set(patients[found][:people])) == min(len(found), people)


def test_without_labels_every_kind_of_slide_is_met_once():
    vectors, kind = clusters(10, 30)
    nothing = np.zeros(len(kind), bool)
    found = label_next(directions(vectors), np.ones(len(kind)), nothing, alone(len(kind)), 10)
    assert sorted(kind[found]) == list(range(10))


def test_kinds_that_are_labelled_come_last():
    vectors, kind = clusters(6, 20)
    labelled = np.zeros(len(kind), bool)
    labelled[np.flatnonzero(kind < 3)[::7]] = True
    found = label_next(directions(vectors), np.ones(len(kind)), labelled, alone(len(kind)), 3)
    assert sorted(kind[found]) == [3, 4, 5]


def test_of_slides_that_cover_alike_the_unsure_ones_are_chosen():
    vectors, kind = clusters(4, 25)
    unsure = np.where(kind == 2, 1.0, 0.05)
    nothing = np.zeros(len(kind), bool)
    assert kind[label_next(directions(vectors), unsure, nothing, alone(len(kind)), 1)[0]] == 2


def test_the_first_choice_is_the_best_of_all_by_brute_force():
    rng = np.random.default_rng(3)
    rows, unsure = directions(rng.normal(size=(40, 4))), rng.random(40)
    labelled = np.arange(40) < 5
    best, value = -1, -1.0
    for one in range(5, 40):
        covers = 0.0
        for other in range(5, 40):
            known = max(0.0, *(float(rows[k] @ rows[other]) for k in range(5)))
            covers += unsure[other] * max(0.0, float(rows[one] @ rows[other]) - known)
        if unsure[one] * covers > value:
            best, value = one, unsure[one] * covers
    assert label_next(rows, unsure, labelled, alone(40), 1) == [best]


def test_the_order_of_the_slides_does_not_count():
    rng = np.random.default_rng(5)
    vectors, labels = rng.normal(size=(60, 6)), np.where(np.arange(60) < 12, np.where(np.arange(60) % 2, "b", "a"), "")
    vectors[:, 0] += 3 * (labels == "b")
    order = rng.permutation(60)
    one = probe_so_far(vectors, list(labels), alone(60))
    other = probe_so_far(vectors[order], list(labels[order]), alone(60)[order])
    assert [order[row] for row in other.suggested] == one.suggested


def test_the_border_between_two_classes_is_asked_for():
    """Slides along a line, labelled at both ends: the classifier is unsure in the middle."""
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 101)
    vectors = np.stack([x, *0.1 * rng.normal(size=(3, 101))], 1)
    labels = ["a" if value < -0.8 else "b" if value > 0.8 else "" for value in x]
    found = probe_so_far(vectors, labels, alone(101), count=3)
    assert (found.classes, found.counts) == (("a", "b"), (10, 10))
    assert np.abs(x[found.suggested[0]]) < 0.35
    assert found.auroc is not None
    assert found.auroc[0] == 1.0
    assert found.probabilities is not None
    assert np.abs(np.corrcoef(found.probabilities[:, 1], x)[0, 1]) > 0.9


def test_the_figure_is_of_patients_held_out():
    """Vectors that know only the patient: each patient has one label, and no other patient tells it."""
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(60), 4).astype(str).astype(object)
    vectors = np.repeat(rng.normal(size=(60, 20)), 4, axis=0) + 0.01 * rng.normal(size=(240, 20))
    labels = np.repeat(np.where(rng.random(60) < 0.5, "a", "b"), 4)
    found = probe_so_far(vectors, list(labels), patients)
    assert found.auroc is not None
    assert found.auroc[0] < 0.7
    assert found.auroc[1] < 0.5 < found.auroc[2]
    assert (found.patients, found.folds, found.suggested) == (60, 5, [])


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (["", "", "", "", "", ""], "two classes"),
        (["a", "a", "a", "", "", ""], "two classes"),
        (["a", "a", "a", "b", "", ""], "two patients"),
    ],
)
def test_too_few_labels_say_so_and_still_suggest(labels, why):
    vectors = np.random.default_rng(0).normal(size=(6, 3))
    found = probe_so_far(vectors, labels, alone(6), count=2)
    assert found.auroc is None
    assert why in found.why
    assert len(found.suggested) == 2
    assert not any(labels[row] for row in found.suggested)


def test_numbers_are_no_classes():
    with pytest.raises(LabelError, match="21 different labels"):
        probe_so_far(np.ones((30, 3)), [str(k % 21) for k in range(30)], alone(30))


def test_uncertainty_is_between_certain_and_even():
    assert uncertainty(np.array([[1.0, 0.0], [0.5, 0.5]])) == pytest.approx([0, 1], abs=1e-9)
    assert uncertainty(np.full((1, 7), 1 / 7)) == pytest.approx([1])
    rows = np.array(list(itertools.permutations([0.7, 0.2, 0.1])))
    assert np.ptp(uncertainty(rows)) == pytest.approx(0)
