"""What neighbouring tiles share: the loss against its definition, the stage's symmetries, a truth that it finds."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from histossl.core.errors import FileFormatError, SettingsError
from histossl.gigassl.embed import EmbedSettings, embed_slide, explain_slide
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.neighbours import Neighbours, foretelling, functions
from histossl.gigassl.pretrain import pretrain_slides
from histossl.gigassl.pretrain_settings import NEIGHBOURS
from histossl.gigassl.pretrain_task import NeighbourTask, draw_batch, draw_windows
from histossl.gigassl.slide_sources import SlideSource
from histossl.gigassl.sparse import SparseMap
from histossl.gigassl.views import ViewSettings
from support.features import SMALL, write_source

ENCODER = replace(NEIGHBOURS, in_dim=32, dim=8, prototypes=4)
SETTINGS = replace(SMALL, encoder=ENCODER, view=ViewSettings(tiles=100))
WHOLE = ViewSettings(tiles=4096), EmbedSettings(views=0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def field(seed: int = 0, maps: int = 2) -> SparseMap:
    """Maps with holes, 12 channels."""
    rng = np.random.default_rng(seed)
    sites = np.argwhere(rng.random((maps, 9, 7)) < 0.7)
    return SparseMap.of(normal(len(sites), 12, seed=seed), sites, maps)


def sums(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    products = (own * other).sum().reshape(1), (own.T @ own).flatten(), (other.T @ other).flatten()
    return torch.cat([*products, own.new_full((1,), len(own))])


def test_the_loss_is_least_at_the_canonical_functions():
    """Of two sides with canonical correlations .8 and .3: minus half the sum of their squares."""
    rng, n = np.random.default_rng(0), 200_000
    x = rng.standard_normal((n, 2))
    r = np.array([0.8, 0.3])
    y = r * x + np.sqrt(1 - r**2) * rng.standard_normal((n, 2))
    own, other = (torch.from_numpy(side * np.sqrt(r)) for side in (x, y))
    best, gauges = foretelling(sums(own, other))
    assert float(best) == pytest.approx(-0.5 * (0.8**2 + 0.3**2), abs=0.01)
    assert 0.3 < float(gauges["agreement"]) < 0.8
    for factor in (0.8, 1.25):
        assert foretelling(sums(own * factor, other))[0] > best
    assert foretelling(sums(own[:, [0, 0]], other[:, [0, 0]]))[0] > best  # the same function twice is no help
    assert foretelling(sums(own, other[torch.randperm(n)]))[0] > 0


def test_functions_are_counted():
    for kept in (1, 2, 4):
        rows = normal(20_000, 4)
        rows[:, kept:] = 0
        assert float(functions(sums(rows, rows))) == pytest.approx(kept, rel=0.02)
    assert functions(sums(torch.zeros(5, 3), torch.zeros(5, 3))) == 0


def test_a_tile_does_not_foretell_itself_and_only_its_neighbours_do():
    stage = Neighbours(12, 6).eval()
    sparse = field(maps=1)
    features = sparse.features.clone().requires_grad_()
    middle = 20
    _, foretold = stage.sides(sparse.with_features(features))
    # The mean of the map is taken away, so that a far tile has the same small part in all.
    (gradient,) = torch.autograd.grad(foretold[middle].sum(), features)
    near = np.abs(sparse.grid.sites - sparse.grid.sites[middle])[:, 1:].max(1) == 1
    size = gradient.norm(dim=1).numpy()
    assert (size[near] > 3 * size[~near].max()).all()
    assert size[middle] == pytest.approx(float(np.median(size[~near])), rel=1e-4)


def test_what_all_tiles_of_a_view_share_is_not_foretold():
    stage, sparse = Neighbours(12, 6).eval(), field(maps=1)
    _, one = stage.sides(sparse)
    _, other = stage.sides(sparse.with_features(sparse.features + 5))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def tissue(folder: Path, name: str, share: float, rng: np.random.Generator) -> SlideSource:
    """Tiles of two kinds in patches, which one of many noisy numbers tells; and a stain of the slide's own."""
    source = write_source(folder, name, rng, views=0)
    kinds = np.repeat(np.repeat(rng.random((2, 4)) < share, 3, 0), 3, 1)[:, :10].ravel()
    with h5py.File(source.features, "r+") as file:
        rows = (rng.standard_normal((60, 32)) * 2 + rng.standard_normal(32)) / 2**0.5  # as large as the kinds are
        rows[:, 3] = 3.0 * kinds + 0.5 * rng.standard_normal(60)
        file["features"][...] = rows.astype(np.float32)
        file.attrs["share"] = kinds.mean()
    return source


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[SlideSource], np.ndarray]:
    folder, rng = tmp_path_factory.mktemp("neighbours"), np.random.default_rng(0)
    sources = [tissue(folder, f"s{k}", rng.uniform(0.2, 0.8), rng) for k in range(24)]
    shares = []
    for source in sources:
        with h5py.File(source.features) as file:
            shares.append(float(file.attrs["share"]))
    pretrain_slides(sources, replace(SETTINGS, epochs=60), folder / "enc", folder / "logs", "f", "cpu")
    return folder, sources, np.array(shares)


