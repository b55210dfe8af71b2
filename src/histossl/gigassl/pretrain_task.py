"""One training step of the slide encoder: its batch of view pairs, the projector and the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histossl.core.errors import TrainingError
from histossl.gigassl.chunked import encode_twice
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.gauges import effective_rank, gauges
from histossl.gigassl.layers import Projector
from histossl.gigassl.neighbours import foretelling, functions
from histossl.gigassl.pretrain_settings import PretrainSettings
from histossl.gigassl.slide_sources import SlideSource
from histossl.gigassl.views import collate, disturb, draw_pair, draw_view
from histossl.training.distributed import gather, rank_and_world_size, rank_counts
from histossl.training.losses import nt_xent

# As `SlideEncoder` takes it: n first views, then their n partners.
Chunk = tuple[Tensor, NDArray, NDArray, int]


class PretrainTask(nn.Module):
    """The slide encoder, its projector and the loss of a batch of pairs.

    Args:
        settings: of the training.
        encoder: of chunks of views; by default a `SlideEncoder` with `settings.encoder`.
        dim: length of its vectors.
    """

    def __init__(self, settings: PretrainSettings, encoder: nn.Module | None = None, dim: int = 0) -> None:
        super().__init__()
        self.encoder = encoder or SlideEncoder(settings.encoder, seed=settings.seed)
        self.projector = Projector(dim or settings.encoder.contrasted_dim, seed=settings.seed)
        self.temperature = settings.temperature
        self.last: tuple[Tensor, int] | None = None

    def forward(self, batch: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a whole batch.

        Several chunks pass the encoder one after the other and again in the backward pass, so that only one of them
        and all slide vectors are in memory at a time (Gao et al., RepL4NLP 2021); the encoder's batch norms then take
        the statistics of a chunk.

        Args:
            batch: this process's chunks as of `draw_batch`, and the number of pairs in all processes; optionally the
                groups of all pairs, as `nt_xent` takes them.

        Returns:
            The scalar loss of all pairs, and the gauges by name.
        """
        chunks, pairs, *groups = batch
        encode = self.encoder if len(chunks) == 1 else partial(encode_twice, self.encoder)
        halves = [encode(*chunk).chunk(2) for chunk in chunks]
        vectors = torch.cat([one for one, _ in halves] + [other for _, other in halves])
        a, b = gather_pairs(self.projector(vectors), pairs)
        self.last = vectors.detach(), pairs
        return nt_xent(a, b, self.temperature, *groups), gauges(a.detach(), b.detach())

    def measure(self) -> dict[str, Tensor]:
        """What is too costly to measure at every step: the effective rank of the last batch's slide vectors."""
        assert self.last is not None
        return {"effective_rank": effective_rank(torch.cat(gather_pairs(*self.last)))}


class Moments(nn.Module):
    """An encoder of the arch `neighbours` as its loss sees it.

    Args:
        encoder: whose `moments` a call gives.
    """

    def __init__(self, encoder: SlideEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, *chunk: Any) -> Tensor:
        """`SlideEncoder.moments` of a chunk."""
        return self.encoder.moments(*chunk)


