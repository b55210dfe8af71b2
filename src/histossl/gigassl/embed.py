"""A slide encoder and the tiles of a slide in, the slide's vector out; and what every tile gives to a score of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from histossl.core.config import number_of
from histossl.gigassl.embed_settings import EmbedSettings
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.prototypes import Counted
from histossl.gigassl.views import ViewBatch, ViewSettings, collate, draw_tiles
from histossl.training.device import pick_dtype

# Bounds the memory of a pass: views are grouped up to this many tiles.
TILES_A_PASS = 8192


@torch.inference_mode()
def embed_slide(
    encoder: SlideEncoder,
    features: NDArray[np.float32],
    positions: NDArray[np.float32],
    view: ViewSettings,
    settings: EmbedSettings,
    slide_id: str,
) -> NDArray[np.float32]:
    """The mean over R views of un-augmented tiles, the shares of prototypes in the whole slide, then the L2 norm.

    Args:
        encoder: in evaluation mode.
        features: (N, D), all tiles of the slide.
        positions: (N, 2) (row, column) in tile units.
        view: how many tiles a view has and whether they lie in windows: as in training.
        settings: R and the seed.
        slide_id: the views depend on it and on the seed, not on the other slides.

    Returns:
        (vector_dim,) of length 1.
    """
    whole = encoder.whole(*_seen(encoder, features, positions, view, settings, slide_id))
    return torch.nn.functional.normalize(whole, dim=0).numpy()


@torch.inference_mode()
def fit_parts(
    encoder: SlideEncoder, slides: Iterable[tuple[str, NDArray[np.float32], NDArray[np.float32]]], tiles: int = 4096
) -> None:
    """Bring the parts of an encoder's vectors to one scale over a cohort; nothing where they stand as they are.

    Args:
        encoder: in evaluation mode, with its prototypes.
        slides: name, features (N, D) and positions (N, 2) of each, un-augmented.
        tiles: of a slide that are looked at, at most, in one window.
    """
    if encoder.parts is None:
        return
    view, once = ViewSettings(tiles=tiles, windows=1), EmbedSettings(views=1)
    found = [encoder.joined(*_seen(encoder, xs, at, view, once, name)) for name, xs, at in slides]
    encoder.parts.fit(torch.stack(found))


def _seen(
    encoder: SlideEncoder,
    features: NDArray[np.float32],
    positions: NDArray[np.float32],
    view: ViewSettings,
    settings: EmbedSettings,
    slide_id: str,
) -> tuple[torch.Tensor, Counted | None]:
    """(contrasted_dim,) the mean over the views, and the prototypes counted in the whole slide."""
    passes = _passes(encoder, features, positions, view, settings, slide_id)
    mean = _mean(_vectors(encoder, batch, settings) for batch, _ in passes)
    return mean, encoder.counted(_on_device(encoder, features), positions)


@dataclass(frozen=True)
class Shares:
    """What every tile of a slide gives to linear scores of its vector.

    Attributes:
        vector: (vector_dim,) float32, as `embed_slide` makes it.
        shares: (N, C) float64; they add up to the vector times the scores' weights.
        looked_at: (N,) float64, the part of what was looked at that a tile took, 0 where none did; they add up to 1.
    """

    vector: NDArray[np.float32]
    shares: NDArray[np.float64]
    looked_at: NDArray[np.float64]


@torch.inference_mode()
def explain_slide(
    encoder: SlideEncoder,
    features: NDArray[np.float32],
    positions: NDArray[np.float32],
    view: ViewSettings,
    settings: EmbedSettings,
    slide_id: str,
    weights: NDArray,
) -> Shares:
    """The exact share of every tile in scores of the slide's vector: the vector is a mean over sites of views.

    Args:
        encoder: the slide encoder, in evaluation mode.
        features: (N, D) float32 of the slide's tiles.
        positions: (N, 2) float32 in tile units, (x, y).
        view: how views are drawn.
        settings: how many views, and in which precision.
        slide_id: seeds the views.
        weights: (vector_dim, C) of C scores.
    """
    given, added = torch.from_numpy(np.asarray(weights, np.float64)), torch.zeros(())
    if encoder.parts is not None:
        given, added = encoder.parts.directions(given)
    split = encoder.settings.contrasted_dim
    directions, rest = (part.float().to(_device(encoder)) for part in (given[:split], given[split:]))
    vectors: list[torch.Tensor] = []
    shares, seen = np.zeros((len(features), weights.shape[1])), np.zeros(len(features))
    for batch, rows in _passes(encoder, features, positions, view, settings, slide_id):
        vectors.append(_vectors(encoder, batch, settings))
        with _autocast(encoder, settings):
            tiles = batch.features.to(_device(encoder))
            found = encoder.tile_shares(tiles, batch.positions.numpy(), batch.views.numpy(), batch.size, directions)
        np.add.at(shares, rows, found.double().cpu().numpy())
        np.add.at(seen, rows, 1)
    shares /= sum(map(len, vectors))
    counted = encoder.counted(_on_device(encoder, features), positions)
    if counted is not None:
        shares += counted.tile_shares(rest).double().cpu().numpy()
        seen += 1  # they look at every tile
    whole = encoder.whole(_mean(vectors), counted)
    length = max(float(whole.norm()), 1e-12)  # as of `normalize`
    vector = torch.nn.functional.normalize(whole, dim=0).numpy()
    looked_at = seen / max(1, seen.sum())
    # What the cohort's mean would get belongs to no tile: each takes of it as much as it was looked at.
    return Shares(vector, (shares + looked_at[:, None] * added.numpy()) / length, looked_at)


def _mean(vectors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Over all rows of all (R, d)."""
    total, count = torch.zeros(()), 0
    for part in vectors:
        total = total + part.sum(dim=0)
        count += len(part)
    return total / count


