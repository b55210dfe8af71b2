"""Tile-level self-supervision: its augmentation, its queue, its batches, and what it learns."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import ndimage

from histossl.cli.main import main
from histossl.core import hdf5
from histossl.core.errors import FileFormatError, SettingsError, TrainingError
from histossl.encoders.augment import TileAugmentSettings, augment_each, draw_tile_augmentations, view_side
from histossl.encoders.moco import MocoSettings, MocoTask
from histossl.encoders.pretrain_tiles import TileTrainSettings, pretrain_tiles
from histossl.encoders.tile_encoder import load_encoder
from histossl.encoders.tile_stream import TileSource, TileStream, tiles_trained_on
from histossl.execution.workers import Workers
from histossl.study.survey import SurveyJob, survey_slide
from histossl.wsi.geometry import Region
from histossl.wsi.slide import open_slide
from histossl.wsi.synth import SynthSettings, write_slide
from histossl.wsi.tiles import TileSpec
from histossl.wsi.tissue import TissueSettings

SPEC = TileSpec(px=48, mpp=1.3)
SMALL = MocoSettings(steps=4, batch=6, slides=2, queue=16, projection=8, precision="float32")
CALM = TileAugmentSettings(view=24, zoom=1, stain=0, tint=0, jitter=0, grayscale=0, blur=0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[TileSource]:
    folder = tmp_path_factory.mktemp("moco")
    found = []
    for k, (width, height) in enumerate([(448, 384), (256, 320), (320, 448)]):
        path, tiles = folder / f"s{k}.tiff", folder / f"tiles{k}.h5"
        write_slide(path, SynthSettings(width=width, height=height, seed=k))
        job = SurveyJob(f"s{k}", path, None, None, TissueSettings(), SPEC, tiles, folder / f"qc{k}.jpg")
        found.append(TileSource(f"s{k}", path, survey_slide(job).mpp, SPEC, tiles))
    return found


def test_views_are_crops_turned_by_right_angles_and_mirrored():
    """Without change of colour or scale a view is one of the eight symmetries of a square cut from its tile."""
    tile = torch.randint(0, 256, (1, 40, 40, 3), dtype=torch.uint8)
    seen = set()
    for seed in range(40):
        drawn = draw_tile_augmentations(CALM, 1, 40, np.random.default_rng(seed))
        # Whole pixels: the crop is moved to the nearest pixel's corner, so that the grid meets pixel centres.
        corner = np.rint((drawn[0, [2, 5]] + 1) * 20 - 12)
        drawn[0, [2, 5]] = (corner + 12) / 20 - 1
        view = augment_each(tile, torch.from_numpy(drawn), 24)[0]
        x, y = corner.astype(int)
        cut = tile[0, y : y + 24, x : x + 24].permute(2, 0, 1) / 255
        forms = {(k, m): torch.rot90(cut.flip(2) if m else cut, k, (1, 2)) for k in range(4) for m in range(2)}
        matching = [form for form, there in forms.items() if torch.allclose(view, there, atol=1e-3)]
        assert len(matching) == 1
        seen.add(matching[0])
    assert len(seen) == 8


def test_each_tile_has_its_own_augmentation():
    tiles = torch.randint(0, 256, (5, 36, 36, 3), dtype=torch.uint8)
    drawn = torch.from_numpy(draw_tile_augmentations(TileAugmentSettings(), 5, 36, np.random.default_rng(0)))
    side = view_side(TileAugmentSettings(), 36)
    assert side == 27
    together = augment_each(tiles, drawn, side)
    assert together.shape == (5, 3, 27, 27)
    assert together.is_contiguous(memory_format=torch.channels_last)
    for k in range(5):
        torch.testing.assert_close(together[k], augment_each(tiles[k : k + 1], drawn[k : k + 1], side)[0])
    assert len({row.tobytes() for row in drawn.numpy()}) == 5


def test_stain_jitter_scales_the_amount_of_stain_and_leaves_glass_alone():
    """A tile of pure hematoxylin stays of its hue, at another density; white stays white."""
    amounts = np.array([0.0, 0.3, 0.8, 1.2])
    pixels = 256 * np.exp(-amounts[:, None] * np.array([0.65, 0.70, 0.29])) - 1
    tile = torch.from_numpy(
        np.rint(np.broadcast_to(pixels[:, None], (4, 4, 3))).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    )
    drawn = draw_tile_augmentations(replace(CALM, stain=0.5), 64, 32, np.random.default_rng(1))
    drawn[:, :6] = [1, 0, 0, 0, 1, 0]
    views = augment_each(tile.expand(64, -1, -1, -1), torch.from_numpy(drawn), 32)
    od = -torch.log((views * 255 + 1) / 256)[:, :, 4::8, 4]
    assert od[:, :, 0].abs().max() < 0.01
    factors = od[:, :, 2] / torch.tensor([0.65, 0.70, 0.29]) / 0.8
    torch.testing.assert_close(factors, factors.mean(1, keepdim=True).expand(-1, 3), atol=0.03, rtol=0)
    torch.testing.assert_close(od[:, :, 3] / od[:, :, 2], torch.full((64, 3), 1.5), atol=0.06, rtol=0)
    assert 0.5 < factors.min() < 0.6
    assert 1.4 < factors.max() < 1.52


def test_the_queue_holds_the_latest_keys_and_empty_places_do_not_count():
    task = MocoTask(SMALL).train()
    rng = np.random.default_rng(0)
    tiles = torch.randint(0, 256, (6, 48, 48, 3), dtype=torch.uint8)
    a, b = (draw_tile_augmentations(SMALL.augment, 6, 48, rng) for _ in range(2))
    kept = []
    for k in range(4):
        before = task.queue.clone()
        loss, _ = task((tiles, a, b))
        kept.append(task.queue[:6].clone())
        torch.testing.assert_close(task.queue[6:], before[:10])
        assert task.filled == min(16, 6 * (k + 1))
    torch.testing.assert_close(task.queue, torch.cat([*reversed(kept)])[:16])
    torch.testing.assert_close(task.queue.norm(dim=1), torch.ones(16))
    loss.backward()
    assert all(p.grad is None for p in task.key.parameters())
    assert all(p.grad is not None for p in task.query.parameters())


def test_the_loss_is_the_paper_s():
    """A loop over queries: -log of the positive's share among the positive, the other keys and the queue."""
    task = MocoTask(SMALL).eval()
    task.filled = 10
    tiles = torch.randint(0, 256, (6, 48, 48, 3), dtype=torch.uint8)
    a, b = (draw_tile_augmentations(SMALL.augment, 6, 48, np.random.default_rng(k)) for k in range(2))
    with torch.no_grad():
        loss, gauges = task((tiles, a, b))
        from histossl.encoders.moco import normalised

        one, other = (normalised(augment_each(tiles, torch.from_numpy(t), 36)) for t in (a, b))
        queries, keys = (torch.nn.functional.normalize(n(x), dim=1) for n, x in ((task.query, one), (task.key, other)))
    candidates, total = [*keys, *task.queue[:10]], 0.0
    for i, query in enumerate(queries):
        shares = [float(torch.exp(query @ c / SMALL.temperature)) for c in candidates]
        total -= np.log(shares[i] / sum(shares))
    assert float(loss) == pytest.approx(total / 6, rel=1e-4)
    assert 0 <= float(gauges["matched"]) <= 1


