"""The probe against brute force, against scikit-learn, and against what must be so."""

import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score

from histossl.core.errors import FileFormatError, LabelError, SettingsError
from histossl.evaluate.audit import near_duplicates
from histossl.evaluate.labels import Labels
from histossl.evaluate.methods import describe
from histossl.evaluate.plots import file_names
from histossl.evaluate.probe import probe, write_probe
from histossl.evaluate.settings import ProbeSettings, Recipe
from histossl.evaluate.splits import grouped_folds
from histossl.view.report.page import ReportInput, write_report

QUICK = ProbeSettings(repeats=2, bootstraps=100, shots=(10,))


def labels_of(classes, patients, name="label", **more):
    ids = pd.Index([f"s{k:03d}" for k in range(len(classes))], name="slide_id")
    table = pd.DataFrame({"patient_id": [f"p{p}" for p in patients], name: [f"c{c}" for c in classes]}, index=ids)
    return Labels(table.assign(**more), (name, *more))


def test_separable_gives_one_and_permuted_gives_a_half():
    rng = np.random.default_rng(0)
    patients = np.arange(150) // 2
    classes = (np.arange(75) % 3)[patients]
    clear = np.eye(3)[classes] @ rng.normal(size=(3, 12)) + 0.01 * rng.normal(size=(150, 12))
    noise = rng.normal(size=(150, 12))
    ids = [f"s{k:03d}" for k in range(150)]
    result = probe({"clear": clear, "noise": noise}, ids, labels_of(classes, patients), QUICK)
    table = result.table.set_index(["n_labelled", "embedding"])
    for n in ("10", "all"):
        assert table.loc[(n, "clear"), ["auroc", "low", "high", "balanced_accuracy"]].tolist() == [1, 1, 1, 1]
        noisy = table.loc[(n, "noise")]
        assert noisy["low"] < 0.5 < noisy["high"]
        assert noisy["difference"] == pytest.approx(1 - noisy["auroc"])
        assert noisy["difference_low"] > 0.3
    assert np.isnan(table.loc[("all", "clear"), "difference"])
    assert result.predictions.query("embedding == 'clear'").eval("truth == predicted").all()


def test_where_there_is_nothing_to_learn_the_figure_is_not_biased():
    """Over many permutations of the labels the mean is .5."""
    rng = np.random.default_rng(1)
    once = ProbeSettings(repeats=1, bootstraps=100, shots=())
    x, ids, found = rng.normal(size=(40, 3)), [f"s{k:03d}" for k in range(40)], []
    for _ in range(60):
        classes = rng.permutation(np.arange(40) % 2)
        found.append(probe({"x": x}, ids, labels_of(classes, np.arange(40)), once).table["auroc"][0])
    assert abs(np.mean(found) - 0.5) < 3 * np.std(found) / np.sqrt(len(found))


def test_the_probe_does_not_depend_on_units_order_or_company():
    rng = np.random.default_rng(2)
    patients = np.arange(80) // 2
    classes = (np.arange(40) % 2)[patients]
    x = rng.normal(size=(80, 7)) + 0.5 * classes[:, None]
    labels, ids = labels_of(classes, patients), [f"s{k:03d}" for k in range(80)]
    plain = probe({"x": x}, ids, labels, QUICK).table.iloc[:, :6]
    scaled = probe({"x": 1000 * x + 5}, ids, labels, QUICK).table.iloc[:, :6]
    pd.testing.assert_frame_equal(plain, scaled, rtol=1e-3)
    columns, powers = replace(QUICK, scale="columns"), np.logspace(-3, 3, 7)
    each, scaled = (probe({"x": v}, ids, labels, columns).table.iloc[:, :6] for v in (x, x * powers + 5))
    pd.testing.assert_frame_equal(each, scaled, rtol=1e-3)
    beside = probe({"y": x[:, :2], "x": x}, ids, labels, QUICK).table.query("embedding == 'x'").iloc[:, :6]
    pd.testing.assert_frame_equal(plain, beside.reset_index(drop=True))
    again = probe({"x": x}, ids, labels, QUICK)
    pd.testing.assert_frame_equal(again.table.iloc[:, :6], plain)
    more_ids = ["unlabelled", *ids]
    with_others = probe({"x": np.vstack([np.full(7, 99.0), x])}, more_ids, labels, QUICK)
    pd.testing.assert_frame_equal(with_others.table.iloc[:, :6], plain)


