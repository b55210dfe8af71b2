"""Sites: an effect that was put in is found and taken out, the label stays, and confounding is named."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from histossl.core.errors import LabelError
from histossl.evaluate.audit import confounding
from histossl.evaluate.labels import Labels
from histossl.evaluate.methods import describe
from histossl.evaluate.probe import write_probe
from histossl.evaluate.rivals import probe_with_rivals
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.site_effects import neighbourhood, site_effects
from histossl.evaluate.site_remedies import remedied
from histossl.evaluate.sources import Source
from histossl.view.report.page import ReportInput, write_report

QUICK = ProbeSettings(repeats=1, folds=3, bootstraps=100, shots=())


def cohort(rng, n=180, shift=2.0, spread=2.0):
    """Three sites with their own mean and deviation; the class is independent of them."""
    sites, classes = np.arange(n) % 3, np.arange(n) // 3 % 2
    x = rng.standard_normal((n, 8)) * np.array([1, spread, 1 / spread])[sites][:, None]
    x += shift * rng.standard_normal((3, 8))[sites]
    x[:, 0] += 1.5 * classes
    ids = tuple(f"s{k:03d}" for k in range(n))
    table = pd.DataFrame(
        {"patient_id": [f"p{k}" for k in range(n)], "grade": [f"g{c}" for c in classes]}, index=pd.Index(ids)
    )
    of = {name: f"site {s}" for name, s in zip(ids, sites, strict=True)}
    return Source(ids, {"v": x.astype(np.float32)}), Labels(table, ("grade",), sites=of), sites, classes


def test_the_remedies_take_out_the_site_and_leave_the_label():
    source, labels, _, _ = cohort(np.random.default_rng(0))
    found, said = site_effects(source, labels, QUICK)
    rows = found.set_index("remedy")
    before, centred, scaled = (rows.loc[name] for name in rows.index)
    assert before["site_auroc"] > 0.95
    assert before["purity"] > before["expected_purity"] + 0.3
    # Means of the held-out patients, too, would push this far below .5.
    assert abs(centred["site_auroc"] - 0.5) < 0.03
    assert abs(scaled["site_auroc"] - 0.5) < 0.03
    assert abs(scaled["purity"] - scaled["expected_purity"]) < 0.05
    assert scaled["auroc"] > before["auroc"] - 0.02
    assert scaled["robustness"] > before["robustness"] + 0.2
    assert scaled["auroc_new_sites"] > before["auroc_new_sites"] - 0.02
    assert "V 0.0" in said[0]


def test_means_and_deviations_are_those_of_the_cohort():
    source, _, sites, _ = cohort(np.random.default_rng(1), n=3000)
    x = source.vectors["v"]
    np.testing.assert_array_equal(remedied(x, sites, "none"), x)
    for how in ("centre", "scale"):
        found = remedied(x, sites, how)
        for s in range(3):
            np.testing.assert_allclose(found[sites == s].mean(axis=0), x.mean(axis=0), atol=1e-4)
    deviations = np.stack([remedied(x, sites, "scale")[sites == s].std(axis=0) for s in range(3)])
    np.testing.assert_allclose(deviations, np.broadcast_to(deviations.mean(axis=0), (3, 8)), rtol=0.03)
    # A slide alone at its site would be taken out whole with its mean.
    np.testing.assert_allclose(remedied(x[:4], np.arange(4), "scale"), x[:4], rtol=1e-5)


def test_neighbours_by_hand():
    """Four places: neighbours share the site in two of them and the class in the others."""
    rng = np.random.default_rng(2)
    centres = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
    place = np.repeat(np.arange(4), 14)
    x = centres[place] + 0.01 * rng.standard_normal((56, 2))
    sites, folds = place, np.arange(56)[None] % 7
    found = neighbourhood(x, np.arange(56) % 2, sites, folds)
    assert found["purity"] == 1
    assert found["robustness"] == 0
    assert 0.15 < found["expected_purity"] < 0.35
    assert neighbourhood(x, place, np.arange(56) % 2, folds)["robustness"] == 1


def test_confounding_is_said_in_one_line():
    sites = np.array(["A"] * 20 + ["B"] * 20)
    assert confounding(np.array(["x"] * 20 + ["y"] * 20), sites).startswith("CONFOUNDED")
    assert confounding(np.array(["x", "y"] * 20), sites).endswith("V 0.00")
    nine_in_ten = np.array((["x"] * 18 + ["y"] * 2) + (["y"] * 18 + ["x"] * 2))
    assert confounding(nine_in_ten, sites).startswith("CONFOUNDED IN PART with the site (Cramér's V 0.80)")
    # Many small sites go together with anything, by chance.
    rng = np.random.default_rng(0)
    told = confounding(rng.permutation(["x", "y"] * 30), np.arange(60) // 2)
    assert float(told.rpartition("V ")[2]) > 0.5
    assert told.startswith("class and site")
    source, labels, _, _ = cohort(np.random.default_rng(3))
    assert "class and site go together" in probe_with_rivals(source, labels, QUICK).audit[0]


def test_a_remedy_is_fitted_on_what_trains_alone():
    """What the tested slides are changes nothing for the others, and they are moved by the others' means."""
    source, _, sites, _ = cohort(np.random.default_rng(4))
    x, train = source.vectors["v"], np.arange(120)
    other = x.copy()
    other[120:] += 100
    for how in ("centre", "scale"):
        found, moved = remedied(x, sites, how, train), remedied(other, sites, how, train)
        np.testing.assert_array_equal(found[train], moved[train])
        np.testing.assert_allclose(found[train], remedied(x[train], sites[train], how), atol=1e-5)
    centred = remedied(x, sites, "centre", train)
    means = np.stack([x[train][sites[train] == s].mean(axis=0) for s in range(3)])
    np.testing.assert_allclose(centred[120:], x[120:] - means[sites[120:]] + x[train].mean(axis=0), atol=1e-5)
    # A site that nobody of is known is centred by itself.
    new = np.where(np.arange(180) < 120, sites, 7)
    np.testing.assert_allclose(remedied(x, new, "centre", train)[120:].mean(axis=0), x[train].mean(axis=0), atol=1e-5)