def test_the_momentum_encoder_follows_and_uses_running_averages():
    task = MocoTask(replace(SMALL, momentum=0.5)).train()
    assert not any(module.training for module in task.key.modules())
    task.seen = 100
    with torch.no_grad():
        for p in task.query.parameters():
            p.add_(1)
        task.query[0].bn1.running_mean.add_(4)
    before = {n: v.clone() for n, v in task.key.state_dict().items()}
    task._update_momentum_encoder()
    for name, value in task.key.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (before[name] + task.query.state_dict()[name]) / 2)


def test_batches_are_the_tiles_that_lie_there_from_all_slides_alike(sources):
    settings = replace(SMALL, steps=40)
    with Workers(1) as workers:
        stream = TileStream(sources, settings.plan(), workers)
        batches = [stream(step) for step in (0, 1, 2)]
        again = TileStream(sources, settings.plan(), workers)(2)
    assert torch.equal(batches[2], again)
    for step, tiles in enumerate(batches):
        expected = []
        for job in stream.jobs(step):
            with open_slide(job.path) as slide:
                expected += [slide.read(Region(float(x), float(y), job.extent, job.extent), 1.3) for x, y in job.xy]
        np.testing.assert_array_equal(tiles, np.stack(expected))
    drawn = [job for step in range(30) for job in stream.jobs(step)]
    assert [sum(len(job.xy) for job in drawn if job.slide == k) for k in range(3)] == [60, 60, 60]
    assert all({(x, y) for x, y in job.xy} <= {(x, y) for x, y in stream.tiles[job.slide].xy} for job in drawn)


def train(sources: list[TileSource], folder: Path, moco: MocoSettings = SMALL) -> dict[str, str]:
    settings = TileTrainSettings("moco", moco=moco)
    with Workers(1) as workers:
        return pretrain_tiles(sources, settings, folder / "encoder", folder / "logs", workers, "cpu")


