"""A view of a slide: some of its tiles, on a map that is turned, mirrored and stretched.

Everything is in tile units: neighbouring tiles are 1 apart, positions are (row, column), in training as at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from histossl.core.errors import SettingsError


@dataclass(frozen=True)
class ViewSettings:
    """How a view is drawn.

    Attributes:
        tiles: T, tiles in a view; all of them where there are fewer.
        windows: 0 draws the tiles at random, as the paper does; w >= 1 draws w random tiles and as many neighbours of
            each as make T, so that tiles meet on the map as they do at inference.
        scale_min: least of the factors, uniform and independent, by which rows and columns are stretched; below 1
            neighbours fall on one site and are averaged.
        scale_max: greatest of them; above 1 neighbours come apart.
        any_angle: turn by any angle; otherwise by quarters, which keep neighbours neighbours.
        share: where a slide comes without pixel augmentations, at most this share of its tiles are in one view, so that
            two views of a small slide differ.
        dropout: there, the share of the features that are zero in all tiles of a view.
        noise: there, how far a view's features are moved, in their standard deviations over the view: by as much all
            tiles together, as another stain would, and each tile for itself.
    """

    tiles: int = 256
    windows: int = 1
    scale_min: float = 1.0
    scale_max: float = 1.0
    any_angle: bool = False
    share: float = 0.7
    dropout: float = 0.1
    noise: float = 0.1

    def __post_init__(self) -> None:
        if self.tiles < 1 or not 0 <= self.windows <= self.tiles:
            raise SettingsError(
                f"a view has tiles >= 1 and 0 <= windows <= tiles, got tiles {self.tiles}, windows {self.windows}"
            )
        if not 0 < self.scale_min <= self.scale_max < np.inf:
            raise SettingsError(f"scales must be 0 < min <= max, got {self.scale_min} and {self.scale_max}")
        if not (0 < self.share <= 1 and 0 <= self.dropout < 1 and 0 <= self.noise < np.inf):
            raise SettingsError(
                f"a view needs share in (0, 1], dropout in [0, 1) and noise >= 0, got {self.share}, {self.dropout} "
                f"and {self.noise}"
            )


@dataclass(frozen=True)
class ViewBatch:
    """Views side by side.

    Attributes:
        features: (N, D) float32, the tiles of all views.
        positions: (N, 2) float32 (row, column) in tile units.
        views: (N,) int64, ascending: the view that each tile is of.
        size: number of views; one without tiles counts.
    """

    features: torch.Tensor
    positions: torch.Tensor
    views: torch.Tensor
    size: int


View = tuple[NDArray, NDArray]  # features (T, D) as stored, positions (T, 2) float32 in tile units


def draw_view(features: NDArray, positions: NDArray, settings: ViewSettings, rng: np.random.Generator) -> View:
    """Draw tiles and move their map.

    Args:
        features: (n, D); only the drawn rows are read, so a memory map will do.
        positions: (n, 2) (row, column) in tile units.
        settings: how.
        rng: the only source of chance.

    Returns:
        features (T, D) of the same dtype and positions (T, 2) float32; T = min(settings.tiles, n).
    """
    chosen = np.sort(draw_tiles(positions, settings, rng))
    return np.asarray(features[chosen]), move_map(positions[chosen], settings, rng)


def draw_pair(
    features: NDArray, positions: NDArray, settings: ViewSettings, rng: np.random.Generator
) -> tuple[View, View]:
    """Two views of a slide for a positive pair: under two different pixel augmentations where it has several, and
    otherwise of two samples of its tiles with their features disturbed.

    Args:
        features: (K, n, D), the tiles under K augmentations.
        positions: (K, n, 2) (row, column) in tile units.
        settings: how a view is drawn.
        rng: the only source of chance.
    """
    count = len(features)
    if count == 1:
        views = [draw_view(features[0], positions[0], _fewer(settings, features.shape[1]), rng) for _ in range(2)]
        one, other = [(disturb(rows, settings, rng), places) for rows, places in views]
        return one, other
    first, second = rng.choice(count, 2, replace=False)
    one = draw_view(features[first], positions[first], settings, rng)
    return one, draw_view(features[second], positions[second], settings, rng)


def draw_one(features: NDArray, positions: NDArray, settings: ViewSettings, rng: np.random.Generator) -> View:
    """One view of a slide whose partner comes from another source: arguments, and what is done, as of `draw_pair`."""
    if len(features) > 1:
        chosen = rng.integers(len(features))
        return draw_view(features[chosen], positions[chosen], settings, rng)
    rows, places = draw_view(features[0], positions[0], _fewer(settings, features.shape[1]), rng)
    return disturb(rows, settings, rng), places


def _fewer(settings: ViewSettings, tiles: int) -> ViewSettings:
    """Settings of views that show no more than their share of so many tiles."""
    most = max(1, round(settings.share * tiles))
    return replace(settings, tiles=min(settings.tiles, most), windows=min(settings.windows, settings.tiles, most))


def disturb(features: NDArray, settings: ViewSettings, rng: np.random.Generator) -> NDArray[np.float32]:
    """Features (T, D) of a view, some of them dropped and all of them moved; see `ViewSettings`."""
    rows = features.astype(np.float32)
    if settings.noise and len(rows):
        together, alone = rng.standard_normal((1, rows.shape[1])), rng.standard_normal(rows.shape)
        rows += (settings.noise * rows.std(0) * (together + alone)).astype(np.float32)
    if settings.dropout:
        rows *= rng.random(rows.shape[1]) >= settings.dropout
    return rows


def draw_tiles(positions: NDArray, settings: ViewSettings, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices (T,) of the tiles of a view, each at most once, in no order."""
    n = len(positions)
    if n <= settings.tiles:
        return np.arange(n)
    if not settings.windows:
        return rng.choice(n, settings.tiles, replace=False)
    free = np.ones(n, bool)
    for share in np.diff(np.linspace(0, settings.tiles, settings.windows + 1).astype(int)):
        centre = positions[rng.choice(np.flatnonzero(free))]
        far = np.abs(positions - centre).max(1)
        far = np.where(free, far + rng.random(n) * 1e-3, np.inf)  # chance decides between equally far ones
        free[np.argpartition(far, share - 1)[:share]] = False
    return np.flatnonzero(~free)


