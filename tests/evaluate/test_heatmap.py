"""Heatmaps: the shares of the tiles add up to the logit, which is scikit-learn's; files say the same as one another."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from histossl.cli.main import main
from histossl.core.embeddings import read_embeddings
from histossl.evaluate.heatmap import Heatmap
from histossl.evaluate.heatmap_files import _painted, write_heatmap_geojson, write_heatmap_picture, write_heatmap_table
from histossl.evaluate.linear import fit_score
from histossl.evaluate.settings import ProbeSettings
from histossl.gigassl.embed import EmbedSettings, embed_slide, explain_slide
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.encoder_settings import EncoderSettings
from histossl.gigassl.views import ViewSettings
from histossl.study.heatmaps import thumbnail
from histossl.wsi.geometry import Size

IJ = np.stack(np.divmod(np.arange(60), 10), axis=1)  # 6 rows of 10
MARKED = np.array([0, 1, 2, 10, 11, 12])  # the upper left corner


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Eight slides; those with an odd number have other tiles in their upper left corner."""
    folder = tmp_path_factory.mktemp("heat")
    rng = np.random.default_rng(0)
    (folder / "in").mkdir()
    for k in range(10):
        features = rng.normal(size=(60, 12)).astype(np.float32)
        if k % 2:
            features[MARKED, 0] += 12
        with h5py.File(folder / "in" / f"s {k}.h5", "w") as file:
            file["features"] = features
            file["coords"] = IJ[:, ::-1] * 448 + [100, 200]
            file["coords"].attrs.update(patch_size=224, patch_size_level0=448, level0_width=5000, level0_height=3100)
    flags = ["--pretrain.epochs=20", "--pretrain.view.tiles=24", "--pretrain.encoder.dim=8", "--device=cpu"]
    flags += ["--pretrain.encoder.prototypes=4"]
    assert main(["pretrain", str(folder / "in"), "--out", str(folder / "study"), *flags]) == 0
    rows = "".join(f"s {k},{'BA'[k % 2 == 0]}\n" for k in range(9))  # the tenth has no label
    (folder / "l.csv").write_text(f"slide_id,label\n{rows}")
    return folder


FLAGS = ["--probe.folds=2", "--device=cpu"]


@pytest.mark.parametrize("views", [0, 7])
@pytest.mark.parametrize("arch", ["sparse", "attention"])
@pytest.mark.parametrize("hard_border", [False, True])
def test_shares_add_up_to_the_scores_of_the_very_vector_that_is_embedded(views, arch, hard_border):
    rng = np.random.default_rng(1)
    features, positions = rng.normal(size=(90, 12)).astype(np.float32), rng.uniform(3, 20, (90, 2)).astype(np.float32)
    made = EncoderSettings(in_dim=12, dim=8, prototypes=0, arch=arch, hard_border=hard_border)
    encoder = SlideEncoder(made, seed=1).eval()
    arguments = encoder, features, positions, ViewSettings(16, 2), EmbedSettings(views), "x"
    weights = rng.normal(size=(encoder.settings.vector_dim, 3))
    found = explain_slide(*arguments, weights)
    np.testing.assert_allclose(found.vector, embed_slide(*arguments), atol=1e-6)
    np.testing.assert_allclose(found.shares.sum(0), found.vector @ weights, atol=1e-5)
    assert found.looked_at.sum() == pytest.approx(1)
    assert (found.looked_at > 0).all() == (views == 0)
    assert (found.shares[found.looked_at == 0] == 0).all()


@pytest.mark.parametrize(("kinds", "scale"), [(2, "whole"), (3, "whole"), (2, "columns")])
def test_the_linear_score_is_that_of_scikit_learn(kinds, scale):
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, 5, (80, 6)), np.arange(80) % 7 % kinds
    x[:, 0] += y
    score = fit_score(x, y, np.array(["a", "b", "c"][:kinds]), ProbeSettings(C=2.0, scale=scale))
    centred = x - x.mean(0)
    whole = centred / np.sqrt((centred**2).sum(1).mean())
    scaled = whole if scale == "whole" else StandardScaler().fit_transform(x) / 6**0.5
    model = LogisticRegression(C=2.0, class_weight="balanced", tol=1e-10, max_iter=10_000).fit(scaled, y)
    logits = score(x)
    if kinds == 2:
        assert score.names == ("b",)
        np.testing.assert_allclose(logits[:, 0], model.decision_function(scaled), atol=1e-4)
    else:
        assert score.names == ("a", "b", "c")
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        np.testing.assert_allclose(p, model.predict_proba(scaled), atol=1e-4)


