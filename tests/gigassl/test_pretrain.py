"""Slide-level self-supervision on features with a known truth."""

from __future__ import annotations

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from histossl.core.errors import FileFormatError, SettingsError, TrainingError
from histossl.gigassl import pretrain_task
from histossl.gigassl.embed import EmbedSettings, embed_slide, mean_pool
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.encoder_settings import EncoderSettings
from histossl.gigassl.gauges import effective_rank, gauges
from histossl.gigassl.pretrain import pretrain_slides
from histossl.gigassl.pretrain_settings import PretrainSettings, trained_as
from histossl.gigassl.slide_sources import SlideSource, plain_tiles
from histossl.gigassl.views import ViewSettings
from support.features import SMALL, write_source


@pytest.fixture
def sources(tmp_path) -> list[SlideSource]:
    rng = np.random.default_rng(0)
    return [write_source(tmp_path / "in", f"s{k}", rng) for k in range(12)] if (tmp_path / "in").mkdir() is None else []


def test_slides_are_told_apart(sources, tmp_path):
    pretrain_slides(sources, SMALL, tmp_path / "enc", tmp_path / "logs", "f", "cpu")
    with (tmp_path / "logs" / "log.csv").open() as file:
        log = list(csv.DictReader(file))
    assert float(log[-1]["matched"]) > 0.9
    assert float(log[-1]["loss"]) < 0.5 * float(log[0]["loss"])
    assert float(log[-1]["spread"]) > 0.5
    about = trained_as(tmp_path / "enc")
    assert about["slides"] == [f"s{k}" for k in range(12)]
    assert about["features"] == "f"
    encoder = SlideEncoder.load(tmp_path / "enc")
    assert encoder.settings.in_dim == 32
    assert not (tmp_path / "logs" / "checkpoint.pt").exists()


def test_the_same_seed_gives_the_same_bytes(sources, tmp_path):
    short = replace(SMALL, epochs=3)
    for name, settings in (("a", short), ("b", short), ("c", replace(short, seed=1))):
        pretrain_slides(sources, settings, tmp_path / name, tmp_path / f"logs-{name}", "f", "cpu")
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_every_slide_comes_once_an_epoch_in_views_of_two_augmentations(sources, monkeypatch):
    seen: list[tuple[str, int]] = []
    load = SlideSource.load

    def watched(self):
        features, positions = load(self)
        marked = np.array(features)
        marked[:, :, 0] = np.arange(len(marked))[:, None]
        marked[:, :, 1] = int(self.slide_id[1:])
        return marked, positions

    monkeypatch.setattr(SlideSource, "load", watched)
    settings = replace(SMALL, batch=5)
    for step in range(3):
        ((features, positions, views, size),), _ = pretrain_task.draw_batch(step, 3, sources, settings)
        pairs = size // 2
        assert len(features) == size * 24
        for k in range(pairs):
            one, two = (np.unique(features[views == v][:, :2].numpy(), axis=0) for v in (k, k + pairs))
            assert len(one) == len(two) == 1  # a view has one augmentation and one slide
            assert one[0, 1] == two[0, 1]
            assert one[0, 0] != two[0, 0]
            seen.append((f"s{int(one[0, 1])}", step))
        assert positions.dtype == np.float32
    assert sorted(name for name, _ in seen) == sorted(source.slide_id for source in sources)


def test_without_views_plain_features_serve(tmp_path):
    rng = np.random.default_rng(0)
    sources = [write_source(tmp_path, f"s{k}", rng, views=0) for k in range(4)]
    features, positions = sources[0].load()
    assert features.shape == (1, 60, 32)
    np.testing.assert_array_equal(positions[0][:3], [[0, 0], [0, 1], [0, 2]])
    pretrain_slides(sources, replace(SMALL, epochs=2), tmp_path / "enc", tmp_path / "logs", "f", "cpu")
    assert (tmp_path / "enc" / "model.safetensors").exists()


def test_in_16_bits_it_learns_the_same(sources, tmp_path):
    logs = {}
    for precision in ("float32", "bfloat16"):
        folder = tmp_path / precision
        pretrain_slides(sources, replace(SMALL, epochs=3, precision=precision), folder / "e", folder / "l", "f", "cpu")
        with (folder / "l" / "log.csv").open() as file:
            logs[precision] = [float(row["loss"]) for row in csv.DictReader(file)]
    assert logs["float32"] != logs["bfloat16"]
    assert logs["float32"] == pytest.approx(logs["bfloat16"], rel=0.03)
    weights = load_file(tmp_path / "bfloat16" / "e" / "model.safetensors")
    assert weights["stage.blocks.0.conv1.weight"].dtype == torch.float32


