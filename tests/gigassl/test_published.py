"""Published slide encoders: against their layers written out in numpy, site by site; nothing in a file is executed."""

from __future__ import annotations

import os
import pickle
import sys
import types
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from histossl.cli.main import main
from histossl.core.embeddings import read_embeddings
from histossl.core.errors import FileFormatError
from histossl.gigassl.published import load_published, read_state

IN, OUT = 6, 10
PREFIX = "backbone.mil.net.mil_model.sparse_pooling.0"


def made_up_state(seed: int = 0, width: int = IN) -> dict[str, torch.Tensor]:
    """Random weights under the names and in the layout of the published checkpoints, and others that are not wanted."""
    rng = np.random.default_rng(seed)
    state = {}
    for block, inputs in ((0, width), (1, OUT)):
        shapes = {"conv1": (9, 1, inputs, OUT), "conv2": (9, 1, OUT, OUT)}
        shapes |= {"convd": (1, 1, inputs, OUT)} if block == 0 else {}
        for name, shape in shapes.items():
            state[f"{PREFIX}.{block}.{name}.weight"] = torch.tensor(rng.normal(0, 0.4, shape), dtype=torch.float32)
        for name in ("norm1", "norm2", "normd")[: 3 - block]:
            for kind in ("weight", "bias", "running_mean", "running_var"):
                values = rng.uniform(0.2, 2, OUT) if kind in ("weight", "running_var") else rng.normal(0, 0.5, OUT)
                state[f"{PREFIX}.{block}.{name}.{kind}"] = torch.tensor(values, dtype=torch.float32)
    state["backbone.mil.net.linear_classifier.weight"] = torch.ones(2, OUT)
    state["projector.layer1.0.weight"] = torch.ones(512, 512)
    return state


def save(path: Path, state: dict, **more) -> Path:
    """As the public code does: with settings of a class that nobody else has."""
    module = types.ModuleType("arguments")
    module.Namespace = type("Namespace", (dict,), {"__module__": "arguments"})
    sys.modules["arguments"] = module
    try:
        settings = module.Namespace(lr=0.03)
        settings.nested = module.Namespace()
        torch.save({"state_dict": state, "config": settings, "epoch": 3, **more}, path)
    finally:
        del sys.modules["arguments"]
    return path


