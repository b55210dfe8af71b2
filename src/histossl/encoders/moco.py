"""Tiles without labels in, a tile encoder out: momentum contrast (MoCo v2, Chen et al., arXiv 2003.04297).

We differ in one place: batch statistics of one device's batch tell the key that belongs to a query from older keys in
the queue, which MoCo hides by shuffling between devices. Here the momentum encoder normalises by running averages, of
its own momentum (EMAN, Cai et al., CVPR 2021), so that there is nothing to hide on one device either.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from histossl import store
from histossl.augment import TileAugmentSettings, augment_each, draw_tile_augmentations, view_side
from histossl.config import fingerprint, to_dict
from histossl.encoders.resnet import IMAGENET_MEAN, IMAGENET_STD, ResNet18
from histossl.encoders.zoo import keep_buffers, pick_device, pick_dtype, save_encoder
from histossl.errors import FileFormatError, SettingsError, SlideError, TrainingError
from histossl.losses import contrast
from histossl.read import ReadJob, read_tiles
from histossl.scale import Workers
from histossl.tiles import TileSpec
from histossl.train import Schedule, end_of_training, fit


@dataclass(frozen=True)
class TileTrainSettings:
    """Self-supervised learning of tiles.

    Args:
        steps: of the optimiser.
        batch: tiles a step; each gives a query and a key.
        slides: a batch's tiles come from this many slides, in equal parts: every slide counts the same.
        rate: Adam's highest learning rate.
        warmup: share of the training in which the rate rises.
        weight_decay: on kernels, decoupled.
        temperature: of InfoNCE.
        queue: keys of earlier batches that serve as negatives.
        momentum: share of the momentum encoder that a step keeps (less in the first steps).
        projection: length of the vectors that are contrasted.
        precision: auto (bfloat16 where the hardware multiplies it natively), float32 or bfloat16.
        seed: of the initial weights, the tiles drawn and their augmentations.
        augment: the domain of augmentations.
    """

    steps: int = 600
    batch: int = 128
    slides: int = 16
    rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 1e-4
    temperature: float = 0.2
    queue: int = 4096
    momentum: float = 0.99
    projection: int = 128
    precision: str = "auto"
    seed: int = 0
    augment: TileAugmentSettings = field(default_factory=TileAugmentSettings)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 2 or self.slides < 1 or self.queue < 0 or self.projection < 1:
            raise SettingsError("tile training needs steps, slides, projection >= 1, batch >= 2 and queue >= 0")
        if not (self.rate > 0 and self.temperature > 0 and 0 <= self.warmup <= 1 and 0 <= self.momentum < 1):
            raise SettingsError("tile training needs rate, temperature > 0, warmup in [0, 1], momentum in [0, 1)")


@dataclass(frozen=True)
class TileSource:
    """Where the tiles of one slide lie.

    Attributes:
        slide_id: for messages.
        path, mpp: of the slide.
        tile: what its tiles are.
        tiles_path: the HDF5 file of their places.
    """

    slide_id: str
    path: Path
    mpp: float
    tile: TileSpec
    tiles_path: Path


# Augmentations travel as numpy arrays: floating tensors would be rounded to the precision of the products.
Batch = tuple[Tensor, NDArray[np.float32], NDArray[np.float32]]


class MocoTask(nn.Module):
    """A ResNet-18 up to `layer3` and its projector, their momentum copies, the queue, and the loss of a batch."""

    def __init__(self, settings: TileTrainSettings) -> None:
        super().__init__()
        self.settings = settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            encoder = ResNet18(stages=3)
            self.query = nn.Sequential(encoder, projector(encoder.dim, settings.projection)).to(
                memory_format=torch.channels_last
            )  # type: ignore[call-overload]
            self.register_buffer("queue", F.normalize(torch.randn(settings.queue, settings.projection), dim=1))
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.queue: Tensor
        self.filled: Tensor
        self.seen: Tensor

    @property
    def encoder(self) -> ResNet18:
        """What was learned: the momentum encoder, an average over the last steps."""
        found = self.key[0]
        assert isinstance(found, ResNet18)
        return found

    def train(self, mode: bool = True) -> MocoTask:
        """The momentum encoder stays in evaluation mode: it normalises by running averages."""
        super().train(mode)
        self.key.eval()
        return self

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """((B, H, W, 3) uint8 tiles, (B, 31) augmentations of the queries, those of the keys) -> (loss, gauges)."""
        tiles, *drawn = batch
        side = view_side(self.settings.augment, tiles.shape[1])
        with torch.autocast(tiles.device.type, enabled=False):  # densities need more than eight bits
            one, other = (normalised(augment_each(tiles, torch.from_numpy(t).to(tiles.device), side)) for t in drawn)
        with torch.no_grad():
            if self.training and not self.seen:
                self._settle(one)
            self._follow()
            keys = F.normalize(self.key(other).float(), dim=1)
        queries = F.normalize(self.query(one).float(), dim=1)
        with torch.autocast(queries.device.type, enabled=False):
            similarity = queries @ torch.cat([keys, self.queue]).T
        index = torch.arange(similarity.shape[1], device=similarity.device)
        positives = index == index[: len(keys), None]
        known = index < len(keys) + self.filled
        loss = contrast(similarity / self.settings.temperature, positives, known.expand_as(positives))
        if self.training:
            self._enqueue(keys)
        return loss, _gauges(queries.detach(), keys, similarity.detach())

    def _settle(self, x: Tensor) -> None:
        """Running averages begin at those of a batch: from 0 and 1 the momentum encoder would see all tiles alike."""
        norms = [m for m in self.query.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        self.query(x)
        for norm in norms:
            norm.momentum = 0.1

    @torch.no_grad()
    def _follow(self) -> None:
        """The momentum encoder goes a step towards the encoder, in weights and in running averages."""
        self.seen += 1
        keep = torch.clamp(self.seen / (self.seen + 9), max=self.settings.momentum)
        mine, theirs = self.key.state_dict(), self.query.state_dict()
        for name, value in mine.items():
            value.copy_(torch.lerp(theirs[name], value, keep) if value.is_floating_point() else theirs[name])

    def _enqueue(self, keys: Tensor) -> None:
        if len(self.queue):
            self.queue.copy_(torch.cat([keys, self.queue])[: len(self.queue)])
            self.filled.copy_(torch.clamp(self.filled + len(keys), max=len(self.queue)))


def projector(dim: int, projection: int) -> nn.Sequential:
    """Two layers, with batch norms as in MoCo v3: features of a new network are almost parallel, and learning starts
    only once they are told apart."""
    return nn.Sequential(
        nn.Linear(dim, dim, bias=False),
        nn.BatchNorm1d(dim),
        nn.ReLU(),
        nn.Linear(dim, projection, bias=False),
        nn.BatchNorm1d(projection, affine=False),
    )


def normalised(x: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] as `load_encoder` will give them to the network."""
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def _gauges(queries: Tensor, keys: Tensor, similarity: Tensor) -> dict[str, Tensor]:
    """`spread`: root mean square deviation of the keys, 1 where they fill the sphere, 0 where they have collapsed.

    `matched`: share of queries whose most similar key, of the batch, is their own.
    """
    own = similarity[:, : len(keys)].argmax(dim=1) == torch.arange(len(keys), device=keys.device)
    return {
        "spread": keys.var(dim=0, correction=0).sum().sqrt(),
        "matched": own.float().mean(),
        "alignment": (2 - 2 * (queries * keys).sum(dim=1)).mean(),
    }


