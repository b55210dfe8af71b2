"""Typical tiles and neighbourhoods of a cohort: found without labels, counted exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from histossl.core.errors import SettingsError
from histossl.gigassl.embed import EmbedSettings, embed_slide, explain_slide
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.encoder_settings import EncoderSettings
from histossl.gigassl.prototypes import RUNS, neighbourhood_mean
from histossl.gigassl.sparse import SparseMap
from histossl.gigassl.views import ViewSettings


def squares(side: int) -> np.ndarray:
    """(side * side, 2) positions of a full map."""
    return np.argwhere(np.ones((side, side), bool)).astype(np.float32)


def cohort(lesions: int) -> list[tuple[torch.Tensor, np.ndarray]]:
    """Slides of noise, each with a stain of its own, the first `lesions` of them with a small square of other tiles."""
    rng = np.random.default_rng(0)
    slides = []
    for k in range(12):
        tiles = rng.standard_normal((20, 20, 16)).astype(np.float32) + rng.standard_normal(16).astype(np.float32) * 3
        if k < lesions:
            row, column = rng.integers(0, 16, 2)
            tiles[row : row + 4, column : column + 4, :4] += 2.5
        slides.append((torch.from_numpy(tiles.reshape(-1, 16)), squares(20)))
    return slides


def roots(encoder: SlideEncoder, tiles: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
    """Of the shares of the prototypes."""
    counted = encoder.counted(tiles, positions)
    assert counted is not None
    return counted.roots


def test_neighbourhood_mean_is_that_of_the_tiles_that_are_there() -> None:
    rng = np.random.default_rng(1)
    sites = np.unique(rng.integers(0, 7, (60, 3)) % [2, 7, 7], axis=0)
    rows = torch.from_numpy(rng.standard_normal((len(sites), 3)))
    found = neighbourhood_mean(rows, SparseMap.of(rows, sites, 2).grid)
    for k, (view, row, column) in enumerate(sites):
        near = (sites[:, 0] == view) & (abs(sites[:, 1] - row) <= 1) & (abs(sites[:, 2] - column) <= 1)
        torch.testing.assert_close(found[k], rows[torch.from_numpy(near)].mean(0))


def test_a_rare_focus_has_a_prototype_of_its_own() -> None:
    slides = cohort(lesions=6)
    encoder = SlideEncoder(EncoderSettings(in_dim=16, dim=8, prototypes=12))
    encoder.fit_prototypes(slides)
    every = torch.stack([roots(encoder, *slide) for slide in slides])
    shares = every.square().reshape(12, 2, RUNS * 12)
    torch.testing.assert_close(shares.sum(2), torch.full((12, 2), float(RUNS)))
    assert (shares >= 0).all()
    # At the largest scale some prototype is found in every slide with the focus, and hardly in any other.
    with_focus, without = shares[:6, -1].amin(0), shares[6:, -1].amax(0)
    assert (with_focus - without).max() > 0.01


def test_prototypes_do_not_see_the_stain_of_a_slide_nor_where_it_lies() -> None:
    slides = cohort(lesions=6)
    encoder = SlideEncoder(EncoderSettings(in_dim=16, dim=8, prototypes=12))
    encoder.fit_prototypes(slides)
    tiles, positions = slides[0]
    one, moved = roots(encoder, tiles, positions), roots(encoder, tiles + 5, positions + 40)
    torch.testing.assert_close(one, moved, atol=0.01, rtol=0)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_the_same_cohort_gives_the_same_bytes_and_few_tiles_suffice() -> None:
    found = []
    for _ in range(2):
        encoder = SlideEncoder(EncoderSettings(in_dim=16, dim=8, prototypes=12))
        encoder.fit_prototypes(cohort(lesions=3))
        assert encoder.prototypes is not None
        found.append(encoder.prototypes.state_dict())
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    encoder = SlideEncoder(EncoderSettings(in_dim=16, dim=8, prototypes=12))
    encoder.fit_prototypes([(torch.ones(3, 16), squares(2)[:3])])  # fewer tiles than prototypes, and all alike
    few = roots(encoder, torch.ones(3, 16), squares(2)[:3])
    torch.testing.assert_close(few.square().sum(), torch.tensor(float(2 * RUNS)))


def test_rounding_where_there_are_fewer_tiles_than_axes_is_not_blown_up() -> None:
    rng = np.random.default_rng(3)
    basis = rng.standard_normal((3, 16)).astype(np.float32)  # the tiles differ in three directions only
    slides = [(torch.from_numpy(rng.standard_normal((25, 3)).astype(np.float32) @ basis), squares(5)) for _ in range(4)]
    encoder = SlideEncoder(EncoderSettings(in_dim=16, dim=8, prototypes=4))
    encoder.fit_prototypes(slides)
    assert encoder.prototypes is not None
    spread = torch.cat([tiles - tiles.mean(0) for tiles, _ in slides]) @ encoder.prototypes.axes
    assert (spread.std(0)[:3] > 0.8).all()
    assert (spread.std(0)[3:] < 0.05).all()


def test_shares_of_tiles_add_up_to_the_scores_of_the_slide_with_its_prototypes() -> None:
    encoder = SlideEncoder(EncoderSettings(in_dim=16, dim=8, prototypes=12)).eval()
    slides = cohort(lesions=6)
    encoder.fit_prototypes(slides)
    tiles, positions = slides[0]
    weights = np.random.default_rng(2).standard_normal((encoder.settings.vector_dim, 2)).astype(np.float32)
    given = tiles.numpy(), positions, ViewSettings(tiles=50), EmbedSettings(views=7), "a"
    found = explain_slide(encoder, *given, weights)
    np.testing.assert_allclose(found.vector, embed_slide(encoder, *given), atol=1e-6)
    np.testing.assert_allclose(found.shares.sum(0), found.vector @ weights, atol=1e-4)


def test_settings() -> None:
    assert EncoderSettings(in_dim=16, dim=8, prototypes=12).vector_dim == 8 + 16 + 2 * 4 * 12
    assert EncoderSettings(in_dim=16, dim=8, prototypes=0).vector_dim == 8 + 16
    assert EncoderSettings(in_dim=16, dim=8, prototypes=12, scales=(0, 1, 3)).vector_dim == 8 + 16 + 3 * 4 * 12
    with pytest.raises(SettingsError, match="prototypes"):
        EncoderSettings(prototypes=-1)
    with pytest.raises(SettingsError, match="scales"):
        EncoderSettings(scales=(2, 1))
