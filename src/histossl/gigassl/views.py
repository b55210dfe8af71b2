"""Draws views of slides: some of the tiles, on a map that is turned, mirrored and stretched.

Positions are (row, column) in tile units, in training and at inference: neighbouring tiles are 1 apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from histossl.gigassl.pretrain_settings import ViewSettings


@dataclass(frozen=True)
class ViewBatch:
    """The concatenated tiles of several views.

    Attributes:
        features: (N, D) float32, the tiles of all views.
        positions: (N, 2) float32 (row, column) in tile units.
        views: (N,) int64, ascending: the view of each tile.
        size: number of views, including those without tiles.
    """

    features: torch.Tensor
    positions: torch.Tensor
    views: torch.Tensor
    size: int


View = tuple[NDArray, NDArray]  # features (T, D) as stored, positions (T, 2) float32 in tile units


def draw_view(features: NDArray, positions: NDArray, settings: ViewSettings, rng: np.random.Generator) -> View:
    """Draw tiles of a slide and transform their map.

    Args:
        features: (n, D); only the drawn rows are read, so a memory map is enough.
        positions: (n, 2) (row, column) in tile units.
        settings: of the view.
        rng: the only source of randomness.

    Returns:
        features (T, D) of the same dtype and positions (T, 2) float32; T = min(settings.tiles, n).
    """
    chosen = np.sort(draw_tiles(positions, settings, rng))
    return np.asarray(features[chosen]), move_map(positions[chosen], settings, rng)


def draw_pair(
    features: NDArray, positions: NDArray, settings: ViewSettings, rng: np.random.Generator
) -> tuple[View, View]:
    """Draw two views of a slide for a positive pair.

    With several pixel augmentations the views have two different ones; with a single one they are two samples of the
    tiles, with disturbed features.

    Args:
        features: (K, n, D), the tiles under K augmentations.
        positions: (K, n, 2) (row, column) in tile units.
        settings: of the views.
        rng: the only source of randomness.

    Returns:
        The two views.
    """
    count = len(features)
    if count == 1:
        views = [draw_view(features[0], positions[0], _fewer(settings, features.shape[1]), rng) for _ in range(2)]
        one, other = [(disturb(rows, settings, rng), moved) for rows, moved in views]
        return one, other
    first, second = rng.choice(count, 2, replace=False)
    one = draw_view(features[first], positions[first], settings, rng)
    return one, draw_view(features[second], positions[second], settings, rng)


def draw_one(features: NDArray, positions: NDArray, settings: ViewSettings, rng: np.random.Generator) -> View:
    """Draw one view of a slide as `draw_pair` does, for a pair whose other view is from another source.

    Args:
        features: (K, n, D), the tiles under K augmentations.
        positions: (K, n, 2) (row, column) in tile units.
        settings: of the view.
        rng: the only source of randomness.

    Returns:
        The view.
    """
    if len(features) > 1:
        chosen = rng.integers(len(features))
        return draw_view(features[chosen], positions[chosen], settings, rng)
    rows, moved = draw_view(features[0], positions[0], _fewer(settings, features.shape[1]), rng)
    return disturb(rows, settings, rng), moved


def _fewer(settings: ViewSettings, tiles: int) -> ViewSettings:
    """The settings for a slide of `tiles` tiles, with at most `share` of them per view."""
    most = max(1, round(settings.share * tiles))
    return replace(settings, tiles=min(settings.tiles, most), windows=min(settings.windows, settings.tiles, most))


def disturb(features: NDArray, settings: ViewSettings, rng: np.random.Generator) -> NDArray[np.float32]:
    """Add noise to the features of a view and set some to zero; see `ViewSettings`.

    Args:
        features: (T, D) of the view's tiles.
        settings: `noise` and `dropout` are used.
        rng: the only source of randomness.

    Returns:
        (T, D) float32, a copy.
    """
    rows = features.astype(np.float32)
    if settings.noise and len(rows):
        together, alone = rng.standard_normal((1, rows.shape[1])), rng.standard_normal(rows.shape)
        rows += (settings.noise * rows.std(0) * (together + alone)).astype(np.float32)
    if settings.dropout:
        rows *= rng.random(rows.shape[1]) >= settings.dropout
    return rows


def draw_tiles(positions: NDArray, settings: ViewSettings, rng: np.random.Generator) -> NDArray[np.int64]:
    """Choose the tiles of a view.

    Args:
        positions: (n, 2) (row, column) in tile units.
        settings: `tiles` and `windows` are used.
        rng: the only source of randomness.

    Returns:
        (T,) int64 indices without repeats, in any order; T = min(settings.tiles, n).
    """
    n = len(positions)
    if n <= settings.tiles:
        return np.arange(n)
    if not settings.windows:
        return rng.choice(n, settings.tiles, replace=False)
    free = np.ones(n, bool)
    for share in np.diff(np.linspace(0, settings.tiles, settings.windows + 1).astype(int)):
        centre = positions[rng.choice(np.flatnonzero(free))]
        far = np.abs(positions - centre).max(1)
        far = np.where(free, far + rng.random(n) * 1e-3, np.inf)  # chance decides between tiles at the same distance
        free[np.argpartition(far, share - 1)[:share]] = False
    return np.flatnonzero(~free)


def move_map(positions: NDArray, settings: ViewSettings, rng: np.random.Generator) -> NDArray[np.float32]:
    """Stretch, mirror, turn and shift the map of a view; the shift is below the stride of the encoder, which is 2.

    Args:
        positions: (T, 2) (row, column) in tile units.
        settings: the scales and `any_angle` are used.
        rng: the only source of randomness.

    Returns:
        (T, 2) float32 (row, column) in tile units, perhaps negative.
    """
    turn = rng.uniform(0, 2 * np.pi) if settings.any_angle else np.pi / 2 * rng.integers(4)
    sine, cosine = np.sin(turn), np.cos(turn)
    if not settings.any_angle:  # exact, so that rounding moves no tile across the edge of a site
        sine, cosine = np.round(sine), np.round(cosine)
    stretch = np.diag(rng.uniform(settings.scale_min, settings.scale_max, 2))
    mirror = np.diag([1.0, rng.choice([-1.0, 1.0])])
    matrix = np.array([[cosine, -sine], [sine, cosine]]) @ mirror @ stretch
    middle = np.floor(np.asarray(positions, np.float64)) + 0.5  # the middle of a site is away from its edges
    moved = middle @ matrix.T + rng.integers(0, 2, 2)
    return moved.astype(np.float32)


def collate(views: Sequence[View]) -> ViewBatch:
    """Concatenate views to a batch.

    Args:
        views: (features, positions) of each view; one without tiles keeps its number.

    Returns:
        The batch.
    """
    counts = torch.tensor([len(positions) for _, positions in views])
    features, positions = ([view[side] for view in views] for side in (0, 1))
    return ViewBatch(
        _tensor(features),
        _tensor(positions),
        torch.repeat_interleave(torch.arange(len(views)), counts),
        len(views),
    )


def _tensor(parts: list[NDArray]) -> torch.Tensor:
    # The tiles of one slide may fill half of the memory: a single view is not copied.
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0], np.float32))
