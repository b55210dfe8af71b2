"""Settings of the self-supervised training of the slide encoder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from histossl.core.config import PRECISIONS, check_choice
from histossl.core.errors import FileFormatError, SettingsError
from histossl.gigassl.encoder_settings import EncoderSettings
from histossl.training.schedule import Schedule

NEIGHBOURS = EncoderSettings(dim=64, inlet="scaled", arch="neighbours")
"""Learned without a contrast of slides: see `Neighbours`, and docs/ablation.md for what it is worth."""


@dataclass(frozen=True)
class ViewSettings:
    """How a view is drawn.

    Attributes:
        tiles: T, tiles per view; all tiles of a slide that has fewer.
        windows: 0 draws the tiles at random, as the paper does; w >= 1 draws w random tiles, each with its nearest
            neighbours, T in all, so that tiles are adjacent on the map as they are at inference.
        scale_min: lower end of the range of the factors, uniform and independent, by which rows and columns are
            stretched; below 1 neighbours can fall on one site, where they are averaged.
        scale_max: upper end of that range; above 1 neighbours can become separated.
        any_angle: turn by any angle; otherwise by multiples of 90°, which keep neighbours adjacent.
        share: of the tiles of a slide without pixel augmentations that one view has at most, in (0, 1], so that two
            views of a small slide differ.
        dropout: for such slides, share of the features that are set to zero in all tiles of a view, in [0, 1).
        noise: for such slides, size of the noise that is added to features, in their standard deviations over the
            view: one vector for all tiles, as a change of stain would add, and one for each tile.
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
        if not 0 < self.scale_min <= self.scale_max < math.inf:
            raise SettingsError(f"scales must be 0 < min <= max, got {self.scale_min} and {self.scale_max}")
        if not (0 < self.share <= 1 and 0 <= self.dropout < 1 and 0 <= self.noise < math.inf):
            raise SettingsError(
                f"a view needs share in (0, 1], dropout in [0, 1) and noise >= 0, got {self.share}, {self.dropout} "
                f"and {self.noise}"
            )


@dataclass(frozen=True)
class PretrainSettings:
    """Self-supervised learning of slides.

    Args:
        epochs: times that every slide is seen.
        batch: B, slides a step, all of them where there are fewer; each gives two views.
        rate: Adam's highest learning rate.
        rate_batch: the batch that `rate` is meant for: others take more or less in proportion; 0 takes it as it is.
        warmup: share of the training in which the rate rises; from 1 on, the number of epochs.
        weight_decay: weight decay of matrices and kernels, decoupled.
        temperature: temperature of NT-Xent; the arch `neighbours` has none.
        negatives: all; or site: a slide is contrasted with those of its own site alone, so that nothing is learned of
            how sites differ: a column site of slides.csv, or TCGA barcodes. The arch `neighbours` has no negatives.
        chunk: slides (or one more) that are in memory at once with all that their gradient needs, in each process; 0:
            the batch.
        patience: training ends early where loss and rank have not moved over this share of it; 0: never. See
            docs/training.md.
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
    negatives: str = "all"
    chunk: int = 0
    patience: float = 0.25
    keep: str = "best"
    precision: str = "auto"
    seed: int = 0
    start: str = "random"
    view: ViewSettings = field(default_factory=ViewSettings)
    encoder: EncoderSettings = field(default_factory=lambda: NEIGHBOURS)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2:
            raise SettingsError(f"pretrain needs epochs >= 1 and batch >= 2, got {self.epochs} and {self.batch}")
        if not (self.rate > 0 and self.temperature > 0 and self.warmup >= 0 and self.rate_batch >= 0):
            raise SettingsError("pretrain needs rate > 0, temperature > 0, rate_batch >= 0 and warmup >= 0")

        check_choice("pretrain.precision", self.precision, PRECISIONS)
        check_choice("pretrain.negatives", self.negatives, ("all", "site"))
        if self.negatives == "site" and self.encoder.arch == "neighbours":
            what = "pretrain.negatives is site, and the arch neighbours contrasts no slides"
            raise SettingsError(what, "take --pretrain.encoder.arch sparse, mlp or attention")
        if self.chunk < 0 or not 0 <= self.patience <= 1 or self.keep not in ("last", "best"):
            raise SettingsError("pretrain needs chunk >= 0, patience in [0, 1] and keep last or best")

        known = self.start in ("random", "tile-encoder") or self.start.startswith("pickle:")
        if not known and not self.start.endswith(".safetensors"):
            choices = "choose random, tile-encoder, a .safetensors file or pickle:FILE"
            raise SettingsError(f"pretrain.start is {self.start!r}", choices)

    def check_files(self) -> None:
        """Refuse weights to start from that are not there, before anything is computed.

        Raises:
            SettingsError: `start` names a file that does not exist.
        """
        if self.start not in ("random", "tile-encoder") and not Path(self.start.removeprefix("pickle:")).is_file():
            raise SettingsError(f"pretrain.start: no file {self.start.removeprefix('pickle:')}", "correct the path")

    def schedule(self, slides: int) -> Schedule:
        """The steps and rates of a training.

        Args:
            slides: number of slides that it learns from.

        Returns:
            The schedule; epochs and fractions of the settings become steps.
        """
        per_epoch = math.ceil(slides / self.batch)
        steps = self.epochs * per_epoch
        rate = self.rate * slides / per_epoch / self.rate_batch if self.rate_batch else self.rate
        warmup = self.warmup * (per_epoch if self.warmup >= 1 else steps)
        rows = max(1, steps // 200)
        return Schedule(steps, rate, min(round(warmup), steps), self.weight_decay, rows, self.patience)


def trained_as(folder: Path) -> dict[str, Any]:
    """How a slide encoder was made.

    Args:
        folder: of the encoder.

    Returns:
        `fingerprint`, `features` (of what it learned from), `slides` and `pretrain`.

    Raises:
        FileFormatError: the folder holds no slide encoder that `pretrain` wrote.
    """
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))["about"]
        return {name: about[name] for name in ("fingerprint", "features", "slides", "pretrain")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{folder}: no slide encoder with its settings ({error})", "run pretrain first"
        ) from error
