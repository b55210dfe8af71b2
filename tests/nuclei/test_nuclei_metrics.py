"""Scores against loops written from the definitions, and on the cases that have no nuclei."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from histossl.cli import nuclei_score
from histossl.core.errors import LabelError
from histossl.nuclei.metrics import METRICS, Scores, score, summarise


def brute(prediction: np.ndarray, truth: np.ndarray) -> Scores:
    """Straight from the definitions, one nucleus at a time."""
    p_ids = [int(k) for k in np.unique(prediction) if k]
    t_ids = [int(k) for k in np.unique(truth) if k]
    a, b = prediction > 0, truth > 0
    if not p_ids and not t_ids:
        return Scores(1, 1, 1, 1, 1, 1)
    iou = {
        (t, p): ((truth == t) & (prediction == p)).sum() / ((truth == t) | (prediction == p)).sum()
        for t in t_ids
        for p in p_ids
    }
    common = union = 0
    used = set()
    for t in t_ids:
        best = max(p_ids, key=lambda p: iou[t, p], default=None)
        if best is None or iou[t, best] == 0:
            union += (truth == t).sum()
            continue
        common += ((truth == t) & (prediction == best)).sum()
        union += ((truth == t) | (prediction == best)).sum()
        used.add(best)
    union += sum((prediction == p).sum() for p in p_ids if p not in used)
    hits = [value for value in iou.values() if value > 0.5]
    tp, fp, fn = len(hits), len(p_ids) - len(hits), len(t_ids) - len(hits)
    return Scores(
        dice=2 * (a & b).sum() / (a.sum() + b.sum()),
        aji=common / union if union else 0,
        pq=sum(hits) / (tp + fp / 2 + fn / 2),
        f1=2 * tp / (2 * tp + fp + fn),
        precision=(a & b).sum() / a.sum() if a.any() else 1,
        recall=(a & b).sum() / b.sum() if b.any() else 1,
    )


@given(seed=st.integers(0, 10**6), ids=st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_equals_the_definitions(seed: int, ids: int) -> None:
    rng = np.random.default_rng(seed)
    truth = np.kron(rng.integers(0, ids + 1, (3, 5)), np.ones((3, 4), int)) * 7
    prediction = np.where(rng.random(truth.shape) < 0.8, truth, rng.integers(0, 3, truth.shape))
    prediction = np.roll(prediction, int(rng.integers(0, 3)), 1).astype(np.uint16)
    np.testing.assert_allclose(astuple(score(prediction, truth)), astuple(brute(prediction, truth)), atol=1e-12)


def test_ids_need_not_be_consecutive() -> None:
    truth = np.zeros((6, 9), np.int64)
    truth[1:3, 1:4], truth[4:6, 5:9] = 3, 2**31 - 1
    assert score(truth, truth) == Scores(1, 1, 1, 1, 1, 1)
    assert score(truth * 0 + (truth > 3) * 70000 + (truth == 3) * 1, truth) == Scores(1, 1, 1, 1, 1, 1)


def test_images_without_nuclei_are_defined() -> None:
    none, some = np.zeros((4, 7), int), np.ones((4, 7), int)
    assert score(none, none) == Scores(1, 1, 1, 1, 1, 1)
    assert score(some, none) == Scores(0, 0, 0, 0, 0, 1)
    assert score(none, some) == Scores(0, 0, 0, 0, 1, 0)


def test_a_merge_costs_instances_not_pixels() -> None:
    truth = np.zeros((8, 12), int)
    truth[2:6, 1:6], truth[2:6, 6:11] = 1, 2
    merged = (truth > 0).astype(int)
    found = score(merged, truth)
    assert found.dice == 1
    assert found.f1 == 0
    assert found.aji == pytest.approx(0.5)  # both take the merged one: 20 + 20 common pixels of 40 + 40


@pytest.mark.parametrize("bad", [np.zeros((3, 4, 1), int), np.zeros((3, 4)), np.zeros((3, 5), int)])
def test_refuses_what_is_no_pair_of_labels(bad: np.ndarray) -> None:
    with pytest.raises(LabelError):
        score(bad, np.zeros((3, 4), int))


def test_the_bootstrap_holds_the_mean_and_is_seeded() -> None:
    rows = [Scores(*np.full(6, value)) for value in (0.2, 0.4, 0.9)]
    one, two = (summarise(rows, np.random.default_rng(5)) for _ in range(2))
    assert one == two
    assert set(one) == set(METRICS)
    assert one["pq"].mean == pytest.approx(0.5)
    assert 0.2 <= one["pq"].low < 0.5 < one["pq"].high <= 0.9
    with pytest.raises(LabelError):
        summarise([], np.random.default_rng(0))


def _labels() -> np.ndarray:
    labels = np.zeros((30, 50), np.int32)
    labels[3:12, 4:20], labels[15:28, 22:45] = 1, 2
    return labels


def _geojson(path: Path) -> None:
    rings = [[[4, 3], [20, 3], [20, 12], [4, 12], [4, 3]], [[22, 15], [45, 15], [45, 28], [22, 28], [22, 15]]]
    features = [
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [r]}, "properties": {}} for r in rings
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def test_score_reads_labels_and_geojson(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", _labels())
    _geojson(tmp_path / "a.geojson")
    for prediction, truth in (("a.geojson", "a.tif"), ("a.tif", "a.geojson"), ("a.geojson", "a.geojson")):
        out = tmp_path / "scores.csv"
        assert nuclei_score.score(tmp_path / prediction, tmp_path / truth, out) == 0
        assert out.read_text().splitlines()[1].split(",")[1:] == ["1.0"] * 6


def test_score_names_what_does_not_match(tmp_path: Path) -> None:
    for folder, names in (("p", "ab"), ("t", "bc")):
        (tmp_path / folder).mkdir()
        for name in names:
            tifffile.imwrite(tmp_path / folder / f"{name}.tif", _labels())
    with pytest.raises(LabelError, match="do not match"):
        nuclei_score.score(tmp_path / "p", tmp_path / "t")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LabelError, match="no label images"):
        nuclei_score.score(tmp_path / "p", tmp_path / "empty")
    with pytest.raises(LabelError, match="folder"):
        nuclei_score.score(tmp_path / "p" / "a.tif", tmp_path / "t")
    (tmp_path / "bad.geojson").write_text("{")
    with pytest.raises(LabelError, match="no GeoJSON"):
        nuclei_score.score(tmp_path / "bad.geojson", tmp_path / "t" / "b.tif")


def test_masks_are_refused_and_strangers_suspected(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    labels = np.kron(np.eye(6, dtype=np.int32) * np.arange(1, 7), np.ones((9, 9), np.int32))
    tifffile.imwrite(tmp_path / "a.tif", labels)
    tifffile.imwrite(tmp_path / "mask.tif", (labels > 0).astype(np.uint8) * 255)
    with pytest.raises(LabelError, match=r"mask\.tif: is a mask: its 6 pieces have one number, 255; give each nucleus"):
        nuclei_score.score(tmp_path / "a.tif", tmp_path / "mask.tif")
    assert nuclei_score.score(tmp_path / "a.tif", tmp_path / "a.tif") == 0
    assert "SUSPECT" not in capsys.readouterr().err
    tifffile.imwrite(tmp_path / "b.tif", labels[:, ::-1])  # of another picture
    assert nuclei_score.score(tmp_path / "a.tif", tmp_path / "b.tif") == 0
    assert "SUSPECT b.tif: nuclei and truth hardly overlap, Dice 0.000" in " ".join(capsys.readouterr().err.split())
