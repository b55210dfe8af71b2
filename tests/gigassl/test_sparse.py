"""Sparse layers against the dense ones of torch on the occupied sites."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from histossl.gigassl import sparse_buffers
from histossl.gigassl.norms import OneScale, SiteNorm
from histossl.gigassl.sparse import Grid, SparseConv, SparseMap, average_pool, sparse_conv

ROWS, COLUMNS, MAPS = 7, 10, 3
quick = settings(max_examples=25, deadline=None)
site = st.tuples(st.integers(0, MAPS - 1), st.integers(0, ROWS - 1), st.integers(0, COLUMNS - 1))
any_sites = st.lists(site, max_size=60).map(lambda sites: np.array(sites, np.int64).reshape(-1, 3))
unique_sites = any_sites.map(lambda sites: np.unique(sites, axis=0))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(rows: torch.Tensor, grid: Grid, shape: tuple[int, int]) -> torch.Tensor:
    """(maps, C, H, W), zero where no site is."""
    out = rows.new_zeros(grid.batch_size, *shape, rows.shape[1])
    view, row, column = torch.from_numpy(grid.sites).unbind(1)
    return out.index_put((view, row, column), rows).permute(0, 3, 1, 2)


def read(maps: torch.Tensor, grid: Grid) -> torch.Tensor:
    view, row, column = torch.from_numpy(grid.sites).unbind(1)
    return maps[view, :, row, column]


def as_dense_weight(weight: torch.Tensor) -> torch.Tensor:
    """(9, in, out) as conv2d's (out, in, 3, 3)."""
    return weight.reshape(3, 3, *weight.shape[1:]).permute(3, 2, 0, 1)


