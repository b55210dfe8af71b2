"""A saved probe: what it says of single slides holds, it reads back, and it refuses what it was not made for."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from histossl.core.errors import FileFormatError, LabelError
from histossl.evaluate.labels import Labels
from histossl.evaluate.saved_probe import SavedProbe, fit_saved
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.sources import Source

ONCE = ProbeSettings(repeats=1, bootstraps=100, shots=())


def draw(rng, n, classes=2, d=5):
    """Vectors of n patients, two slides each, and the class of each; the classes overlap."""
    truth = rng.integers(classes, size=n)
    middle = np.eye(classes, d)[truth] * 1.5 + 0.5 * rng.standard_normal((n, d))
    return np.repeat(middle, 2, axis=0) + rng.standard_normal((2 * n, d)), np.repeat(truth, 2)


def saved(rng, n=100, classes=2, seed=0):
    x, y = draw(rng, n, classes)
    ids = tuple(f"s{k:03d}" for k in range(2 * n))
    table = pd.DataFrame(
        {"patient_id": [f"p{k // 2}" for k in range(2 * n)], "grade": [f"g{c}" for c in y]}, index=pd.Index(ids)
    )
    source = Source(ids, {"v": x.astype(np.float32)})
    return fit_saved(source, Labels(table, ("grade",)), "grade", replace(ONCE, seed=seed), "made of this"), x, y


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "patients"), [(2, 150), (3, 195)])
def test_the_set_holds_the_class_as_often_as_it_says(classes, patients):
    """Over draws of cohort and new patients: .90, whatever the model is worth; a cohort a draw."""
    rng = np.random.default_rng(classes)
    held = []
    for k in range(200):
        probe, _, _ = saved(rng, patients, classes, seed=k)
        x, y = draw(rng, 20, classes)
        held += [f"g{c}" in _set(probe, probe.score(v[None])) for v, c in zip(x[::2], y[::2], strict=True)]
    assert abs(np.mean(held) - 0.9) < 0.02, np.mean(held)


def _set(probe, logits):
    """The conformal set alone, by its definition: the distances of `predict` take most of its time."""
    odds = np.column_stack([np.zeros(1), logits])[0] if logits.shape[1] == 1 else logits[0]
    p = np.exp(odds - odds.max()) / np.exp(odds - odds.max()).sum()
    n = len(probe.misfits)
    limit = np.sort(probe.misfits)[min(n, int(np.ceil((n + 1) * 0.9))) - 1]
    return [name for name, value in zip(probe.names, p, strict=True) if 1 - value <= limit]


@pytest.mark.parametrize("classes", [2, 3])
def test_predictions_are_calibrated_and_known_patients_are_near(classes):
    rng = np.random.default_rng(10 + classes)
    probe, x, _ = saved(rng, 160, classes)
    new, truth = draw(rng, 150, classes)
    said = [probe.predict(vector) for vector in new]
    for one in said:
        assert sum(one.probabilities.values()) == pytest.approx(1)
        assert len(one.nearest) == 5
        assert len({patient for patient, *_ in one.nearest}) == 5
        assert not one.known
    for one, vector in zip(said[:9], new, strict=False):
        logits = probe.score(vector[None])
        assert list(one.chosen) == _set(probe, logits)
    for k in range(classes):
        p = np.array([one.probabilities[f"g{k}"] for one in said])
        assert abs(p.mean() - (truth == k).mean()) < 0.12
    assert np.mean([one.unlike for one in said]) < 0.06
    own = probe.predict(x[7], "s007")
    assert own.known
    assert own.nearest[0][:2] == ("p3", "s007")
    assert probe.predict(np.full(5, 40.0)).unlike


def test_it_reads_back_and_damage_is_refused(tmp_path):
    probe, x, _ = saved(np.random.default_rng(1))
    probe.save(tmp_path / "p")
    again = SavedProbe.load(tmp_path / "p")
    assert again.predict(x[3], "s003") == probe.predict(x[3], "s003")
    assert again.encoder == "made of this"
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    (tmp_path / "p" / "config.json").write_text(json.dumps(config | {"labels": config["labels"][1:]}))
    with pytest.raises(FileFormatError, match="do not fit each other"):
        SavedProbe.load(tmp_path / "p")
    (tmp_path / "p" / "config.json").write_text("[]")
    with pytest.raises(FileFormatError, match="no probe can be read"):
        SavedProbe.load(tmp_path / "p")
    with pytest.raises(FileFormatError, match="no probe can be read"):
        SavedProbe.load(tmp_path / "nothing")


def test_numbers_have_no_saved_probe():
    ids = tuple(f"s{k}" for k in range(40))
    table = pd.DataFrame({"patient_id": ids, "age": [str(k + 0.5) for k in range(40)]}, index=pd.Index(ids))
    source = Source(ids, {"v": np.random.default_rng(2).standard_normal((40, 3)).astype(np.float32)})
    with pytest.raises(LabelError, match="only probes of classes are saved"):
        fit_saved(source, Labels(table, ("age",)), "age", ONCE, "")
