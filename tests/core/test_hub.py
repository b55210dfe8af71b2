"""Models by name: what is pushed comes back the same, from a hub on this machine; without a network an error says so."""

import shutil

import numpy as np
import pytest
import torch

from histossl.cli.model_commands import export
from histossl.core.errors import FileFormatError
from histossl.core.hub import model_folder, push
from histossl.encoders.resnet import ResNet18
from histossl.encoders.tile_encoder import fourth_stage, load_encoder, save_encoder
from support.hub import local_hub

pytest.importorskip("huggingface_hub", reason="needs histossl[hub]")
SETTINGS = {"tile": {"px": 32, "mpp": 1.0}, "fingerprint": "f", "slides": []}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with local_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


def test_an_encoder_is_pushed_and_taken_by_name(hub, tmp_path):
    save_encoder(ResNet18(4).eval(), tmp_path / "study" / "tile-encoder", SETTINGS)
    assert export(tmp_path / "study", tmp_path / "out", what="tile-encoder", to="group/encoder") == 0
    assert hub.private == {"group/encoder": True}
    assert set(hub.repos["group/encoder"]) >= {"model.safetensors", "config.json", "README.md"}
    here, there = (load_encoder(name, precision="float32") for name in (tmp_path / "out", "hf:group/encoder"))
    assert here.identity == there.identity
    assert there.mpp == 1.0
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(here(x), there(x))
    assert len(fourth_stage("hf:group/encoder")) == len(fourth_stage(str(tmp_path / "out"))) > 0
    # Also as a folder behind `hf:`, which is else one of transformers.
    assert load_encoder(f"hf:{tmp_path / 'out'}", precision="float32").identity == here.identity


def test_a_folder_comes_back_and_stays_without_the_network(hub, tmp_path, monkeypatch):
    model = tmp_path / "model"
    for name, text in {
        "probe/config.json": "{}",
        "slide-encoder/model.safetensors": "abc",
        "run.py": "1",
        "a.pkl": "p",
    }.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(text)
    push(model, "hf:group/model")
    found = model_folder("hf:group/model")
    assert (found / "probe" / "config.json").read_text() == "{}"
    assert (found / "slide-encoder" / "model.safetensors").read_text() == "abc"
    assert not (found / "run.py").exists()  # neither programs nor pickles are fetched
    assert not (found / "a.pkl").exists()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert model_folder("hf:group/model") == found
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(FileFormatError, match=r"hf:group/model: cannot be had from Hugging Face .*without network"):
        model_folder("hf:group/model")
    with pytest.raises(
        FileFormatError, match=r"group/model: cannot be put on Hugging Face .*is whole: upload it later"
    ):
        push(model, "group/model")


def test_what_is_not_there_is_named(hub, tmp_path):
    with pytest.raises(FileFormatError, match="hf:group/none: cannot be had"):
        model_folder("hf:group/none")
    with pytest.raises(FileFormatError, match="cannot be had"):
        model_folder("hf:not a name")
    assert model_folder(tmp_path) == tmp_path
    assert hub.asked
