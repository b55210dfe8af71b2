"""What a slide encoder is made of, and what earlier versions made theirs of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histossl.core.errors import SettingsError

RUNS = 4
"""Clusterings at each scale: whether one k-means gives something rare a cluster of its own is a matter of luck."""
BEFORE = {"scales": [0, 2, 4], "normalise": False, "stage_scales": []}
"""Settings that slide encoders were made with before these could be chosen."""


@dataclass(frozen=True)
class EncoderSettings:
    """What a slide encoder is made of.

    Attributes:
        in_dim: length of a tile's vector; other than 256 passes a linear layer first.
        dim: length of what the stage gives to the slide's vector.
        inlet: "plain" takes the tiles as they are, as the paper does. "scaled" brings their features to mean 0 and a
            mean variance of 1, so that they keep their proportions. "standard" brings each of them to variance 1.
            "centred" first subtracts the mean of the view, and with it the stain and most of a shared augmentation;
            then the stage sees in what the tiles differ.
        tile_mean: append the mean of the tiles themselves, `in_dim` numbers, scaled as at the inlet or standardised; it
            says what they are made of.
        prototypes: number of typical neighbourhoods in each clustering; the roots of their shares are appended, so that
            what is rare is not lost in a mean. 0: none. See docs/methods.md.
        scales: how often tiles are averaged with their neighbours (3x3) before prototypes are looked for: 0 is tiles
            themselves, 1 about 3x3 of them, 2 about 5x5. One entry for each set of clusterings, ascending.
        stage_scales: the same for the prototypes that are looked for in what the stage has learned, not in the tiles;
            an empty list leaves them out. Only the arch "neighbours" has them.
        normalise: bring the parts of the slide's vector to one scale over the cohort (docs/methods.md); otherwise they
            stand behind one another as they are.
        arch: "neighbours" (learns what neighbouring tiles share), or one that learns by a contrast of slides: "sparse"
            (sees neighbours), "mlp" or "attention" (see tiles one by one).
        hard_border: as in published weights, the map ends at row 0 and column 0; otherwise the result does not depend
            on where a slide's coordinates begin.
        linear: whether tiles of another length than 256 pass a linear layer first, or the stage takes them as they are.
        spacing: sites from a tile to its neighbour; the published code has 4 on slides scanned at 40x.
    """

    in_dim: int = 256
    dim: int = 128
    inlet: str = "centred"
    tile_mean: bool = True
    prototypes: int = 64
    scales: tuple[int, ...] = (1, 2)
    stage_scales: tuple[int, ...] = (0, 1)
    normalise: bool = True
    arch: str = "sparse"
    hard_border: bool = False
    spacing: float = 1.0
    linear: bool = True

    def __post_init__(self) -> None:
        if self.arch not in ("neighbours", "sparse", "mlp", "attention"):
            raise SettingsError(
                f"no slide encoder is called {self.arch!r}", "take neighbours, sparse, mlp or attention"
            )
        if self.inlet not in ("plain", "scaled", "standard", "centred"):
            raise SettingsError(f"no inlet is called {self.inlet!r}", "take plain, scaled, standard or centred")
        if self.in_dim < 1 or self.dim < 1:
            raise SettingsError(f"in_dim and dim must be positive, got {self.in_dim} and {self.dim}")
        if self.arch == "neighbours" and self.dim % 2:
            raise SettingsError(f"encoder.dim of the arch neighbours must be even, got {self.dim}")
        if self.prototypes < 0:
            raise SettingsError(f"encoder.prototypes must not be negative, got {self.prototypes}")
        for name, scales in (("scales", self.scales), ("stage_scales", self.stage_scales)):
            if list(scales) != sorted(set(scales)) or min(scales, default=0) < 0 or not self.scales:
                raise SettingsError(f"encoder.{name} must ascend from 0 or more, got {scales}")
        if not 0 < self.spacing < np.inf:
            raise SettingsError(f"encoder.spacing must be positive, got {self.spacing}")

    @property
    def contrasted_dim(self) -> int:
        """Length of the part of the slide's vector that takes part in the contrast, and comes first."""
        return self.dim + self.in_dim * self.tile_mean

    @property
    def vector_dim(self) -> int:
        """Length of the slide's vector."""
        return sum(self.parts.values())

    @property
    def part_names(self) -> tuple[str, ...]:
        """Of every number of the slide's vector, the name of its part."""
        return tuple(name for name, length in self.parts.items() for _ in range(length))

    @property
    def parts(self) -> dict[str, int]:
        """Names of the parts of the slide's vector, in order, and their lengths."""
        lengths = {"stage": self.dim, "mean": self.in_dim * self.tile_mean}
        lengths["prototypes"] = len(self.scales) * RUNS * self.prototypes
        if self.arch == "neighbours":
            lengths["stage prototypes"] = len(self.stage_scales) * RUNS * self.prototypes
        return {name: length for name, length in lengths.items() if length}


def made_before(folder: Path) -> str:
    """What is old about a slide encoder.

    Args:
        folder: of the encoder.

    Returns:
        A clause for a message; empty where nothing is old, or the folder holds no encoder.
    """
    try:
        settings = json.loads((Path(folder) / "config.json").read_text("utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if not isinstance(settings, dict):
        return ""
    if "normalise" not in settings:
        return "it was made by an earlier version: the parts of its vectors are not brought to one scale"
    if settings.get("arch") != "neighbours":
        return ""
    if "stage_scales" not in settings:
        return "it was made by an earlier version: its vectors have no prototypes of what the stage learned"
    if settings.get("inlet") == "standard":
        return "it brings every feature of a tile to variance 1, as was the default of earlier versions"
    return ""
