"""The slide encoder: against a dense network, invariances, its file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from histossl.core.errors import FileFormatError, SettingsError
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.encoder_settings import EncoderSettings
from histossl.gigassl.layers import Projector, from_dense
from histossl.gigassl.sites import site_indices

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
    encoder = SlideEncoder(
        EncoderSettings(dim=512, inlet="plain", tile_mean=False, prototypes=0, hard_border=True)
    ).eval()
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
@pytest.mark.parametrize("tile_mean", [True, False])
def test_shares_of_tiles_add_up_to_the_scores_of_the_slide(arch, tile_mean):
    encoder, (tiles, positions, views) = small(arch, tile_mean=tile_mean), batch()
    with torch.no_grad():
        encoder.train()(tiles, positions, views, 3)  # moves the running statistics
        encoder.eval()
        directions = normal(encoder.settings.contrasted_dim, 2, seed=5)
        shares = encoder.tile_shares(tiles, positions, views, 4, directions)
        vectors = encoder(tiles, positions, views, 4)
    for view in range(3):
        torch.testing.assert_close(shares[views == view].sum(0), vectors[view] @ directions, rtol=1e-4, atol=1e-4)


def test_a_tile_s_share_comes_from_the_sites_that_cover_it():
    encoder, tiles = small(tile_mean=False, prototypes=0), normal(2, 16)
    positions, views = np.array([[0, 0], [0, 40]]), np.zeros(2, int)  # too far apart to meet
    directions = normal(24, 1, seed=5)
    with torch.no_grad():
        shares = encoder.tile_shares(tiles, positions, views, 1, directions)
        found = encoder._looked_at(encoder._placed(tiles, positions, views, 1)[1])
        scores = found.features @ directions / len(found.grid)
    left = torch.from_numpy(found.grid.sites[:, 2] < 10)
    torch.testing.assert_close(shares, torch.stack([scores[left].sum(0), scores[~left].sum(0)]))


def test_a_centred_inlet_does_not_see_what_all_tiles_of_a_slide_share():
    tiles, positions, views = batch()
    stained = tiles + normal(3, 16, seed=7)[views]
    for inlet in ("plain", "standard", "centred"):
        encoder = small(inlet=inlet, tile_mean=False)
        with torch.no_grad():
            one, two = (encoder(t, positions, views, 3) for t in (tiles, stained))
        assert torch.allclose(one, two, atol=1e-4) == (inlet == "centred")


def test_the_mean_of_the_tiles_is_part_of_the_vector():
    encoder, (tiles, positions, views) = small(prototypes=0), batch()
    positions = np.arange(len(tiles))[:, None] * [1, 1]  # a site each
    with torch.no_grad():
        vector = encoder(tiles, positions, views, 4)
    means = torch.stack([tiles[views == view].mean(0) for view in range(3)])
    torch.testing.assert_close(vector[:3, 24:], means / (1 + 1e-5) ** 0.5)
    assert vector.shape == (4, 40)
    assert (vector[3] == 0).all()


def test_a_hard_border_leaves_positions_that_are_not_negative_where_they_are():
    positions = np.array([[0.2, 3.9], [5.0, 0.0], [-3.0, 1.0]])
    np.testing.assert_array_equal(site_indices(positions, np.array([0, 0, 1]), True), [[0, 0, 3], [0, 5, 0], [1, 1, 1]])
    np.testing.assert_array_equal(site_indices(positions, np.array([0, 0, 1])), [[0, 2, 5], [0, 7, 2], [1, 3, 3]])


def test_the_seed_makes_the_weights_and_the_global_generator_stays():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two, other = (SlideEncoder(EncoderSettings(in_dim=16, dim=24), seed=s) for s in (0, 0, 1))
    Projector(24, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not torch.equal(one.linear.weight, other.linear.weight)


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
    assert out.shape == (2, 40)
    assert out.isfinite().all()


def test_autocast_moves_the_vector_little():
    encoder, (tiles, positions, views) = small(), batch()
    with torch.no_grad():
        exact = encoder(tiles, positions, views, 3)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = encoder(tiles, positions, views, 3)
    assert rounded.dtype == torch.float32
    assert 0 < (1 - F.cosine_similarity(exact.double(), rounded.double())).max() < 1e-3


def test_with_spacing_neighbours_lie_sites_apart():
    tiles, positions, views = batch(size=1)
    wide, plain = small(spacing=4.0), small()
    with torch.no_grad():
        torch.testing.assert_close(wide(tiles, positions, views, 1), plain(tiles, positions * 4, views, 1))
        assert not torch.allclose(wide(tiles, positions, views, 1), plain(tiles, positions, views, 1), atol=1e-3)
    with pytest.raises(SettingsError, match="spacing"):
        EncoderSettings(spacing=0)
