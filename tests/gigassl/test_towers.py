"""Two sources of the same slides: views are paired, encoders learn what both see, a slide has one vector."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from histossl.cli.main import main
from histossl.core.embeddings import Embeddings, read_embeddings
from histossl.core.errors import TrainingError
from histossl.gigassl import pretrain_settings, pretrain_task
from histossl.gigassl.embed import EmbedSettings, embed_slide
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.encoder_settings import EncoderSettings
from histossl.gigassl.pretrain_settings import PretrainSettings
from histossl.gigassl.slide_sources import SlideSource, plain_tiles
from histossl.gigassl.towers import Features, Towers, draw_across, match, pretrain_towers
from histossl.gigassl.views import ViewSettings
from histossl.study.folder import Study
from histossl.study.multi_source import merge_vectors
from support.features import FAST, IJ, trident, write_source

NARROW = [EncoderSettings(in_dim=dim, dim=16, prototypes=0) for dim in (24, 32)]
SETTINGS = PretrainSettings(epochs=2, batch=6, precision="float32", view=ViewSettings(tiles=16), encoder=NARROW[0])


def two_sources(folder: Path, slides: int = 6) -> list[list[SlideSource]]:
    """Slides 0 to 3 in the one, of 24 numbers and without augmentations; 2 and on in the other, of 32 and with."""
    rng = np.random.default_rng(0)
    for name in "ab":
        (folder / name).mkdir(parents=True)
    first = [write_source(folder / "a", f"s{k}", rng, 24, views=0) for k in range(slides - 2)]
    return [first, [write_source(folder / "b", f"s{k}", rng, 32) for k in range(2, slides)]]


def test_slides_are_matched_by_name(tmp_path):
    sources = two_sources(tmp_path)
    shown = match(sources)
    assert [sorted(slide) for slide in shown] == [[0], [0], [0, 1], [0, 1], [1], [1]]
    assert shown[2] == {0: sources[0][2], 1: sources[1][0]}
    with pytest.raises(TrainingError, match="no slide is in two sources: 's0' here, 's4' there; give files the same"):
        match([sources[0], sources[1][2:]])


def test_each_view_is_encoded_by_its_source_and_comes_where_it_was(tmp_path):
    towers = Towers(NARROW).eval()
    shown = match(two_sources(tmp_path))
    parts, order = draw_across(0, np.arange(6), shown, SETTINGS)
    with torch.no_grad():
        found = towers(parts, order)
        assert found.shape == (12, 16 + 24 + 32) == (12, towers.contrasted_dim)
        for source, encoder in enumerate(towers.encoders):
            alone = encoder(*parts[source])
            own = [k for k in range(12) if int(found[k, 40:].any()) == source]
            np.testing.assert_array_equal(found[own][:, :16], alone[:, :16])
            place = slice(16, 40) if source == 0 else slice(40, 72)
            np.testing.assert_array_equal(found[own][:, place], alone[:, 16:])
            assert not found[own][:, 40 : 72 if source == 0 else 40].any()
        # of the pairs, slides 0 and 1 are in the first source alone, 4 and 5 in the second
        sides = np.sort([[int(found[k, 40:].any()), int(found[k + 6, 40:].any())] for k in range(6)])
    assert sides.tolist() == [[0, 0], [0, 0], [0, 1], [0, 1], [1, 1], [1, 1]]


def test_which_source_comes_first_is_drawn_anew(tmp_path):
    shown = match(two_sources(tmp_path))
    first = set()
    for epoch in range(8):
        parts, order = draw_across(epoch, np.array([2]), shown, SETTINGS)
        assert sorted(parts) == [0, 1]
        first.add(order.tolist()[0])
    assert first == {0, 1}


def test_convolutions_are_shared_and_batch_norms_are_not():
    towers = Towers(NARROW)
    one, other = towers.encoders
    assert one.stage.blocks[0].conv1.weight is other.stage.blocks[0].conv1.weight
    assert one.stage.blocks[0].bn1.weight is not other.stage.blocks[0].bn1.weight
    towers.double()
    assert one.stage.blocks[0].conv1.weight is other.stage.blocks[0].conv1.weight
    names = [name for name, _ in towers.named_parameters()]
    assert sum("conv1" in name for name in names) == 2  # of two blocks, once


def test_a_source_without_views_takes_part_and_gets_a_gradient_of_zero(tmp_path):
    towers = Towers(NARROW)
    parts, order = draw_across(0, np.array([0, 1]), match(two_sources(tmp_path)), SETTINGS)
    assert list(parts) == [0]
    towers(parts, order).square().sum().backward()
    assert towers.encoders[0].linear.weight.grad.abs().max() > 0
    assert not towers.encoders[1].linear.weight.grad.any()


def test_every_slide_comes_once_an_epoch(tmp_path):
    shown = match(two_sources(tmp_path))
    sizes = []
    for step in range(2):
        ((parts, order),), pairs = pretrain_task.draw_batch(step, 2, shown, replace(SETTINGS, batch=3), draw_across)
        assert sum(part[3] for part in parts.values()) == len(order) == 2 * pairs
        sizes.append(pairs)
    assert sizes == [3, 3]


def sources_of(folder: Path, slides: list[list[SlideSource]]) -> list[Features]:
    return [Features(own, f"made {k}", folder / f"enc{k}") for k, own in enumerate(slides)]


def test_the_same_seed_gives_the_same_bytes_and_each_encoder_stands_by_itself(tmp_path):
    slides = two_sources(tmp_path / "in")
    for name in "ab":
        pretrain_towers(sources_of(tmp_path / name, slides), SETTINGS, tmp_path / name / "logs", "cpu")
    for k, dim in enumerate((24, 32)):
        files = [(tmp_path / name / f"enc{k}" / "model.safetensors").read_bytes() for name in "ab"]
        assert files[0] == files[1]
        encoder = SlideEncoder.load(tmp_path / "a" / f"enc{k}")
        assert encoder.settings.in_dim == dim
        features, positions = plain_tiles(slides[k][0].features)
        vector = embed_slide(encoder, features, positions, SETTINGS.view, EmbedSettings(views=2), "s")
        assert np.isfinite(vector).all()
        about = pretrain_settings.trained_as(tmp_path / "a" / f"enc{k}")
        assert (about["features"], about["slides"]) == (f"made {k}", [slide.slide_id for slide in slides[k]])
        assert about["pretrain"]["encoder"]["in_dim"] == dim
    assert not (tmp_path / "a" / "logs" / "checkpoint.pt").exists()


@dataclass(frozen=True)
class Held(SlideSource):
    """A slide whose tiles are at hand."""

    tiles: NDArray

    def dim(self) -> int:
        return self.tiles.shape[1]

    def load(self) -> tuple[NDArray, NDArray[np.float32]]:
        return self.tiles[None], IJ[None].astype(np.float32)


def seen_by_two(folder: Path, slides: int) -> tuple[list[list[SlideSource]], NDArray]:
    """What a slide is, four numbers, as two encoders show it: each among eight louder ones that are its own whim."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(slides, 4))
    sources: list[list[SlideSource]] = []
    for name, dim in (("a", 24), ("b", 32)):
        mixing, own = rng.normal(size=(12, dim)) / 4, []
        for k in range(slides):
            tiles = (np.r_[truth[k], 2 * rng.normal(size=8)] + rng.normal(size=(40, 12))) @ mixing
            trident(folder / name, f"s{k}", tiles.astype(np.float32))
            own.append(Held(f"s{k}", folder / name / f"s{k}.h5", folder, tiles.astype(np.float32)))
        sources.append(own)
    return sources, truth


