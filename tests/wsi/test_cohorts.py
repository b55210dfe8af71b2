"""Cohorts on disk: the labels, sites and outcomes of the slides that were painted, the same bytes for the same seed."""

import csv

import numpy as np
import pandas as pd
import pytest

from histossl.core.errors import SettingsError
from histossl.evaluate.audit import confounding
from histossl.wsi.synth import CLASSES, FACTORS, synth, write_cohort
from histossl.wsi.synth.recipe import outcome, plan


def test_a_cohort_on_disk(tmp_path):
    made = write_cohort(tmp_path / "a", slides=4, width=600, height=500, seed=9, truth=True)
    with (tmp_path / "a" / "labels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["slide_id", "patient_id", *FACTORS]
    assert len({r["patient_id"] for r in rows}) == 2
    assert [p.stem for p in sorted((tmp_path / "a" / "slides").iterdir())] == [r["slide_id"] for r in rows]
    assert [p.stem for p in sorted((tmp_path / "a" / "truth").iterdir())] == [r["slide_id"] for r in rows]
    assert [[CLASSES[f].index(r[f]) for f in FACTORS] for r in rows] == [[getattr(s, f) for f in FACTORS] for s in made]
    synth(tmp_path / "c", slides=4, width=64, height=64, seed=9, sites="independent")
    with (tmp_path / "c" / "labels.csv").open(encoding="utf-8") as file:
        at = {r["patient_id"]: int(r["site"].removeprefix("laboratory ")) for r in csv.DictReader(file)}
    assert list(at.values()) == [np.random.default_rng([p, 7]).integers(3) + 1 for p in {s.patient: 0 for s in made}]
    synth(tmp_path / "b", slides=4, width=600, height=500, seed=9)
    for path in sorted((tmp_path / "b").rglob("*.*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "a" / path.relative_to(tmp_path / "b")).read_bytes()


@pytest.mark.parametrize(("sites", "least", "most"), [("independent", 0, 0.3), ("confounded", 0.7, 0.9)])
def test_sites_are_independent_of_the_tissue_or_confounded_with_it(tmp_path, sites, least, most):
    made = write_cohort(tmp_path, slides=120, width=64, height=64, seed=3, sites=sites)
    table = pd.read_csv(tmp_path / "survival.csv")
    people = table.drop_duplicates("patient_id")
    assert (table.groupby("patient_id")["site"].nunique() == 1).all()
    told = confounding(people["composition"].to_numpy(str), people["site"].to_numpy(str))
    assert told.startswith("CONFOUNDED IN PART") == (sites == "confounded")
    assert least <= float(told.rpartition("V ")[2].partition(")")[0]) <= most
    others = confounding(people["lesion"].to_numpy(str), people["site"].to_numpy(str))
    assert float(others.rpartition("V ")[2]) < 0.3
    # The painting follows: the laboratory that is written is the one whose colours the slide has.
    glass = np.array([plan(s).stain[2, 0] for s in made])
    means = pd.Series(glass).groupby(table["site"]).mean()
    assert means.loc["laboratory 2"] < means.loc["laboratory 1"] - 0.015
    assert [tuple(row) for row in table[["os_months", "os_event"]].to_numpy().tolist()] == [outcome(s) for s in made]
    labels = pd.read_csv(tmp_path / "labels.csv")
    pd.testing.assert_frame_equal(labels, table[list(labels.columns)])


def test_no_slides_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="slides"):
        write_cohort(tmp_path, slides=0)
    with pytest.raises(SettingsError, match="sites"):
        write_cohort(tmp_path, slides=2, sites="confused")
