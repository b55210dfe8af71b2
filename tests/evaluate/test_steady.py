"""Vectors of patients with several slides: what these slides agree on counts more, and scores stay linear."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from histossl.evaluate.fitted import fit_probe
from histossl.evaluate.labels import Labels
from histossl.evaluate.linear import fit_task
from histossl.evaluate.methods import describe
from histossl.evaluate.patients import by_patient
from histossl.evaluate.rivals import probe_with_rivals
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.sources import Source
from histossl.evaluate.steady import PRIOR, steady
from histossl.evaluate.targets import make_task

QUICK = ProbeSettings(unit="patient", repeats=1, bootstraps=100, shots=())


def scattered(rng, patients, each=2, d=20):
    """Slides that lie apart by 0.1 to 3 along turned axes, and what their patients have in common."""
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
    spread = np.geomspace(0.1, 3, d)
    own = rng.standard_normal((patients, d)) @ turn.T
    groups = np.repeat(np.arange(patients), each)
    return own[groups] + (rng.standard_normal((len(groups), d)) * spread) @ turn.T, groups, own, turn


def apart(x, groups):
    means = np.stack([x[groups == g].mean(axis=0) for g in np.unique(groups)])
    return x - means[groups]


def test_slides_of_a_patient_lie_apart_alike_in_every_direction():
    x, groups, _, _ = scattered(np.random.default_rng(0), 2000)
    for values, most in ((x, np.inf), (steady(x, groups)(x), 2.0)):
        spread = np.linalg.svd(apart(values, groups), compute_uv=False)
        assert spread[0] / spread[-1] < most
    assert np.linalg.cond(apart(x, groups)) > 20


def test_few_slides_change_little_and_single_ones_nothing():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((30, 8))
    np.testing.assert_array_equal(steady(x, np.arange(30))(x), x)
    # The one direction that is known weighs as one deviation beside `PRIOR` others.
    groups = np.append(np.arange(29), 28)
    found = steady(x, groups)
    np.testing.assert_allclose(found.factors, [1 / np.sqrt(1 + 1 / PRIOR)])
    along = x[28] - x[29]
    np.testing.assert_allclose(found(along[None])[0], along * found.factors[0])
    same = np.repeat(x[:15], 2, axis=0)
    np.testing.assert_allclose(steady(same, np.arange(30) // 2)(same), same)


def test_the_unit_does_not_matter():
    x, groups, _, _ = scattered(np.random.default_rng(2), 40)
    np.testing.assert_allclose(steady(1000 * x, groups)(x), steady(x, groups)(x), rtol=1e-8, atol=1e-10)


def cohort(seed, patients=100):
    """The hazard lies where the slides of a patient agree best."""
    rng = np.random.default_rng(seed)
    x, groups, own, turn = scattered(rng, patients, d=40)
    hazard = 1.0 * (own @ turn)[:, 0]
    event, contact = rng.exponential(20 * np.exp(-hazard)), rng.exponential(60, patients)
    outcomes = [f"{min(e, c):.3f}{'' if e <= c else '+'}" for e, c in zip(event, contact, strict=True)]
    ids = [f"s{k}" for k in range(len(x))]
    people = [f"p{g}" for g in groups]
    table = pd.DataFrame({"patient_id": people, "os": [outcomes[g] for g in groups]}, index=pd.Index(ids))
    labels = Labels(table, ("os",), outcomes={"os": "months"})
    source = Source(tuple(ids), {"v": x.astype(np.float32)}, dict(zip(ids, people, strict=True)))
    return source, labels


def c_index(source, labels, **changes):
    return probe_with_rivals(source, labels, replace(QUICK, **changes)).survival["c_index"].iloc[0]


def test_survival_of_patients_is_learned_better():
    gained = [c_index(*cohort(k)) - c_index(*cohort(k), steady=False) for k in range(4)]
    assert np.mean(gained) > 0.02
    assert min(gained) > 0


def test_rows_that_are_slides_stay_as_they_are():
    source, labels = cohort(0, 60)
    assert c_index(source, labels, unit="slide") == c_index(source, labels, unit="slide", steady=False)


@pytest.mark.parametrize("on", [True, False])
def test_a_kept_probe_scores_vectors_as_they_are(on):
    source, labels = cohort(3, 80)
    settings = replace(QUICK, steady=on)
    kept = fit_probe(source, labels, settings).targets[0]
    people, told, _ = by_patient(source, labels, "mean")
    task, x = make_task("os", people.ids, told, settings), people.vectors["v"].astype(float)
    groups = np.unique([source.patients[n] for n in source.ids], return_inverse=True)[1]
    moved = steady(source.vectors["v"], groups)(x) if on else x
    by_hand = fit_task(task, np.arange(len(task.rows)), moved[task.rows], settings, "")(moved)
    np.testing.assert_allclose(kept.score(x), by_hand, rtol=1e-6, atol=1e-8)


def test_the_method_section_says_it_where_it_is_done():
    words = "within-class covariance normalisation"
    assert words in describe(QUICK, classes=False, survival=True)
    assert words not in describe(QUICK)
    assert words not in describe(ProbeSettings(), classes=False, survival=True)