def test_a_training_that_was_stopped_ends_with_the_same_bytes(sources, tmp_path, monkeypatch):
    assert train(sources, tmp_path / "one") == {}
    call = TileStream.__call__

    def killed(self: TileStream, step: int):
        if step == 3:
            raise KeyboardInterrupt
        return call(self, step)

    monkeypatch.setattr(TileStream, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        train(sources, tmp_path / "two")
    assert not (tmp_path / "two" / "encoder").exists()
    monkeypatch.setattr(TileStream, "__call__", call)
    train(sources, tmp_path / "two")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one/encoder" / name).read_bytes() == (tmp_path / "two/encoder" / name).read_bytes()
    encoder = load_encoder(str(tmp_path / "one/encoder"), precision="float32")
    assert encoder.dim == 256
    assert encoder(torch.rand(2, 3, 48, 40)).shape == (2, 256)
    assert load_file(tmp_path / "one/encoder/model.safetensors")["bn1.running_mean"].abs().max() > 0


def test_a_slide_that_cannot_be_read_is_left_out_and_named(sources, tmp_path):
    broken = tmp_path / "broken.tiff"
    broken.write_bytes(sources[0].path.read_bytes()[:3000])
    bad = replace(sources[0], slide_id="bad", path=broken)
    assert set(train([bad, *sources[1:]], tmp_path)) == {"bad"}
    with pytest.raises(TrainingError, match=r"broken\.tiff"):
        train([bad], tmp_path / "none")


def test_it_learns_to_tell_tiles_apart():
    """Chance is one in twelve; every step shows other crops of the same twelve textures."""
    rng = np.random.default_rng(0)
    noise = [ndimage.gaussian_filter(rng.normal(size=(48, 48, 3)), (1 + 0.4 * k, 1 + 0.4 * k, 0)) for k in range(12)]
    tiles = torch.from_numpy(np.stack([255 * (x - x.min()) / np.ptp(x) for x in noise]).astype(np.uint8))
    task = MocoTask(MocoSettings(batch=12, queue=24, projection=16, momentum=0.9, augment=CALM)).train()
    adam = torch.optim.AdamW(task.query.parameters(), lr=1e-3)
    matched = []
    for _ in range(40):
        loss, gauges = task((tiles, *(draw_tile_augmentations(CALM, 12, 48, rng) for _ in range(2))))
        loss.backward()
        adam.step()
        adam.zero_grad()
        matched.append(float(gauges["matched"]))
        assert gauges["spread"] > 0.3
    assert np.mean(matched[-8:]) > 0.25


def test_settings_out_of_range_are_refused():
    for wrong in ({"steps": 0}, {"batch": 1}, {"temperature": 0.0}, {"momentum": 1.0}, {"rate": 0.0}):
        with pytest.raises(SettingsError):
            MocoSettings(**wrong)
    with pytest.raises(SettingsError):
        TileAugmentSettings(view=4)


FAST = ["--tile.px=48", "--tile.mpp=1.3", "--workers=1", "--device=cpu", "--tile-encoder.method=moco"]
FAST += ["--tile-encoder.moco.steps=2", "--tile-encoder.moco.batch=6", "--tile-encoder.moco.queue=8"]


def test_slides_in_an_encoder_out_and_a_study_uses_its_own(sources, tmp_path, capsys):
    slides = tmp_path / "slides"
    slides.mkdir()
    for source in sources:
        shutil.copy(source.path, slides)
    assert main(["encoder", "pretrain", str(slides), "-o", str(tmp_path / "tile-encoder"), *FAST]) == 0
    weights = (tmp_path / "tile-encoder" / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "tile-encoder" / "config.json").read_text())["slides"] == ["s0", "s1", "s2"]

    study = tmp_path / "study"
    assert main(["inspect", str(slides), "--out", str(study), *FAST[:3]]) == 0
    encode = ["encode", str(study), "--encoder=self", "--encode.views=0", *FAST[2:]]
    assert main(encode) == 0
    assert (study / "tile-encoder" / "model.safetensors").read_bytes() == weights
    features = (study / "features" / "s0.h5").read_bytes()
    assert hdf5.read_features(study / "features" / "s0.h5").shape[1] == 256
    assert main(encode) == 0
    assert (study / "features" / "s0.h5").read_bytes() == features
    assert main([*encode, "--tile-encoder.moco.steps=3"]) == 2
    assert "tile-encoder: moco.steps: 2 -> 3" in capsys.readouterr().err
    shutil.rmtree(study / "features")
    other = ["encode", str(study), f"--encoder={tmp_path / 'tile-encoder'}", "--encode.views=0", *FAST[2:4]]
    assert main(other) == 0
    assert (study / "features" / "s0.h5").read_bytes() == features
    (study / "tile-encoder" / "config.json").unlink()
    with pytest.raises(FileFormatError):
        tiles_trained_on(study / "tile-encoder")
