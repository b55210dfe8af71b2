"""The slide encoder: against a dense network, invariances, its file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from histossl.errors import FileFormatError, SettingsError
from histossl.gigassl.encoder import EncoderSettings, Projector, SlideEncoder, from_dense, place

ARCHS = ("sparse", "mlp", "attention")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For tensors as small as these, waiting for a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(seed: int = 0, tiles: int = 60, dim: int = 16, size: int = 3) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    views = np.sort(rng.integers(0, size, tiles))
    return normal(tiles, dim, seed=seed), rng.uniform(-5, (9, 14), (tiles, 2)), views


def small(arch: str = "sparse", **changes) -> SlideEncoder:
    return SlideEncoder(EncoderSettings(in_dim=16, dim=24, arch=arch, **changes)).eval()


class DenseBlock(nn.Module):
    """ResNet's basic block, written from He et al."""

    def __init__(self, inputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, 512, 3, stride, padding=2 - stride, bias=False)
        self.conv2 = nn.Conv2d(512, 512, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(512), nn.BatchNorm2d(512)
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, 512, 1, bias=False), nn.BatchNorm2d(512))


@pytest.fixture(scope="module")
def dense_stage() -> nn.Sequential:
    stage = nn.Sequential(DenseBlock(256, 2), DenseBlock(512, 1)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, value in stage.state_dict().items():
        if value.is_floating_point():
            spread = 0.02 if value.ndim == 4 else 0.2
            value.normal_(1.0 if name.endswith(("var", "bn1.weight")) else 0.0, spread, generator=generator).abs_()
            value.mul_(1 if value.ndim == 1 else torch.randn(value.shape, generator=generator).sign())
    return stage


def test_a_full_map_gives_what_the_dense_stage_gives(dense_stage):
    rows, columns = 9, 13  # odd: a full map without padding has no partly covered outputs inside
    tiles = normal(rows * columns, 256)
    encoder = SlideEncoder(EncoderSettings(hard_border=True)).eval()
    encoder.load_dense({f"layer4.{k}": v for k, v in dense_stage.state_dict().items()})
    at = np.stack(np.mgrid[:rows, :columns], -1).reshape(-1, 2)
    x = F.pad(tiles.T.reshape(1, 256, rows, columns), (0, 2, 0, 2))  # the sparse map goes on to the right and below
    first, second = dense_stage
    with torch.no_grad():
        got = encoder(tiles, at, np.zeros(len(at), int), 1)
        inner = F.relu(first.bn1(first.conv1(x)))
        inner = first.bn2(first.conv2(inner)) + first.downsample(F.avg_pool2d(x, 3, 2))
        x = F.relu(inner)
        x = F.relu(x + second.bn2(second.conv2(F.relu(second.bn1(second.conv1(x))))))
    torch.testing.assert_close(got, x.mean((2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_views_do_not_know_each_other_nor_the_order_of_tiles(arch):
    encoder, (tiles, positions, views) = small(arch), batch()
    order = np.random.default_rng(1).permutation(len(tiles))
    with torch.no_grad():
        together = encoder(tiles, positions, views, 4)
        shuffled = encoder(tiles[order], positions[order], views[order], 4)
        alone = [
            encoder(tiles[views == v], positions[views == v], np.zeros((views == v).sum(), int), 1) for v in (0, 1, 2)
        ]
    torch.testing.assert_close(together, shuffled)
    torch.testing.assert_close(together[:3], torch.cat(alone))
    assert (together[3] == 0).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(-9, 9), st.integers(-9, 9))
def test_where_coordinates_begin_does_not_matter_by_the_stride(down, right):
    encoder, (tiles, positions, views) = small(), batch()
    with torch.no_grad():
        here = encoder(tiles, positions, views, 3)
        there = encoder(tiles, positions + np.array([2 * down, 2 * right]), views, 3)
    torch.testing.assert_close(here, there)


def test_only_the_sparse_encoder_sees_who_is_beside_whom():
    tiles, positions, views = batch(tiles=80, size=1)
    positions = np.stack(np.mgrid[:8, :10], -1).reshape(-1, 2)
    mixed = np.random.default_rng(3).permutation(positions)
    for arch in ARCHS:
        with torch.no_grad():
            one, two = (small(arch)(tiles, at, views, 1) for at in (positions, mixed))
        assert torch.allclose(one, two, atol=1e-5) == (arch != "sparse")


@pytest.mark.parametrize("arch", ARCHS)
def test_shares_of_tiles_add_up_to_the_score_of_the_slide(arch):
    encoder, (tiles, positions, views) = small(arch), batch()
    probe = normal(24, seed=5)
    with torch.no_grad():
        found = encoder.sites(tiles, positions, views, 4)
        torch.testing.assert_close(found.pooled(), encoder(tiles, positions, views, 4))
        shares = found.tile_shares(found.vectors @ probe * found.weights, len(tiles))
    for view in range(3):
        torch.testing.assert_close(shares[views == view].sum(), found.pooled()[view] @ probe, rtol=1e-4, atol=1e-5)


def test_tiles_lie_under_the_sites_that_cover_them():
    encoder, (tiles, positions, views) = small(), batch()
    found = encoder.sites(tiles, positions, views, 3)
    at = place(positions, views)[found.tiles.numpy()]
    site = found.grid.sites[found.sites.numpy()]
    assert (at[:, 0] == site[:, 0]).all()
    assert ((at[:, 1:] - 2 * site[:, 1:] >= 0) & (at[:, 1:] - 2 * site[:, 1:] <= 2)).all()
    assert set(found.tiles.tolist()) == set(range(len(tiles)))
    assert set(found.sites.tolist()) == set(range(len(found.grid)))


def test_a_hard_border_leaves_positions_that_are_not_negative_where_they_are():
    positions = np.array([[0.2, 3.9], [5.0, 0.0], [-3.0, 1.0]])
    np.testing.assert_array_equal(place(positions, np.array([0, 0, 1]), True), [[0, 0, 3], [0, 5, 0], [1, 1, 1]])
    np.testing.assert_array_equal(place(positions, np.array([0, 0, 1])), [[0, 2, 5], [0, 7, 2], [1, 3, 3]])


def test_the_seed_makes_the_weights_and_the_global_generator_stays():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two, other = (SlideEncoder(EncoderSettings(in_dim=16, dim=24), seed=s) for s in (0, 0, 1))
    Projector(24, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not torch.equal(one.inlet.weight, other.inlet.weight)


@pytest.mark.parametrize("arch", ARCHS)
def test_an_encoder_comes_back_from_its_folder(tmp_path, arch):
    encoder, (tiles, positions, views) = small(arch), batch()
    encoder.train()(tiles, positions, views, 3)  # moves the running statistics
    encoder.eval().save(tmp_path / "slide-encoder", {"seed": 3})
    again = SlideEncoder.load(tmp_path / "slide-encoder")
    assert again.settings == encoder.settings
    with torch.no_grad():
        assert torch.equal(again(tiles, positions, views, 3), encoder(tiles, positions, views, 3))


@pytest.mark.parametrize(
    "damage", ["truncated weights", "no config", "other config", "other weights", "unknown setting"]
)
def test_a_damaged_folder_is_refused(tmp_path, damage):
    folder = tmp_path / "slide-encoder"
    small().save(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no config":
        config.unlink()
    elif damage == "other config":
        config.write_text('{"model_type": "vit"}')
    elif damage == "other weights":
        config.write_text(config.read_text().replace('"dim": 24', '"dim": 32'))
    else:
        config.write_text(config.read_text().replace('"dim"', '"dims"'))
    with pytest.raises(FileFormatError, match=r"slide.encoder"):
        SlideEncoder.load(folder)


def test_weights_of_another_network_are_refused(dense_stage):
    state = dense_stage.state_dict()
    with pytest.raises(FileFormatError, match=r"layer4\.1\.conv2\.weight"):
        from_dense({k: v for k, v in state.items() if k != "1.conv2.weight"})
    with pytest.raises(SettingsError, match="sparse"):
        small("mlp").load_dense(state)


def test_tiles_of_another_length_are_refused():
    with pytest.raises(SettingsError, match="tiles of 16 numbers"):
        small()(normal(4, 17), np.zeros((4, 2)), np.zeros(4, int), 1)


@pytest.mark.parametrize("arch", ARCHS)
def test_one_tile_trains(arch):
    encoder = small(arch).train()
    out = encoder(normal(1, 16), np.zeros((1, 2)), np.zeros(1, int), 2)
    out.sum().backward()
    assert out.shape == (2, 24)
    assert out.isfinite().all()


def test_autocast_moves_the_vector_little():
    encoder, (tiles, positions, views) = small(), batch()
    with torch.no_grad():
        exact = encoder(tiles, positions, views, 3)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = encoder(tiles, positions, views, 3)
    assert rounded.dtype == torch.float32
    assert 0 < (1 - F.cosine_similarity(exact.double(), rounded.double())).max() < 1e-3
