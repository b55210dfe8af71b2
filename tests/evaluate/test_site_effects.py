"""Sites: an effect that was put in is found and taken out, the label stays, and confounding is named."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from histossl.core.errors import LabelError
from histossl.evaluate.audit import confounding
from histossl.evaluate.labels import Labels
from histossl.evaluate.rivals import probe_with_rivals
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.site_effects import neighbourhood, remedied, remedied_source, site_effects
from histossl.evaluate.sources import Source

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
    assert scaled["site_auroc"] < 0.55
    assert centred["site_auroc"] < before["site_auroc"]
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
    alone = remedied(x[:4], np.arange(4), "scale")
    assert np.isfinite(alone).all()


def test_neighbours_by_hand():
    """Four places: neighbours share the site in two of them and the class in the others."""
    rng = np.random.default_rng(2)
    centres = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
    place = np.repeat(np.arange(4), 14)
    x = centres[place] + 0.01 * rng.standard_normal((56, 2))
    sites = place
    found = neighbourhood(x, np.arange(56) % 2, sites, np.arange(56))
    assert found["purity"] == 1
    assert found["robustness"] == 0
    assert 0.15 < found["expected_purity"] < 0.3
    assert neighbourhood(x, place, np.arange(56) % 2, np.arange(56))["robustness"] == 1


def test_confounding_is_said_in_one_line():
    sites = np.array(["A"] * 20 + ["B"] * 20)
    assert confounding(np.array(["x"] * 20 + ["y"] * 20), sites).startswith("CONFOUNDED")
    assert confounding(np.array(["x", "y"] * 20), sites).endswith("V 0.00")
    source, labels, _, _ = cohort(np.random.default_rng(3))
    assert "class and site go together" in probe_with_rivals(source, labels, QUICK).audit[0]


def test_the_remedy_in_the_probe_is_the_same():
    source, labels, sites, _ = cohort(np.random.default_rng(4))
    found = probe_with_rivals(source, labels, replace(QUICK, site_remedy="centre"))
    by_hand = replace(source, vectors={"v": remedied(source.vectors["v"], sites, "centre")})
    pd.testing.assert_frame_equal(found.table, probe_with_rivals(by_hand, labels, QUICK).table)


def test_slides_without_a_site_are_named():
    source, labels, _, _ = cohort(np.random.default_rng(5))
    some = {name: site for name, site in labels.sites.items() if name != "s007"}
    with pytest.raises(LabelError, match="no site is known of 1 slides: 's007'"):
        remedied_source(source, some, "centre")
    with pytest.raises(LabelError, match="slides without a site"):
        site_effects(source, replace(labels, sites=some), QUICK)