def test_the_probe_takes_the_site_out_fold_by_fold():
    """Where the class differs between sites by its share, a probe that knows the site beats one that does not."""
    source, labels, sites, _ = cohort(np.random.default_rng(4))
    of_site = np.array(["a", "b"])[
        (np.random.default_rng(0).random(180) < np.array([0.2, 0.5, 0.8])[sites]).astype(int)
    ]
    torn = replace(labels, table=labels.table.assign(grade=of_site))
    settings = replace(QUICK, rivals=("knn",))
    knows, not_any_more = (
        probe_with_rivals(source, torn, replace(settings, site_remedy=how)).table.set_index("embedding")["auroc"]
        for how in ("none", "scale")
    )
    assert (knows.iloc[:2] > 0.65).all()
    assert (not_any_more.iloc[:2] < 0.6).all()
    assert (not_any_more.iloc[:2] > 0.4).all()
    assert 0.4 < knows["v, whole sites held out"] < 0.6  # which tells that it was the site
    assert "training patients" in describe(replace(settings, site_remedy="scale"))


@pytest.mark.parametrize("unit", ["slide", "patient"])
def test_whole_sites_held_out_stand_beside(unit, tmp_path):
    """The row is what holding out sites gives, in figures, page and words, and never one of the rivals."""
    source, labels, _, _ = cohort(np.random.default_rng(7))
    settings = replace(QUICK, shots=(20,), rivals=("knn",), unit=unit)
    found = probe_with_rivals(source, labels, settings)
    assert list(found.table["embedding"])[-2:] == ["v, 10 nearest", "v, whole sites held out"]
    row = found.table.iloc[-1]
    alone = probe_with_rivals(source, labels, replace(settings, hold_out="sites", rivals=(), shots=()))
    assert list(alone.table["embedding"]) == ["v"]
    assert (row["auroc"], row["low"], row["high"]) == tuple(alone.table.loc[0, ["auroc", "low", "high"]])
    whole = found.table[found.table["n_labelled"] == "all"].iloc[0]
    assert row["difference"] == pytest.approx(whole["auroc"] - row["auroc"])
    assert f"{row['auroc']:.2f} ({row['low']:.2f} to {row['high']:.2f}) with whole sites held out" in repr(found)
    write_probe(found, tmp_path)
    content = json.loads((tmp_path / "probe.json").read_text())
    assert "with whole sites held out" in content["method"]
    write_report(tmp_path / "r.html", ReportInput("r", pd.DataFrame({"slide_id": source.ids}), probe=content))
    page = (tmp_path / "r.html").read_text()
    assert page.count("v, whole sites held out") == 1  # a row, and no rival to be ahead of


def test_sites_that_cannot_be_held_out_say_why():
    source, labels, _, classes = cohort(np.random.default_rng(8))
    own = {name: f"site {c}" for name, c in zip(source.ids, classes, strict=True)}
    found = probe_with_rivals(source, replace(labels, sites=own), QUICK)
    assert list(found.table["embedding"]) == ["v"]
    assert "whole sites cannot be held out: every site has slides of one class only" in found.audit[0]
    some = {name: site for name, site in labels.sites.items() if name != "s007"}
    found = probe_with_rivals(source, replace(labels, sites=some), QUICK)
    assert "whole sites cannot be held out: no site is known of 's007'" in found.audit[0]
    one = probe_with_rivals(source, replace(labels, sites=dict.fromkeys(labels.sites, "here")), QUICK)
    assert "whole sites" not in one.audit[0]


def test_slides_alone_at_their_site_are_told():
    source, labels, _, _ = cohort(np.random.default_rng(6))
    many = replace(labels, sites={name: f"h{k // 2}" if k < 170 else f"h{k}" for k, name in enumerate(source.ids)})
    found = probe_with_rivals(source, many, replace(QUICK, site_remedy="scale"))
    assert "10 slides are alone at their site and stay as they are" in found.audit[0]
    with pytest.raises(LabelError, match=r"two sites with 3 patients or more .*: h0 \(2\), "):
        site_effects(source, many, QUICK)


def test_slides_without_a_site_are_named():
    source, labels, _, _ = cohort(np.random.default_rng(5))
    some = {name: site for name, site in labels.sites.items() if name != "s007"}
    with pytest.raises(LabelError, match="no site is known of 's007'"):
        probe_with_rivals(source, replace(labels, sites=some), replace(QUICK, site_remedy="centre"))
    with pytest.raises(LabelError, match="slides whose site is unknown"):
        site_effects(source, replace(labels, sites=some), QUICK)