def test_what_cannot_be_learned_from_is_said(sources, tmp_path):
    with pytest.raises(TrainingError, match=r"1 slide to learn from \(s0\); give two or more"):
        pretrain_slides(sources[:1], SMALL, tmp_path / "e", tmp_path / "l", "f", "cpu")
    odd = write_source(tmp_path, "odd", np.random.default_rng(1), dim=48)
    with pytest.raises(FileFormatError, match="odd: features of 48"):
        pretrain_slides([*sources, odd], SMALL, tmp_path / "e", tmp_path / "l", "f", "cpu")
    np.save(sources[3].views / "coords.npy", np.zeros((4, 59, 2), np.int32))
    with pytest.raises(FileFormatError, match="s3"):
        pretrain_slides(sources, SMALL, tmp_path / "e", tmp_path / "l", "f", "cpu")
    with pytest.raises(SettingsError, match="epochs"):
        PretrainSettings(epochs=0)
    with pytest.raises(SettingsError, match="keep last or best"):
        PretrainSettings(keep="first")
    with pytest.raises(FileFormatError, match="pretrain first"):
        trained_as(tmp_path / "nothing")


def test_a_vector_has_length_one_and_depends_on_its_slide_alone(sources):
    encoder = SlideEncoder(EncoderSettings(in_dim=32), seed=0).eval()
    features, positions = plain_tiles(sources[0].features)
    settings, view = EmbedSettings(views=8), ViewSettings(tiles=16)
    one, two = (embed_slide(encoder, features, positions, view, settings, "s0") for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert np.linalg.norm(one) == pytest.approx(1, rel=1e-5)
    other = embed_slide(encoder, features, positions, view, settings, "s1")
    assert not np.array_equal(one, other)  # its views are its own
    assert one @ other > 0.95  # but show the same slide


def test_all_tiles_in_one_view_equal_the_encoder(sources):
    encoder = SlideEncoder(EncoderSettings(in_dim=32, prototypes=0), seed=0).eval()
    features, positions = plain_tiles(sources[0].features)
    vector = embed_slide(encoder, features, positions, ViewSettings(tiles=10_000, windows=0), EmbedSettings(), "s0")
    with torch.inference_mode():
        direct = encoder(torch.from_numpy(features), positions, np.zeros(60, np.int64), 1)[0]
    np.testing.assert_allclose(vector, torch.nn.functional.normalize(direct, dim=0).numpy(), atol=1e-6)
    np.testing.assert_allclose(mean_pool(features), features.mean(0), rtol=1e-5)


def test_the_effective_rank_counts_the_directions_in_which_vectors_differ():
    generator = torch.Generator().manual_seed(0)
    even = torch.linalg.qr(torch.randn(64, 8, generator=generator))[0]
    even = torch.linalg.qr(even - even.mean(0))[0]  # eight directions of equal weight, about a mean of zero
    assert effective_rank(even) == pytest.approx(8, rel=1e-3)
    assert effective_rank(3 * even + 5) == pytest.approx(8, rel=1e-3)  # neither length nor place matters
    weights = torch.tensor([3.0, 1.0])  # shares 3/4 and 1/4
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(even[:, :2] * weights) == pytest.approx(math.exp(entropy), rel=1e-3)
    line = torch.arange(9.0)[:, None] * torch.ones(1, 5)
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.ones(9, 5)) == 0


def test_a_batch_larger_than_the_cohort_is_the_cohort(sources):
    ((_, _, _, size),), pairs = pretrain_task.draw_batch(0, 1, sources, replace(SMALL, batch=256))
    assert (size, pairs) == (24, 12)
    assert replace(SMALL, batch=256).schedule(12).steps == SMALL.epochs


def test_gauges_tell_collapse_from_health():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(400, 64, generator=generator)
    healthy, collapsed = gauges(z, z + 0.01), gauges(torch.ones(400, 64), torch.ones(400, 64))
    assert healthy["spread"] == pytest.approx(1, abs=0.02)
    assert healthy["matched"] == 1
    assert healthy["uniformity"] < -3.5
    assert collapsed["spread"] < 1e-3
    assert collapsed["uniformity"] == pytest.approx(0, abs=1e-4)
    shuffled = gauges(z, torch.randn(400, 64, generator=generator))
    assert shuffled["matched"] < 0.05
    assert shuffled["alignment"] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("processes", [1, 3])
def test_sites_come_in_the_order_in_which_pairs_are_gathered(sources, monkeypatch, processes):
    sites, settings = [f"site {k % 4}" for k in range(12)], replace(SMALL, batch=6)
    drawn: list[list[int]] = []

    def draw(epoch, slides, shown, settings):
        drawn.append([int(k) for k in slides])
        return ()

    for step in (0, 1, 2):
        drawn.clear()
        for rank in range(processes):
            monkeypatch.setattr(pretrain_task, "rank_and_world_size", lambda rank=rank: (rank, processes))
            pretrain_task.draw_batch(step, 2, sources, settings, draw)
            (found,) = pretrain_task.sites_of_step(sites, step, 2, settings)
        assert found.tolist() == [k % 4 for slides in drawn for k in slides]
    assert pretrain_task.sites_of_step([], 0, 2, settings) == ()


def test_the_arch_without_a_contrast_has_no_negatives():
    with pytest.raises(SettingsError, match="the arch neighbours contrasts no slides"):
        PretrainSettings(negatives="site")
    with pytest.raises(SettingsError, match="negatives"):
        replace(SMALL, negatives="sites")
