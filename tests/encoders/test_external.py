"""Anybody's tile encoders: small models that the tests make and save, and everything that is refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from histossl.core.errors import FileFormatError
from histossl.encoders.external import _mpp_of
from histossl.encoders.tile_encoder import load_encoder


def library(name: str):
    """An extra, or a skipped test: timm also fails with a RuntimeError where torchvision is of another build."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported: {str(error).splitlines()[0]}")


class Channels(nn.Module):
    """The mean of each channel, its square and the sides: what the transform did can be read off the features."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3))
        sides = torch.tensor([x.shape[2], x.shape[3]], dtype=x.dtype).expand(x.shape[0], 2)
        return torch.cat([mean, mean * mean, sides], dim=1)


def scripted(path: Path, model: nn.Module, **wants) -> str:
    torch.jit.save(torch.jit.script(model), path)
    if wants:
        path.with_suffix(".json").write_text(json.dumps(wants))
    return f"torchscript:{path}"


def test_torchscript_with_its_own_transform(tmp_path):
    name = scripted(tmp_path / "m.pt", Channels(), mean=[0.1, 0.2, 0.3], std=[0.5, 0.5, 0.25], side=32)
    encoder = load_encoder(name)
    assert encoder.dim == 8
    tiles = torch.tensor([0.6, 0.7, 0.8])[:, None, None].expand(4, 3, 48, 40)
    out = encoder(tiles)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[:, :3], torch.tensor([1.0, 1.0, 2.0]).expand(4, 3), atol=1e-4, rtol=1e-4)
    assert out[0, 6:].tolist() == [32, 32]


def test_without_a_side_tiles_stay_as_they_are(tmp_path):
    encoder = load_encoder(scripted(tmp_path / "m.pt", Channels()))
    assert encoder(torch.rand(2, 3, 48, 40))[0, 6:].tolist() == [48, 40]


def test_the_mpp_is_what_the_model_says_or_its_card(tmp_path):
    assert load_encoder(scripted(tmp_path / "m.pt", Channels(), mpp=0.25)).mpp == 0.25
    assert load_encoder(scripted(tmp_path / "n.pt", Channels())).mpp is None
    for wrong in (0, -1, "20x", True):
        with pytest.raises(FileFormatError, match="not a number of µm per pixel"):
            load_encoder(scripted(tmp_path / "m.pt", Channels(), mpp=wrong))
    assert {_mpp_of(name, None) for name in ("hf-hub:MahmoodLab/UNI", "owkin/phikon-v2")} == {0.5}
    assert _mpp_of("owkin/phikon-v2", 1) == 1.0
    assert _mpp_of("resnet18", None) is None


def test_resampling_is_antialiased(tmp_path):
    """A board of single black and white pixels is grey from afar."""

    class Deviation(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2).std(dim=2)

    encoder = load_encoder(scripted(tmp_path / "m.pt", Deviation(), mean=[0, 0, 0], std=[1, 1, 1], side=16))
    board = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).float().expand(1, 3, 64, 64)
    assert encoder(board).max() < 0.05


def test_the_identity_follows_weights_and_transform(tmp_path):
    def identity(folder: str, seed: int, side: int) -> dict[str, str]:
        torch.manual_seed(seed)
        (tmp_path / folder).mkdir()
        model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
        return load_encoder(scripted(tmp_path / folder / "m.pt", model, side=side)).identity

    one = identity("a", 0, 32)
    assert one == identity("b", 0, 32)  # wherever the file lies
    assert one != identity("c", 1, 32)
    assert one != identity("d", 0, 64)


@pytest.mark.parametrize("what", ["map", "tuple", "fixed"])
def test_models_that_give_no_vector_a_tile_are_refused(tmp_path, what):
    class Map(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, ::8, ::8]

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.mean(dim=(2, 3)), x

    model = {"map": Map(), "tuple": Pair(), "fixed": nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))}[what]
    with pytest.raises(FileFormatError, match=r"\(B, D\)"):
        load_encoder(scripted(tmp_path / "m.pt", model))


def test_what_cannot_be_loaded_is_one_line_with_a_way_out(tmp_path):
    (tmp_path / "text.pt").write_text("no model")
    for name in (f"torchscript:{tmp_path / 'text.pt'}", f"torchscript:{tmp_path / 'absent.pt'}"):
        with pytest.raises(FileFormatError, match="cannot be loaded") as caught:
            load_encoder(name)
        assert "\n" not in str(caught.value)
        assert "torch.jit.save" in str(caught.value)


@pytest.mark.parametrize(("kind", "extra"), [("timm", "timm"), ("hf", "transformers")])
def test_a_missing_library_is_named(monkeypatch, kind, extra):
    monkeypatch.setitem(__import__("sys").modules, extra, None)
    with pytest.raises(FileFormatError, match=rf"needs a library that is missing .*pip install {extra}"):
        load_encoder(f"{kind}:anything")


@pytest.mark.parametrize(("kind", "extra"), [("timm", "timm"), ("hf", "transformers")])
def test_a_library_that_is_broken_is_not_called_missing(tmp_path, monkeypatch, kind, extra):
    (tmp_path / f"{extra}.py").write_text("raise ImportError('Could not import module AutoModel')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, extra, raising=False)
    with pytest.raises(FileFormatError, match=rf"{extra} cannot be imported \(Could not .*torchvision of another"):
        load_encoder(f"{kind}:anything")


def test_a_vision_transformer_from_a_folder(tmp_path, monkeypatch):
    transformers = library("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    config.mpp = 0.5
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path / "vit")
    wants = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": {"height": 32, "width": 32}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(wants))
    encoder = load_encoder(f"hf:{tmp_path / 'vit'}", precision="float32")
    assert (encoder.dim, encoder.side, encoder.mpp) == (24, 32, 0.5)
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        normal = (x - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
        token = model(pixel_values=normal).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(x), token, atol=1e-4, rtol=1e-4)
    assert encoder(torch.rand(3, 3, 48, 40)).shape == (3, 24)
    with pytest.raises(FileFormatError, match="give the folder"):
        load_encoder(f"hf:{tmp_path / 'absent'}")


def test_a_convolutional_network_of_transformers(tmp_path):
    transformers = library("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    transformers.ResNetModel(config).save_pretrained(tmp_path / "net")
    encoder = load_encoder(f"hf:{tmp_path / 'net'}", precision="float32")
    assert encoder.mpp is None
    assert encoder(torch.rand(2, 3, 64, 48)).shape == (2, 16)


def test_a_model_of_timm_from_a_folder(tmp_path, monkeypatch):
    timm = library("timm")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = timm.create_model("test_resnet.r160_in1k", pretrained=False, num_classes=0).eval()
    from safetensors.torch import save_file

    (tmp_path / "net").mkdir()
    save_file(model.state_dict(), tmp_path / "net" / "model.safetensors")
    cfg = {"input_size": [3, 96, 96], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "num_classes": 0}
    about = {"architecture": "test_resnet", "num_features": model.num_features, "pretrained_cfg": cfg, "mpp": 0.25}
    (tmp_path / "net" / "config.json").write_text(json.dumps(about))
    encoder = load_encoder(f"timm:{tmp_path / 'net'}", precision="float32")
    assert (encoder.dim, encoder.side, encoder.mpp) == (model.num_features, 96, 0.25)
    x = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(x), model((x - 0.5) / 0.25), atol=1e-4, rtol=1e-4)
    with pytest.raises(FileFormatError, match="give the folder"):
        load_encoder("timm:no_such_model")
