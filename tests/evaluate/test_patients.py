"""Vectors and labels of patients: exact means, one label each, contradictions named."""

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest

import histossl as hs
from histossl.core.errors import FileFormatError, LabelError, SettingsError
from histossl.evaluate.labels import read_labels
from histossl.evaluate.linear import LinearScore
from histossl.evaluate.patients import by_patient, combine, labels_for
from histossl.evaluate.probe import probe
from histossl.evaluate.rivals import probe_with_rivals
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.sources import Source

QUICK = ProbeSettings(repeats=1, folds=3, bootstraps=100, shots=(), unit="patient")


def cohort(rng, patients=24):
    """Each patient has one to three slides; the class is of the patient and is seen in the mean alone."""
    of = np.repeat(np.arange(patients), rng.integers(1, 4, patients))
    classes = np.arange(patients) % 2
    values = rng.normal(size=(len(of), 6)).astype(np.float32)
    values[:, 0] += 3 * classes[of]
    ids = tuple(f"s{k:03d}" for k in rng.permutation(len(of)))
    people = {name: f"p{p:02d}" for name, p in zip(ids, of, strict=True)}
    counts = {name: int(k) for name, k in zip(ids, rng.integers(1, 99, len(of)), strict=True)}
    return Source(ids, {"vectors": values}, people, tile_counts=counts), of, classes


@pytest.mark.parametrize("how", ["mean", "tiles"])
def test_a_patient_is_the_weighted_mean_and_linear_scores_add_up(how, tmp_path):
    source, of, classes = cohort(np.random.default_rng(0))
    path = tmp_path / "labels.csv"
    rows = [f"{name},{source.patients[name]},{classes[p]}" for name, p in zip(source.ids, of, strict=True)]
    path.write_text("\n".join(["slide_id,patient_id,grade", *rows]))
    found, labels, members = by_patient(source, read_labels(path, source.ids, (), source.patients), how)
    weight = source.tile_counts if how == "tiles" else dict.fromkeys(source.ids, 1)
    score = LinearScore(("1",), np.random.default_rng(1).normal(size=(6, 1)), np.array([0.7]))
    logits = dict(zip(source.ids, score(source.vectors["vectors"])[:, 0], strict=True))
    for name, values in zip(found.ids, found.vectors["vectors"], strict=True):
        slides = [s for s in source.ids if source.patients[s] == name]
        assert members[name] == slides
        shares = [weight[s] / sum(weight[s] for s in slides) * logits[s] for s in slides]
        assert score(values[None])[0, 0] == pytest.approx(sum(shares), abs=1e-5)
    assert labels.table["grade"].to_dict() == {f"p{p:02d}": str(c) for p, c in enumerate(classes)}


def test_the_probe_of_patients_is_the_probe_of_their_means(tmp_path):
    source, of, classes = cohort(np.random.default_rng(2))
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(["patient_id,grade", *(f"p{p:02d},{c}" for p, c in enumerate(classes))]))
    labels = read_labels(path, source.ids, (), source.patients)
    ours = probe_with_rivals(source, labels, QUICK)
    means = np.stack([source.vectors["vectors"][of == p].mean(axis=0) for p in range(24)])
    ids = [f"p{p:02d}" for p in range(24)]
    by_hand = read_labels(path, ids, (), {name: name for name in ids})
    theirs = probe({"vectors": means}, ids, by_hand, QUICK)
    pd.testing.assert_frame_equal(ours.table.drop(columns="n_slides"), theirs.table.drop(columns="n_slides"))
    assert ours.table["n_slides"].tolist() == [len(source.ids)]
    assert ours.table["n_patients"].tolist() == [24]
    assert ours.table["auroc"][0] > 0.9