def r_squared(vectors: NDArray, truth: NDArray) -> float:
    """Of ridge regression on one half of the slides, on the other."""
    half = len(vectors) // 2
    x = (vectors - vectors[:half].mean(0)) / (vectors[:half].std(0) + 1e-6)
    weights = np.linalg.solve(x[:half].T @ x[:half] + 10 * np.eye(x.shape[1]), x[:half].T @ truth[:half])
    return float(1 - ((x[half:] @ weights - truth[half:]) ** 2).sum() / (truth[half:] ** 2).sum())


def test_two_encoders_learn_what_both_see(tmp_path):
    slides, truth = seen_by_two(tmp_path / "in", 64)
    encoder = EncoderSettings(dim=32, inlet="standard", tile_mean=False, prototypes=0, arch="mlp")
    settings = replace(SETTINGS, encoder=encoder, epochs=60, batch=64, rate=3e-3)
    pretrain_towers(sources_of(tmp_path, slides), settings, tmp_path / "logs", "cpu")

    def vectors(encoders: list[SlideEncoder]) -> list[NDArray]:
        view, all_tiles = settings.view, EmbedSettings(views=0)
        return [
            np.stack([embed_slide(network, *plain_tiles(slide.features), view, all_tiles, "s") for slide in own])
            for own, network in zip(slides, encoders, strict=True)
        ]

    trained = vectors([SlideEncoder.load(tmp_path / f"enc{k}") for k in (0, 1)])
    untrained = vectors([one.eval() for one in Towers([replace(encoder, in_dim=dim) for dim in (24, 32)]).encoders])
    agree = [float(((a @ b.T).argmax(1) == np.arange(64)).mean()) for a, b in (trained, untrained)]
    assert agree[0] > 0.25
    assert agree[1] < 0.1
    assert r_squared(sum(trained), truth) > r_squared(sum(untrained), truth) + 0.1


