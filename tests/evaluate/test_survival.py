"""Survival: Cox against lifelines, metrics against brute force, labels of every kind, and what must be so."""

import json

import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter, KaplanMeierFitter
from lifelines.datasets import load_lung, load_rossi
from lifelines.utils import concordance_index

import histossl as hs
from histossl.core.errors import LabelError, SettingsError
from histossl.evaluate.cox import log_likelihood, prepare_cox, solve_cox, survival_of
from histossl.evaluate.labels import read_labels
from histossl.evaluate.outcomes import find_outcomes, followed
from histossl.evaluate.probe import write_probe
from histossl.evaluate.risk_groups import TICKS, risk_groups
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.survival import fit_survival
from histossl.evaluate.survival_score import concordance, still_followed, survival_samples, times_of
from histossl.view.report.page import ReportInput, write_report
from histossl.wsi.synth.recipe import HAZARDS, SynthSettings, log_hazard, outcome


def cohort(rng, n=120, d=4, ties=True):
    """Two features carry the hazard."""
    x = rng.standard_normal((n, d))
    event, contact = rng.exponential(20 * np.exp(-1.5 * x[:, 0] - x[:, 1])), rng.exponential(40, n)
    time = np.minimum(event, contact)
    return x, np.column_stack([np.ceil(time) if ties else time, event <= contact])


@pytest.mark.parametrize("penalty", [1e-9, 0.01, 0.1])
def test_the_solver_is_lifelines_own(penalty):
    table = load_rossi()
    x, truth = table.drop(columns=["week", "arrest"]).to_numpy(float), table[["week", "arrest"]].to_numpy(float)
    unit = x.std(axis=0, ddof=1)
    z = (x - x.mean(axis=0)) / unit
    w = solve_cox(prepare_cox(z, truth), penalty * len(z), tolerance=1e-12)
    theirs = CoxPHFitter(penalizer=penalty).fit(table, "week", "arrest", fit_options={"precision": 1e-12})
    np.testing.assert_allclose(w / unit, theirs.params_, atol=1e-6)
    times = np.array([1.0, 20.0, 52.0])
    curves = theirs.predict_survival_function(table.iloc[:9], times=times).T
    np.testing.assert_allclose(survival_of(z @ w, truth, z[:9] @ w, times), curves, atol=1e-6)


def test_published_coefficients_to_the_third_digit():
    """Rossi's recidivism data as Fox and Weisberg print it (ties of Efron)."""
    table = load_rossi()
    names = ["fin", "age", "race", "wexp", "mar", "paro", "prio"]
    x, truth = table[names].to_numpy(float), table[["week", "arrest"]].to_numpy(float)
    w = solve_cox(prepare_cox(x - x.mean(axis=0), truth), 1e-9, tolerance=1e-10)
    published = [-0.37942, -0.05744, 0.31390, -0.14980, -0.43370, -0.08487, 0.09150]
    np.testing.assert_allclose(w, published, atol=5e-4)
    assert log_likelihood(x @ w, truth) == pytest.approx(-658.75, abs=0.005)


def test_more_features_than_slides():
    rng = np.random.default_rng(0)
    x, truth = cohort(rng, 30, 50)
    w = solve_cox(prepare_cox(x, truth), 3.0, tolerance=1e-10)
    best = log_likelihood(x @ w, truth) - 1.5 * w @ w
    for _ in range(20):
        v = w + 1e-3 * rng.standard_normal(50)
        assert log_likelihood(x @ v, truth) - 1.5 * v @ v < best


def test_harrells_c_is_lifelines_own_also_on_resamples():
    rng = np.random.default_rng(1)
    x, truth = cohort(rng)
    risk = np.round(x[:, 0], 1)
    drawn = rng.integers(len(x), size=len(x))
    weights = np.stack([np.ones(len(x)), np.bincount(drawn, minlength=len(x))])
    found = concordance(risk, truth, np.zeros(len(x), int), np.arange(len(x)), weights, truth[:, 1])
    theirs = [concordance_index(t[:, 0], -r, t[:, 1]) for t, r in ((truth, risk), (truth[drawn], risk[drawn]))]
    np.testing.assert_allclose(found, theirs, atol=1e-12)
    lung = load_lung().dropna(subset=["age"])
    truth = lung[["time", "status"]].to_numpy(float)
    mine = concordance(lung["age"].to_numpy(float), truth, np.zeros(len(lung), int), np.arange(len(lung)),
                       np.ones((1, len(lung))), truth[:, 1])  # fmt: skip
    assert mine[0] == pytest.approx(concordance_index(truth[:, 0], -lung["age"], truth[:, 1]))


