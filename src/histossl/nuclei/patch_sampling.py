"""Patch contrast as published (Boserup and Selvan, NLDL 2023), vectorised: network, patches, similarities, loss.

All numbers are in `PatchContrastSettings`. A channel that drew only positive (or only negative) patches adds nothing to
the loss; the public code skips the whole batch. The feature network is our own, of about the published size (3,386
parameters), since the paper does not give its layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.core.errors import SettingsError
from histossl.training.losses import contrast

SIMILARITIES = ("mse", "cross_entropy", "cosine", "mutual_information", "kl")
_BINS = 8  # of the soft histograms of mutual information


@dataclass(frozen=True)
class PatchContrastSettings:
    """The published numbers.

    Attributes:
        mpp: µm per pixel.
        channels: C, number of channels of the confidence.
        crop: pixels, side of a training crop; one crop per image and epoch.
        batch: crops per step.
        lowest: intensities are scaled to [lowest, 1].
        patch: pixels, side of a patch.
        stride: pixels between the candidate positions of patches.
        places: patches drawn per image and channel, with replacement.
        least: weight of a candidate whose entropy is one bit.
        similarity: mse, cross_entropy, cosine (of learned features), mutual_information or kl.
        between: weight of the loss between channels.
        rate: learning rate of Adam.
        weight_decay: weight decay of Adam.
        epochs: number of epochs, of one crop per image.
        runs: runs from different initial weights, of which one is kept: in some runs no channel finds nuclei.
        opening: pixels, radius of the disc that opens the mask.
        closing: pixels, radius of the disc that closes it.
        seed: seed of all randomness.

    Raises:
        SettingsError: there is no such similarity, or a patch is larger than a crop.
    """

    mpp: float = 0.25
    channels: int = 4
    crop: int = 300
    batch: int = 10
    lowest: float = 0.05
    patch: int = 50
    stride: int = 20
    places: int = 10
    least: float = 0.001
    similarity: str = "mse"
    between: float = 1.0
    rate: float = 2e-4
    weight_decay: float = 1e-4
    epochs: int = 25
    runs: int = 3
    opening: int = 3
    closing: int = 1
    seed: int = 0

    FORMER_NAME: ClassVar[str] = "PaperSettings"

    def __post_init__(self) -> None:
        if self.similarity not in SIMILARITIES:
            raise SettingsError(f"no similarity is called {self.similarity!r}", f"take {', '.join(SIMILARITIES)}")
        if not 0 < self.patch <= self.crop:
            raise SettingsError(f"patches of {self.patch} px do not fit into crops of {self.crop} px")


class _Block(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        layers = [
            (
                nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False),
                nn.BatchNorm2d(width),
                nn.ELU(),
            )
            for _ in range(2)
        ]
        self.layers = nn.Sequential(*[layer for three in layers for layer in three])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ConfidenceNet(nn.Module):
    """The published network: 7,372 parameters with four channels; full resolution, receptive field 167 px.

    Args:
        channels: C, number of output channels.
        seed: seed of the initial weights.
        width: channels of the hidden layers.
    """

    def __init__(self, channels: int = 4, seed: int = 0, width: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(3, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ELU(),
                *[_Block(width, dilation) for dilation in (1, 2, 3, 5, 10, 20)],
                nn.Conv2d(width, channels, 1),
            )

    def forward(self, image: Tensor) -> Tensor:
        """Compute the confidence.

        Args:
            image: (B, 3, H, W) in [0, 1].

        Returns:
            (B, C, H, W) in [0, 1].
        """
        return self.layers(image).sigmoid()


def draw_places(confidence: Tensor, settings: PatchContrastSettings, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the positions of patches, and which of them are positive; without host synchronisation.

    Args:
        confidence: (B, C, H, W) in [0, 1].
        settings: patch, stride, places, least.
        uniform: (2, B, C, places) random numbers in [0, 1).

    Returns:
        rows, columns: (B, C, places) int64, top-left corners.
        positive: (B, C, places) bool.
    """
    mean = F.avg_pool2d(confidence.detach(), settings.patch, settings.stride)
    c = confidence.detach().clamp(1e-6, 1 - 1e-6)
    bits = -(c * c.log2() + (1 - c) * (1 - c).log2())
    entropy = F.avg_pool2d(bits, settings.patch, settings.stride)
    weight = (1 - entropy).clamp(min=settings.least).flatten(2)
    # Inverse transform sampling: draws with replacement.
    steps = weight.cumsum(2) / weight.sum(2, keepdim=True)
    chosen = torch.searchsorted(steps, uniform[0].contiguous()).clamp(max=weight.shape[2] - 1)
    width = mean.shape[3]
    positive = uniform[1] < mean.flatten(2).gather(2, chosen)
    return chosen // width * settings.stride, chosen % width * settings.stride, positive


