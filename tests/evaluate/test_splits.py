"""Splits: no patient on both sides, no class missing, the same for the same seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histossl.core.errors import LabelError
from histossl.evaluate.splits import draw_patients, draw_shots, grouped_folds, site_folds


@st.composite
def cohorts(draw):
    """Patients of one class each, unevenly many slides a patient; always enough patients a class for the folds."""
    folds = draw(st.integers(2, 6))
    patients_of = draw(st.lists(st.integers(folds, 12), min_size=2, max_size=4))
    of_patient = np.repeat(np.arange(len(patients_of)), patients_of)
    slides = draw(st.lists(st.integers(1, 7), min_size=len(of_patient), max_size=len(of_patient)))
    patient = np.repeat(np.arange(len(of_patient)), slides)
    order = np.random.default_rng(draw(st.integers(0, 2**32))).permutation(len(patient))
    return of_patient[patient][order], np.array([f"p{k:03d}" for k in patient])[order], folds


@settings(max_examples=60, deadline=None)
@given(cohorts(), st.integers(0, 2**31))
def test_folds_keep_patients_together_and_every_class_in_every_fold(cohort, seed):
    classes, patients, folds = cohort
    assigned = grouped_folds(classes, patients, folds, repeats=3, seed=seed)
    assert assigned.shape == (3, len(classes))
    for fold_of in assigned:
        for patient in np.unique(patients):
            assert len(np.unique(fold_of[patients == patient])) == 1
        for c in np.unique(classes):
            held = [len(np.unique(patients[(fold_of == fold) & (classes == c)])) for fold in range(folds)]
            assert min(held) >= 1
            assert max(held) - min(held) <= 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=12, max_size=60), st.integers(3, 12), st.integers(0, 2**31))
def test_mixed_patients_stay_together_and_every_class_is_trained_on(classes, patients, seed):
    classes, patient = np.unique(classes, return_inverse=True)[1], np.arange(len(classes)) % patients
    try:
        folds = grouped_folds(classes, patient, 3, repeats=2, seed=seed, mixed_patients=True)
    except LabelError:
        return
    for fold_of in folds:
        assert all(len(np.unique(fold_of[patient == p])) == 1 for p in range(patients))
        for fold in range(3):
            assert set(classes[fold_of != fold]) == set(classes)


def test_repeats_differ_and_a_seed_tells_them_all():
    classes, patients = np.arange(60) % 2, np.arange(60)
    first = grouped_folds(classes, patients, 5, repeats=3, seed=1)
    assert np.array_equal(first, grouped_folds(classes, patients, 5, repeats=3, seed=1))
    assert not np.array_equal(first, grouped_folds(classes, patients, 5, repeats=3, seed=2))
    assert not np.array_equal(first[0], first[1])


def test_patients_are_what_counts_not_slides():
    classes = np.repeat([0, 1], 50)
    patients = np.concatenate([np.arange(50), 50 + np.arange(50) % 3])  # class 1: fifty slides of three patients
    with pytest.raises(LabelError, match=r"5 folds.* 3 of 53 patients; --probe\.folds 3"):
        grouped_folds(classes, patients, 5, repeats=1, seed=0)
    grouped_folds(classes, patients, 3, repeats=1, seed=0)


def test_one_class_and_one_patient_a_class_are_refused():
    with pytest.raises(LabelError, match="one class"):
        grouped_folds(np.zeros(20, int), np.arange(20), 2, repeats=1, seed=0)
    with pytest.raises(LabelError, match="label more patients"):
        grouped_folds(np.array([0] * 19 + [1]), np.arange(20), 2, repeats=1, seed=0)


def test_contradicting_patients_are_named_unless_allowed():
    classes, patients = np.arange(40) % 2, np.array([f"case {k // 2}" for k in range(40)])
    with pytest.raises(LabelError, match=r"20 patients.*'case 0'.*15 more.*mixed-patients"):
        grouped_folds(classes, patients, 5, repeats=1, seed=0)
    folds = grouped_folds(classes, patients, 5, repeats=1, seed=0, mixed_patients=True)[0]
    assert np.array_equal(folds[::2], folds[1::2])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=8, max_size=80), st.integers(4, 80), st.integers(0, 2**31))
def test_shots_are_as_many_as_asked_and_in_proportion(classes, n, seed):
    classes = np.array([*classes, 0, 1, 2, 3])
    n = min(n, len(classes))
    drawn = draw_shots(classes, n, np.random.default_rng(seed))
    assert len(np.unique(drawn)) == n
    share = np.bincount(classes[drawn], minlength=4)
    due = np.bincount(classes, minlength=4) * n / len(classes)
    assert (share >= 1).all()
    assert (share <= np.bincount(classes)).all()
    assert (share <= np.maximum(np.ceil(due), 1)).all()


def test_shots_refuse_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="cannot draw 1 of 4"):
        draw_shots(np.array([0, 0, 1, 1]), 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="cannot draw 5 of 4"):
        draw_shots(np.array([0, 0, 1, 1]), 5, np.random.default_rng(0))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(2, 5), st.integers(0, 2**31))
def test_neither_sites_nor_patients_are_on_both_sides(sites, folds, seed):
    rng = np.random.default_rng(seed)
    n = 12 * sites
    site, patient, classes = np.arange(n) % sites, rng.integers(n // 2, size=n), rng.integers(3, size=n)
    try:
        found = site_folds(classes, patient, site, folds, repeats=2, seed=seed)
    except LabelError:
        return
    for fold_of in found:
        assert set(fold_of) == set(range(folds))
        for groups in (site, patient):
            assert all(len(set(fold_of[groups == group])) == 1 for group in np.unique(groups))
        for fold in range(folds):
            assert set(classes[fold_of != fold]) == set(classes)


def test_with_as_many_folds_as_sites_each_is_left_out_once_and_large_sites_are_spread():
    site = np.repeat(np.arange(4), [40, 30, 20, 10])
    classes, patient = np.arange(100) % 2, np.arange(100)
    found = site_folds(classes, patient, site, 4, repeats=3, seed=0)
    for fold_of in found:
        assert sorted(len(set(site[fold_of == fold])) for fold in range(4)) == [1, 1, 1, 1]
    two = site_folds(classes, patient, site, 2, repeats=3, seed=0)
    assert all(np.bincount(fold_of).tolist() == [50, 50] for fold_of in two)


def test_sites_that_cannot_teach_are_refused():
    site, patient = np.repeat(["a", "b", "c"], 10), np.arange(30)
    with pytest.raises(LabelError, match=r"5 folds, but 3 sites that share no patient; --probe\.folds 3"):
        site_folds(np.arange(30) % 2, patient, site, 5, 1, 0)
    with pytest.raises(LabelError, match=r"all slides of a class are at 'c', so no other site has slides to train on"):
        site_folds(np.where(site == "c", 2, np.arange(30) % 2), patient, site, 3, 1, 0)
    with pytest.raises(LabelError, match="every site has slides of one class only"):
        site_folds((site == "a").astype(int), patient, site, 3, 1, 0)
    with pytest.raises(LabelError, match="1 sites that share no patient"):  # one patient was seen everywhere
        site_folds(np.arange(30) % 2, np.where(np.arange(30) % 10 == 0, 0, patient), site, 2, 1, 0)


@settings(max_examples=60, deadline=None)
@given(cohorts(), st.integers(3, 20), st.integers(0, 2**31))
def test_whole_patients_are_drawn_and_every_class_is_among_them(cohort, n, seed):
    classes, patients, _ = cohort
    n = min(max(n, len(set(classes))), len(set(patients)))
    drawn = draw_patients(classes, patients, n, np.random.default_rng(seed))
    assert len(set(patients[drawn])) == n
    assert set(drawn) == set(np.flatnonzero(np.isin(patients, patients[drawn])))
    assert set(classes[drawn]) == set(classes)
