"""Settings of tile encoders and of the encoding of slides. They import no torch, so that flags are read at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from histossl.core.config import PRECISIONS, check_choice
from histossl.core.errors import SettingsError

METHODS = ("macenko", "reinhard")  # of stain normalisation
SCALES = (1, 2, 4)
"""A pixel of a visual word's patch is so many of the tile's pixels wide."""
PLAIN = 6 + 5 * 2 * len(SCALES)
"""Numbers of contrast and colour, see `PatchKMeans.described`."""


@dataclass(frozen=True)
class AugmentSettings:
    """The domain of tile augmentations.

    Args:
        crop: least share of the tile's area that is kept; the crop's aspect lies in [3/4, 4/3].
        flip: probability of a mirror image.
        rotate: whether the tile is turned by any angle (edges mirrored).
        brightness: factor in [1 - b, 1 + b].
        contrast: factor in [1 - c, 1 + c].
        saturation: factor in [1 - s, 1 + s].
        hue: shift in [-h, h] of the full circle.
        jitter: probability of the four colour changes, in random order.
        grayscale: probability of losing all colour.
        blur: probability of a 5x5 Gaussian blur with sigma in [0.1, 1] pixels.
    """

    crop: float = 0.5
    flip: float = 0.5
    rotate: bool = True
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.2
    jitter: float = 0.8
    grayscale: float = 0.2
    blur: float = 0.5

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grayscale", "blur", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"augment.{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 < self.crop <= 1:
            raise SettingsError(f"augment.crop must lie in (0, 1], got {self.crop}")
        if not 0 <= self.hue <= 0.5:
            raise SettingsError(f"augment.hue must lie in [0, 0.5], got {self.hue}")


@dataclass(frozen=True)
class EncodeSettings:
    """Settings of the encoding of slides.

    Args:
        views: K, augmented views per slide; 0 stores no views, and training uses the plain features.
        tiles: n, tiles per view (all of them where a slide has fewer).
        window: tiles of a view are drawn in compact groups of this size, so that they have neighbours; 1 draws single
            tiles.
        batch: tiles per forward pass.
        precision: auto (bfloat16 where the hardware multiplies it natively), float32 or bfloat16.
        stain: none; or tiles get the colours of the cohort's median slide (median), or of one slide (its slide_id).
        stain_method: macenko (by the amounts of two stains) or reinhard (by mean and deviation of the colours).
        seed: of the augmentations and of the tiles drawn.
        max_lost: share of a slide's tiles that may be undecodable, in [0, 1); they are left out. With more, the slide
            fails.
        augment: the augmentations.
    """

    views: int = 4
    tiles: int = 256
    window: int = 64
    batch: int = 64
    precision: str = "auto"
    stain: str = "none"
    stain_method: str = "macenko"
    seed: int = 0
    max_lost: float = 0.05
    augment: AugmentSettings = field(default_factory=AugmentSettings)

    def __post_init__(self) -> None:
        for name, least in (("views", 0), ("tiles", 1), ("window", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise SettingsError(f"encode.{name} must be at least {least}, got {getattr(self, name)}")
        check_choice("encode.precision", self.precision, PRECISIONS)
        check_choice("encode.stain_method", self.stain_method, METHODS)
        if not 0 <= self.max_lost < 1:
            raise SettingsError(f"encode.max_lost must lie in [0, 1), got {self.max_lost}")


@dataclass(frozen=True)
class StreamPlan:
    """How many tiles, and from how many slides.

    Attributes:
        steps: batches.
        batch: tiles of each.
        slides: that a batch's tiles come from, in equal parts.
        seed: of the order of the slides and the choice of tiles.
    """

    steps: int
    batch: int
    slides: int
    seed: int


@dataclass(frozen=True)
class PatchKMeansSettings:
    """Visual words of tiles.

    Args:
        count: words of each stain and size.
        tiles: number of tiles to learn from, balanced over the slides.
        patches: number of patches, of each stain and size, in which the words are found.
        seed: of the tiles and patches drawn, and of k-means.
    """

    count: int = 64
    tiles: int = 2048
    patches: int = 25_000
    seed: int = 0

    FORMER_NAME: ClassVar[str] = "WordSettings"

    def __post_init__(self) -> None:
        if self.count < 2 or self.tiles < 2 or self.patches < self.count:
            raise SettingsError("words need a count >= 2, tiles >= 2, and no fewer patches than words")

    def plan(self) -> StreamPlan:
        """What is read of the slides."""
        batch = min(self.tiles, 128)
        return StreamPlan(-(-self.tiles // batch), batch, 32, self.seed)


@dataclass(frozen=True)
class JointSettings:
    """Visual words with contrast and colour.

    Args:
        words: of the visual words.
        nuisances: directions that are projected out, those in which a change of stain moves slides most; 0 keeps all.
        stain: standard deviation of the logarithm of the factors by which hematoxylin and eosin change; the residual
            and the whole change by half of it.
        tint: standard deviation of what is added to each channel's density.
        plain: weight of contrast and colour beside that of the words.
        axes: principal axes of tiles that are kept, at most as many as there are numbers; the length of a feature.
    """

    words: PatchKMeansSettings = field(default_factory=PatchKMeansSettings)
    nuisances: int = 4
    stain: float = 0.2
    tint: float = 0.04
    plain: float = 2.0
    axes: int = 128

    def __post_init__(self) -> None:
        if not 0 <= self.nuisances <= PLAIN or self.stain < 0 or self.tint < 0:
            raise SettingsError(f"joint needs nuisances from 0 to {PLAIN}, stain >= 0 and tint >= 0")
        if self.axes < 1 or self.plain <= 0:
            raise SettingsError("joint needs axes >= 1 and plain > 0")


@dataclass(frozen=True)
class TileAugmentSettings:
    """The domain of augmentations of single tiles, made for stained tissue.

    Args:
        view: side of a view in pixels; at most three quarters of the tile's side, so that two views of a tile differ.
        zoom: a pixel of a view covers between 1 / zoom and zoom pixels of the tile, limited by the tile's size; near 1,
            since at a known mpp the size of cells is a feature.
        stain: each stain's optical density is multiplied by its own factor in [1 - s, 1 + s]; stains are hematoxylin,
            eosin and the residual.
        tint: added to the optical density of each channel, in [-t, t], as glass, lamp and scanner do.
        jitter: probability of the changes of colour in `colour`.
        colour: greatest change of brightness, contrast and saturation; hue changes by at most a quarter of it.
        grayscale: probability of losing all colour.
        blur: probability of a Gaussian blur with sigma up to 1 pixel.
    """

    view: int = 96
    zoom: float = 1.25
    stain: float = 0.5
    tint: float = 0.1
    jitter: float = 0.8
    colour: float = 0.4
    grayscale: float = 0.2
    blur: float = 0.5

    def __post_init__(self) -> None:
        for name in ("stain", "jitter", "colour", "grayscale", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"augment.{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.view < 16 or self.zoom < 1 or self.tint < 0:
            raise SettingsError("augment needs view >= 16, zoom >= 1 and tint >= 0")


@dataclass(frozen=True)
class MocoSettings:
    """Settings of momentum contrast on tiles.

    Args:
        steps: number of optimiser steps.
        batch: tiles per step; each gives a query and a key.
        slides: number of slides that the tiles of a batch come from, in equal parts: every slide counts the same.
        rate: Adam's highest learning rate.
        warmup: share of the steps in which the rate rises, in [0, 1].
        weight_decay: weight decay of the kernels, decoupled.
        temperature: temperature of InfoNCE.
        queue: number of keys of earlier batches that serve as negatives.
        momentum: share of the momentum encoder that a step keeps, in [0, 1); less in the first steps.
        projection: length of the vectors that are contrasted.
        precision: auto (bfloat16 where the hardware multiplies it natively), float32 or bfloat16.
        seed: of the initial weights, the tiles drawn and their augmentations.
        augment: the augmentations.
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
            raise SettingsError("moco needs steps, slides, projection >= 1, batch >= 2 and queue >= 0")
        check_choice("moco.precision", self.precision, PRECISIONS)
        if not (self.rate > 0 and self.temperature > 0 and 0 <= self.warmup <= 1 and 0 <= self.momentum < 1):
            raise SettingsError("moco needs rate, temperature > 0, warmup in [0, 1], momentum in [0, 1)")

    def plan(self) -> StreamPlan:
        """How many tiles are read from how many slides."""
        return StreamPlan(self.steps, self.batch, self.slides, self.seed)


@dataclass(frozen=True)
class TileTrainSettings:
    """How tiles are learned without labels.

    Args:
        method: joint (visual words with the contrast and colour that they divide out, a minute), words (small patches
            of stain and k-means, seconds) or moco (momentum contrast as in the paper, hours).
        joint: of `joint`.
        words: of `words`.
        moco: of `moco`.
    """

    method: str = "joint"
    joint: JointSettings = field(default_factory=JointSettings)
    words: PatchKMeansSettings = field(default_factory=PatchKMeansSettings)
    moco: MocoSettings = field(default_factory=MocoSettings)

    def __post_init__(self) -> None:
        if self.method not in ("joint", "words", "moco"):
            raise SettingsError(f"tile-encoder.method must be joint, words or moco, got {self.method!r}")

    @property
    def chosen(self) -> JointSettings | PatchKMeansSettings | MocoSettings:
        """Of the method."""
        return {"joint": self.joint, "words": self.words, "moco": self.moco}[self.method]

    def plan(self) -> StreamPlan:
        """What is read of the slides."""
        chosen = self.chosen
        return chosen.words.plan() if isinstance(chosen, JointSettings) else chosen.plan()
