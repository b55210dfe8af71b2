"""Settings of the second pillar. They import nothing that computes, so that flags are read at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from histossl.core.config import PRECISIONS, check_choice
from histossl.core.errors import SettingsError


@dataclass(frozen=True)
class TreeSettings:
    """Score of an object by its shape.

    Attributes:
        smallest: µm², least area.
        largest: µm², greatest area.
        hole: µm², holes up to this area belong to the object around them.
        roundness: exponent of the roundness, which is the area over that of the ellipse of equal moments: 1 for any
            ellipse, less for objects that are concave, branched or two nuclei.
        longest: ratio of the axes at which the score falls to 0; up to half of it there is no penalty.
        usual: µm², usual area of nuclei in the image; 0 where it is unknown.
        spread: standard deviation of the logarithm of areas around the usual one; smaller values penalise objects of
            other sizes more.
        edges: whether to multiply by the mean gradient along the outline, which prefers the sharpest of nested
            outlines.
        whole: factor that several parts must score better by than the object that contains them.
        nested: the same for a single part, that is for a tighter outline.
    """

    smallest: float = 6.0
    largest: float = 250.0
    hole: float = 40.0
    roundness: float = 3.0
    longest: float = 6.0
    usual: float = 0.0
    spread: float = 1.25
    edges: bool = True
    whole: float = 1.02
    nested: float = 1.0


@dataclass(frozen=True)
class InstanceSettings:
    """How nuclei are separated.

    Attributes:
        threshold: threshold on the confidence, 0 to 1.
        smallest: µm², least area of a nucleus.
        hole: µm², holes up to this area are filled.
        smooth: µm, sigma of the Gaussian on the depth before nuclei are separated.
        middle: least maximum of the depth in a nucleus, where the depth is learned; objects of less depth are dropped.
        parts: score of the markers of nuclei, where the depth is learned.
        apart: µm, least distance of two markers, where the depth is the distance to the outline.
    """

    threshold: float = 0.5
    smallest: float = 8.0
    hole: float = 40.0
    smooth: float = 0.35
    apart: float = 2.0
    middle: float = 0.5
    parts: TreeSettings = field(
        default_factory=lambda: TreeSettings(
            smallest=1.5, largest=300, hole=0, roundness=16, longest=20, edges=False, whole=1.0, nested=1.1
        )
    )


@dataclass(frozen=True)
class PseudoLabelSettings:
    """How hematoxylin becomes pseudo-labels.

    Attributes:
        blur: µm, sigma of the Gaussian on hematoxylin.
        levels: thresholds of the tree of objects.
        quality: least quality of a sure object, in units of the slide's steep slopes (their 95th percentile).
        doubt: weight of dark pixels outside sure objects; sure background weighs 1.
        pale: how pale doubtful pixels may be, from 1 (only pixels darker than Otsu's threshold are doubtful)
            down to 0 (all pixels darker than the median of those below that threshold are).
        faint: weight of the pixels between the two thresholds.
        pasted: per mm², sure nuclei that are copied beside others in a second copy of each field, so that the network
            meets touching nuclei whose outlines are known.
        paled: whether there is a third copy of each field, in which sure nuclei are paler than they are, by a factor
            drawn for each, so that the network meets pale and vesicular nuclei whose outlines are known.
        objects: the score of an object by its shape.
    """

    blur: float = 0.2
    levels: int = 32
    quality: float = 0.2
    doubt: float = 0.1
    pale: float = 1.0
    faint: float = 0.02
    pasted: float = 2400.0
    paled: bool = False
    objects: TreeSettings = field(default_factory=TreeSettings)


@dataclass(frozen=True)
class SelfTrainingSettings:
    """Settings of the training of the default method.

    Attributes:
        steps: of training.
        batch: crops per step.
        crop: side of a crop in pixels of 0.5 µm.
        rate: highest learning rate.
        weight_decay: weight decay of the kernels.
        stain: sigma of the changes of stain: each crop's optical density is scaled, mixed between channels, shifted.
        strength: sigma of the logarithm of a factor on all of a crop's optical density.
        zoom: crops are scaled by a factor of up to e^zoom up or down.
        noise: sigma of noise on the optical density.
        turns: quarter turns over which confidence is averaged: 1, 2 or 4.
        support: whether the sure nuclei of a slide support the network there, and its last layer is fitted to them
            (`slide_head.py`, `evidence.py`); for a network that learned elsewhere.
        precision: auto (bfloat16 where the hardware multiplies it natively), float32 or bfloat16.
        widths: channels of the network at full, half and quarter resolution.
        seed: seed of all that is random.
        pseudo_labels: how pseudo-labels are made.
    """

    steps: int = 800
    batch: int = 12
    crop: int = 128
    rate: float = 4e-3
    weight_decay: float = 1e-3
    stain: float = 0.15
    strength: float = 0.0
    zoom: float = 0.3
    noise: float = 0.02
    turns: int = 2
    support: bool = False
    precision: str = "auto"
    widths: tuple[int, int, int] = (12, 24, 32)
    seed: int = 0
    pseudo_labels: PseudoLabelSettings = field(default_factory=PseudoLabelSettings)

    FORMER_NAME: ClassVar[str] = "ContrastSettings"
    FORMER_FIELDS: ClassVar[dict[str, str]] = {"lessons": "pseudo_labels", "agreement": ""}

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.turns not in (1, 2, 4):
            raise SettingsError("self-training needs steps >= 1, batch >= 1 and turns of 1, 2 or 4")
        check_choice("self-training.precision", self.precision, PRECISIONS)
        if self.crop < 32 or self.crop % 4:
            raise SettingsError(f"self-training.crop must be a multiple of 4 from 32, got {self.crop}")


@dataclass(frozen=True)
class AdaptSettings:
    """How a trained model is adapted to new slides.

    Attributes:
        steps: of training.
        rate: highest learning rate.
        held: every `held`-th field is used to judge, not to learn.
        margin: least improvement of the judgement that the adapted model must reach.
        seed: seed of all that is random.
    """

    steps: int = 300
    rate: float = 2e-3
    held: int = 4
    margin: float = 0.002
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.held < 2:
            raise SettingsError("adapting needs steps >= 1 and held >= 2")


@dataclass(frozen=True)
class SegmentSettings:
    """How a slide is segmented. Only `instances` changes the result, and `fields` and `seed` through the statistics.

    Attributes:
        tile: pixels at the method's mpp, side of a tile; memory grows with its square, by about 200
            bytes a pixel and process.
        halo: pixels around a tile that are read too; larger than any nucleus and than the network's receptive field.
        fields: squares of 256 pixels that stain statistics are taken from.
        seed: seed of their coordinates.
        instances: how nuclei are separated.
    """

    tile: int = 1024
    halo: int = 96
    fields: int = 24
    seed: int = 0
    instances: InstanceSettings = field(default_factory=InstanceSettings)

    def __post_init__(self) -> None:
        # The network's grid of strides begins at the slide's corner whatever the tiles are.
        for name, least in (("tile", 64), ("halo", 64)):
            if getattr(self, name) < least or getattr(self, name) % 4:
                raise SettingsError(f"{name} must be a multiple of 4 from {least}, got {getattr(self, name)}")
        if self.fields < 1:
            raise SettingsError(f"fields must be at least 1, got {self.fields}")


@dataclass(frozen=True)
class ExportSettings:
    """Which files are written beside the overlay and the GeoJSON.

    Attributes:
        gzip: whether the GeoJSON is gzipped (QuPath opens it as it is).
        parquet: GeoParquet, one row per nucleus.
        h5ad: AnnData, one row of measures per nucleus.
        density: nuclei per mm² of tissue in squares of 100 µm, as a TIFF.
        sheet: a picture of 48 random nuclei with their outlines, for checking.
        zarr: OME-Zarr labels.
        labels: a label image (int32 TIFF) for plain pictures.
    """

    gzip: bool = False
    parquet: bool = False
    h5ad: bool = False
    density: bool = False
    sheet: bool = False
    zarr: bool = False
    labels: bool = True
