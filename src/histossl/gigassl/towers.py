"""Pretraining on several sources of the same slides, such as two tile encoders or two magnifications.

The two views of a slide are from two different sources, so that the encoders learn what both sources show. Each source
has its own slide encoder, for features of its own length on its own map. The encoders share their convolutions, but not
their batch norms, since the statistics of the sources differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.core.config import fingerprint, to_dict
from histossl.core.errors import SettingsError, TrainingError
from histossl.gigassl.complete import complete
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.encoder_settings import EncoderSettings
from histossl.gigassl.pretrain import hardware, of_length, start_from
from histossl.gigassl.pretrain_settings import PretrainSettings
from histossl.gigassl.pretrain_task import Chunk, PretrainTask, draw_batch, steps_of_an_epoch
from histossl.gigassl.slide_sources import SlideSource, sample_slides, some_slides
from histossl.gigassl.sparse import SparseConv
from histossl.gigassl.views import View, collate, draw_one, draw_pair
from histossl.training.distributed import is_rank_zero
from histossl.training.loop import end_of_training, fit


@dataclass(frozen=True)
class Features:
    """The features of slides from one tile encoder at one magnification: one source.

    Attributes:
        slides: in a fixed order.
        made_of: fingerprint of the features.
        folder: for the slide encoder that is trained on them.
    """

    slides: Sequence[SlideSource]
    made_of: str
    folder: Path


Shown = dict[int, SlideSource]
"""Number of the source -> the slide in that source."""


class Towers(nn.Module):
    """One slide encoder per source; they share convolutions and attention, each has its own inlet and batch norms.

    Args:
        settings: of each encoder; they differ only in `in_dim`.
        seed: of the initial weights.
    """

    def __init__(self, settings: Sequence[EncoderSettings], seed: int = 0) -> None:
        super().__init__()
        self.encoders = [SlideEncoder(own, seed) for own in settings]
        self.each = nn.ModuleList(self.encoders)
        leading, *others = self.encoders
        for other in others:
            other.attention = leading.attention
            for own, shared in zip(_convolutions(other), _convolutions(leading), strict=True):
                own.weight = shared.weight
        self.dim = leading.settings.dim
        self.own = [
            s.contrasted_dim - s.dim for s in settings
        ]  # numbers of each vector that are specific to its source

    @property
    def contrasted_dim(self) -> int:
        """Length of the vectors that are contrasted: the part common to all sources, then the specific part of each."""
        return self.dim + sum(self.own)

    def forward(self, parts: Mapping[int, Chunk], order: Tensor) -> Tensor:
        """Encode views of several sources.

        Args:
            parts: source -> its views, as `SlideEncoder` takes them.
            order: (V,) int64; row i of the result is view `order[i]`, with views numbered source by source.

        Returns:
            (V, contrasted_dim), zeros in the specific parts of the other sources.
        """
        found = []
        for k, encoder in enumerate(self.encoders):
            # Encoders without views run too: in other processes they may have views, and batch norms wait for all.
            vectors = encoder(*parts.get(k, _no_views(encoder)))
            before, after = sum(self.own[:k]), sum(self.own[k + 1 :])
            found.append(torch.cat([vectors[:, : self.dim], F.pad(vectors[:, self.dim :], (before, after))], 1))
        return torch.cat(found)[order]


def _no_views(encoder: SlideEncoder) -> Chunk:
    weight = next(encoder.stage.parameters())
    return weight.new_empty(0, encoder.settings.in_dim), np.empty((0, 2)), np.empty(0, np.int64), 0


def _convolutions(encoder: SlideEncoder) -> list[SparseConv]:
    return [layer for layer in encoder.stage.modules() if isinstance(layer, SparseConv)]


def match(sources: Sequence[Sequence[SlideSource]]) -> list[Shown]:
    """Match the slides of several sources by name.

    Args:
        sources: the slides of each source.

    Returns:
        Each slide once, with the sources that have it, sorted by name.

    Raises:
        TrainingError: no slide is in two of the sources.
    """
    found: dict[str, Shown] = {}
    for k, slides in enumerate(sources):
        for slide in slides:
            found.setdefault(slide.slide_id, {})[k] = slide
    if all(len(shown) == 1 for shown in found.values()):
        one, other = (next(iter(slides)).slide_id if slides else "nothing" for slides in sources[:2])
        raise TrainingError(f"no slide is in two sources: {one!r} here, {other!r} there", "give files the same names")
    return [found[name] for name in sorted(found)]


def draw_across(
    epoch: int, slides: NDArray, shown: Sequence[Shown], settings: PretrainSettings
) -> tuple[dict[int, Chunk], Tensor]:
    """Draw two views of each of some slides: from two random sources, or both from the only source of a slide.

    Two views of one source share the effect of the stain on its tile encoder, so they are avoided where possible.

    Args:
        epoch: seeds the draws, with the slide's number.
        slides: (B,) int, numbers of slides in `shown`.
        shown: from `match`.
        settings: of the pretraining; `seed` and `view` are used.

    Returns:
        The arguments of `Towers.forward`: the views of each source, and the order, in which the first views of all
        slides come before the second ones.
    """
    pairs: list[list[tuple[int, View]]] = []
    for k in slides.tolist():
        rng, slide = np.random.default_rng([settings.seed, epoch, k]), shown[int(k)]
        sources = list(slide)
        if len(sources) == 1:
            views = draw_pair(*slide[sources[0]].load(), settings.view, rng)
            pairs.append([(sources[0], view) for view in views])
        else:
            chosen = rng.permutation(sources)[:2].tolist()
            pairs.append([(source, draw_one(*slide[source].load(), settings.view, rng)) for source in chosen])
    return _by_source([one for one, _ in pairs] + [other for _, other in pairs])


def _by_source(views: Sequence[tuple[int, View]]) -> tuple[dict[int, Chunk], Tensor]:
    sources = np.array([source for source, _ in views])
    parts: dict[int, Chunk] = {}
    for source in np.unique(sources).tolist():
        batch = collate([view for of, view in views if of == source])
        parts[source] = batch.features, batch.positions.numpy(), batch.views.numpy(), batch.size
    # The inner argsort sorts the views by source; its inverse is the row of each view in the sorted list.
    return parts, torch.from_numpy(np.argsort(np.argsort(sources, kind="stable")))


def pretrain_towers(sources: Sequence[Features], settings: PretrainSettings, logs: Path, device: str = "auto") -> None:
    """Train one slide encoder per source together, and write each to its folder, whole or not at all.

    Each encoder can be loaded and used alone. For a slide in several sources, training makes the first
    `settings.encoder.dim` numbers of the vectors agree.

    Args:
        sources: two or more, in a fixed order; slides are matched by name and need not be in all sources.
        settings: of the training; `encoder.in_dim` is replaced by the length of each source's features, and the arch
            `neighbours`, which makes nothing of a second source, by `sparse` with its usual inlet.
        logs: folder of log.csv, TensorBoard's files and checkpoints.
        device: auto, cpu or cuda.

    Raises:
        TrainingError: there are fewer than two slides, no slide is in two sources, or a loss is not finite.
        FileFormatError: features are damaged or of different encoders in one source, or the weights to start from are
            of another network.
    """
    if settings.negatives == "site":
        raise SettingsError("pretrain.negatives is site, of several sources", "train on one source, or take all")
    if settings.encoder.arch == "neighbours":
        settings = replace(settings, encoder=replace(settings.encoder, arch="sparse", inlet="centred"))
    shown = match([source.slides for source in sources])
    per_epoch = steps_of_an_epoch([next(iter(slide.values())).slide_id for slide in shown], settings)
    each = [of_length(settings, source.slides) for source in sources]
    towers = Towers([own.encoder for own in each], settings.seed)
    started = [start_from(encoder, settings.start, None) for encoder in towers.encoders]
    where, dtype = hardware(device, settings.precision)
    names = [[slide.slide_id for slide in source.slides] for source in sources]
    made = fingerprint(list(map(to_dict, each)), [source.made_of for source in sources], names, dtype, started)
    task = PretrainTask(settings, towers, towers.contrasted_dim)
    outcome = fit(
        task,
        lambda step: draw_batch(step, per_epoch, shown, settings, draw_across),
        settings.schedule(len(shown)),
        logs,
        made,
        where,
        dtype,
        about={"fingerprint": made, "sources": [to_dict(own) for own in each], "slides": len(shown)},
        measure=task.measure,
        best=settings.keep == "best",
    )
    if is_rank_zero():
        for k, (encoder, source) in enumerate(zip(towers.encoders, sources, strict=True)):
            sample = sample_slides(source.slides, settings.seed)
            rival = complete(encoder, sample, partial(some_slides, source.slides, settings.seed), settings.seed)
            about = {"fingerprint": fingerprint(made, k), "features": source.made_of, "slides": names[k]}
            about |= {"pretrain": to_dict(each[k]), "start": started[k], "training": vars(outcome)}
            encoder.save(source.folder, about, rival)
        end_of_training(logs)
