"""Every step forward and backward on torch's `meta` device, which has shapes and no values.

Whatever asks for a value (`.item()`, a boolean mask, `nonzero`, a condition on a tensor) or mixes devices raises there.
So no step makes a GPU wait, and none would fail on one; no GPU is needed to see it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from histossl.encoders.augment import (
    AugmentSettings,
    TileAugmentSettings,
    augment,
    draw_augmentation,
    draw_tile_augmentations,
    to_float,
)
from histossl.encoders.joint import Joint
from histossl.encoders.moco import MocoSettings, MocoTask
from histossl.encoders.patch_kmeans import PatchKMeans
from histossl.encoders.resnet import ResNet18, fold_batch_norms
from histossl.encoders.tile_encoder import TileEncoder
from histossl.evaluate.mil import AttentionPool, BagTask
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.encoder_settings import EncoderSettings
from histossl.gigassl.pretrain_settings import PretrainSettings
from histossl.gigassl.pretrain_task import NeighbourTask, PretrainTask
from histossl.gigassl.towers import Towers
from histossl.nuclei.network import NucleusNet
from histossl.nuclei.patch_sampling import SIMILARITIES, ConfidenceNet, PatchContrastSettings, PatchContrastTask
from histossl.nuclei.self_training import SelfTraining, SelfTrainingTask
from histossl.nuclei.settings import SelfTrainingSettings
from histossl.training.loop import Schedule, optimiser

META = torch.device("meta")
SCHEDULE = Schedule(steps=2, rate=1e-3, warmup=0)
ENCODER = EncoderSettings(in_dim=24, dim=16, prototypes=4)


def on_meta(batch: Any) -> Any:
    return apply_to_collection(batch, Tensor, Tensor.to, device=META)


def two_steps(task: nn.Module, batch: Any, plain: bool = False) -> None:
    """Train as `fit` does; every parameter that is trained has a gradient, and all stays on the device."""
    task = task.to(META).train()
    adam = optimiser(task, replace(SCHEDULE, plain=plain))
    for _ in range(2):
        loss, gauges = task(on_meta(batch))
        loss.backward()
        assert all(p.grad is not None for p in task.parameters() if p.requires_grad)
        adam.step()
        adam.zero_grad(set_to_none=True)
        assert loss.shape == ()
        assert {value.device for value in [loss, *gauges.values()]} == {META}
    assert {tensor.device for tensor in [*task.parameters(), *task.buffers()]} == {META}


def views(size: int, dim: int = 24, tiles: int = 9) -> tuple[Tensor, np.ndarray, np.ndarray, int]:
    """`size` views of slides, each of `tiles` tiles in a square."""
    square = np.stack(np.divmod(np.arange(tiles), 3), 1).astype(float)
    return torch.randn(size * tiles, dim), np.tile(square, (size, 1)), np.repeat(np.arange(size), tiles), size


def random_tiles(count: int, side: int = 64) -> Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8)


@pytest.mark.parametrize(
    "changed",
    [
        {"arch": "sparse"},
        {"arch": "mlp", "inlet": "standard", "tile_mean": False},
        {"arch": "attention", "inlet": "plain"},
        {"in_dim": 256, "prototypes": 0, "hard_border": True, "spacing": 4.0},
    ],
)
@pytest.mark.parametrize("chunks", [1, 2])
def test_slide_encoders(changed: dict[str, Any], chunks: int):
    encoder = replace(ENCODER, **changed)
    task = PretrainTask(PretrainSettings(encoder=encoder))
    two_steps(task, (tuple(views(6, encoder.in_dim) for _ in range(chunks)), 3 * chunks))
    assert task.measure()["effective_rank"].device == META


@pytest.mark.parametrize("inlet", ["scaled", "plain"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_what_neighbouring_tiles_share(inlet: str, chunks: int):
    """The stage of the default settings."""
    encoder = SlideEncoder(replace(ENCODER, arch="neighbours", inlet=inlet))
    task = NeighbourTask(encoder)
    two_steps(task, (tuple(views(6) for _ in range(chunks)), 6 * chunks))
    assert task.measure()["effective_rank"].device == META


def test_several_sources():
    towers = Towers([replace(ENCODER, in_dim=dim) for dim in (24, 32)])
    task = PretrainTask(PretrainSettings(encoder=ENCODER), towers, towers.contrasted_dim)
    parts = {0: views(4), 1: views(4, 32)}
    two_steps(task, (((parts, torch.arange(8)),), 4))


def test_momentum_contrast():
    settings = MocoSettings(batch=4, queue=16, projection=8)
    rng = np.random.default_rng(0)
    drawn = [draw_tile_augmentations(TileAugmentSettings(), 4, 64, rng) for _ in range(2)]
    two_steps(MocoTask(settings), (random_tiles(4), *drawn))


def test_self_training():
    density, target = torch.rand(2, 3, 32, 48), torch.rand(2, 3, 32, 48)
    two_steps(SelfTrainingTask(NucleusNet()), (density, target))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_patch_contrast(similarity: str):
    settings = PatchContrastSettings(crop=40, patch=20, stride=10, places=4, batch=2, channels=3, similarity=similarity)
    two_steps(PatchContrastTask(settings), (torch.rand(2, 3, 40, 40), torch.rand(2, 2, 3, 4)), plain=True)


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("kind", ["attention", "encoder"])
def test_networks_on_labelled_slides(kind: str, classes: int):
    plain = replace(ENCODER, prototypes=0, inlet="standard", tile_mean=False, normalise=False)
    network = AttentionPool(24, 16) if kind == "attention" else SlideEncoder(plain)
    task = BagTask(network, 16, torch.ones(classes) if classes else None, dropout=0.25)
    two_steps(task, (*views(4), torch.tensor([0, 1, 2, 0]) if classes else torch.rand(4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blurred", [False, True])
def test_encoding_of_tiles(dtype: torch.dtype, blurred: bool):
    network = fold_batch_norms(ResNet18()).to(META, dtype)
    encoder = TileEncoder({"name": "random"}, network, 256, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), dtype, META, side=48)
    drawn = replace(draw_augmentation(AugmentSettings(), np.random.default_rng(0)), sigma=0.7 * blurred)
    for tiles in (to_float(random_tiles(5).to(META), dtype), augment(random_tiles(5).to(META), drawn, dtype)):
        found = encoder.on_device(tiles)
        assert (found.shape, found.dtype, found.device) == ((5, 256), torch.float32, META)


@pytest.mark.parametrize("network", [PatchKMeans(8), Joint(8, 2)], ids=["patch-kmeans", "joint"])
def test_encoding_by_visual_words(network: nn.Module):
    with torch.inference_mode():
        assert network.to(META)(torch.rand(3, 3, 64, 64, device=META)).device == META


@pytest.mark.parametrize("arch", ["neighbours", "sparse", "mlp", "attention"])
def test_slide_vectors(arch: str):
    encoder = SlideEncoder(replace(ENCODER, arch=arch)).to(META).eval()
    tiles, *rest = on_meta(views(1))
    with torch.inference_mode():
        assert encoder(tiles, *rest).shape == (1, encoder.settings.contrasted_dim)
        counted = encoder.counted(tiles, rest[0])
        assert counted is not None
        directions = torch.rand(counted.total, 2, device=META)
        assert counted.tile_shares(directions).shape == (9, 2)


@pytest.mark.parametrize("turns", [1, 4])
def test_segmentation_of_nuclei(turns: int):
    method = SelfTraining(SelfTrainingSettings(turns=turns), NucleusNet(), "meta")
    found = method.confidence_torch(torch.rand(1, 3, 48, 64, device=META))
    assert (found.shape, found.device) == ((1, 2, 48, 64), META)
    with torch.inference_mode():
        assert ConfidenceNet().to(META)(torch.rand(1, 3, 48, 64, device=META)).device == META


@pytest.mark.parametrize("ask", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any())])
def test_a_step_that_waits_would_be_seen(ask):
    with pytest.raises((RuntimeError, NotImplementedError)):
        ask(torch.zeros(3, device=META))