def tiles_trained_on(folder: Path) -> set[str]:
    """The slides that a tile encoder of ours was trained on.

    Raises:
        FileFormatError: no tile encoder with its settings stands there.
    """
    try:
        return set(json.loads((folder / "config.json").read_text(encoding="utf-8"))["slides"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{folder}: no tile encoder with its settings ({error})"
        raise FileFormatError(what, "remove it to train anew, or give it as --encoder") from error


class TileStream:
    """Batches of tiles from slides, a function of seed and step alone, read ahead by worker processes.

    A slide of which a batch cannot be read is left out of that batch, and counted.

    Args:
        sources: the slides, in a fixed order.
        settings: of the training.
        workers: who reads.
    """

    def __init__(self, sources: Sequence[TileSource], settings: TileTrainSettings, workers: Workers) -> None:
        self.sources, self.settings, self.workers = sources, settings, workers
        self.tiles = [store.read_tiles_of(source.tiles_path) for source in sources]
        self.failures: dict[str, str] = {}
        self._next = -1
        self._answers: Iterator[tuple[ReadJob, NDArray[np.uint8] | Exception]] = iter(())
        self._last: Batch | None = None

    def __call__(self, step: int) -> Batch:
        """The batch of a step, as `MocoTask` takes it; steps in order come fast, others are read anew.

        Raises:
            TrainingError: not one slide of the batch can be read.
        """
        if self._last is not None and step == self._next - 1:
            return self._last
        if step != self._next:
            depth = 2 * self.settings.slides // self.workers.count + 1
            jobs = (job for s in range(step, self.settings.steps) for job in self.jobs(s))
            self._answers = self.workers.map(read_tiles, jobs, ahead=max(2, depth))
        self._next = step + 1
        found = [self._tiles(*next(self._answers)) for _ in self.jobs(step)]
        tiles = np.concatenate([part for part in found if part is not None] or [np.empty((0, 1, 1, 3), np.uint8)])
        if len(tiles) < 2:
            raise TrainingError(f"no tile of step {step} can be read: {next(iter(self.failures.values()))}")
        self._last = (torch.from_numpy(tiles), *self._drawn(step, len(tiles), tiles.shape[1]))
        return self._last

    def jobs(self, step: int) -> list[ReadJob]:
        """What is read for a step: tiles of the next slides of a shuffled round, in equal parts."""
        wanted, rng = self.settings.batch, np.random.default_rng([self.settings.seed, 0, step])
        slides = min(self.settings.slides, len(self.sources), wanted)
        places = np.arange(step * slides, (step + 1) * slides)
        found = []
        for position, k in enumerate(self._slide(int(place)) for place in places):
            source, tiles = self.sources[k], self.tiles[k]
            count = wanted // slides + (position < wanted % slides)
            chosen = np.sort(rng.choice(len(tiles.xy), count, replace=count > len(tiles.xy)))
            xy, tile = tiles.xy[chosen], source.tile
            found.append(ReadJob(k, step, source.path, source.mpp, xy, tiles.extent, tile.mpp, tile.px))
        return found

    def _slide(self, place: int) -> int:
        """The slide at a place of the endless row of shuffled rounds, in which every slide comes once a round."""
        turn, position = divmod(place, len(self.sources))
        return int(np.random.default_rng([self.settings.seed, 1, turn]).permutation(len(self.sources))[position])

    def _tiles(self, job: ReadJob, answer: NDArray[np.uint8] | Exception) -> NDArray[np.uint8] | None:
        if isinstance(answer, Exception):
            what = str(answer) if isinstance(answer, SlideError) else f"{job.path.name}: {answer}"
            self.failures.setdefault(self.sources[job.slide].slide_id, what)
            return None
        return answer

    def _drawn(self, step: int, count: int, px: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        rng = np.random.default_rng([self.settings.seed, 2, step])
        one, other = (draw_tile_augmentations(self.settings.augment, count, px, rng) for _ in range(2))
        return one, other


def pretrain_tiles(
    sources: Sequence[TileSource],
    settings: TileTrainSettings,
    folder: Path,
    logs: Path,
    workers: Workers,
    device: str = "auto",
) -> dict[str, str]:
    """Train a tile encoder and write it to `folder`, whole or absent; `load_encoder(folder)` reads it back.

    Args:
        sources: the slides, in a fixed order.
        settings: of the training.
        folder: of the result: model.safetensors and config.json.
        logs: of log.csv, TensorBoard and checkpoints, from which a killed training goes on.
        workers: processes that read tiles.
        device: auto, cpu or cuda.

    Returns:
        The slides of which tiles could not be read, and why.

    Raises:
        TrainingError: fewer than two tiles, no tile that can be read, or a loss that is not finite.
        FileFormatError: the places of a slide's tiles are absent or damaged.
    """
    where = pick_device(device)
    dtype = str(pick_dtype(settings.precision, where)).removeprefix("torch.")
    keep_buffers()
    stream = TileStream(sources, settings, workers)
    if sum(len(tiles.xy) for tiles in stream.tiles) < 2:
        raise TrainingError("fewer than two tiles to learn from", "contrast needs two or more")
    schedule = Schedule(
        settings.steps,
        settings.rate,
        round(settings.warmup * settings.steps),
        settings.weight_decay,
        checkpoints=max(1, settings.steps // 50),
    )
    of = [[source.slide_id, tiles.fingerprint] for source, tiles in zip(sources, stream.tiles, strict=True)]
    made = fingerprint(settings, of, dtype)
    task = MocoTask(settings)
    fit(task, stream, schedule, logs, made, where.type, dtype)
    names = [source.slide_id for source in sources]
    about = {
        "architecture": "resnet18 up to layer3",
        "fingerprint": made,
        "slides": names,
        "settings": to_dict(settings),
    }
    save_encoder(task.encoder, folder, about | {"tile": to_dict(sources[0].tile)})
    end_of_training(logs)
    return stream.failures