def test_a_loud_part_keeps_its_share_of_the_penalty():
    """What tells the classes is ten times as large as 200 numbers of noise: one scale keeps that, columns drown it."""
    rng = np.random.default_rng(11)
    classes = np.arange(60) % 2
    x = np.column_stack([classes + 0.5 * rng.normal(size=60), 0.1 * rng.normal(size=(60, 200))])
    labels, ids = labels_of(classes, np.arange(60)), [f"s{k:03d}" for k in range(60)]
    whole, columns = (
        probe({"x": x}, ids, labels, replace(QUICK, scale=scale)).table["auroc"].iloc[-1]
        for scale in ("whole", "columns")
    )
    assert whole > 0.88 > columns + 0.05


def test_a_model_never_sees_the_patient_that_it_scores():
    """Every patient has a mark of its own and a random class: known patients would be told perfectly."""
    rng = np.random.default_rng(3)
    patients = np.arange(200) // 5
    classes = rng.permutation(np.arange(40) % 2)[patients]
    x = np.eye(40)[patients] + 0.01 * rng.normal(size=(200, 40))
    ids = [f"s{k:03d}" for k in range(200)]
    grouped = probe({"x": x}, ids, labels_of(classes, patients), QUICK)
    leaking = probe({"x": x}, ids, labels_of(classes, np.arange(200)), QUICK)
    assert grouped.table["auroc"].iloc[-1] < 0.7
    assert leaking.table["auroc"].iloc[-1] > 0.99
    assert "no patients on both sides" in grouped.audit[0]


def test_targets_that_were_found_are_passed_over_and_those_named_refused():
    rng = np.random.default_rng(4)
    classes, x, ids = np.arange(40) % 2, rng.normal(size=(40, 3)), [f"s{k:03d}" for k in range(40)]
    labels = labels_of(classes, np.arange(40), "stage", note=[f"text {k}" for k in range(40)])
    with pytest.raises(LabelError, match="note: 40 different values on 40 slides"):
        probe({"x": x}, ids, labels, QUICK)
    result = probe({"x": x}, ids, Labels(labels.table, labels.targets, chosen=False), QUICK)
    assert set(result.table["target"]) == {"stage"}
    assert "left out: note" in result.complaints[0]
    with pytest.raises(LabelError, match="no target can be probed"):
        probe({"x": x}, ids, Labels(labels.table, ("note",), chosen=False), QUICK)


def test_slides_without_a_label_for_a_target_do_not_take_part():
    rng = np.random.default_rng(5)
    labels = labels_of(np.arange(40) % 2, np.arange(40))
    labels.table.iloc[::4, 1] = None
    table = probe({"x": rng.normal(size=(40, 3))}, [f"s{k:03d}" for k in range(40)], labels, QUICK).table
    assert set(table["n_slides"]) == {30}


def test_near_duplicates_are_found_across_blocks():
    x = np.random.default_rng(6).normal(size=(1500, 32))
    x[1400] = x[3]
    x[7] = x[2] + 1e-4
    assert near_duplicates(x) == [(2, 7), (3, 1400)]
    assert near_duplicates(np.ones((5, 4))) == []
    far = np.random.default_rng(6).normal(size=(50, 32))
    far[10:12] += 20  # alike in being extreme, their cosine is .99, and yet different
    assert near_duplicates(far) == []


def test_bad_vectors_and_settings_are_refused():
    labels, ids = labels_of(np.arange(20) % 2, np.arange(20)), [f"s{k:03d}" for k in range(20)]
    x = np.random.default_rng(7).normal(size=(20, 3))
    x[4, 1] = np.nan
    with pytest.raises(FileFormatError, match=r"x: 1 vectors are not finite, first \['s004'\]"):
        probe({"x": x}, ids, labels, QUICK)
    with pytest.raises(FileFormatError, match="20 different slides"):
        probe({"x": x[:5]}, ids, labels, QUICK)
    bads: tuple[dict[str, Any], ...] = ({"folds": 1}, {"C": 0.0}, {"shots": (1,)}, {"bootstraps": 0}, {"repeats": 0})
    for bad in bads:
        with pytest.raises(SettingsError, match=f"probe.{next(iter(bad))}"):
            ProbeSettings(**bad)


