"""Rivals: each learns what its kind can see, none sees whom it is tested on, all stand in one table."""

from dataclasses import replace

import h5py
import numpy as np
import pandas as pd
import pytest

from histossl.core.errors import SettingsError
from histossl.evaluate.labels import Labels
from histossl.evaluate.mil import Recipe, trained_rival
from histossl.evaluate.part_weights import weighed_parts
from histossl.evaluate.probe import probe
from histossl.evaluate.rivals import cached_rival, neighbours, probe_with_rivals
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.sources import Source

QUICK = ProbeSettings(repeats=1, folds=2, bootstraps=100, shots=())
SMALL = Recipe(steps=60, batch=16, tiles=64, rate=3e-3, dim=32)


def labels_of(classes, patients=None):
    ids = [f"s{k:03d}" for k in range(len(classes))]
    patients = range(len(classes)) if patients is None else patients
    table = pd.DataFrame({"patient_id": [f"p{p}" for p in patients], "label": [f"c{c}" for c in classes]}, index=ids)
    return ids, Labels(table, ("label",))


def board(rows, columns):
    return np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)


def marked(rng, n):
    """Bags of 48 tiles; in class 1 two of them carry a mark, too little to move the mean."""
    classes = np.arange(n) % 2
    bags = []
    for c in classes:
        x = rng.normal(size=(48, 8))
        x[rng.choice(48, 2, replace=False), :3] += 4.0 * c
        bags.append((x.astype(np.float16), board(6, 8).astype(np.float32)))
    return bags, classes


def patterns(rng, n):
    """Half the tiles of every bag are dark: a chequered board in class 0, one half of the board in class 1."""
    classes = np.arange(n) % 2
    bags = []
    for c in classes:
        at = board(8, 6)
        dark = (at.sum(1) % 2 == rng.integers(2)) if c == 0 else ((at[:, 0] < 4) == rng.integers(2))
        x = rng.normal(size=(48, 8)) * 0.3
        x[:, 0] += np.where(dark, 1, -1)
        bags.append((x.astype(np.float16), at.astype(np.float32)))
    return bags, classes


def accuracy(kind, bags, classes, recipe=SMALL):
    half = len(bags) // 2
    train, test = np.arange(half), np.arange(half, len(bags))
    found = trained_rival(kind, bags, recipe=recipe, device="cpu")(train, classes[train], test, 5)
    assert found.shape == (len(test), 2)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    return np.mean(found.argmax(axis=1) == classes[test])


def test_attention_finds_the_few_tiles_that_matter_and_is_blind_to_places():
    rng = np.random.default_rng(0)
    assert accuracy("attention", *marked(rng, 80)) > 0.8
    assert 0.2 < accuracy("attention", *patterns(rng, 60)) < 0.8


def test_sparse_convolutions_see_who_neighbours_whom():
    assert accuracy("sparse", *patterns(np.random.default_rng(1), 60), replace(SMALL, steps=25)) > 0.9