def _on_device(encoder: SlideEncoder, features: NDArray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(features, np.float32)).to(_device(encoder))


def _passes(
    encoder: SlideEncoder,
    features: NDArray[np.float32],
    positions: NDArray[np.float32],
    view: ViewSettings,
    settings: EmbedSettings,
    slide_id: str,
) -> Iterator[tuple[ViewBatch, NDArray[np.int64]]]:
    """The views of a slide, as many in a batch as its memory allows, and which tile each of their tiles is."""
    rng = np.random.default_rng([settings.seed, number_of(slide_id)])
    if settings.views == 0:
        view = replace(view, tiles=max(1, len(features)), windows=0)
    count = settings.views if len(features) > view.tiles else 1
    a_pass = max(1, TILES_A_PASS // max(1, min(view.tiles, len(features))))
    for start in range(0, count, a_pass):
        chosen = [np.sort(draw_tiles(positions, view, rng)) for _ in range(min(a_pass, count - start))]
        whole = len(chosen[0]) == len(features)  # then as they are, without a copy
        views = [(features, positions) if whole else (features[rows], positions[rows]) for rows in chosen]
        if encoder.settings.hard_border:  # in the published code a view begins at its own first row and column
            views = [(tiles, places - np.floor(places.min(0, initial=np.inf))) for tiles, places in views]
        yield collate(views), np.concatenate(chosen)


def _vectors(encoder: SlideEncoder, batch: ViewBatch, settings: EmbedSettings) -> torch.Tensor:
    with _autocast(encoder, settings):
        tiles = batch.features.to(_device(encoder))
        return encoder(tiles, batch.positions.numpy(), batch.views.numpy(), batch.size).float().cpu()


def _device(encoder: SlideEncoder) -> torch.device:
    return next(encoder.parameters()).device


def _autocast(encoder: SlideEncoder, settings: EmbedSettings) -> torch.autocast:
    device = _device(encoder)
    dtype = pick_dtype(settings.precision, device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def mean_pool(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean of a slide's tile features: the baseline for a slide encoder.

    Args:
        features: (N, D) float32.

    Returns:
        (D,) float32.
    """
    return features.mean(axis=0, dtype=np.float64).astype(np.float32)