def test_what_is_written_reads_back(tmp_path):
    rng = np.random.default_rng(8)
    ids = [f"s{k:03d}" for k in range(40)]
    result = probe(
        {"x": rng.normal(size=(40, 3)), "y": rng.normal(size=(40, 2))},
        ids,
        labels_of(np.arange(40) % 2, range(40)),
        QUICK,
    )
    write_probe(result, tmp_path)
    content = json.loads((tmp_path / "probe.json").read_text())
    assert content["settings"]["folds"] == 5
    assert content["table"][0]["difference"] is None
    table = pd.read_csv(tmp_path / "probe.csv", dtype={"n_labelled": str})
    pd.testing.assert_frame_equal(table, result.table, atol=1e-6, check_dtype=False)
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    assert len(predictions) == 80
    np.testing.assert_allclose(predictions["p(c0)"] + predictions["p(c1)"], 1, atol=2e-6)
    files = ["predictions.csv", "probe-label.png", "probe-label.svg", "probe.csv", "probe.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    before = [(tmp_path / name).read_bytes() for name in files]
    write_probe(result, tmp_path)
    assert before == [(tmp_path / name).read_bytes() for name in files]


def test_figures_without_interval_equal_scikit_learn_on_one_model():
    rng = np.random.default_rng(10)
    classes = np.repeat([0, 1, 2], [30, 20, 10])
    once = ProbeSettings(folds=2, repeats=1, bootstraps=100, shots=())
    ids = [f"s{k:03d}" for k in range(60)]
    x = rng.normal(size=(60, 4)) + classes[:, None] * 0.5
    result = probe({"x": x}, ids, labels_of(classes, range(60)), once)
    row, found = result.table.iloc[0], result.predictions
    assert row["f1"] == pytest.approx(f1_score(found["truth"], found["predicted"], average="macro"))
    assert row["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(found["truth"], found["predicted"]))
    p = found[["p(c0)", "p(c1)", "p(c2)"]].to_numpy()
    assert row["brier"] == pytest.approx(((p - np.eye(3)[classes]) ** 2).sum(axis=1).mean())
    folds = grouped_folds(classes, np.array([f"p{k}" for k in range(60)]), 2, 1, 0)[0]
    expected = [average_precision_score(classes[folds == f] == c, p[folds == f, c]) for f in (0, 1) for c in range(3)]
    assert row["average_precision"] == pytest.approx(np.mean(expected))


def test_names_of_targets_are_data(tmp_path):
    names = file_names(["a/b", "a b", "../..", "Grade", "grade", "ü" * 300])
    assert len({name.casefold() for name in names.values()}) == 6
    assert not any("/" in name or "." in name or len(name) > 70 for name in names.values())
    classes = np.arange(24) % 2
    labels = labels_of(classes, range(24), "../$x_{$/..")
    result = probe({"<b>$": np.random.default_rng(0).normal(size=(24, 2))}, list(labels.table.index), labels, QUICK)
    write_probe(result, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_penalty_is_chosen_by_patients_that_train_and_helps_where_it_matters():
    """One of eighty features tells the class: without penalty the others drown it."""
    rng = np.random.default_rng(9)
    patients = np.arange(120) // 2
    classes = (np.arange(60) % 2)[patients]
    x = rng.normal(size=(120, 80))
    x[:, 0] += 2.5 * classes
    ids, labels = [f"s{k:03d}" for k in range(120)], labels_of(classes, patients)
    quick = {"repeats": 2, "bootstraps": 100, "shots": ()}
    weak = probe({"x": x}, ids, labels, ProbeSettings(C=1e4, **quick)).table["auroc"][0]
    chosen = probe({"x": x}, ids, labels, ProbeSettings(C=1e4, choose_C=(0.1, 1.0, 1e4), **quick)).table["auroc"][0]
    one = probe({"x": x}, ids, labels, ProbeSettings(C=1e4, choose_C=(1e4,), **quick)).table["auroc"][0]
    assert one == weak
    assert chosen > weak + 0.02


def test_numbers_are_regressed_on_patients_held_out():
    rng = np.random.default_rng(11)
    patients = np.arange(120) // 2
    signal = rng.normal(size=60)[patients]
    x = rng.normal(size=(120, 10))
    x[:, 0] += 3 * signal
    mark = np.eye(60)[patients] + 0.01 * rng.normal(size=(120, 60))  # knows the patient, and nothing else
    labels = labels_of(np.zeros(120), patients)
    labels.table["label"] = [f"{value:.4f}" for value in 50 + 7 * signal]
    ids = list(labels.table.index)
    result = probe({"x": x, "x in other units": x * 1e3 - 5, "mark": mark}, ids, labels, replace(QUICK, shots=(20,)))
    assert result.table.empty
    table = result.numbers.set_index(["n_labelled", "embedding"])
    best, last = table.loc[("all", "x")], table.loc[("all", "mark")]
    assert best["spearman"] > 0.85
    assert best["low"] < best["spearman"] < best["high"]
    assert best["r2"] > 0.7
    assert best["mae"] < 4 < last["mae"]  # the mean of |7 z| is 5.6
    assert abs(last["spearman"]) < 0.35
    assert last["difference_low"] > 0.4
    assert table.loc[("20", "x"), "spearman"] < best["spearman"]
    same = table.loc[("all", "x in other units")]
    assert same["spearman"] == pytest.approx(best["spearman"], abs=1e-3)
    found = result.predictions.query("embedding == 'x'")
    assert np.corrcoef(found["truth"].astype(float), found["predicted"].astype(float))[0, 1] > 0.85
    assert "numbers from " in result.audit[0]


def test_what_is_a_class_and_what_a_number():
    rng = np.random.default_rng(12)
    x, patients = rng.normal(size=(60, 3)), np.arange(60)

    def kind(values, task="auto"):
        labels = labels_of(np.zeros(60), patients)
        labels.table["label"] = [str(value) for value in values]
        result = probe({"x": x}, list(labels.table.index), labels, replace(QUICK, task=task, shots=(), folds=2))
        return "classes" if len(result.table) else "numbers"

    grades, ages = np.arange(60) % 4 + 1, rng.integers(20, 90, size=60)
    assert (kind(grades), kind(ages), kind(grades, "numbers")) == ("classes", "numbers", "numbers")
    with pytest.raises(LabelError, match="different values"):
        kind(np.arange(60), "classes")
    with pytest.raises(LabelError, match="'a' is no number"):
        kind(["a", "b"] * 30, "numbers")
    with pytest.raises(LabelError, match="all slides have the value 3"):
        kind([3] * 60, "numbers")


def test_sites_are_left_out_whole_where_asked():
    """The vectors know the site alone, and sites differ in how common the class is."""
    rng = np.random.default_rng(13)
    site = np.arange(240) % 6
    classes = (rng.random(240) < np.where(site < 3, 0.15, 0.85)).astype(int)
    x = np.eye(6)[site] + 0.05 * rng.normal(size=(240, 6))
    plain = labels_of(classes, np.arange(240))
    labels = replace(plain, sites={f"s{k:03d}": f"site {site[k]}" for k in range(240)})
    ids, once = list(labels.table.index), replace(QUICK, shots=(), folds=3, repeats=1)
    known = probe({"x": x}, ids, labels, once)
    unknown = probe({"x": x}, ids, labels, replace(once, hold_out="sites"))
    assert "6 of 6 sites on both sides" in known.audit[0]
    assert "none of 6 sites on both sides" in unknown.audit[0]
    assert known.table["auroc"][0] > 0.8 > 0.7 > unknown.table["auroc"][0]


def test_shots_may_count_patients():
    patients = np.arange(90) // 3
    classes = (np.arange(30) % 2)[patients]
    x, seen = np.random.default_rng(14).normal(size=(90, 2)), []

    def spy(train, truth, test, seed):
        seen.append((len(set(patients[train])), len(train)))
        return np.tile([0.5, 0.5], (len(test), 1))

    labels = labels_of(classes, patients)
    found = replace(QUICK, shots=(4, 10, 25), shots_of="patients")
    result = probe({"x": x}, list(labels.table.index), labels, found, {"spy": spy})
    assert set(seen) == {(4, 12), (10, 30), (24, 72)}
    assert list(result.table["n_labelled"].unique()) == ["4", "10", "all"]


def test_the_audit_says_what_was_seen_in_pretraining():
    labels = labels_of(np.arange(40) % 2, np.arange(40))
    ids, x = list(labels.table.index), np.random.default_rng(0).normal(size=(40, 3))
    assert (
        "the label-free pretraining used 12 of the slides"
        in probe({"x": x}, ids, labels, QUICK, seen=set(ids[:12]) | {"another"}).audit[0]
    )
    assert "pretraining" not in probe({"x": x}, ids, labels, QUICK).audit[0]


def test_the_paragraph_of_method_tells_every_setting():
    plain = ProbeSettings()
    others: dict[str, Any] = {
        "targets": ("grade",), "task": "classes", "hold_out": "sites", "folds": 4, "repeats": 3, "C": 2.0,
        "choose_C": (0.3, 3.0), "balanced": False, "alphas": (0.7,), "shots": (17,), "shots_of": "patients",
        "bootstraps": 777, "rivals": ("max",), "mixed_patients": True, "seed": 5, "parts": ("all",),
        "unit": "patient", "site_remedy": "centre", "time": "os_months", "event": "os_event", "horizons": (60.0,),
        "scale": "columns", "area": "tumour",
    }  # fmt: skip
    assert set(others) == {field.name for field in fields(ProbeSettings)} - {"combine", "steady"}
    patients = replace(plain, unit="patient")
    assert describe(replace(patients, combine="tiles")) != describe(patients)
    assert describe(replace(patients, steady=False), survival=True) != describe(patients, survival=True)
    said = describe(plain, True, True, True)
    told = {name: describe(replace(plain, **{name: value}), True, True, True) for name, value in others.items()}
    assert all(text != said for text in told.values())
    for name, word in {"folds": "4 folds", "C": "C = 2", "choose_C": "0.3, 3", "shots": "17 slides", "seed": "seed 5",
                       "alphas": "0.7", "bootstraps": "777", "targets": "grade"}.items():  # fmt: skip
        assert word in told[name]
    for field in fields(Recipe):  # of the trained rivals
        assert f"{getattr(Recipe(), field.name):g}" in describe(replace(plain, rivals=("sparse",)))


def test_numbers_are_written_beside_classes(tmp_path):
    rng = np.random.default_rng(15)
    labels = labels_of(np.arange(40) % 2, range(40), "kind", age=[str(v) for v in rng.normal(50, 9, size=40)])
    labels = Labels(labels.table, ("kind", "age"))
    ids = list(labels.table.index)
    write_probe(probe({"x": rng.normal(size=(40, 3))}, ids, labels, QUICK), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "predictions.csv", "probe.csv", "numbers.csv", "probe.json",
        "probe-kind.png", "probe-kind.svg", "probe-age.png", "probe-age.svg",
    }  # fmt: skip
    content = json.loads((tmp_path / "probe.json").read_text())
    assert [row["target"] for row in content["numbers"]] == ["age", "age"]
    assert "Ridge regression" in content["method"]
    write_report(tmp_path / "report.html", ReportInput("ages", pd.DataFrame({"slide_id": ids}), probe=content))
    page = (tmp_path / "report.html").read_text()
    assert "40 patients, numbers</span>" in page
    assert "40 patients, 2 classes</span>" in page
    assert "AUROC or Spearman&#39;s correlation with its 95 % interval" in page
    found = pd.read_csv(tmp_path / "predictions.csv")
    assert found.query("target == 'age'")["p(c0)"].isna().all()
    kinds = Labels(labels.table, ("kind",))
    write_probe(probe({"x": rng.normal(size=(40, 3))}, ids, kinds, QUICK), tmp_path)
    assert not (tmp_path / "numbers.csv").exists()