def test_a_study_s_heatmaps_add_up_and_find_the_place(study):
    assert main(["heatmap", str(study / "study"), "--labels", str(study / "l.csv"), *FLAGS]) == 1  # one has no label
    heat = study / "study" / "heatmaps"
    with (heat / "scores.csv").open() as file:
        scores = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert len(scores) == 10
    told = []
    assert scores["s 9"]["trained_on"] == "all labelled slides"
    assert {row["trained_on"][-6:] for name, row in scores.items() if name != "s 9"} == {"fold 1", "fold 2"}
    for name, row in scores.items():
        with (heat / "label" / f"{name}.csv").open() as file:
            tiles = list(csv.DictReader(file))
        shares = np.array([float(tile["share(B)"]) for tile in tiles])
        assert row["class"] == "B"
        assert shares.sum() == pytest.approx(float(row["logit"]), abs=1e-4)
        assert [(int(t["x"]), int(t["y"])) for t in tiles[:2]] == [(100, 200), (548, 200)]
        data = json.loads((heat / "label" / f"{name}.geojson").read_text())
        squares = {f["properties"]["name"]: f for f in data["features"]}
        for k, tile in enumerate(tiles):
            if float(tile["looked_at"]):
                found = squares.pop(f"tile {k}")
                x, y = int(tile["x"]), int(tile["y"])
                ring = [[x, y], [x + 448, y], [x + 448, y + 448], [x, y + 448], [x, y]]
                assert found["geometry"]["coordinates"] == [ring]
                measured = found["properties"]["measurements"]
                assert measured["share(B)"] == pytest.approx(shares[k], rel=1e-4, abs=1e-8)
                assert measured["score(B)"] == pytest.approx(shares[k] / float(tile["looked_at"]), rel=1e-4, abs=1e-8)
        assert not squares
        if int(name[-1]) % 2:
            per_view = shares / np.array([float(tile["looked_at"]) or np.inf for tile in tiles])
            told.append(roc_auc_score(np.isin(np.arange(len(tiles)), MARKED), per_view))
        assert (heat / "label" / f"{name}.png").stat().st_size > 5000
    assert min(told) > 0.75
    assert np.mean(told) > 0.9


def test_one_slide_may_be_asked_for_and_an_unknown_one_is_named(study, tmp_path, capsys):
    command = ["heatmap", str(study / "study"), "--labels", str(study / "l.csv"), *FLAGS]
    assert main([*command, "--slides", '["s 77"]']) == 2
    assert "s 77" in capsys.readouterr().err
    settings = study / "study" / "settings.json"
    kept = settings.read_text()
    settings.write_text(kept.replace('"views": 50', '"views": 3'))
    assert main([*command, "--slides", '["s 1"]']) == 1
    assert "run `histossl embed` again" in capsys.readouterr().err
    settings.write_text(kept)


def test_a_slide_without_an_mpp_of_its_own_is_drawn_with_that_of_the_table(tmp_path, capsys):
    Image.new("RGB", (640, 480), (200, 90, 160)).save(tmp_path / "a.png")
    row = {"slide_id": "a", "path": str(tmp_path / "a.png"), "mpp": "0.5"}  # as --mpp-default wrote it
    drawn = thumbnail(row)
    assert drawn is not None
    assert abs(drawn.mean(axis=(0, 1)) - [200, 90, 160]).max() < 3
    assert capsys.readouterr().err == ""
    assert thumbnail(row | {"mpp": "none"}) is None
    assert "is drawn on white" in capsys.readouterr().err


def test_vectors_of_the_study_have_the_logits(study):
    vectors = read_embeddings(study / "study" / "embeddings.h5ad")
    assert vectors.vectors["giga-ssl"].shape == (10, 20 + 8 * 4 + 8 * 4)


def test_files_of_several_classes_and_of_tiles_that_nobody_looked_at(tmp_path):
    shares = np.array([[0.5, -1.0], [0.25, 2.0], [0.0, 0.0]])
    heatmap = Heatmap("s<1>$x$", ("A", "ü,B"), shares.sum(0), shares, np.array([0.5, 0.5, 0.0]), np.zeros(2, "f4"))
    xy = np.array([[0, 0], [100, 0], [0, 50]])
    write_heatmap_table(tmp_path / "t.csv", heatmap, xy, in_um=True)
    with (tmp_path / "t.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["tile", "x_um", "y_um", "looked_at", "share(A)", "share(ü,B)"]
    assert [float(row["share(ü,B)"]) for row in rows] == [-1, 2, 0]
    write_heatmap_geojson(tmp_path / "g.geojson", heatmap, xy, 99.8)
    found = json.loads((tmp_path / "g.geojson").read_text("utf-8"))["features"]
    assert len(found) == 2
    assert found[1]["properties"]["measurements"]["score(ü,B)"] == 4
    write_heatmap_picture(tmp_path / "p.png", heatmap, xy, 50, Size(200, 100))
    assert Image.open(tmp_path / "p.png").size[0] > 500


def test_scores_are_painted_where_the_tiles_lie():
    xy = np.array([[0, 0], [100, 0], [0, 50]])
    ground = _painted(np.array([1.0, 2.0, np.nan]), xy, 50, Size(200, 100), (10, 20))
    wanted = np.full((10, 20), np.nan)
    wanted[:5, :5], wanted[:5, 10:15] = 1, 2
    np.testing.assert_array_equal(ground, wanted)


def test_16_bit_products_move_a_vector_little_and_follow_the_weights():
    rng = np.random.default_rng(2)
    features, positions = rng.normal(size=(40, 12)).astype(np.float32), rng.uniform(0, 9, (40, 2)).astype(np.float32)
    encoder = SlideEncoder(EncoderSettings(in_dim=12, dim=8, tile_mean=False, prototypes=0), seed=1).eval()

    def vector(precision: str) -> np.ndarray:
        return embed_slide(encoder, features, positions, ViewSettings(8), EmbedSettings(5, 0, precision), "x")

    exact, rounded = vector("float32"), vector("bfloat16")
    assert 0 < np.abs(exact - rounded).max() < 1e-2
    with torch.no_grad():
        encoder.stage.blocks[1].conv2.weight.mul_(-3)
    changed, rounded_again = vector("float32"), vector("bfloat16")
    assert np.abs(changed - exact).max() > 0.02
    assert np.abs(changed - rounded_again).max() < 1e-2