def brute(risk, survival, truth, folds, times):
    """Every metric by loops over the pairs, straight from its definition."""
    time, event = truth.T
    censoring = KaplanMeierFitter().fit(time, 1 - event)

    def followed_to(t, before):
        return float(censoring.survival_function_at_times(np.nextafter(t, 0) if before else t).iloc[0])

    sums = {"c_index": [0.0, 0.0], "uno_c": [0.0, 0.0]} | {f"auroc@{t:g}": [0.0, 0.0] for t in times.horizons}
    for i in np.flatnonzero(event):
        for j in range(len(risk)):
            if folds[i] != folds[j]:
                continue
            right = (risk[i] > risk[j]) + 0.5 * (risk[i] == risk[j])
            g = followed_to(time[i], True)
            kinds = {"c_index": 1.0, "uno_c": g**-2 * (time[i] <= times.end)}
            if time[j] > time[i] or (time[j] == time[i] and not event[j]):
                for name, weight in kinds.items():
                    sums[name][0] += weight * right
                    sums[name][1] += weight
            for t in times.horizons:
                if time[i] <= t < time[j]:
                    sums[f"auroc@{t:g}"][0] += right / g
                    sums[f"auroc@{t:g}"][1] += 1 / g
    brier = []
    for k, t in enumerate(times.grid, len(times.horizons)):
        each = [
            survival[i, k] ** 2 / followed_to(time[i], True) if event[i] and time[i] <= t
            else (1 - survival[i, k]) ** 2 / followed_to(t, False) if time[i] > t else 0.0
            for i in range(len(risk))
        ]  # fmt: skip
        brier.append(np.mean(each))
    return {name: a / b for name, (a, b) in sums.items()} | {"ibs": np.mean(brier)}


def test_every_metric_is_its_definition():
    rng = np.random.default_rng(2)
    x, truth = cohort(rng, 60)
    times, folds = times_of(truth, ()), np.arange(60) % 3
    risk = np.round(x[:, 0], 1)
    survival = rng.random((60, len(times.all)))
    values = np.column_stack([risk, survival])[None]
    found = survival_samples(values, truth, folds[None], np.arange(60), np.ones((1, 60)), times)
    expected = brute(risk, survival, truth, folds, times)
    for name, value in expected.items():
        assert found[name][0] == pytest.approx(value, abs=1e-9), name
    assert found["auroc"][0] == pytest.approx(np.mean([expected[f"auroc@{t:g}"] for t in times.horizons]))


def test_all_are_followed_where_nobody_is_censored():
    truth = np.column_stack([np.arange(1.0, 11.0), np.ones(10)])
    np.testing.assert_array_equal(still_followed(truth, truth[:, 0]), 1)


def labelled(x, truth, **more):
    ids = [f"s{k:03d}" for k in range(len(x))]
    table = pd.DataFrame({"slide_id": ids, "os_months": truth[:, 0], "os_event": truth[:, 1].astype(int), **more})
    return pd.DataFrame(x, index=pd.Index(ids)), table


def test_the_probe_finds_the_hazard_and_nothing_in_noise(tmp_path):
    rng = np.random.default_rng(3)
    x, truth = cohort(rng, 150)
    vectors, table = labelled(x, truth)
    quick = {"repeats": 1, "bootstraps": 100, "shots": (30,)}
    found = hs.probe(vectors, table, **quick)
    assert found.table.empty
    rows = found.survival.set_index(["n_labelled", "embedding"])
    own, without = rows.loc[("all", "vectors")], rows.loc[("all", "no vectors (Kaplan and Meier)")]
    oracle = concordance(1.5 * x[:, 0] + x[:, 1], truth, np.zeros(150, int), np.arange(150), np.ones((1, 150)),
                         truth[:, 1])[0]  # fmt: skip
    assert abs(own["c_index"] - oracle) < 0.03
    assert own["low"] < own["c_index"] < own["high"]
    assert without["c_index"] == without["auroc"] == 0.5
    assert own["ibs"] < without["ibs"] - 0.03
    assert rows.loc[("30", "vectors"), "c_index"] < own["c_index"] + 0.02
    noise = hs.probe(vectors * 0 + rng.standard_normal(x.shape), table, **quick).survival.iloc[-2]
    assert noise["low"] < 0.5 < noise["high"] or abs(noise["c_index"] - 0.5) < 0.08
    parted = risk_groups(found.predictions[found.predictions["embedding"] == "vectors"])
    assert parted["p"] < 1e-3
    assert sum(group["patients"] for group in parted["groups"]) == 150
    assert sum(group["events"] for group in parted["groups"]) == truth[:, 1].sum()
    ticks = parted["ticks"]
    assert ticks[0] == 0
    assert 3 <= len(ticks) <= TICKS
    assert ticks[-1] <= truth[:, 0].max() < ticks[-1] + ticks[1]
    assert sum(group["at_risk"][1] for group in parted["groups"]) == (truth[:, 0] >= ticks[1]).sum()
    write_probe(found, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "survival.csv", "predictions.csv", "probe.json", "probe-os.png", "probe-os.svg"
    }  # fmt: skip
    content = json.loads((tmp_path / "probe.json").read_text())
    write_report(tmp_path / "report.html", ReportInput("os", pd.DataFrame({"slide_id": vectors.index}), probe=content))
    page = (tmp_path / "report.html").read_text()
    assert "Harrell&#39;s C" in page or "Harrell's C" in page
    assert "log-rank p &lt; 0.001" in page
    assert ">months<" in page
    assert "at risk" in page