def shown(names: list[str], values: NDArray) -> Embeddings:
    return Embeddings(pd.DataFrame(index=pd.Index(names)), {"v": values.astype(np.float32)}, {}, "")


def test_a_slide_s_vector_is_the_mean_of_what_its_sources_share_beside_what_each_has_of_its_own():
    a, b = np.array([[3.0, 1, 5], [1, 1, 1]]), np.array([[1.0, 3, 7, 8], [2, 2, 2, 2]])
    sources = [shown(["x", "y"], a), shown(["x", "z"], b)]
    wanted = np.array([[2, 2, 5, 7, 8], [1, 1, 1, 0, 0], [2, 2, 0, 2, 2]])
    found = merge_vectors(sources, "v", ["x", "y", "z"], 2)
    np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), rtol=1e-6)
    turned = merge_vectors(
        sources[::-1], "v", ["z", "y", "x"], 2
    )  # the order of sources and slides is that of the numbers
    np.testing.assert_array_equal(turned[::-1][:, [0, 1, 4, 2, 3]], found)
    whole = merge_vectors(sources, "v", ["x", "y", "z"], 0)
    np.testing.assert_array_equal(whole[1], [1, 1, 1, 0, 0, 0, 0])


def write_folders(folder: Path, only_a: int = 1, only_b: int = 1) -> list[str]:
    """Six slides at 20x by one encoder, at 10x by another, of which some are in one alone."""
    rng = np.random.default_rng(0)
    coarse = np.stack(np.divmod(np.arange(20), 4), 1)[:, ::-1] * 1024 + [300, 812]
    for k in range(6 + only_a + only_b):
        if k < 6 + only_a:
            trident(folder / "a", f"s{k}")
        if k < 6 or k >= 6 + only_a:
            values = rng.normal(size=32) + rng.normal(size=(20, 32))
            about = {"patch_size_level0": 1024, "target_magnification": 10}
            trident(folder / "b", f"s{k}", values.astype(np.float32), coarse, **about)
    return [str(folder / "a"), str(folder / "b")]