def vectors(encoder: SlideEncoder, sources: list[SlideSource]) -> np.ndarray:
    tiles = [source.load() for source in sources]
    return np.stack([embed_slide(encoder, xs[0], at[0], *WHOLE, "a") for xs, at in tiles])


def explained(values: np.ndarray, truth: np.ndarray) -> float:
    """The best squared correlation of a principal axis with the truth."""
    axes = np.linalg.svd(values - values.mean(0), full_matrices=False)[0][:, :2]
    return max(np.corrcoef(axis, truth)[0, 1] ** 2 for axis in axes.T)


def test_training_finds_what_neighbours_share(trained):
    folder, sources, shares = trained
    encoder = SlideEncoder.load(folder / "enc")
    own, rival = (vectors(e, sources)[:, :8] for e in (encoder, *encoder.rival))
    assert explained(own, shares) > 0.85
    assert explained(own, shares) > explained(rival, shares) + 0.3
    with (folder / "logs" / "log.csv").open() as file:
        log = list(csv.DictReader(file))
    assert float(log[-1]["loss"]) < -0.1 < float(log[0]["loss"])
    assert float(log[-1]["agreement"]) > 0.2


def test_shares_of_tiles_add_up(trained):
    folder, sources, _ = trained
    encoder = SlideEncoder.load(folder / "enc")
    features, positions = (rows[0] for rows in sources[0].load())
    weights = np.random.default_rng(0).standard_normal((encoder.settings.vector_dim, 2))
    found = explain_slide(encoder, features, positions, *WHOLE, "a", weights)
    np.testing.assert_allclose(found.shares.sum(0), found.vector @ weights, atol=2e-4)


def test_chunks_and_16_bits_change_the_loss_little(trained):
    _, sources, _ = trained
    task = NeighbourTask(SlideEncoder(replace(ENCODER, prototypes=0), seed=0)).eval()
    losses = {
        chunk: float(task(draw_batch(0, 1, sources, replace(SETTINGS, chunk=chunk), draw_windows))[0].detach())
        for chunk in (0, 5)
    }
    assert losses[0] == pytest.approx(losses[5], rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = float(task(draw_batch(0, 1, sources, SETTINGS, draw_windows))[0].detach())
    assert low == pytest.approx(losses[0], rel=0.1)


def test_a_view_is_a_quarter_and_the_same_whoever_draws_it(trained):
    _, sources, _ = trained
    one, other = (draw_windows(3, np.array([k, 4]), sources, SETTINGS) for k in (2, 9))
    assert one[3] == 2
    assert len(one[0]) == 2 * 25
    torch.testing.assert_close(one[0][one[2] == 1], other[0][other[2] == 1])


def test_half_of_the_windows_are_not_augmented(tmp_path):
    source = write_source(tmp_path, "a", np.random.default_rng(0))
    np.save(source.views / "plain.npy", np.full((4, 60, 32), 100, np.float16))
    drawn = [draw_windows(epoch, np.array([0]), [source], SETTINGS)[0].mean() for epoch in range(200)]
    assert np.mean(np.array(drawn) > 50) == pytest.approx(0.5, abs=0.12)
    assert source.load()[0].max() < 50  # what is contrasted never sees them
    for other in (np.zeros((4, 59, 32), np.float16), np.zeros((4, 60, 32), np.int16)):
        np.save(source.views / "plain.npy", other)
        with pytest.raises(FileFormatError, match=r"plain\.npy: .* beside views of \(4, 60, 32\)"):
            for epoch in range(20):
                draw_windows(epoch, np.array([0]), [source], SETTINGS)


@pytest.mark.parametrize("tiles", [1, 2])
def test_few_slides_of_few_tiles_train(tmp_path, tiles):
    rng = np.random.default_rng(0)
    sources = [write_source(tmp_path, f"s{k}", rng, views=0) for k in range(2)]
    few = replace(SETTINGS, epochs=2, view=ViewSettings(tiles=tiles))
    pretrain_slides(sources, few, tmp_path / "e", tmp_path / "l", "f", "cpu")
    assert np.isfinite(vectors(SlideEncoder.load(tmp_path / "e"), sources)).all()


def test_an_odd_length_is_refused():
    with pytest.raises(SettingsError, match="must be even, got 7"):
        replace(NEIGHBOURS, dim=7)