def move_map(positions: NDArray, settings: ViewSettings, rng: np.random.Generator) -> NDArray[np.float32]:
    """Stretch, mirror, turn and shift positions (T, 2) of one map; the shift is below the stride of the encoder."""
    turn = rng.uniform(0, 2 * np.pi) if settings.any_angle else np.pi / 2 * rng.integers(4)
    sine, cosine = np.sin(turn), np.cos(turn)
    if not settings.any_angle:  # exact, so that no tile falls to the wrong side of a site's edge
        sine, cosine = np.round(sine), np.round(cosine)
    stretch = np.diag(rng.uniform(settings.scale_min, settings.scale_max, 2))
    mirror = np.diag([1.0, rng.choice([-1.0, 1.0])])
    matrix = np.array([[cosine, -sine], [sine, cosine]]) @ mirror @ stretch
    middle = np.floor(np.asarray(positions, np.float64)) + 0.5  # the middle of a site stays clear of its edges
    moved = middle @ matrix.T + rng.integers(0, 2, 2)
    return moved.astype(np.float32)


def collate(views: Sequence[View]) -> ViewBatch:
    """Put views side by side; a view without tiles keeps its place."""
    counts = torch.tensor([len(positions) for _, positions in views])
    features, positions = ([view[side] for view in views] for side in (0, 1))
    return ViewBatch(
        _tensor(features),
        _tensor(positions),
        torch.repeat_interleave(torch.arange(len(views)), counts),
        len(views),
    )


def _tensor(parts: list[NDArray]) -> torch.Tensor:
    # The tiles of one slide may fill half of the memory: one view alone is not copied.
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0], np.float32))
