"""The tile encoder: its layers, its weights from files, and what it refuses."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

from histossl.core.errors import FileFormatError, SettingsError
from histossl.encoders.resnet import ResNet18, fold_batch_norms, state_of
from histossl.encoders.tile_encoder import load_encoder
from histossl.training.device import pick_device, pick_dtype


def random_net(stages: int = 4) -> ResNet18:
    torch.manual_seed(1)
    net = ResNet18(stages)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return net.eval()


def test_the_cut_network_is_the_start_of_the_whole():
    whole, cut = random_net(), ResNet18(3).eval()
    cut.load_state_dict({n: v for n, v in whole.state_dict().items() if not n.startswith("layer4")})
    x = torch.rand(2, 3, 64, 96)
    maps = []
    whole.layer3.register_forward_hook(lambda _m, _i, out: maps.append(out))
    with torch.inference_mode():
        whole(x)
        torch.testing.assert_close(cut(x), maps[0].mean(dim=(2, 3)))
    assert cut(x).shape == (2, 256)
    assert maps[0].shape == (2, 256, 4, 6)


def test_parameters_are_as_many_as_in_the_published_network():
    assert sum(p.numel() for p in ResNet18(4).parameters()) == 11_689_512 - 513_000  # without the classifier


def test_folding_batch_norms_changes_nothing():
    net, x = random_net(3), torch.rand(2, 3, 40, 56)
    with torch.inference_mode():
        before = net(x)
        after = fold_batch_norms(net)(x)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def weights_of(net: ResNet18, kind: str) -> dict:
    state = dict(net.state_dict()) | {"fc.weight": torch.rand(10, 512), "fc.bias": torch.rand(10)}
    if kind == "moco":
        query = {f"module.encoder_q.{n}": v for n, v in state.items()}
        key = {f"module.encoder_k.{n}": torch.zeros_like(v) for n, v in state.items()}
        return {"epoch": 3, "arch": "resnet18", "state_dict": {**query, **key, "module.queue": torch.rand(4, 4)}}
    return state


@pytest.mark.parametrize("kind", ["torchvision", "moco", "safetensors"])
def test_weights_load_from_every_layout(tmp_path, kind):
    net = random_net()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    weights = weights_of(net, kind)
    save_file(weights, path) if kind == "safetensors" else torch.save(weights, path)
    if kind != "safetensors":
        with pytest.raises(FileFormatError, match=r"is a pickle.*pickle:.*w\.pth"):
            load_encoder(str(path))
        path = f"pickle:{path}"
    encoder = load_encoder(str(path), precision="float32")
    cut = ResNet18(3).eval()
    cut.load_state_dict({n: v for n, v in state_of(weights).items() if not n.startswith("layer4")})
    x = torch.rand(2, 3, 48, 64)
    mean, std = (torch.tensor(v)[:, None, None] for v in (encoder.mean, encoder.std))
    with torch.inference_mode():
        torch.testing.assert_close(encoder(x), cut((x - mean) / std), atol=1e-4, rtol=1e-4)


def test_bfloat16_moves_features_by_less_than_a_hundredth():
    x = torch.rand(4, 3, 64, 64)
    exact = load_encoder("random", seed=2, precision="float32")(x)
    fast = load_encoder("random", seed=2, precision="bfloat16")(x)
    assert (1 - torch.cosine_similarity(exact, fast)).max() < 1e-2


def test_random_is_seeded_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    x = torch.rand(1, 3, 64, 64)
    torch.set_rng_state(state)
    one, two, other = (load_encoder("random", seed=s, precision="float32") for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one(x), two(x))
    assert not torch.allclose(one(x), other(x))
    assert one.identity != other.identity


def test_other_architectures_are_refused(tmp_path):
    wide = {n: torch.rand(*v.shape, 2) for n, v in ResNet18(3).state_dict().items()}
    torch.save(wide, tmp_path / "wide.pth")
    with pytest.raises(FileFormatError, match="not the weights of a ResNet-18"):
        load_encoder(f"pickle:{tmp_path / 'wide.pth'}")
    torch.save({"patch_embed.weight": torch.rand(3)}, tmp_path / "vit.pth")
    with pytest.raises(FileFormatError, match=r"conv1\.weight is missing"):
        load_encoder(f"pickle:{tmp_path / 'vit.pth'}")


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickles_truncated_and_absent_files_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    with path.open("wb") as file:
        pickle.dump(Bomb(tmp_path / "crater"), file, protocol=2)
    with pytest.raises(FileFormatError, match="is a pickle"):
        load_encoder(str(path))
    with pytest.raises(FileFormatError, match="holds pickled objects"):
        load_encoder(f"pickle:{path}")
    assert not (tmp_path / "crater").exists()
    torch.save(ResNet18(3).state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(FileFormatError, match="truncated or not a weight file"):
        load_encoder(f"pickle:{path}")
    with pytest.raises(FileFormatError, match="no tile encoder"):
        load_encoder(str(tmp_path / "absent.pth"))


def test_devices_and_precisions_are_checked():
    with pytest.raises(SettingsError, match="unknown device"):
        pick_device("tpu9")
    with pytest.raises(SettingsError, match="precision"):
        pick_dtype("float8", torch.device("cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match="no GPU"):
            pick_device("cuda")