class NeighbourTask(nn.Module):
    """A slide encoder of the arch `neighbours`, and the loss of a batch of views, one of each slide.

    Args:
        encoder: of that arch.
    """

    def __init__(self, encoder: SlideEncoder) -> None:
        super().__init__()
        self.moments = Moments(encoder)
        self.last = torch.zeros(())

    def forward(self, batch: tuple[tuple[Chunk, ...], int]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a whole batch; chunks, where there are several, as in `PretrainTask.forward`.

        Args:
            batch: this process's chunks as of `draw_batch`, and the number of slides in all processes.

        Returns:
            The scalar loss over all sites, and the gauges by name.
        """
        chunks, _ = batch
        encode = self.moments if len(chunks) == 1 else partial(encode_twice, self.moments)
        own = torch.stack([encode(*chunk) for chunk in chunks]).sum(0)
        every = gather(own[None], [1] * rank_and_world_size()[1]).sum(0)
        self.last = every.detach()
        return foretelling(every)

    def measure(self) -> dict[str, Tensor]:
        """What is too costly to measure at every step: the effective number of functions of a tile."""
        return {"effective_rank": functions(self.last)}


def gather_pairs(views: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """The two views of all pairs, from those of each process.

    Args:
        views: (2n, d) of this process: n first views, then their n partners.
        pairs: number of pairs in all processes.

    Returns:
        First views (pairs, d) and their partners (pairs, d).
    """
    a, b = gather(torch.cat(views.chunk(2), dim=1), rank_counts(pairs)).chunk(2, dim=1)
    return a, b


def steps_of_an_epoch(names: Sequence[str], settings: PretrainSettings) -> int:
    """The batches in which every slide occurs once.

    Args:
        names: of the slides.
        settings: of the training.

    Returns:
        Number of batches.

    Raises:
        TrainingError: too few slides for a contrast, or for the processes that train.
    """
    if len(names) < 2:
        only = names[0] if names else "nothing"
        raise TrainingError(f"{len(names)} slide to learn from ({only})", "give two or more")
    per_epoch, processes = math.ceil(len(names) / settings.batch), rank_and_world_size()[1]
    if len(names) // per_epoch < processes:
        raise TrainingError(
            f"{processes} processes for batches of {len(names) // per_epoch} slides",
            "start as many as slides, or fewer",
        )
    return per_epoch


def draw_chunk(epoch: int, slides: NDArray, sources: Sequence[SlideSource], settings: PretrainSettings) -> Chunk:
    """Two views of each of some slides.

    Args:
        epoch: from 0 on.
        slides: (n,) integers, which of `sources`.
        sources: all slides.
        settings: of the training.

    Returns:
        Of 2n views, n first ones and then their partners: features (M, D), positions (M, 2) in tile units, the view
        (M,) of each tile, and 2n.

    Raises:
        FileFormatError: features or views of a slide are absent or damaged.
    """
    pairs = []
    for k in slides:
        features, positions = sources[k].load()
        rng = np.random.default_rng([settings.seed, epoch, int(k)])
        pairs.append(draw_pair(features, positions, settings.view, rng))
    batch = collate([one for one, _ in pairs] + [other for _, other in pairs])
    # Positions stay on the CPU, where the kernel maps are built.
    return batch.features, batch.positions.numpy(), batch.views.numpy(), batch.size


def draw_windows(epoch: int, slides: NDArray, sources: Sequence[SlideSource], settings: PretrainSettings) -> Chunk:
    """One view of each of some slides, a quarter as large as the views that make a slide's vector.

    Only near tiles foretell one another, so that many small views teach more than few large ones. Half of them are not
    augmented, where such tiles are kept: a slide's vector is of un-augmented tiles, and what tells rare tissue, such as
    fine texture, does not survive every augmentation; the other half teaches what does not depend on the stain.

    Args:
        epoch: from 0 on.
        slides: (n,) integers, which of `sources`.
        sources: all slides.
        settings: of the training.

    Returns:
        As of `draw_chunk`, n views.

    Raises:
        FileFormatError: features or views of a slide are absent or damaged.
    """
    few = max(1, settings.view.tiles // 4)
    view = replace(settings.view, tiles=few, windows=min(settings.view.windows, few))
    views = []
    for k in slides:
        features, positions = sources[k].load()
        rng = np.random.default_rng([settings.seed, epoch, int(k)])
        chosen, plain = rng.integers(len(features)), sources[k].plain(features)
        if plain is not None and rng.random() < 0.5:
            features = plain
        rows, moved = draw_view(features[chosen], positions[chosen], view, rng)
        views.append((disturb(rows, view, rng), moved))
    batch = collate(views)
    return batch.features, batch.positions.numpy(), batch.views.numpy(), batch.size


def draw_batch(
    step: int,
    per_epoch: int,
    slides: Sequence[Any],
    settings: PretrainSettings,
    draw: Callable[[int, NDArray, Any, PretrainSettings], tuple] = draw_chunk,
) -> tuple[tuple[Any, ...], int]:
    """This process's chunks of one step, and the pairs of all processes: a function of seed and step alone.

    Every slide comes once an epoch, none is dropped. What is drawn of a slide does not depend on who draws it.

    Args:
        step: from 0 on.
        per_epoch: steps in which all slides come.
        slides: in a fixed order.
        settings: of the training.
        draw: (epoch, numbers of slides, slides, settings) -> their views as the encoder takes them.
    """
    epoch, together = step // per_epoch, slides_of(step, per_epoch, len(slides), settings)
    rank, processes = rank_and_world_size()
    mine = together[rank::processes]
    # As many chunks in each process, since they meet in every one, and none empty.
    count = math.ceil(len(together) // processes / settings.chunk) if settings.chunk else 1
    return tuple(draw(epoch, k, slides, settings) for k in np.array_split(mine, count)), len(together)


def slides_of(step: int, per_epoch: int, slides: int, settings: PretrainSettings) -> NDArray[np.int64]:
    """The slides of one step, of all processes: a function of seed and step alone.

    Args:
        step: from 0 on.
        per_epoch: steps in which all slides come.
        slides: number of slides.
        settings: of the training.

    Returns:
        Their numbers, in random order; process r of P has every P-th from the r-th on.
    """
    epoch, part = divmod(step, per_epoch)
    order = np.random.default_rng([settings.seed, epoch]).permutation(slides)
    return np.array_split(order, per_epoch)[part]


def sites_of_step(sites: Sequence[str], step: int, per_epoch: int, settings: PretrainSettings) -> tuple[Tensor, ...]:
    """The sites of the slides of one step, as `PretrainTask` takes them, in the order in which pairs are gathered.

    Args:
        sites: of all slides; empty where slides of all sites are contrasted.
        step: from 0 on.
        per_epoch: steps in which all slides come.
        settings: of the training.

    Returns:
        (pairs,) int64, or nothing.
    """
    if not sites:
        return ()
    processes = rank_and_world_size()[1]
    together = slides_of(step, per_epoch, len(sites), settings)
    gathered = np.concatenate([together[rank::processes] for rank in range(processes)])
    return (torch.from_numpy(np.unique(sites, return_inverse=True)[1][gathered].astype(np.int64)),)
