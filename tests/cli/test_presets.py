"""The preset `paper` is the published method, and what is given beside a preset counts more."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from histossl.cli import study_commands
from histossl.cli.main import parse
from histossl.cli.presets import PAPER
from histossl.cli.study_commands import run
from histossl.core.errors import FileFormatError, SettingsError
from histossl.encoders.encode import EncodeSettings
from histossl.encoders.pretrain_tiles import TileTrainSettings
from histossl.encoders.resnet import ResNet18
from histossl.encoders.tile_encoder import fourth_stage
from histossl.execution.workers import Workers
from histossl.gigassl import pretrain
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.layers import Projector
from histossl.gigassl.pretrain import pretrain_slides
from histossl.gigassl.pretrain_settings import PretrainSettings, trained_as
from histossl.study.encode_stage import encoder_of
from histossl.study.folder import Study
from histossl.training.loop import Outcome, rate_at
from support.features import write_source


@pytest.fixture(scope="module")
def whole_resnet(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    torch.manual_seed(5)
    save_file(ResNet18(4).state_dict(), path)
    return path


def test_the_paper_s_numbers():
    schedule = PAPER.schedule(slides=1024)
    assert schedule.steps == 3000 * 4
    assert rate_at(39, schedule) == schedule.rate == 0.03  # the tenth epoch ends the rise
    assert rate_at(19, schedule) == pytest.approx(0.015)
    assert rate_at(40 + (12000 - 40) // 2, schedule) == pytest.approx(0.015)  # half way down the cosine
    assert schedule.weight_decay == 0
    assert PAPER.schedule(slides=64).rate == pytest.approx(0.03 * 64 / 256)
    assert PAPER.schedule(slides=300).rate == pytest.approx(0.03 * 150 / 256)  # two batches of even size
    assert (PAPER.batch, PAPER.temperature) == (256, 0.05)
    view = PAPER.view
    assert (view.tiles, view.windows, view.scale_min, view.scale_max, view.any_angle) == (5, 0, 0.5, 2.0, True)
    assert (view.share, view.dropout, view.noise) == (1, 0, 0)  # nothing that the paper does not have


def test_the_paper_s_network_is_resnet_18_s_fourth_stage_and_nothing_else():
    encoder, dense = SlideEncoder(PAPER.encoder), ResNet18(4).layer4
    count = {name: sum(p.numel() for p in net.parameters()) for name, net in (("ours", encoder), ("dense", dense))}
    assert count["ours"] == count["dense"] == 8_393_728
    assert PAPER.encoder.vector_dim == 512
    assert (encoder.settings.hard_border, encoder.settings.spacing) == (True, 1.0)
    sizes = [tuple(layer.weight.shape) for layer in Projector(512) if isinstance(layer, torch.nn.Linear)]
    assert sizes == [(512, 512), (512, 512), (256, 512)]


def test_the_command_line_takes_a_preset_and_what_is_given_beside_it():
    words = ["SLIDES", "--out=S", "--preset=paper", "--pretrain.view.tiles=7", "--embed.views=20"]
    found = parse("run", run, words)
    assert found["pretrain"] == replace(PAPER, view=replace(PAPER.view, tiles=7))
    assert found["encode"] == EncodeSettings(views=50, tiles=256, window=1)
    assert found["embed"].views == 20
    assert (found["tile"].px, found["tile"].mpp) == (224, 1.0)
    assert parse("pretrain", study_commands.pretrain_command, ["S", "--preset", "paper"])["pretrain"] == PAPER
    assert parse("pretrain", study_commands.pretrain_command, ["S"])["pretrain"] == PretrainSettings()


def test_a_preset_may_stand_in_a_file(tmp_path):
    (tmp_path / "c.yaml").write_text("preset: paper\npretrain:\n  epochs: 12\n")
    found = parse("pretrain", study_commands.pretrain_command, ["S", f"--config={tmp_path / 'c.yaml'}"])
    assert found["pretrain"] == replace(PAPER, epochs=12)
    with pytest.raises((SettingsError, SystemExit)):
        parse("pretrain", study_commands.pretrain_command, ["S", "--preset=papers"])


def test_encoding_keeps_the_fourth_stage_in_the_study(tmp_path, whole_resnet):
    study = Study(tmp_path / "study")
    with Workers(1) as pool:
        encoder_of(study, str(whole_resnet), TileTrainSettings(), EncodeSettings(precision="float32"), pool, "cpu")
        kept, whole = load_file(study.fourth_stage), load_file(whole_resnet)
        assert kept.keys() == {name for name in whole if name.startswith("layer4.")}
        assert all(torch.equal(value, whole[name]) for name, value in kept.items())
        encoder_of(study, "random", TileTrainSettings(), EncodeSettings(precision="float32"), pool, "cpu")
    assert not study.fourth_stage.exists()


def test_training_under_it_starts_from_the_dense_stage_and_runs(tmp_path, whole_resnet):
    rng = np.random.default_rng(0)
    sources = [write_source(tmp_path, f"s{k}", rng, dim=256) for k in range(4)]
    short = replace(PAPER, epochs=2, rate=1e-12, precision="float32")
    pretrain_slides(sources, short, tmp_path / "enc", tmp_path / "logs", "f", "cpu", whole_resnet)
    encoder = SlideEncoder.load(tmp_path / "enc")
    kernel = fourth_stage(str(whole_resnet))["layer4.1.conv2.weight"]
    learned = encoder.stage.blocks[1].conv2.weight.reshape(3, 3, 512, 512).permute(3, 2, 0, 1)
    torch.testing.assert_close(learned, kernel, atol=1e-6, rtol=0)
    with (tmp_path / "logs" / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]
    assert trained_as(tmp_path / "enc")["pretrain"]["start"] == "tile-encoder"


def test_what_it_starts_from_is_part_of_its_key(tmp_path, whole_resnet, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "fit", lambda *_, **__: Outcome(1, 1, 1))
    rng = np.random.default_rng(0)
    sources = [write_source(tmp_path, f"s{k}", rng, dim=16) for k in range(2)]
    keys = {}
    for start, given in (("random", None), ("tile-encoder", None), ("tile-encoder", whole_resnet)):
        short = replace(PAPER, epochs=1, start=start, precision="float32")
        pretrain_slides(sources, short, tmp_path / f"e{len(keys)}", tmp_path / f"l{len(keys)}", "f", "cpu", given)
        keys[start, given] = trained_as(tmp_path / f"e{len(keys)}")["fingerprint"]
    assert len(set(keys.values())) == 3
    assert "begins at random" in capsys.readouterr().err
    cut = tmp_path / "cut.safetensors"
    save_file(ResNet18(3).state_dict(), cut)
    assert fourth_stage(str(cut)) == fourth_stage("random") == fourth_stage("timm:anything") == {}
    with pytest.raises(FileFormatError, match="layer4"):
        pretrain_slides(sources, replace(PAPER, start=str(cut)), tmp_path / "e", tmp_path / "l", "f", "cpu")
    other = replace(PAPER, start=str(whole_resnet), encoder=replace(PAPER.encoder, arch="mlp"))
    with pytest.raises(SettingsError, match="only a sparse encoder"):
        pretrain_slides(sources, other, tmp_path / "e", tmp_path / "l", "f", "cpu")
