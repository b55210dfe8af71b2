"""A slide encoder and the tiles of a slide in, the slide's vector out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from histossl.config import number_of
from histossl.errors import SettingsError
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.views import ViewSettings, collate, draw_tiles

# Bounds the memory of a pass: views are grouped up to this many tiles.
TILES_A_PASS = 8192


@dataclass(frozen=True)
class EmbedSettings:
    """How a slide's vector is made.

    Args:
        views: R, random views of un-augmented tiles that are averaged; 0 is one pass over all tiles, and so is any R
            where a view holds all tiles of a slide.
        seed: of the views.
    """

    views: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.views < 0:
            raise SettingsError(f"embed.views must not be negative, got {self.views}")


@torch.inference_mode()
def embed_slide(
    encoder: SlideEncoder,
    features: NDArray[np.float32],
    positions: NDArray[np.float32],
    view: ViewSettings,
    settings: EmbedSettings,
    slide_id: str,
) -> NDArray[np.float32]:
    """The mean over R views of un-augmented tiles, then the L2 norm.

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
    rng = np.random.default_rng([settings.seed, number_of(slide_id)])
    if settings.views == 0:
        view = replace(view, tiles=len(features), windows=0)
    count = settings.views if len(features) > view.tiles else 1
    a_pass = max(1, TILES_A_PASS // min(view.tiles, len(features)))
    device = next(encoder.parameters()).device
    total = torch.zeros(encoder.settings.vector_dim)
    for start in range(0, count, a_pass):
        chosen = [np.sort(draw_tiles(positions, view, rng)) for _ in range(min(a_pass, count - start))]
        batch = collate([(features[rows], positions[rows]) for rows in chosen])
        vectors = encoder(batch.features.to(device), batch.positions.numpy(), batch.views.numpy(), batch.size)
        total += vectors.float().sum(dim=0).cpu()
    return torch.nn.functional.normalize(total, dim=0).numpy()


def mean_pool(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean of a slide's tile features (N, D): the baseline that a slide encoder has to beat."""
    return features.mean(axis=0, dtype=np.float64).astype(np.float32)