def test_from_two_folders_of_features_to_vectors_a_probe_and_heatmaps(tmp_path, capsys):
    folders, study = write_folders(tmp_path / "in"), tmp_path / "study"
    command = ["pretrain", *folders, "--out", str(study), *FAST]
    assert main(command) == 0
    assert "8 slides: 7 in source-1, 7 in source-2" in capsys.readouterr().err
    made = (study / "embeddings.h5ad").read_bytes()
    found = read_embeddings(study / "embeddings.h5ad")
    assert list(found.slides.index) == [f"s{k}" for k in range(8)]
    vectors = found.vectors["giga-ssl"]
    assert vectors.shape == (8, 8 + 24 + 32)
    assert not vectors[6, 32:].any()
    assert not vectors[7, 8:32].any()
    assert vectors[:6].all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert found.vectors["mean pooling"].shape == (8, 24 + 32)
    parts = [read_embeddings(study / f"source-{k}" / "embeddings.h5ad") for k in (1, 2)]
    mean = (parts[0].vectors["giga-ssl"][0, :8] + parts[1].vectors["giga-ssl"][0, :8]) / 2
    assert mean @ vectors[0, :8] == pytest.approx(np.linalg.norm(mean) * np.linalg.norm(vectors[0, :8]), rel=1e-5)

    rows = Study(study).slides()
    rows[0]["patient_id"] = "p"
    assert main(command) == 0  # again: all of it stands
    assert (study / "embeddings.h5ad").read_bytes() == made
    Study(study).write_slides(rows)
    assert main(["embed", str(study), "--device=cpu"]) == 0
    assert read_embeddings(study / "embeddings.h5ad").slides["patient_id"].tolist()[0] == "p"

    (tmp_path / "l.csv").write_text("slide_id,label\n" + "".join(f"s{k},{k % 2}\n" for k in range(8)))
    flags = ["--labels", str(tmp_path / "l.csv"), "--probe.folds=2", "--probe.bootstraps=100", "--probe.repeats=1"]
    assert main(["probe", str(study), *flags]) == 0
    assert main(["report", str(study)]) == 0
    (tmp_path / "l.csv").write_text("slide_id,label\n" + "".join(f"s{k},{k % 2}\n" for k in (*range(6), 7)))
    assert main(["heatmap", str(study / "source-2"), *flags, "--device=cpu"]) == 0
    capsys.readouterr()
    assert main(["heatmap", str(study), *flags, "--device=cpu"]) == 2
    assert "explain one of them" in capsys.readouterr().err


def test_encoders_of_a_study_of_two_sources_embed_other_slides(tmp_path, capsys):
    folders = write_folders(tmp_path / "in")
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert main(["pretrain", *folders, "--out", first, *FAST]) == 0
    assert main(["embed", *folders, "--out", second, "--weights", first, "--device=cpu"]) == 0
    a, b = (read_embeddings(Path(study) / "embeddings.h5ad").vectors["giga-ssl"] for study in (first, second))
    np.testing.assert_array_equal(a, b)
    assert main(["embed", *folders, folders[0], "--out", str(tmp_path / "3"), "--weights", first]) == 2
    assert "2 sources for 3 folders" in capsys.readouterr().err


def test_what_two_folders_cannot_be_is_said(tmp_path, capsys):
    folders = write_folders(tmp_path / "in")
    study = str(tmp_path / "s")
    assert main(["pretrain", *folders, *FAST]) == 2
    assert "name it: --out" in capsys.readouterr().err
    trident(tmp_path / "in" / "a", "nan", np.full((40, 24), np.nan, np.float32))
    trident(tmp_path / "in" / "b", "far", np.eye(40, 32, dtype=np.float32), IJ * 128)
    assert main(["pretrain", *folders, "--out", study, *FAST]) == 1
    said = capsys.readouterr().err
    assert "features are not finite" in said
    assert "should lie 512 apart and lie 128 apart" in said
    status = {row["slide_id"]: row["status"] for row in Study(study).slides()}
    assert (status["nan"], status["far"], status["s0"]) == ("failed", "failed", "encoded")
    assert main(["pretrain", folders[0], "--out", study, *FAST]) == 2
    assert "made from several folders of features" in capsys.readouterr().err
    assert main(["pretrain", *folders[::-1], "--out", study, *FAST]) == 2
    assert "made with other settings" in capsys.readouterr().err
    alone = str(tmp_path / "alone")
    assert main(["pretrain", folders[0], "--out", alone, *FAST]) == 1
    assert main(["pretrain", *folders, "--out", alone, *FAST]) == 2
    assert "made from slides or from one folder" in capsys.readouterr().err
    apart = [str(tmp_path / "apart" / name) for name in "ab"]
    for k, folder in enumerate(apart):
        for name in ("x", "y"):
            trident(Path(folder), f"{name}{k}")
    assert main(["pretrain", *apart, "--out", str(tmp_path / "t"), *FAST]) == 2
    assert "no slide is in two sources: 'x0' here, 'x1' there" in capsys.readouterr().err