def test_slides_weighted_or_chosen_by_a_column(tmp_path):
    """Weights of a column are those by hand; 0, an empty cell and an absent row leave a slide out, a word chooses."""
    source, of, classes = cohort(np.random.default_rng(4))
    values, path = source.vectors["vectors"], tmp_path / "labels.csv"
    weights = np.random.default_rng(5).integers(0, 4, len(of))
    weights[np.unique(of, return_index=True)[1]] = 2  # each patient keeps a slide
    weights[of == 3] = 0
    stain = np.where(weights > 1, "HE", "PAS")
    cells = np.where(weights == 0, "", weights.astype(str))
    rows = [
        f"{name},{source.patients[name]},{classes[p]},{cell},{kind}"
        for name, p, cell, kind in zip(source.ids, of, cells, stain, strict=True)
    ]
    path.write_text("\n".join(["slide_id,patient_id,grade,block,stain", *rows[:-1]]))
    weights[-1], stain[-1] = 0, "PAS"  # its row is not there
    for how, by_hand in (("block", weights), ("stain=he", (stain == "HE").astype(int))):
        settings = replace(QUICK, combine=how, targets=("grade",))
        labels = labels_for(source, path, settings)
        found, of_people, members = by_patient(source, labels, how)
        there = [p for p in range(24) if by_hand[of == p].sum()]
        assert found.ids == tuple(f"p{p:02d}" for p in there)
        expected = [np.average(values[of == p], axis=0, weights=by_hand[of == p]) for p in there]
        np.testing.assert_allclose(found.vectors["vectors"], expected, atol=1e-6)
        assert sorted(name for slides in members.values() for name in slides) == sorted(
            n for n, w in zip(source.ids, by_hand, strict=True) if w
        )
        assert any("no slide of 1 patients counts" in what and "'p03'" in what for what in of_people.complaints)
        result = probe_with_rivals(source, labels, settings)
        assert result.table["n_slides"][0] == (by_hand > 0).sum()
        assert result.table["n_patients"][0] == 23
        column = how.partition("=")[0]
        assert column not in labels_for(source, path, replace(settings, targets=())).targets
        assert labels_for(source, path, replace(settings, targets=(column,))).targets == (column,)
    plain = labels_for(source, path, replace(settings, unit="slide"))
    assert plain.weights is None


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("blocks", "no column 'blocks' for --probe.combine.*'block'"),
        ("block", r"block is no weight in rows 2, 3: 'A', '-1'.*block=WORD"),
        ("stain=IHC", "no slide counts by 'stain=IHC'.*stain has 'HE', 'PAS'"),
    ],
)
def test_columns_that_are_no_weights_are_named(tmp_path, how, said):
    source = Source(("a", "b", "c"), {"v": np.eye(3, dtype=np.float32)}, {"a": "P", "b": "P", "c": "Q"})
    path = tmp_path / "labels.csv"
    path.write_text("slide_id,grade,block,stain\na,low,A,HE\nb,low,-1,PAS\nc,high,2,HE\n")
    with pytest.raises(LabelError, match=said):
        labels_for(source, path, replace(QUICK, combine=how, targets=("grade",)))
    path.write_text("patient_id,grade,block\nP,low,1\nQ,high,2\n")
    with pytest.raises(LabelError, match="a row is a patient"):
        labels_for(source, path, replace(QUICK, combine="block", targets=("grade",)))


def test_slides_of_one_patient_with_two_labels_are_named(tmp_path):
    source = Source(("a", "b", "c"), {"v": np.eye(3, dtype=np.float32)}, {"a": "P", "b": "P", "c": "Q"})
    path = tmp_path / "labels.csv"
    path.write_text("slide_id,grade\na,low\nb,high\nc,low\n")
    with pytest.raises(LabelError, match="'P' has 'low' in row 2 and 'high' in row 3"):
        probe_with_rivals(source, read_labels(path, source.ids, (), source.patients), QUICK)


def test_a_table_with_a_row_a_patient(tmp_path):
    path = tmp_path / "clinic.csv"
    path.write_text("patient_id,grade\nP ,low\nq,high\nR,low\n")
    labels = read_labels(path, ["a", "b", "c", "d"], (), {"a": "P", "b": "P", "c": "Q"})
    assert labels.table["grade"].to_dict() == {"a": "low", "b": "low", "c": "high"}
    assert labels.table["patient_id"].to_dict() == {"a": "P", "b": "P", "c": "Q"}
    assert any("no label for 1 of 4" in line for line in labels.complaints)
    assert any("'R'" in line for line in labels.complaints)
    path.write_text("patient_id,grade\nP,low\np,high\n")
    with pytest.raises(LabelError, match="patients named twice"):
        read_labels(path, ["a"], (), {"a": "P"})
    path.write_text("patient_id,grade\nX,low\n")
    with pytest.raises(LabelError, match="none of its patients"):
        read_labels(path, ["a"], (), {"a": "P"})
    barcoded = "TCGA-A2-A1FZ-01Z-00-DX1"
    path.write_text("patient_id,grade\nTCGA-A2-A1FZ,low\n")
    assert read_labels(path, [barcoded]).table["grade"].to_dict() == {barcoded: "low"}


def test_patient_vectors_in_memory():
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    obs = pd.DataFrame({"patient_id": ["P", "Q", "P", "P"], "tiles": [1, 5, 3, 0]}, index=list("abcd"))
    data = anndata.AnnData(X=values, obs=obs, obsm={"other": values[:, :2]})
    plain = hs.patient_vectors(data)
    np.testing.assert_allclose(plain.X, [values[[0, 2, 3]].mean(axis=0), values[1]])
    assert list(plain.obs_names) == ["P", "Q"]
    weighted = hs.patient_vectors(data, weights="tiles")
    np.testing.assert_allclose(weighted.X, [values[0] / 4 + values[2] * 3 / 4, values[1]])
    assert weighted.obs["slides"].tolist() == [2, 1]
    with pytest.raises(FileFormatError, match="1 slides have no weight"):
        hs.patient_vectors(data, weights={"a": 1, "b": 1, "c": 1})
    with pytest.raises(FileFormatError, match="no column 'blocks'"):
        hs.patient_vectors(data, weights="blocks")


def test_settings_that_do_not_go_together():
    with pytest.raises(SettingsError, match="one map of tiles"):
        ProbeSettings(unit="patient", rivals=("sparse",))
    with pytest.raises(SettingsError, match="unit"):
        ProbeSettings(unit="block")


def test_equal_weights_are_exact():
    values = np.random.default_rng(3).normal(size=(4, 2)).astype(np.float32)
    np.testing.assert_array_equal(combine(values, np.arange(4)), values)
