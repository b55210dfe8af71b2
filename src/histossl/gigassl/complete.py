"""What a trained slide encoder gets from the whole cohort: prototypes, the scale of its parts, its untrained rival."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histossl.gigassl.embed import fit_parts
from histossl.gigassl.encoder import SlideEncoder
from histossl.training.distributed import by_itself

Slides = Callable[[], Iterable[tuple[str, NDArray[np.float32], NDArray[np.float32]]]]
"""Name, features (N, D) and positions (N, 2) of slides, un-augmented, anew at each call."""


def complete(
    encoder: SlideEncoder, sample: Iterable[tuple[Tensor, NDArray]], slides: Slides, seed: int
) -> SlideEncoder:
    """Give a trained encoder its prototypes and the scale of its parts, and make its rival.

    Args:
        encoder: trained; left in evaluation mode.
        sample: some tiles of the cohort, as `SlideEncoder.fit_prototypes` takes them.
        slides: of the cohort.
        seed: of the prototypes, and of the weights that the training began with at random.

    Returns:
        The rival, like for like: the same prototypes and the same mean of the tiles, and a stage with the random
        weights of that seed, whose batch norms have the statistics of the cohort and whose prototypes are found in the
        same way. Scaled in the same way.
    """
    encoder.eval()
    if encoder.settings.arch == "neighbours":  # its training sees disturbed tiles, and not their mean
        settle_norms(encoder, slides())
    sample = list(sample)
    encoder.fit_prototypes(sample, seed)
    fit_parts(encoder, slides())
    rival = SlideEncoder(encoder.settings, seed=seed).to(next(encoder.parameters()).device)
    settle_norms(rival, slides())
    if rival.tile_norm is not None and encoder.tile_norm is not None:
        rival.tile_norm.load_state_dict(encoder.tile_norm.state_dict())
    rival.fit_prototypes(sample, seed, tiles_of=encoder)
    rival.eval()
    fit_parts(rival, slides())
    return rival


@torch.no_grad()
def settle_norms(
    encoder: SlideEncoder,
    slides: Iterable[tuple[str, NDArray[np.float32], NDArray[np.float32]]],
    count: int = 64,
    tiles: int = 1024,
) -> None:
    """Give the batch norms of an encoder the statistics of some slides; no weight changes.

    Args:
        encoder: changed in place, and in evaluation mode afterwards.
        slides: name, features (N, D) float32 and positions (N, 2) float32, in tile units, of each slide.
        count: slides at most.
        tiles: of each slide at most, its first ones.
    """
    features, positions, views = [], [], []
    for (_, rows, places), k in zip(slides, range(count), strict=False):
        features.append(rows[:tiles])
        positions.append(places[:tiles])
        views.append(np.full(len(features[-1]), k))
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm1d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    if sum(map(len, features)) > 1:
        encoder.train()
        device = next(encoder.parameters()).device
        given = torch.from_numpy(np.concatenate(features)).float().to(device)
        with by_itself():  # the first of several processes does this alone
            encoder(given, np.concatenate(positions), np.concatenate(views), len(features))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    encoder.eval()