def same_values_and_gradients(ours: torch.Tensor, theirs: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, theirs)
    weight = normal(*ours.shape, seed=9)
    mine = torch.autograd.grad(ours, leaves, weight, allow_unused=True, materialize_grads=True)
    dense_ones = torch.autograd.grad(theirs, leaves, weight, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(mine, dense_ones)


@quick
@given(unique_sites)
def test_submanifold_convolution_is_conv2d_on_the_occupied_sites(sites):
    grid = Grid(sites, MAPS)
    rows, weight = normal(len(grid), 3).requires_grad_(), normal(9, 3, 4, seed=1).requires_grad_()
    theirs = F.conv2d(dense(rows, grid, (ROWS, COLUMNS)), as_dense_weight(weight), padding=1)
    same_values_and_gradients(sparse_conv(rows, weight, grid.neighbours), read(theirs, grid), [rows, weight])


@quick
@given(unique_sites)
def test_strided_convolution_is_conv2d_and_exists_where_any_input_is_occupied(sites):
    grid = Grid(sites, MAPS)
    coarse, kernel = grid.strided
    rows, weight = normal(len(grid), 3).requires_grad_(), normal(9, 3, 4, seed=1).requires_grad_()
    beyond = dense(rows, grid, (ROWS + 2, COLUMNS + 3))  # the sparse map has no end to the right and below
    theirs = F.conv2d(beyond, as_dense_weight(weight), stride=2)
    same_values_and_gradients(sparse_conv(rows, weight, kernel), read(theirs, coarse), [rows, weight])
    occupied = dense(torch.ones(len(grid), 1), grid, (ROWS + 2, COLUMNS + 3))
    expected = torch.nonzero(F.max_pool2d(occupied, 3, 2)[:, 0])
    np.testing.assert_array_equal(coarse.sites, expected.numpy())


@quick
@given(unique_sites)
def test_average_pool_divides_by_nine_however_many_sites_are_occupied(sites):
    grid = Grid(sites, MAPS)
    coarse, kernel = grid.strided
    rows = normal(len(grid), 3).requires_grad_()
    theirs = F.avg_pool2d(dense(rows, grid, (ROWS + 2, COLUMNS + 3)), 3, 2)
    same_values_and_gradients(average_pool(rows, kernel), read(theirs, coarse), [rows])


@quick
@given(any_sites, st.randoms(use_true_random=False))
def test_places_in_any_order_and_twice_are_sorted_and_averaged(sites, random):
    rows = normal(len(sites), 2)
    order = list(range(len(sites)))
    random.shuffle(order)
    placed = SparseMap.of(rows[order], sites[order], MAPS)
    for row, (view, r, c) in zip(placed.features, placed.grid.sites, strict=True):
        here = (sites == (view, r, c)).all(1)
        torch.testing.assert_close(row, rows[torch.from_numpy(here)].mean(0))
    assert len(placed.grid) == len(np.unique(sites, axis=0))


@quick
@given(unique_sites)
def test_mean_of_each_map_with_zeros_for_empty_ones(sites):
    grid = Grid(sites, MAPS)
    rows = normal(len(grid), 2)
    means = SparseMap(rows, grid).mean()
    for view in range(MAPS):
        mine = rows[torch.from_numpy(sites[:, 0] == view)]
        torch.testing.assert_close(means[view], mine.mean(0) if len(mine) else torch.zeros(2, dtype=rows.dtype))


@quick
@given(unique_sites, st.integers(0, 4), st.integers(0, 4))
def test_moving_by_the_stride_moves_the_result(sites, down, right):
    sites = sites + np.array([0, 2, 2])  # clear of the border, where the outermost output has no site
    one, two = Grid(sites, MAPS), Grid(sites + np.array([0, 2 * down, 2 * right]), MAPS)
    rows, weight = normal(len(one), 3), normal(9, 3, 4, seed=1)
    (coarse_one, kernel_one), (coarse_two, kernel_two) = one.strided, two.strided
    np.testing.assert_array_equal(coarse_one.sites + np.array([0, down, right]), coarse_two.sites)
    torch.testing.assert_close(sparse_conv(rows, weight, kernel_one), sparse_conv(rows, weight, kernel_two))


@quick
@given(unique_sites, st.permutations(range(MAPS)))
def test_maps_of_a_batch_do_not_know_each_other(sites, order):
    rows, weight = normal(len(sites), 3), normal(9, 3, 4, seed=1)
    there = np.argsort(order)
    one = SparseMap.of(rows, sites, MAPS)
    two = SparseMap.of(rows, np.column_stack([there[sites[:, 0]], sites[:, 1:]]), MAPS)
    means = [m.with_features(sparse_conv(m.features, weight, m.grid.neighbours)).mean() for m in (one, two)]
    torch.testing.assert_close(means[0], means[1][torch.from_numpy(there)])


@pytest.mark.parametrize("which", ["neighbours", "strided", "itself"])
def test_gradients_by_finite_differences(which):
    grid = Grid(np.unique(np.random.default_rng(0).integers(0, (2, 4, 5), (16, 3)), axis=0), 2)
    kernel = grid.strided[1] if which == "strided" else getattr(grid, which)
    rows, weight = normal(len(grid), 2).requires_grad_(), normal(len(kernel.counts), 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda r, w: sparse_conv(r, w, kernel), (rows, weight))


def test_blocks_do_not_change_the_result(monkeypatch):
    sites = np.unique(np.random.default_rng(0).integers(0, (2, 20, 30), (700, 3)), axis=0)
    rows, weight = normal(len(sites), 3).requires_grad_(), normal(9, 3, 4, seed=1).requires_grad_()
    whole = sparse_conv(rows, weight, Grid(sites, 2).neighbours)
    monkeypatch.setattr(sparse_buffers, "BLOCK", 37)
    same_values_and_gradients(whole, sparse_conv(rows, weight, Grid(sites, 2).neighbours), [rows, weight])


@pytest.mark.parametrize("block", [48, 4096])
def test_autocast_rounds_the_factors_and_keeps_the_sums_in_float32(monkeypatch, block):
    monkeypatch.setattr(sparse_buffers, "BLOCK", block)
    sites = np.unique(np.random.default_rng(0).integers(0, (2, 20, 30), (300, 3)), axis=0)
    grid = Grid(sites, 2)
    rows, weight = normal(len(grid), 64).float().requires_grad_(), normal(9, 64, 48, seed=1).float().requires_grad_()
    exact = sparse_conv(rows, weight, grid.neighbours)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sparse_conv(rows, weight, grid.neighbours)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.01
    upstream = normal(*exact.shape, seed=2).float()
    for mine, true in zip(
        *(torch.autograd.grad(out, [rows, weight], upstream) for out in (rounded, exact)), strict=True
    ):
        assert mine.dtype == torch.float32
        assert 0 < (mine - true).norm() / true.norm() < 0.01


def test_the_same_input_gives_the_same_bytes():
    sites = np.unique(np.random.default_rng(0).integers(0, (2, 20, 30), (900, 3)), axis=0)

    def run(dtype: torch.dtype) -> list[bytes]:
        rows, weight = normal(len(sites), 32).float().requires_grad_(), normal(9, 32, 32).float().requires_grad_()
        placed = SparseMap.of(rows, sites, 2)
        coarse, kernel = placed.grid.strided
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = sparse_conv(placed.features, weight, kernel)
            mean = SparseMap(sparse_conv(out, weight, coarse.neighbours), coarse).mean()
        gradients = torch.autograd.grad(mean.square().sum(), [rows, weight])
        return [t.detach().numpy().tobytes() for t in (mean, *gradients)]

    for dtype in (torch.float32, torch.bfloat16):
        assert run(dtype) == run(dtype)


def test_batch_norm_of_a_single_site_in_training_uses_the_running_statistics():
    norm = SiteNorm(3)
    out = norm(torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(out, torch.tensor([[1.0, 2.0, 3.0]]) / (1 + 1e-5) ** 0.5)
    assert norm.running_mean is not None
    assert (norm.running_mean == 0).all()
    assert norm(torch.empty(0, 3)).shape == (0, 3)


def test_layer_keeps_the_published_layout():
    conv = SparseConv(3, 5)
    assert conv.weight.shape == (9, 1, 3, 5)
    grid = Grid(np.array([[0, 4, 4], [0, 4, 5]]), 1)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[5, 0, 0, 0] = 1  # offset (0, +1): what is right of a site
    out = conv(torch.tensor([[1.0, 0, 0], [7.0, 0, 0]]), grid.neighbours)
    assert out[:, 0].tolist() == [7.0, 0.0]


@pytest.mark.parametrize(
    "sites",
    [[[0, 1, 1], [0, 1, 1]], [[0, 1, 1], [0, 0, 5]], [[0, -1, 0]], [[2, 0, 0]], [[0, 0]]],
    ids=["twice", "out of order", "negative", "beyond the batch", "two columns"],
)
def test_a_grid_refuses_what_is_not_a_set_of_sites(sites):
    with pytest.raises(ValueError, match="sites must"):
        Grid(np.array(sites), 2)


def test_one_scale_keeps_the_proportions_of_columns() -> None:
    rows = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 20.0]) + 7
    norm = OneScale(3)
    norm.momentum = 1.0
    for found in (norm(rows), norm.eval()(rows)):  # of the batch, then of what it kept
        expected = (rows - rows.mean(0)) / rows.var(0).mean().sqrt()
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
