"""A kept probe: its sets cover what they promise, its probabilities come true, strange vectors are told, others refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

import histossl as hs
from histossl.core.errors import FileFormatError, LabelError, SettingsError
from histossl.evaluate import conformal
from histossl.evaluate.conformal import (
    calibrated,
    conformal_limit,
    fit_calibration,
    nearest_patients,
    share_beyond,
    strangeness,
)
from histossl.evaluate.fitted import check_vectors, fit_probe, load_probe, log_probabilities
from histossl.evaluate.labels import Labels
from histossl.evaluate.predict import predict_vectors
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.sources import Source

MEANS = 0.7 * np.random.default_rng(9).normal(size=(3, 6))
STAGES = {"encode": {"encoder": {"name": "random", "seed": "0", "dtype": "float32"}}, "slide-encoder": {"sha256": "ab"}}


def drawn(rng: np.random.Generator, patients: int, kinds: int = 3, first: int = 0):
    """Slides of patients, one to three each, that share much of their noise: ids, vectors, patients, classes."""
    counts = rng.integers(1, 4, patients)
    patient = np.repeat(np.arange(patients), counts)
    truth = (np.arange(patients) % kinds)[patient]
    own = rng.normal(size=(patients, 6))
    x = MEANS[truth] + own[patient] + 0.6 * rng.normal(size=(len(patient), 6))
    ids = [f"s{first + k}" for k in range(len(patient))]
    return ids, x.astype(np.float32), np.array([f"p{first + p}" for p in patient]), np.array(list("abc"))[truth]


def cohort(rng, patients: int, kinds: int = 3, **labels):
    ids, x, people, classes = drawn(rng, patients, kinds)
    table = pd.DataFrame({"patient_id": people, "grade": classes} | labels, index=pd.Index(ids))
    return Source(tuple(ids), {"v": x}, stages=STAGES), Labels(table, tuple(table.columns[1:]))


SETTINGS = ProbeSettings(folds=3, repeats=1)


def test_sets_cover_the_share_of_new_patients_that_they_promise():
    covered, sizes = [], []
    for draw in range(200):
        rng = np.random.default_rng(draw)
        source, labels = cohort(rng, 90, kinds=2)
        probe = fit_probe(source, labels, ProbeSettings(folds=5, repeats=1))
        ids, x, people, truth = drawn(rng, 30, kinds=2, first=1000)
        sets = predict_vectors(probe, ids, x, 0.9).table["set"].str.split(" | ", regex=False)
        inside = pd.Series([t in found for t, found in zip(truth, sets, strict=True)])
        covered.append(inside.groupby(people).mean().mean())
        sizes.append(np.mean([len(found) for found in sets]))
    assert np.mean(covered) == pytest.approx(0.9, abs=0.02)
    assert 1.02 < np.mean(sizes) < 1.9  # neither nothing nor everything


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.95])
def test_without_sharing_patients_the_limit_is_the_one_of_split_conformal_prediction(coverage):
    scores = np.random.default_rng(1).normal(size=57)
    rank = int(np.ceil(coverage * 58))
    assert conformal_limit(scores, np.arange(57), coverage) == np.sort(scores)[rank - 1]
    assert conformal_limit(scores[:3], np.arange(3), 0.9) == np.inf  # too few for that


def test_slides_of_a_patient_count_as_one():
    scores = np.array([0.0, 1, 2, 3, 9, 9, 9, 9, 9, 9])
    patients = np.array(list("abcdeeeeee"))
    assert conformal_limit(scores, patients, 0.6) == 3  # 4 of 5 patients, and the new one, are within
    assert conformal_limit(scores, np.arange(10), 0.6) == 9
    assert share_beyond(scores, patients, np.array([10, 9, 2.5, -1])) == pytest.approx([1 / 6, 2 / 6, 3 / 6, 1])


def test_calibration_is_platts_and_brings_balanced_probabilities_back_to_shares():
    rng = np.random.default_rng(0)
    score = rng.normal(size=(3000, 1)) * 3
    y = (rng.random(3000) < 1 / (1 + np.exp(-(0.5 * score[:, 0] - 1)))).astype(int)
    slope, offsets = fit_calibration(log_probabilities(score), y, np.arange(3000))
    model = LogisticRegression(C=1e6).fit(score, y)
    p = calibrated(log_probabilities(score), slope, offsets)
    np.testing.assert_allclose(p[:, 1], model.predict_proba(score)[:, 1], atol=2e-3)
    assert p[:, 1].mean() == pytest.approx(y.mean(), abs=1e-3)
    assert fit_calibration(log_probabilities(-score), y, np.arange(3000))[0] == 0  # never turned round


def test_few_slides_told_without_an_error_give_no_certainty():
    y = np.arange(12) % 2
    slope, offsets = fit_calibration(log_probabilities(50.0 * (2 * y[:, None] - 1)), y, np.arange(12))
    assert 0.8 < calibrated(log_probabilities(np.array([[50.0]])), slope, offsets)[0, 1] < 0.9  # 7 of 8


def test_the_nearest_patients_are_those_written_out(monkeypatch):
    monkeypatch.setattr(conformal, "BLOCK", 4)  # several blocks
    rng = np.random.default_rng(2)
    known, new = rng.normal(3, 5, (40, 7)), rng.normal(3, 5, (9, 7))
    known[:, 3] = 1  # says nothing
    patients = np.array([f"p{k % 11}" for k in range(40)])
    unit = np.where(np.arange(7) == 3, np.inf, known.std(0))
    names = np.unique(patients)

    def every(rows):
        each = [[np.linalg.norm((row - known[patients == n]) / unit, axis=1).min() for n in names] for row in rows]
        return np.array(each) / 7**0.5

    found, far = nearest_patients(new, known, patients)
    wanted = every(new)
    np.testing.assert_array_equal(found, names[wanted.argsort(1)[:, :5]])
    np.testing.assert_allclose(far, np.sort(wanted, 1)[:, :5], rtol=1e-4)
    own, far = nearest_patients(known, known, patients, patients)
    assert (own != patients[:, None]).all()
    wanted = np.sort(np.where(names == patients[:, None], np.inf, every(known)), 1)[:, :5]
    np.testing.assert_allclose(strangeness(far), wanted.mean(1), rtol=1e-4)
    _, far = nearest_patients(known, known, patients > "p3", patients > "p3")  # two patients: one is left
    assert (np.isinf(far).sum(1) == 1).all()
    assert np.isfinite(strangeness(far)).all()


@pytest.fixture(scope="module")
def probe():
    rng = np.random.default_rng(0)
    source, labels = cohort(rng, 60)
    patient = np.unique(labels.table["patient_id"], return_inverse=True)[1]
    age = source.vectors["v"][:, 0] * 10 + 50
    months = np.exp(0.5 * rng.normal(size=60) - 0.5 * np.bincount(patient, source.vectors["v"][:, 1]))[patient]
    table = labels.table.assign(age=[f"{v:.4f}" for v in age])
    table["os"] = [f"{m:.3f}{'' if p % 3 else '+'}" for m, p in zip(months, patient, strict=True)]
    return fit_probe(source, Labels(table, ("grade", "age", "os"), outcomes={"os": "months"}), SETTINGS)


def test_a_probe_that_is_read_back_says_the_same(probe, tmp_path):
    probe.save(tmp_path / "probe")
    again = load_probe(tmp_path / "probe")
    ids, x, *_ = drawn(np.random.default_rng(5), 20, first=1000)
    one, other = predict_vectors(probe, ids, x), predict_vectors(again, ids, x)
    pd.testing.assert_frame_equal(one.table, other.table)
    assert one.neighbours == other.neighbours
    assert again.stages == STAGES
    first = (tmp_path / "probe" / "model.safetensors").read_bytes()
    again.save(tmp_path / "probe")
    assert (tmp_path / "probe" / "model.safetensors").read_bytes() == first


def test_each_kind_of_target_says_what_it_can(probe):
    ids, x, _, truth = drawn(np.random.default_rng(5), 40, first=1000)
    table = predict_vectors(probe, ids, x).table
    grade, age, risk = (table[table["target"] == name].reset_index() for name in ("grade", "age", "os"))
    p = grade[["p(a)", "p(b)", "p(c)"]].to_numpy()
    np.testing.assert_allclose(p.sum(1), 1)
    assert (grade["predicted"] == truth).mean() > 0.6
    assert (np.array(list("abc"))[p.argmax(1)] == grade["predicted"]).all()
    inside = (age["low"] <= x[:, 0] * 10 + 50) & (x[:, 0] * 10 + 50 <= age["high"])
    assert inside.mean() > 0.8
    assert risk["coverage"].isna().all()
    assert risk["rank"].between(0, 1).all()
    assert np.corrcoef(risk["predicted"].astype(float), x[:, 1])[0, 1] > 0.3
    assert table["nearest"].str.match(r"p\d+ \(.+\); p").all()


def test_strange_vectors_are_told_and_ordinary_ones_are_not(probe):
    ids, x, *_ = drawn(np.random.default_rng(6), 60, first=1000)
    strange = predict_vectors(probe, ids, x + 9).table
    usual = predict_vectors(probe, ids, x).table
    assert np.allclose(strange["unlike"], 1 / 61)
    assert usual["unlike"].mean() == pytest.approx(0.5, abs=0.12)


def test_what_was_learned_on_the_known_slides_says_nothing_of_strangeness(tmp_path):
    """A learned part lies wider on the known slides; by the mean of the tiles, new slides are as strange as known ones."""
    whole, by_mean = [], []
    for draw in range(8):
        rng = np.random.default_rng(draw)
        source, labels = cohort(rng, 40)
        stage = 3 * rng.normal(size=(len(source.ids), 12)).astype(np.float32)
        vectors = {"v": np.hstack([stage, source.vectors["v"]])}
        ids, x, _, _ = drawn(rng, 30, first=1000)
        new = np.hstack([rng.normal(size=(len(x), 12)).astype(np.float32), x])
        for parts, found in (((), whole), (("stage",) * 12 + ("mean",) * 6, by_mean)):
            probe = fit_probe(replace(source, vectors=vectors, parts=parts), labels, SETTINGS)
            probe.save(tmp_path / "probe")
            found.append(predict_vectors(load_probe(tmp_path / "probe"), ids, new).table["unlike"])
    assert np.concatenate(whole).mean() > 0.75
    assert 0.45 < np.concatenate(by_mean).mean() < 0.56
    assert 0.04 < np.mean(np.concatenate(by_mean) <= 0.1) < 0.16


def test_slides_that_the_probe_knows_are_told(probe):
    found = predict_vectors(probe, ["new", probe.ids[3]], probe.vectors[2:4])
    assert found.known == (probe.ids[3],)


def test_vectors_of_another_encoder_are_refused(probe):
    x = np.zeros((2, 6), np.float32)
    check_vectors(probe, Source(("a", "b"), {"v": x}, stages=STAGES))
    for_32_bits = {**STAGES, "encode": {"encoder": {"name": "random", "seed": "0", "dtype": "bfloat16"}}}
    check_vectors(probe, Source(("a", "b"), {"v": x}, stages=for_32_bits))
    other = {**STAGES, "slide-encoder": {"sha256": "cd"}}
    with pytest.raises(FileFormatError, match="of another slide encoder; embed"):
        check_vectors(probe, Source(("a", "b"), {"v": x}, stages=other))
    other = {**STAGES, "inspect": {"tile": {"px": 224, "mpp": 0.5}}}
    with pytest.raises(FileFormatError, match="of another tiles"):
        check_vectors(probe, Source(("a", "b"), {"v": x}, stages=other))
    with pytest.raises(FileFormatError, match="nothing says that these vectors are of the same tile encoder and slide"):
        check_vectors(probe, Source(("a", "b"), {"v": x}))
    with pytest.raises(FileFormatError, match="takes vectors of 6 numbers, and these have 5"):
        check_vectors(probe, Source(("a", "b"), {"v": x[:, 1:]}, stages=STAGES))


def test_what_cannot_be_kept_or_read_is_refused(probe, tmp_path):
    source, labels = cohort(np.random.default_rng(0), 30)
    with pytest.raises(SettingsError, match="a new slide alone has no mean of its site"):
        fit_probe(source, labels, ProbeSettings(site_remedy="centre"))
    with pytest.raises(LabelError):
        fit_probe(source, labels, ProbeSettings(folds=20))
    with pytest.raises(SettingsError, match="between 0 and 1"):
        predict_vectors(probe, ["a"], np.zeros((1, 6)), 90)
    with pytest.raises(FileFormatError, match="no probe is kept here"):
        load_probe(tmp_path)
    probe.save(tmp_path / "p")
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    for harm in ({"format": "2"}, {"slides": ["a"]}, {"targets": [{}]}, {"settings": {"no": 1}}):
        (tmp_path / "p" / "config.json").write_text(json.dumps(config | harm))
        with pytest.raises((FileFormatError, SettingsError)):
            load_probe(tmp_path / "p")
    (tmp_path / "p" / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(FileFormatError):
        load_probe(tmp_path / "p")


def test_a_probe_of_patients_is_of_patients():
    source, labels = cohort(np.random.default_rng(3), 40)
    found = fit_probe(source, labels, ProbeSettings(folds=3, repeats=1, unit="patient"))
    assert set(found.ids) == set(found.patients) == set(labels.table["patient_id"])


def test_in_python_without_a_study(tmp_path):
    ids, x, people, classes = drawn(np.random.default_rng(3), 40)
    frame, grade = pd.DataFrame(x, index=ids), pd.Series(classes, index=ids, name="grade")
    hs.probe(frame, grade, patients=dict(zip(ids, people, strict=True)), folds=3, repeats=1, out=tmp_path / "p")
    new, values, *_ = drawn(np.random.default_rng(4), 5, first=500)
    found = hs.predict(tmp_path / "p", pd.DataFrame(values, index=new), coverage=0.8)
    assert found["slide_id"].tolist() == new
    assert (found["coverage"] == 0.8).all()