def oracle(state: dict, features: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The vector of one map, float64, a dictionary of sites at a time."""
    w = {name.removeprefix(f"{PREFIX}."): value.double().numpy() for name, value in state.items() if PREFIX in name}

    def norm(sites, name):
        mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        return {s: (x - mean) / np.sqrt(var + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"] for s, x in sites.items()}

    def relu(sites):
        return {s: np.maximum(x, 0) for s, x in sites.items()}

    def submanifold(sites, name):
        kernel = w[f"{name}.weight"][:, 0]
        return {
            (r, c): sum(
                sites[r + dy - 1, c + dx - 1] @ kernel[3 * dy + dx]
                for dy in range(3)
                for dx in range(3)
                if (r + dy - 1, c + dx - 1) in sites
            )
            for r, c in sites
        }

    def strided(sites, window):
        top = max(max(s) for s in sites) + 1
        found = {}
        for r in range(top):
            for c in range(top):
                inside = [(dy, dx, sites.get((2 * r + dy, 2 * c + dx))) for dy in range(3) for dx in range(3)]
                if any(x is not None for _, _, x in inside):
                    found[r, c] = sum(window(dy, dx, x) for dy, dx, x in inside if x is not None)
        return found

    at: dict[tuple[int, int], list[np.ndarray]] = {}
    for x, (r, c) in zip(features.astype(np.float64), places, strict=True):
        at.setdefault((int(r), int(c)), []).append(x)
    x = {site: np.mean(rows, axis=0) for site, rows in at.items()}
    first = w["0.conv1.weight"][:, 0]
    inner = relu(norm(strided(x, lambda dy, dx, v: v @ first[3 * dy + dx]), "0.norm1"))
    inner = norm(submanifold(inner, "0.conv2"), "0.norm2")
    pooled = strided(x, lambda dy, dx, v: v / 9)
    short = norm({s: v @ w["0.convd.weight"][0, 0] for s, v in pooled.items()}, "0.normd")
    x = relu({s: inner[s] + short[s] for s in inner})
    inner = norm(submanifold(relu(norm(submanifold(x, "1.conv1"), "1.norm1")), "1.conv2"), "1.norm2")
    return np.mean([np.maximum(inner[s] + x[s], 0) for s in x], axis=0)


@pytest.mark.parametrize("seed", range(4))
def test_a_checkpoint_gives_what_its_layers_written_out_give(tmp_path, seed):
    state = made_up_state(seed)
    encoder = load_published(save(tmp_path / "c.pth", state))
    rng = np.random.default_rng(seed)
    sizes = [5, 40, 1, 23]
    views = np.repeat(np.arange(4), sizes)
    places = rng.integers(0, 8, (len(views), 2))  # some of the forty share a site, some lie at the border
    features = rng.normal(size=(len(views), IN)).astype(np.float32)
    with torch.no_grad():
        got = encoder(torch.from_numpy(features), places.astype(np.float32), views, 4).numpy()
    wanted = [oracle(state, features[views == view], places[views == view]) for view in range(4)]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_other_names_for_the_same_and_files_of_torch_s_first_format(tmp_path):
    state = made_up_state()
    names = {"norm1": "bn1", "norm2": "bn2", "convd": "downsample.0", "normd": "downsample.1"}
    other = {}
    for name, value in state.items():
        for one, two in names.items():
            name = name.replace(f".{one}.", f".{two}.")
        other[name.replace(PREFIX, "stage")] = value
    torch.save(other, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    one, two = load_published(save(tmp_path / "c.pth", state)), load_published(tmp_path / "old.pth")
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, two.state_dict()[name], rtol=0, atol=0)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


@pytest.mark.parametrize("old", [False, True])
def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch, old):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": made_up_state(), "b": Bomb()}, "c.pth", _use_new_zipfile_serialization=not old)
    load_published(tmp_path / "c.pth")
    assert not (tmp_path / "bomb").exists()
    (tmp_path / "p.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FileFormatError, match=r"p\.pth"):
        load_published(tmp_path / "p.pth")
    assert not (tmp_path / "bomb").exists()


def test_what_is_no_such_checkpoint_is_named(tmp_path):
    state = made_up_state()
    without = {k: v for k, v in state.items() if "1.norm2.running_var" not in k}
    with pytest.raises(FileFormatError, match=r"blocks\.1\.bn2\.running_var is missing"):
        load_published(save(tmp_path / "a.pth", without))
    wide = state | {f"{PREFIX}.1.conv1.weight": torch.zeros(9, 1, OUT, OUT + 1)}
    with pytest.raises(FileFormatError, match=r"blocks\.1\.conv1\.weight is \(9, 1, 10, 11\)"):
        load_published(save(tmp_path / "b.pth", wide))
    with pytest.raises(FileFormatError, match=r"two tensors could be blocks\.0\.conv1"):
        load_published(save(tmp_path / "c.pth", state | {"online.0.conv1.weight": torch.zeros(9, 1, IN, OUT)}))
    dense = {"layer4.0.conv1.weight": torch.zeros(512, 256, 3, 3)}
    with pytest.raises(FileFormatError, match="no sparse slide encoder, but layer4"):
        load_published(save(tmp_path / "d.pth", dense))
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "e.pth"))
    (tmp_path / "f.pth").write_bytes(b"PK\x03\x04 no zip")
    torch.save([1, 2], tmp_path / "g.pth")
    for name in ("e", "f", "g", "absent"):
        with pytest.raises(FileFormatError, match=rf"{name}\.pth"):
            read_state(tmp_path / f"{name}.pth")


def write_features(folder: Path, dim: int = IN) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    xy = np.stack(np.divmod(np.arange(30), 6), axis=1)[:, ::-1] * 448
    for k in range(3):
        with h5py.File(folder / f"s{k}.h5", "w") as file:
            file["features"], file["coords"] = rng.normal(size=(30, dim)), xy
            file["coords"].attrs.update(patch_size=224, patch_size_level0=448, level0_width=9000, level0_height=9000)
    return folder


def test_features_are_embedded_by_a_published_checkpoint_and_by_another_study_s_encoder(tmp_path, capsys):
    weights, features = save(tmp_path / "c.pth", made_up_state()), write_features(tmp_path / "in")
    command = ["embed", str(features), "--out", str(tmp_path / "one"), "--device=cpu", "--weights"]
    assert main([*command, str(weights), "--embed.views=0"]) == 0
    found = read_embeddings(tmp_path / "one" / "embeddings.h5ad").vectors["giga-ssl"]
    with h5py.File(features / "s1.h5") as file:
        wanted = oracle(made_up_state(), file["features"][:], file["coords"][:][:, ::-1] // 448)
    np.testing.assert_allclose(found[1], wanted / np.linalg.norm(wanted), atol=1e-5)
    assert main([*command, str(save(tmp_path / "d.pth", made_up_state(1)))]) == 2
    assert "another slide encoder" in capsys.readouterr().err
    other = ["embed", str(features), "--out", str(tmp_path / "two"), "--device=cpu", "--embed.views=0"]
    assert main([*other, "--weights", str(tmp_path / "one" / "slide-encoder")]) == 0
    again = read_embeddings(tmp_path / "two" / "embeddings.h5ad").vectors["giga-ssl"]
    np.testing.assert_array_equal(again, found)


def test_an_encoder_of_other_features_is_refused(tmp_path, capsys):
    weights, features = save(tmp_path / "c.pth", made_up_state()), write_features(tmp_path / "in", IN + 1)
    command = ["embed", str(features), "--out", str(tmp_path / "s"), "--device=cpu", "--weights", str(weights)]
    assert main(command) == 2
    assert f"takes tiles of {IN} numbers" in capsys.readouterr().err