def test_columns_are_found_by_their_names():
    def pairs(*columns):
        return {name: (o.time, o.event, o.unit) for name, o in find_outcomes("t", columns).items()}

    assert pairs("os_months", "os_event", "grade") == {"os": ("os_months", "os_event", "months")}
    assert pairs("OS", "OS.time", "PFI", "PFI.time") == {"OS": ("OS.time", "OS", ""), "PFI": ("PFI.time", "PFI", "")}
    assert pairs("Days", "Status") == {"survival": ("Days", "Status", "days")}
    assert pairs("time", "age") == {}
    assert pairs("OS_MONTHS", "OS_STATUS")["OS"] == ("OS_MONTHS", "OS_STATUS", "months")
    named = find_outcomes("t", ("weeks to relapse", "relapsed"), "weeks to relapse", "relapsed")
    assert named["weeks to relapse"].event == "relapsed"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("a,-3,1\nb,2,0", "os_months is negative in row 2"),
        ("a,2020-03-01,1\nb,2021-05-07,0", "os_months holds dates in rows 2, 3"),
        ("a,12 months,1\nb,1 year,0", "os_months holds no numbers"),
        ("a,5,2\nb,3,1", "os_event is neither event nor censored in row 2: '2'"),
        ("a,5,maybe\nb,3,1", "neither event nor censored in row 2: 'maybe'"),
        ("a,4000,1\nb,3,1", "longer than a life in row 2"),
    ],
)
def test_bad_times_and_events_are_named(tmp_path, rows, said):
    path = tmp_path / "labels.csv"
    path.write_text(f"slide_id,os_months,os_event\n{rows}\n")
    with pytest.raises(LabelError, match=said):
        read_labels(path, ["a", "b"])


@pytest.mark.parametrize("column", ["os_censored", "os_censor"])
def test_a_column_of_the_censored_asks_what_one_means(tmp_path, column):
    (tmp_path / "l.csv").write_text(f"slide_id,os_months,{column}\na,3,1\nb,4,0\n")
    for named in (("", ""), ("os_months", column)):
        with pytest.raises(
            LabelError, match=rf"does '1' in {column} mean censored or an event \(rows 2, 3\).*call the"
        ):
            read_labels(tmp_path / "l.csv", ["a", "b"], outcome=named)
    (tmp_path / "l.csv").write_text(f"slide_id,os_months,{column}\na,3,censored\nb,4,event\n")
    assert list(read_labels(tmp_path / "l.csv", ["a", "b"]).table["os"]) == ["3.0+", "4.0"]


@pytest.mark.parametrize(
    ("column", "times", "said"),
    [
        ("os_months", (400, 900, 380, 60), "half of the times are longer than 390 months (32 years): are"),
        ("os_months", (12, 500, 36, 60), "up to 500 months (42 years) in row 3: are these days or weeks?"),
        ("os_years", (3, 24, 60, 30), "half of the times are longer than 27 years (27 years): are these"),
        ("os_days", (12, 60, 120, 80), "nobody was followed longer than 120 days: are these months?"),
        ("os_months", (12, 60, 239, 80), ""),
        ("os_days", (12, 60, 1200, 80), ""),
        ("os_years", (1, 12, 19.5, 3), ""),
        ("os_time", (400, 900, 380, 60), ""),
    ],
)
def test_times_of_another_unit_are_suspected(tmp_path, column, times, said):
    path = tmp_path / "labels.csv"
    path.write_text(
        f"slide_id,{column},os_event\n" + "\n".join(f"{n},{t},1" for n, t in zip("abcd", times, strict=True)) + "\n"
    )
    found = read_labels(path, list("abcd")).suspicions
    assert len(found) == bool(said)
    assert said in "".join(found)


