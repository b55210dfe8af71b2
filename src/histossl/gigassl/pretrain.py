"""Slides without labels in, a slide encoder out: two views of a slide should agree, those of others not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histossl import store
from histossl.config import fingerprint, to_dict
from histossl.console import say
from histossl.encoders.foreign import hash_of
from histossl.encoders.resnet import state_of
from histossl.encoders.zoo import pick_device, pick_dtype, read_weights
from histossl.errors import FileFormatError, SettingsError, TrainingError
from histossl.geometry import tile_units
from histossl.gigassl.chunked import encode_twice
from histossl.gigassl.complete import complete
from histossl.gigassl.encoder import EncoderSettings, SlideEncoder
from histossl.gigassl.gauges import effective_rank, gauges
from histossl.gigassl.layers import Projector
from histossl.gigassl.views import ViewSettings, collate, draw_pair
from histossl.losses import nt_xent
from histossl.parallel import first, gather, place, shares
from histossl.train import Schedule, end_of_training, fit

MANY = 2000  # slides, at most, whose vectors tell the scale of their parts
SAMPLE = 100_000  # tiles, about: statistics of a cohort are taken of so many


@dataclass(frozen=True)
class PretrainSettings:
    """Self-supervised learning of slides.

    Args:
        epochs: times that every slide is seen.
        batch: B, slides a step, all of them where there are fewer; each gives two views.
        rate: Adam's highest learning rate.
        rate_batch: the batch that `rate` is meant for: others take more or less in proportion; 0 takes it as it is.
        warmup: share of the training in which the rate rises; from 1 on, the number of epochs.
        weight_decay: on matrices and kernels, decoupled.
        temperature: of NT-Xent.
        chunk: slides (or one more) that are in memory at once with all that their gradient needs, in each process; 0:
            the batch.
        patience: share of the training over which nothing may move before it is ended early; 0: never. See `Schedule`.
        keep: what becomes the slide encoder: the `last` weights, or the `best`: those of the lowest loss where the
            last have clearly fallen behind them, as after a collapse.
        precision: auto (bfloat16 where the hardware multiplies it natively), float32 or bfloat16.
        seed: of the initial weights, the order of the slides and the views.
        start: what the slide encoder begins with: random weights, `tile-encoder` (the fourth stage of the tile encoder
            where that is a whole ResNet-18, else random), or ResNet-18 weights: a .safetensors file or `pickle:FILE`.
        view: how a view is drawn.
        encoder: what the slide encoder is made of; `in_dim` follows the features.
    """

    epochs: int = 200
    batch: int = 256
    rate: float = 1e-3
    rate_batch: int = 0
    warmup: float = 0.05
    weight_decay: float = 0.0
    temperature: float = 0.1
    chunk: int = 0
    patience: float = 0.25
    keep: str = "best"
    precision: str = "auto"
    seed: int = 0
    start: str = "random"
    view: ViewSettings = field(default_factory=ViewSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2:
            raise SettingsError(f"pretrain needs epochs >= 1 and batch >= 2, got {self.epochs} and {self.batch}")
        if not (self.rate > 0 and self.temperature > 0 and self.warmup >= 0 and self.rate_batch >= 0):
            raise SettingsError("pretrain needs rate > 0, temperature > 0, rate_batch >= 0 and warmup >= 0")

        if self.chunk < 0 or not 0 <= self.patience <= 1 or self.keep not in ("last", "best"):
            raise SettingsError("pretrain needs chunk >= 0, patience in [0, 1] and keep last or best")

    def schedule(self, slides: int) -> Schedule:
        """The steps and rates of a training on so many slides."""
        per_epoch = math.ceil(slides / self.batch)
        steps = self.epochs * per_epoch
        rate = self.rate * slides / per_epoch / self.rate_batch if self.rate_batch else self.rate
        warmup = self.warmup * (per_epoch if self.warmup >= 1 else steps)
        rows = max(1, steps // 200)
        return Schedule(steps, rate, min(round(warmup), steps), self.weight_decay, rows, self.patience)


def trained_as(folder: Path) -> dict[str, Any]:
    """How a slide encoder was made: `fingerprint`, `features` (of what it learned from), `slides`, `pretrain`.

    Raises:
        FileFormatError: no slide encoder of ours stands there.
    """
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))["about"]
        return {name: about[name] for name in ("fingerprint", "features", "slides", "pretrain")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{folder}: no slide encoder with its settings ({error})", "run pretrain first"
        ) from error


@dataclass(frozen=True)
class SlideSource:
    """Where the tiles of one slide come from.

    Attributes:
        slide_id: for messages.
        features: the HDF5 file of its features.
        views: the folder of its augmented views; where it does not stand, the plain features serve as the one view.
    """

    slide_id: str
    features: Path
    views: Path

    def load(self) -> tuple[NDArray, NDArray[np.float32]]:
        """(K, n, D) features, memory-mapped where they can be, and (K, n, 2) positions in tile units.

        Raises:
            FileFormatError: absent or damaged.
        """
        if not self.views.is_dir():
            features, positions = plain_tiles(self.features)
            return features[None], positions[None]
        try:
            features = np.load(self.views / "features.npy", mmap_mode="r", allow_pickle=False)
            coords = np.load(self.views / "coords.npy", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise FileFormatError(f"{self.views}: damaged ({error})", "remove it and encode again") from error
        if features.ndim != 3 or coords.shape != (*features.shape[:2], 2):
            raise FileFormatError(f"{self.views}: {features.shape} features, {coords.shape} coords", "encode again")
        stride = store.read_made(self.views)["stride_level0"]
        return features, tile_units(coords.reshape(-1, 2), stride).reshape(coords.shape)


def plain_tiles(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """All tiles of a slide as they are: (N, D) features and (N, 2) positions in tile units.

    Raises:
        FileFormatError: the file is damaged, or features and coordinates do not match.
    """
    tiles, features = store.read_tiles_of(path), store.read_features(path)
    if len(tiles.xy) != len(features):
        raise FileFormatError(f"{path}: {len(features)} features but {len(tiles.xy)} coords", "encode the slide anew")
    return features, tile_units(tiles.xy, tiles.stride)


def sample_slides(sources: Sequence[SlideSource], seed: int) -> Iterator[tuple[Tensor, NDArray[np.float32]]]:
    """Whole slides for statistics of the cohort: (n, D) features and (n, 2) positions, un-augmented.

    In random order, up to `SAMPLE` tiles in all; the first slide comes whatever its size.
    """
    total = 0
    for k in np.random.default_rng([seed, len(sources)]).permutation(len(sources)):
        features, positions = plain_tiles(sources[k].features)
        total += len(features)
        if total > SAMPLE and total > len(features):
            return
        yield torch.from_numpy(features).float(), positions


def some_slides(
    sources: Sequence[SlideSource], seed: int
) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
    """Name, features (N, D) and positions (N, 2) of slides in random order, un-augmented, `MANY` at most."""
    for k in np.random.default_rng([seed, len(sources), 1]).permutation(len(sources))[:MANY]:
        features, positions = plain_tiles(sources[k].features)
        yield sources[k].slide_id, np.asarray(features, np.float32), positions


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

    def forward(self, batch: tuple[tuple[tuple, ...], int]) -> tuple[Tensor, dict[str, Tensor]]:
        """(this process's chunks of the batch, pairs that all processes have) -> (loss of the whole batch, gauges).

        Several chunks pass the encoder one after the other and again in the backward pass, so that only one of them
        and all slide vectors are in memory at a time (Gao et al., RepL4NLP 2021); the encoder's batch norms then take
        the statistics of a chunk.
        """
        chunks, pairs = batch
        encode = self.encoder if len(chunks) == 1 else partial(encode_twice, self.encoder)
        halves = [encode(*chunk).chunk(2) for chunk in chunks]
        vectors = torch.cat([one for one, _ in halves] + [other for _, other in halves])
        a, b = gather_pairs(self.projector(vectors), pairs)
        self.last = vectors.detach(), pairs
        return nt_xent(a, b, self.temperature), gauges(a.detach(), b.detach())

    def measure(self) -> dict[str, Tensor]:
        """What is too costly to measure at every step: the effective rank of the last batch's slide vectors."""
        assert self.last is not None
        return {"effective_rank": effective_rank(torch.cat(gather_pairs(*self.last)))}


def gather_pairs(views: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """The two views (pairs, d) of all pairs, from those of each process (2n, d): its first n pair with its last."""
    a, b = gather(torch.cat(views.chunk(2), dim=1), shares(pairs)).chunk(2, dim=1)
    return a, b


def pretrain_slides(
    sources: Sequence[SlideSource],
    settings: PretrainSettings,
    folder: Path,
    logs: Path,
    made_of: str,
    device: str = "auto",
    tile_encoder: Path | None = None,
) -> None:
    """Train a slide encoder and write it to `folder`, whole or absent.

    Args:
        sources: the slides, in a fixed order.
        settings: of the training; `settings.encoder.in_dim` is replaced by the dimension of the features.
        folder: of the result: model.safetensors, config.json and made.json.
        logs: of log.csv, TensorBoard and checkpoints.
        made_of: fingerprint of the features.
        device: auto, cpu or cuda.
        tile_encoder: the fourth stage of the ResNet-18 whose first three made the features, as `fourth_stage` gives
            it, where there is one; for `settings.start`.

    Raises:
        TrainingError: fewer than two slides, or a loss that is not finite.
        FileFormatError: damaged features or features of different encoders; weights to start with of another network.
    """
    names = [source.slide_id for source in sources]
    per_epoch = steps_of_an_epoch(names, settings)
    settings = of_length(settings, sources)
    encoder = SlideEncoder(settings.encoder, seed=settings.seed)
    started = start_from(encoder, settings.start, tile_encoder)
    where, dtype = hardware(device, settings.precision)
    made = fingerprint(settings, made_of, names, dtype, started)
    about = {"fingerprint": made, "features": made_of, "slides": names, "pretrain": to_dict(settings), "start": started}
    task = PretrainTask(settings, encoder)
    outcome = fit(
        task,
        lambda step: draw_batch(step, per_epoch, sources, settings),
        settings.schedule(len(sources)),
        logs,
        made,
        where,
        dtype,
        about=about | {"slides": len(names)},
        measure=task.measure,
        best=settings.keep == "best",
    )
    if first():
        sample = sample_slides(sources, settings.seed)
        rival = complete(encoder, sample, partial(some_slides, sources, settings.seed), settings.seed)
        encoder.save(folder, about | {"training": vars(outcome)}, rival)
        end_of_training(logs)


def steps_of_an_epoch(names: Sequence[str], settings: PretrainSettings) -> int:
    """Batches in which all slides come once.

    Raises:
        TrainingError: too few slides for a contrast, or for the processes that train.
    """
    if len(names) < 2:
        only = names[0] if names else "nothing"
        raise TrainingError(f"{len(names)} slide to learn from ({only})", "contrast needs two or more")
    per_epoch, processes = math.ceil(len(names) / settings.batch), place()[1]
    if len(names) // per_epoch < processes:
        raise TrainingError(
            f"{processes} processes for batches of {len(names) // per_epoch} slides",
            "start as many as slides, or fewer",
        )
    return per_epoch


def of_length(settings: PretrainSettings, sources: Sequence[SlideSource]) -> PretrainSettings:
    """Settings of an encoder that takes the features of these slides.

    Raises:
        FileFormatError: damaged features, or features of different encoders.
    """
    dims = {source.slide_id: source.load()[0].shape[2] for source in sources}
    if len(set(dims.values())) > 1:
        odd = min(dims, key=lambda name: list(dims.values()).count(dims[name]))
        raise FileFormatError(f"{odd}: features of {dims[odd]} numbers among others", "encode it with the same encoder")
    return replace(settings, encoder=replace(settings.encoder, in_dim=next(iter(dims.values()))))


def hardware(device: str, precision: str) -> tuple[str, str]:
    """The kind of device and the number format that a training uses, as `fit` names them."""
    where = pick_device(device)
    return where.type, str(pick_dtype(precision, where)).removeprefix("torch.")


def start_from(encoder: SlideEncoder, start: str, tile_encoder: Path | None) -> str:
    """Give the encoder the weights that it begins with; returns `random`, or their hash."""
    fits = encoder.settings.arch == "sparse" and encoder.settings.dim == 512
    if start == "tile-encoder" and not (fits and tile_encoder is not None and tile_encoder.exists()):
        why = "the tile encoder has no fourth stage to begin with" if fits else "only `sparse` of dim 512 can do so"
        if first():
            say(f"the slide encoder begins at random: {why}", "yellow")
        return "random"
    if start == "random":
        return start
    name = str(tile_encoder) if start == "tile-encoder" else start
    encoder.load_dense(state_of(read_weights(name)))
    return hash_of(encoder.stage)


def draw_chunk(epoch: int, slides: NDArray, sources: Sequence[SlideSource], settings: PretrainSettings) -> Chunk:
    """Two views of each of some slides."""
    pairs = []
    for k in slides:
        features, positions = sources[k].load()
        rng = np.random.default_rng([settings.seed, epoch, int(k)])
        pairs.append(draw_pair(features, positions, settings.view, rng))
    batch = collate([one for one, _ in pairs] + [other for _, other in pairs])
    # Positions stay on the CPU, where the kernel maps are built.
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
    epoch, part = divmod(step, per_epoch)
    order = np.random.default_rng([settings.seed, epoch]).permutation(len(slides))
    together = np.array_split(order, per_epoch)[part]
    rank, processes = place()
    mine = together[rank::processes]
    # As many chunks in each process, since they meet in every one, and none empty.
    count = math.ceil(len(together) // processes / settings.chunk) if settings.chunk else 1
    return tuple(draw(epoch, k, slides, settings) for k in np.array_split(mine, count)), len(together)
