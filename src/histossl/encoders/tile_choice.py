"""Draws the tiles of a view from all tiles of a slide."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def choose_tiles(xy: NDArray[np.int64], n: int, window: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw tiles in compact groups: the tiles nearest to random centres.

    Args:
        xy: (N, 2) corners of the tiles, level-0 pixels.
        n: number of tiles to draw; all N where n is larger.
        window: tiles per group.
        rng: source of the draws.

    Returns:
        (min(n, N),) int64 indices, ascending, without repeats.
    """
    if n >= len(xy):
        return np.arange(len(xy))
    if window == 1:
        return np.sort(rng.choice(len(xy), n, replace=False))
    free = np.ones(len(xy), bool)
    chosen: list[int] = []
    while len(chosen) < n:
        centre = xy[rng.choice(np.flatnonzero(free))]
        distance = np.where(free, np.abs(xy - centre).max(axis=1), np.iinfo(np.int64).max)
        group = np.argsort(distance, kind="stable")[: min(window, n - len(chosen))]
        free[group] = False
        chosen.extend(group.tolist())
    return np.sort(np.array(chosen))