def test_the_same_seed_trains_the_same_network():
    bags, classes = marked(np.random.default_rng(2), 24)
    quick = replace(SMALL, steps=3)
    rows = np.arange(12)
    one, two, other = (
        trained_rival("attention", bags, recipe=quick, device="cpu")(rows, classes[rows], rows + 12, seed)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def test_a_rival_is_handed_whole_patients_and_the_classes_of_no_one_else():
    rng = np.random.default_rng(3)
    patients = np.arange(60) // 3
    classes = (np.arange(20) % 2)[patients]
    ids, labels = labels_of(classes, patients)
    tested = []

    def spy(train, taught, test, seed):
        assert not set(patients[train]) & set(patients[test])
        np.testing.assert_array_equal(taught, classes[train])
        tested.append((len(train), tuple(test)))
        return np.tile([0.5, 0.5], (len(test), 1))

    settings = replace(QUICK, folds=5, shots=(10,))
    result = probe({"x": rng.normal(size=(60, 4))}, ids, labels, settings, {"spy": spy})
    assert sorted(row for n, rows in tested if n > 10 for row in rows) == list(range(60))
    table = result.table.set_index(["embedding", "n_labelled"])
    assert table.loc[("spy", "10"), "auroc"] == table.loc[("spy", "all"), "auroc"] == 0.5
    assert table.loc[("spy", "all"), "difference"] == pytest.approx(table.loc[("x", "all"), "auroc"] - 0.5)
    assert set(result.predictions["embedding"]) == {"x", "spy"}


@pytest.fixture
def source(tmp_path):
    bags, classes = marked(np.random.default_rng(4), 40)
    files = {}
    for k, (features, positions) in enumerate(bags):
        files[f"s{k:03d}"] = tmp_path / f"s{k:03d}.h5"
        with h5py.File(files[f"s{k:03d}"], "w") as file:
            file["features"] = features.astype(np.float32)
            coords = file.create_dataset("coords", data=(positions[:, ::-1] * 512).astype(np.int64))
            coords.attrs.update({"patch_size": 256, "patch_size_level0": 512, "overlap": 0})
            coords.attrs.update({"level0_width": 4096, "level0_height": 3072})
    mean = np.stack([features.astype(np.float32).mean(axis=0) for features, _ in bags])
    return Source(tuple(files), {"mean pooling": mean}, tiles=files), labels_of(classes)[1]


def test_all_methods_stand_in_one_table_in_the_order_asked_for(source):
    settings = replace(QUICK, rivals=("max", "deviation", "knn"))
    table = probe_with_rivals(*source, settings).table.set_index("embedding")
    assert list(table.index) == [
        "mean pooling",
        "max pooling",
        "mean and deviation",
        "mean pooling, 10 nearest",
    ]
    assert table.loc["max pooling", "auroc"] > 0.95 > table.loc["mean pooling", "auroc"]


def test_rivals_that_cannot_run_say_what_they_need(source):
    vectors, labels = source
    with pytest.raises(SettingsError, match="finetune needs a pretrained slide encoder"):
        probe_with_rivals(vectors, labels, replace(QUICK, rivals=("finetune",)))
    with pytest.raises(SettingsError, match="40 slides have none, first 's000'"):
        probe_with_rivals(replace(vectors, tiles={}), labels, replace(QUICK, rivals=("max",)))
    with pytest.raises(SettingsError, match="no 'transformer'; there are knn"):
        ProbeSettings(rivals=("transformer",))


def test_parts_are_weighed_by_folds_of_the_training_patients_alone(tmp_path):
    """One part tells the class, another tells the patient and drowns it; weighed, the first is heard again."""
    rng = np.random.default_rng(6)
    patients = np.arange(90) // 3
    classes = (np.arange(30) % 2)[patients]
    told = classes[:, None] + rng.normal(size=(90, 2))
    loud = 4 * rng.normal(size=(30, 60))[patients]
    vectors = np.hstack([told, loud]).astype(np.float32)
    ids = tuple(f"s{k:03d}" for k in range(90))
    source = Source(ids, {"x": vectors}, parts=("told",) * 2 + ("loud",) * 60)
    labels = labels_of(classes, patients)[1]
    table = probe_with_rivals(source, labels, replace(QUICK, rivals=("parts",))).table.set_index("embedding")
    assert table.loc["x, parts weighed", "auroc"] > table.loc["x", "auroc"] + 0.1
    # The tested rows take no part: another label of theirs changes nothing.
    name, method = weighed_parts(vectors, source.parts, [str(p) for p in patients], QUICK)
    train, test = np.arange(60), np.arange(60, 90)
    found = method(train, classes[:60], test, 0)
    assert name == "parts weighed"
    assert found.shape == (30, 2)
    twins = np.vstack([vectors[:60], np.full((30, 62), 9.0, np.float32)])
    again = weighed_parts(twins, source.parts, [str(p) for p in patients], QUICK)[1](train, classes[:60], train[:5], 0)
    np.testing.assert_array_equal(again, method(train, classes[:60], train[:5], 0))
    numbers = weighed_parts(vectors, source.parts, [str(p) for p in patients], QUICK)[1]
    assert numbers(train, classes[:60].astype(float), test, 0).shape == (30, 1)
    with pytest.raises(SettingsError, match="name no parts"):
        probe_with_rivals(replace(source, parts=()), labels, replace(QUICK, rivals=("parts",)))


def test_rivals_predict_numbers_too():
    """The share of dark tiles, which attention can weigh up; neighbours know it from the mean."""
    rng = np.random.default_rng(5)
    share = rng.uniform(0.1, 0.9, size=60)
    bags = []
    for part in share:
        x = rng.normal(size=(48, 8)) * 0.3
        x[:, 0] += np.where(rng.random(48) < part, 1, -1)
        bags.append((x.astype(np.float16), board(6, 8).astype(np.float32)))
    train, test = np.arange(40), np.arange(40, 60)
    longer = replace(SMALL, steps=150)
    network = trained_rival("attention", bags, recipe=longer, device="cpu")(train, 100 * share[train], test, 1)
    mean = np.stack([features.astype(float).mean(axis=0) for features, _ in bags])
    near = neighbours(mean)(train, 100 * share[train], test, 1)
    for found in (network, near):
        assert found.shape == (20, 1)
        assert np.corrcoef(found[:, 0], share[test])[0, 1] > 0.6
        assert 35 < found.mean() < 65
    assert np.abs(network[:, 0] - 100 * share[test]).mean() < 15  # the mean of all errs by 20


def test_what_was_trained_once_is_remembered_and_nothing_else_is_taken_for_it(tmp_path):
    calls = []

    def rival(train, truth, test, seed):
        calls.append(seed)
        return np.full((len(test), 2), float(len(calls)))

    ids = [f"s{k}" for k in range(9)]
    rows, truth, test = np.arange(4), np.array([0, 1, 0, 1]), np.arange(4, 9)
    first = cached_rival(rival, "made", ids, tmp_path)
    np.testing.assert_array_equal(first(rows, truth, test, 0), first(rows, truth, test, 0))
    assert len(calls) == 1
    first(rows, 1 - truth, test, 0)
    first(rows, truth, test[1:], 0)
    first(rows[:2], truth[:2], test, 0)
    first(rows, truth, test, 1)
    cached_rival(rival, "made otherwise", ids, tmp_path)(rows, truth, test, 0)
    cached_rival(rival, "made", ids[::-1], tmp_path)(rows, truth, test, 0)
    assert len(calls) == 7
    again = cached_rival(rival, "made", ids, tmp_path)(rows, truth, test, 0)
    assert (again == 1).all()
