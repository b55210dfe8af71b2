"""Trains a tile encoder without labels by momentum contrast (MoCo v2, Chen et al., arXiv 2003.04297).

One difference to MoCo: with batch statistics, a query and its key share the statistics of their batch, older keys in
the queue do not, and the network can use that to find the key. MoCo avoids it by shuffling batches between devices.
Here the momentum encoder normalises by running averages, which follow those of the encoder with the same momentum as
the weights (EMAN, Cai et al., CVPR 2021); that works on a single device, too.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.core.config import fingerprint
from histossl.encoders.augment import augment_each, draw_tile_augmentations, view_side
from histossl.encoders.resnet import IMAGENET_MEAN, IMAGENET_STD, ResNet18
from histossl.encoders.settings import MocoSettings
from histossl.encoders.tile_stream import TileStream
from histossl.training.device import keep_buffers, pick_device, pick_dtype, sent, unrounded
from histossl.training.loop import Schedule, fit
from histossl.training.losses import contrast

# Augmentations are numpy arrays, because Fabric would round floating tensors to the precision of the products.
Batch = tuple[Tensor, NDArray[np.float32], NDArray[np.float32]]


class MocoTask(nn.Module):
    """A ResNet-18 up to `layer3` with a projector, their momentum copies, the queue, and the loss of a batch.

    Args:
        settings: of the training; `seed` gives the initial weights and the initial queue.
    """

    def __init__(self, settings: MocoSettings) -> None:
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
        self.queue: Tensor
        self.filled = 0  # rows of the queue that hold keys
        self.seen = 0  # batches

    def get_extra_state(self) -> dict[str, int]:
        """The counters, which are part of the state. They stay on the CPU, so that no step waits for the device."""
        return {"filled": self.filled, "seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore the counters.

        Args:
            state: what `get_extra_state` returned.
        """
        self.filled, self.seen = state["filled"], state["seen"]

    @property
    def encoder(self) -> ResNet18:
        """The result of the training: the momentum encoder, an average over the last steps."""
        found = self.key[0]
        assert isinstance(found, ResNet18)
        return found

    def train(self, mode: bool = True) -> MocoTask:
        """Set the mode; the momentum encoder stays in evaluation mode, so that it normalises by running averages.

        Args:
            mode: whether to train.

        Returns:
            The task itself.
        """
        super().train(mode)
        self.key.eval()
        return self

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss; in training mode the momentum encoder and the queue are updated too.

        Args:
            batch: tiles (B, H, W, 3) uint8, augmentations of the queries (B, 31) float32, and those of the keys.

        Returns:
            The loss (), and the gauges `spread`, `matched` and `alignment`, each ().
        """
        tiles, *drawn = batch
        side = view_side(self.settings.augment, tiles.shape[1])
        with unrounded(tiles.device):  # optical densities need more than the eight bits of bfloat16
            sampled = [sent(torch.from_numpy(t), tiles.device) for t in drawn]
            one, other = (normalised(augment_each(tiles, t, side)) for t in sampled)
        with torch.no_grad():
            if self.training and not self.seen:
                self._start_averages(one)
            self._update_momentum_encoder()
            keys = F.normalize(self.key(other).float(), dim=1)
        queries = F.normalize(self.query(one).float(), dim=1)
        with unrounded(queries.device):
            similarity = queries @ torch.cat([keys, self.queue]).T
        index = torch.arange(similarity.shape[1], device=similarity.device)
        positives = index == index[: len(keys), None]
        known = index < len(keys) + self.filled  # the rest of the queue is random until it has been filled once
        loss = contrast(similarity / self.settings.temperature, positives, known.expand_as(positives))
        if self.training:
            self._enqueue(keys)
        return loss, _gauges(queries.detach(), keys, similarity.detach())

    def _start_averages(self, x: Tensor) -> None:
        """Start the running averages at the statistics of a batch.

        From the initial 0 and 1, the momentum encoder would give almost the same key for all tiles.
        """
        norms = [m for m in self.query.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        self.query(x)
        for norm in norms:
            norm.momentum = 0.1

    @torch.no_grad()
    def _update_momentum_encoder(self) -> None:
        """Move the momentum encoder towards the encoder, in weights and in running averages."""
        self.seen += 1
        # A lower momentum in the first steps, when the encoder changes fast: the initial weights are soon forgotten.
        keep = min(self.seen / (self.seen + 9), self.settings.momentum)
        trained = self.query.state_dict()
        for name, value in self.key.state_dict().items():
            value.copy_(torch.lerp(trained[name], value, keep) if value.is_floating_point() else trained[name])

    def _enqueue(self, keys: Tensor) -> None:
        if len(self.queue):
            self.queue.copy_(torch.cat([keys, self.queue])[: len(self.queue)])
            self.filled = min(self.filled + len(keys), len(self.queue))


def projector(dim: int, projection: int) -> nn.Sequential:
    """Make a projector of two layers, with batch norms as in MoCo v3.

    Features of a new network are almost parallel; without batch norms training starts only once they spread.

    Args:
        dim: length of the features.
        projection: length of the projections.

    Returns:
        The projector, (B, dim) to (B, projection).
    """
    return nn.Sequential(
        nn.Linear(dim, dim, bias=False),
        nn.BatchNorm1d(dim),
        nn.ReLU(),
        nn.Linear(dim, projection, bias=False),
        nn.BatchNorm1d(projection, affine=False),
    )


def normalised(x: Tensor) -> Tensor:
    """Normalise tiles as `TileEncoder` does.

    Args:
        x: (B, 3, H, W) floating in [0, 1].

    Returns:
        The same shape, each channel minus ImageNet's mean, divided by its standard deviation.
    """
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def _gauges(queries: Tensor, keys: Tensor, similarity: Tensor) -> dict[str, Tensor]:
    """Gauges of a batch, each ().

    `spread`: root mean square deviation of the keys, 1 where they fill the sphere, 0 where they have collapsed.
    `matched`: share of queries whose most similar key in the batch is their own.
    `alignment`: mean squared distance between a query and its key.
    """
    own = similarity[:, : len(keys)].argmax(dim=1) == torch.arange(len(keys), device=keys.device)
    return {
        "spread": keys.var(dim=0, correction=0).sum().sqrt(),
        "matched": own.float().mean(),
        "alignment": (2 - 2 * (queries * keys).sum(dim=1)).mean(),
    }


def learn_moco(stream: TileStream, settings: MocoSettings, logs: Path, made: str, device: str = "auto") -> ResNet18:
    """Train a tile encoder by momentum contrast.

    Args:
        stream: of tiles, made with `settings.plan()`.
        settings: of the training.
        logs: folder of log.csv, TensorBoard's files and checkpoints, from which a killed training resumes.
        made: fingerprint of the settings and the tiles.
        device: auto, cpu or cuda.

    Returns:
        The momentum encoder after the last step.

    Raises:
        TrainingError: no tile can be read, or a loss is not finite.
        StudyError: `logs` has a checkpoint of another training.
        SettingsError: the device is unknown or absent.
    """
    where = pick_device(device)
    dtype = str(pick_dtype(settings.precision, where)).removeprefix("torch.")
    keep_buffers()
    schedule = Schedule(
        settings.steps,
        settings.rate,
        round(settings.warmup * settings.steps),
        settings.weight_decay,
        checkpoints=max(1, settings.steps // 50),
    )
    task = MocoTask(settings)

    def batch_of(step: int) -> Batch:
        tiles, rng = stream(step), np.random.default_rng([settings.seed, 2, step])
        one, other = (draw_tile_augmentations(settings.augment, len(tiles), tiles.shape[1], rng) for _ in range(2))
        return tiles, one, other

    fit(task, batch_of, schedule, logs, fingerprint(made, dtype), where.type, dtype)
    return task.encoder