def test_words_zeros_and_halves(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("slide_id,os_months,os_event\na,5,1:DECEASED\nb,3.5,alive\nc,0,dead\nd,,1\ne,7,\nf,,\n")
    labels = read_labels(path, list("abcdef"))
    assert labels.table["os"].dropna().to_dict() == {"a": "5.0", "b": "3.5+"}
    np.testing.assert_array_equal(followed(np.array(["5.0", "3.5+"])), [[5, 1], [3.5, 0]])
    assert labels.outcomes == {"os": "months"}
    said = " ".join(labels.complaints)
    assert "no os_months or no os_event in rows 5, 6" in said
    assert "os_months is 0, nobody was followed, in row 4" in said
    with pytest.raises(LabelError, match="needs a time and an event"):
        read_labels(path, list("abcdef"), outcome=("os_months", ""))
    with pytest.raises(LabelError, match="no column 'months'"):
        read_labels(path, list("abcdef"), outcome=("months", "os_event"))


def test_what_cannot_be_probed_says_why():
    rng = np.random.default_rng(4)
    x, truth = cohort(rng, 40)
    vectors, table = labelled(x, truth)
    quick = {"repeats": 1, "bootstraps": 100, "shots": (), "targets": "os"}
    with pytest.raises(LabelError, match="5 folds, but 0 of 40 patients have an event"):
        hs.probe(vectors, table.assign(os_event=0), **quick)
    with pytest.raises(LabelError, match="2 patients have two outcomes: 'p0' has"):
        people = [f"p{k // 2}" if k < 4 else f"p{k}" for k in range(40)]
        hs.probe(vectors, table.assign(patient_id=people), **quick)
    with pytest.raises(LabelError, match="nothing can be said at 9999"):
        hs.probe(vectors, table, horizons=(9999.0,), **quick)
    with pytest.raises(SettingsError, match="knn predicts classes and numbers"):
        hs.probe(vectors, table, rivals=("knn",), **quick)
    everyone = hs.probe(vectors, table.assign(os_event=1), **quick)
    assert everyone.survival["c_index"].iloc[0] > 0.6


def test_a_fold_without_an_event():
    """A site without events has no pair to order, and the figures are those of the other sites."""
    rng = np.random.default_rng(6)
    x, truth = cohort(rng, 90)
    sites = np.arange(90) % 3
    truth[sites == 2, 1] = 0
    vectors, table = labelled(x, truth, site=[f"site {s}" for s in sites])
    quick = {"repeats": 1, "bootstraps": 100, "shots": (), "folds": 3}
    found = hs.probe(vectors, table, hold_out="sites", **quick).survival.set_index("embedding").loc["vectors"]
    assert 0.7 < found["c_index"] < 1
    assert np.isfinite(found[["low", "high", "uno_c", "auroc", "ibs"]].astype(float)).all()
    beside = hs.probe(vectors, table, **quick).survival.set_index("embedding")
    assert beside.loc["vectors, whole sites held out", "c_index"] == found["c_index"]
    # Nothing to learn from: what is said is what no vectors say.
    censored = np.column_stack([truth[:30, 0], np.zeros(30)])
    times = times_of(truth, ())
    said, learned = fit_survival(x[:30], censored, np.arange(30), x[30:40], ProbeSettings(), times)
    assert not learned
    np.testing.assert_array_equal(said, np.tile(np.append(0, np.ones(len(times.all))), (10, 1)))


def test_the_painted_hazard_is_known():
    """Over many patients Cox's regression on the factors finds the log hazard ratios."""
    rng = np.random.default_rng(5)
    made = [SynthSettings(patient=int(rng.integers(2**62)), composition=k % 2, lesion=k // 2 % 2) for k in range(3000)]
    truth = np.array([outcome(s) for s in made], float)
    x = np.array([[s.composition, s.lesion] for s in made], float)
    w = solve_cox(prepare_cox(x - x.mean(axis=0), truth), 1e-6)
    np.testing.assert_allclose(w, [HAZARDS["composition"], HAZARDS["lesion"]], atol=0.12)
    assert log_hazard(made[3]) == pytest.approx(2.0)
    assert outcome(made[0]) == outcome(made[0])
    assert 0.1 < 1 - truth[:, 1].mean() < 0.5
