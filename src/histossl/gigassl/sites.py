"""Tiles and the sites of a map that they lie on."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histossl.gigassl.sparse import Grid, KernelMap


def site_indices(positions: NDArray, views: NDArray, hard_border: bool = False) -> NDArray[np.int64]:
    """The sites of tiles: positions rounded down, and moved so that none is negative.

    A view moves by an even number of rows and columns, which keeps the layer of stride 2 in step; with two to spare
    at the border, so that every coarse site that covers a tile exists. With a hard border only negative ones move.

    Args:
        positions: (N, 2) in tile units, finite.
        views: (N,) int, the view of each tile.
        hard_border: leave positions that are not negative as they are.

    Returns:
        (N, 3) int64 sites: view, row, column.

    Raises:
        ValueError: a position is not finite.
    """
    if not np.isfinite(positions).all():
        raise ValueError("the positions of tiles must be finite")
    sites = np.floor(positions).astype(np.int64).reshape(-1, 2)
    least = np.full((int(views.max(initial=-1)) + 1, 2), np.iinfo(np.int64).max)
    np.minimum.at(least, views, sites)
    even = least // 2 * 2
    shift = -np.minimum(even, 0) if hard_border else 2 - even
    return np.column_stack([views, sites + shift[views]])


def tiles_under(site_of_tile: NDArray, grid: Grid, pairs: KernelMap) -> tuple[Tensor, Tensor]:
    """Pair the tiles with the last sites that are above them.

    Args:
        site_of_tile: (N,) the site of each tile on the first grid.
        grid: the first grid.
        pairs: of its sites with the last ones.

    Returns:
        Tiles and last sites, both (P,) int64: every tile under every last site; none of either is left out.
    """
    if pairs.identity:
        return torch.arange(len(site_of_tile)), torch.from_numpy(site_of_tile)
    counts = np.bincount(site_of_tile, minlength=len(grid))
    order = np.argsort(site_of_tile, kind="stable")
    starts = np.cumsum(counts) - counts
    source, target = pairs.source.cpu().numpy(), pairs.target.cpu().numpy()
    repeat = counts[source]
    within = np.arange(repeat.sum()) - np.repeat(np.cumsum(repeat) - repeat, repeat)
    tiles = order[np.repeat(starts[source], repeat) + within]
    return torch.from_numpy(tiles), torch.from_numpy(np.repeat(target, repeat))