def attended(image: Tensor, confidence: Tensor, rows: Tensor, columns: Tensor, patch: int) -> Tensor:
    """Patches of image times confidence.

    Args:
        image: (B, 3, H, W).
        confidence: (B, C, H, W).
        rows: (B, C, places) int64, first row of each patch.
        columns: (B, C, places) int64, first column of each patch.
        patch: pixels, side of a patch.

    Returns:
        (C, B * places, 3, patch, patch), channel by channel.
    """
    count, channels, places = rows.shape
    reach = torch.arange(patch, device=image.device)
    y = (rows[..., None] + reach)[..., :, None]
    x = (columns[..., None] + reach)[..., None, :]
    b = torch.arange(count, device=image.device).view(-1, 1, 1, 1, 1)
    c = torch.arange(channels, device=image.device).view(1, -1, 1, 1, 1)
    pieces = image.permute(0, 2, 3, 1)[b, y, x] * confidence[b, c, y, x][..., None]
    return pieces.permute(1, 0, 2, 5, 3, 4).reshape(channels, count * places, 3, patch, patch)


class Similarity(nn.Module):
    """Similarity of all pairs of patches; larger is more similar.

    Args:
        kind: one of SIMILARITIES.
        seed: seed of the feature network's initial weights.
    """

    def __init__(self, kind: str, seed: int = 0) -> None:
        super().__init__()
        self.kind = kind
        if kind == "cosine":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                sizes = ((3, 8), (8, 16), (16, 14))
                convs = [layer for i, o in sizes for layer in (nn.Conv2d(i, o, 3, 2), nn.ELU())]
                self.features = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, patches: Tensor) -> Tensor:
        """Compute all similarities.

        Args:
            patches: (N, 3, p, p) in [0, 1].

        Returns:
            (N, N): row i, column j is s(i, j).
        """
        if self.kind == "cosine":
            z = F.normalize(self.features(patches), dim=1)
            return z @ z.T
        x = patches.flatten(1)
        if self.kind == "mse":
            square = x.square().sum(1)
            return (2 * x @ x.T - square[:, None] - square[None]) / x.shape[1]
        x = x.clamp(1e-4, 1 - 1e-4)
        if self.kind == "cross_entropy":
            return (x @ x.log().T + (1 - x) @ (1 - x).log().T) / x.shape[1]
        if self.kind == "kl":
            p = x / x.sum(1, keepdim=True)
            return p @ p.log().T - (p * p.log()).sum(1, keepdim=True)
        return _mutual_information(x)


def _mutual_information(x: Tensor) -> Tensor:
    """(N, N) in nats, from soft histograms: each value adds to its two nearest bins, linearly."""
    centres = torch.linspace(0, 1, _BINS, device=x.device)
    soft = (1 - (x[:, None] - centres[None, :, None]).abs() * (_BINS - 1)).clamp(min=0)
    count = len(x)
    flat = soft.flatten(0, 1)
    joint = (flat @ flat.T / x.shape[1]).view(count, _BINS, count, _BINS).permute(0, 2, 1, 3)
    single = soft.mean(2)
    independent = single[:, None, :, None] * single[None, :, None, :]
    return (joint * ((joint + 1e-9) / (independent + 1e-9)).log()).sum((2, 3))


def patch_loss(similarity: Tensor, positive: Tensor, between: float = 1.0) -> Tensor:
    """The mean over anchors i and positives j of log sum exp s(i, k) over the negatives k, minus s(i, j).

    Within a channel, the negatives are those of the channel; between channels, they are the positives of the others.

    Args:
        similarity: (C * N, C * N), patches channel by channel.
        positive: (C, N) bool.
        between: weight of the loss between channels.

    Returns:
        The loss, a scalar.
    """
    channels, count = positive.shape
    channel = torch.arange(channels, device=positive.device).repeat_interleave(count)
    flat = positive.flatten()
    same = channel[:, None] == channel[None]
    pairs = same & flat[:, None] & flat[None]
    within = contrast(similarity, pairs, same & ~flat[None])
    others = contrast(similarity, pairs, ~same & flat[None])
    return within + between * others


class PatchContrastTask(nn.Module):
    """Network, similarity and loss.

    Args:
        settings: the published numbers.
        seed: seed of the initial weights.
    """

    def __init__(self, settings: PatchContrastSettings, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        self.network = ConfidenceNet(settings.channels, seed)
        self.similarity = Similarity(settings.similarity, seed)

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch.

        Args:
            batch: images (B, 3, crop, crop) in [0, 1], and random numbers (2, B, C, places) in [0, 1).

        Returns:
            The loss; and `separation`, the paper's criterion of convergence (mean similarity among positives minus
            that to negatives), with `positive`, the share of positive patches.
        """
        image, uniform = batch
        confidence = self.network(image)
        rows, columns, positive = draw_places(confidence, self.settings, uniform)
        patches = attended(image, confidence, rows, columns, self.settings.patch)
        similarity = self.similarity(patches.flatten(0, 1))
        chosen = positive.transpose(0, 1).flatten(1)
        loss = patch_loss(similarity, chosen, self.settings.between)
        return loss, {"separation": _separation(similarity.detach(), chosen), "positive": chosen.float().mean()}


def _separation(similarity: Tensor, positive: Tensor) -> Tensor:
    channel = torch.arange(positive.shape[0], device=positive.device).repeat_interleave(positive.shape[1])
    flat, same = positive.flatten(), channel[:, None] == channel[None]
    alike, unlike = same & flat[:, None] & flat[None], same & flat[:, None] & ~flat[None]
    return (similarity * alike).sum() / alike.sum().clamp(min=1) - (similarity * unlike).sum() / unlike.sum().clamp(
        min=1
    )
