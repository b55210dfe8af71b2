"""Views: a pure function of the generator; what moves a map keeps its distances; windows are windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from histossl.core.errors import SettingsError
from histossl.gigassl.views import ViewSettings, collate, draw_pair, draw_tiles, draw_view, move_map

ROWS, COLUMNS = 13, 21
LATTICE = np.stack(np.mgrid[:ROWS, :COLUMNS], -1).reshape(-1, 2).astype(np.float32)
FEATURES = np.random.default_rng(0).normal(size=(len(LATTICE), 5)).astype(np.float16)
seeds = st.integers(0, 2**32)
quick = settings(max_examples=40, deadline=None)


def distances(positions: np.ndarray) -> np.ndarray:
    return np.linalg.norm(positions[:, None] - positions, axis=-1)


def test_a_view_is_a_function_of_the_generator():
    for chosen in (ViewSettings(20, 0, 0.5, 2, True), ViewSettings(20, 2)):
        one, two, other = (draw_view(FEATURES, LATTICE, chosen, np.random.default_rng(seed)) for seed in (3, 3, 4))
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
        assert not np.array_equal(one[1], other[1])


@quick
@given(seeds, st.booleans())
def test_without_stretching_distances_stay(seed, any_angle):
    moved = move_map(LATTICE, ViewSettings(any_angle=any_angle), np.random.default_rng(seed))
    np.testing.assert_allclose(distances(moved), distances(LATTICE), atol=1e-4)


@quick
@given(seeds)
def test_quarter_turns_put_every_tile_on_a_site_of_its_own(seed):
    moved = move_map(LATTICE, ViewSettings(), np.random.default_rng(seed))
    assert len(np.unique(np.floor(moved), axis=0)) == len(LATTICE)
    assert np.allclose(moved % 1, 0.5)


@quick
@given(seeds, st.floats(0.3, 1), st.floats(1, 3), st.booleans())
def test_rows_and_columns_are_stretched_within_the_range(seed, low, high, any_angle):
    chosen = ViewSettings(scale_min=low, scale_max=high, any_angle=any_angle)
    origin, down, right = move_map(np.array([[0, 0], [1, 0], [0, 1]]), chosen, np.random.default_rng(seed))
    for arm in (down - origin, right - origin):
        assert low - 1e-5 <= np.linalg.norm(arm) <= high + 1e-5
    assert abs((down - origin) @ (right - origin)) < 1e-5  # rows and columns stay at right angles


def test_every_mirror_turn_and_parity_occurs():
    rng = np.random.default_rng(0)
    seen = {tuple(np.floor(move_map(LATTICE[:2], ViewSettings(), rng).ravel())) for _ in range(400)}
    assert len(seen) >= 16
    corner = np.array([[0, 0], [0, 1], [1, 0]])
    turns = {tuple((m - m[0]).ravel()) for m in (move_map(corner, ViewSettings(), rng) for _ in range(200))}
    assert len(turns) == 8


@quick
@given(seeds, st.integers(1, 300), st.integers(0, 5))
def test_tiles_are_drawn_once_with_their_places(seed, tiles, windows):
    chosen = ViewSettings(tiles, min(windows, tiles))
    index = draw_tiles(LATTICE, chosen, np.random.default_rng(seed))
    assert len(np.unique(index)) == len(index) == min(tiles, len(LATTICE))
    features, positions = draw_view(FEATURES, LATTICE, chosen, np.random.default_rng(seed))
    drawn = [np.flatnonzero((f == FEATURES).all(1))[0] for f in features]
    np.testing.assert_allclose(distances(positions), distances(LATTICE[drawn]), atol=1e-4)


@quick
@given(seeds)
def test_a_window_is_a_tile_and_its_nearest(seed):
    at = LATTICE[draw_tiles(LATTICE, ViewSettings(25, 1), np.random.default_rng(seed))]
    rows, columns = np.ptp(at, axis=0) + 1
    assert rows * columns <= 5 * 9  # 5 x 5, wider only where the border cuts it
    touching = (distances(at) < 1.5).sum(1) - 1
    assert (touching > 0).all()


def test_a_pair_is_drawn_under_two_augmentations():
    stored = np.broadcast_to(np.arange(4, dtype=np.float16)[:, None, None], (4, len(LATTICE), 5))
    places = np.broadcast_to(LATTICE, (4, *LATTICE.shape))
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        (one, _), (other, _) = draw_pair(stored, places, ViewSettings(3, 0), rng)
        assert one[0, 0] != other[0, 0]
        seen.add((float(one[0, 0]), float(other[0, 0])))
    assert len(seen) == 12
    (one, _), (other, _) = draw_pair(stored[:1], places[:1], ViewSettings(3, 0), rng)
    assert len(one) == len(other) == 3


def test_without_pixel_augmentations_views_are_samples_that_are_disturbed_together():
    rng = np.random.default_rng(0)
    tiles = rng.normal(3, 2, (1, len(LATTICE), 400)).astype(np.float16)
    chosen = ViewSettings(10_000, 1, share=0.5, dropout=0.3, noise=0.5)
    one, other = draw_pair(tiles, LATTICE[None], chosen, np.random.default_rng(1))
    assert len(one[0]) == len(other[0]) == round(len(LATTICE) / 2)
    dropped = (one[0] == 0).all(0)
    assert dropped.mean() == pytest.approx(0.3, abs=0.08)
    assert not np.array_equal(dropped, (other[0] == 0).all(0))
    calm = draw_pair(tiles, LATTICE[None], ViewSettings(10_000, 1, share=0.5, dropout=0, noise=0), rng)[0][0]
    assert {row.tobytes() for row in calm} <= {row.tobytes() for row in tiles[0].astype(np.float32)}
    moved = one[0][:, ~dropped].mean(0) - 3  # by half a deviation of 2 together; tiles alone average out
    assert moved.std() == pytest.approx(1, abs=0.15)
    assert one[0][:, ~dropped].std(0).mean() == pytest.approx(2 * 1.25**0.5, rel=0.05)
    both = draw_pair(np.repeat(tiles, 2, 0), np.repeat(LATTICE[None], 2, 0), chosen, rng)[0][0]
    assert len(both) == len(LATTICE)  # pixel augmentations need no more
    np.testing.assert_array_equal(np.sort(both, 0), np.sort(tiles[0], 0))


def test_a_batch_keeps_the_place_of_a_view_without_tiles():
    views = [draw_view(FEATURES[:n], LATTICE[:n], ViewSettings(7, 0), np.random.default_rng(n)) for n in (30, 0, 4)]
    batch = collate(views)
    assert batch.size == 3
    assert batch.views.tolist() == [0] * 7 + [2] * 4
    assert batch.features.dtype == batch.positions.dtype == torch.float32
    np.testing.assert_array_equal(batch.features[7:], views[2][0])
    np.testing.assert_array_equal(batch.positions[:7], views[0][1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"tiles": 0},
        {"windows": -1},
        {"scale_min": 2, "scale_max": 1},
        {"scale_min": 0},
        {"share": 0},
        {"dropout": 1},
        {"noise": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(SettingsError):
        ViewSettings(**wrong)


def test_one_view_alone_is_not_copied():
    features, positions = np.ones((5, 3), np.float32), np.zeros((5, 2), np.float32)
    assert np.shares_memory(collate([(features, positions)]).features.numpy(), features)
    assert collate([(features[::-1].astype(np.float16), positions)]).features.dtype == torch.float32
