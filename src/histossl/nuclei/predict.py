"""A method over a whole slide: tissue only, tile by tile at a fixed mpp, every nucleus once, in bounded memory."""

from __future__ import annotations

import logging
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from histossl import store
from histossl.config import fingerprint
from histossl.errors import FileFormatError, SettingsError, SlideError
from histossl.geometry import Size, level0_length
from histossl.nuclei.instances import InstanceSettings, Nuclei, joined
from histossl.nuclei.rows import by_row, tile_rows
from histossl.nuclei.stain import Stains, estimate_stains, sample_fields
from histossl.readers import Level
from histossl.scale import Here, Place
from histossl.slide import Slide, open_slide
from histossl.tissue import TissueMask, find_tissue

log = logging.getLogger(__name__)

_FIELD = 2000.0  # µm: a picture less wide is a field, all of it is looked at


class Method(Protocol):
    """What finds nuclei: `prior`, `contrast`, `paper`."""

    @property
    def name(self) -> str: ...

    @property
    def mpp(self) -> float:
        """µm per pixel of the pictures that it takes."""
        ...

    @property
    def learned(self) -> bool:
        """Whether the depth was learned, or is the plain distance to the outline."""
        ...

    def prepare(self, fields: list[NDArray[np.uint8]], stains: Stains) -> float:
        """A number of the slide that `confidence` needs, from a sample of it."""
        ...

    def confidence(self, rgb: NDArray[np.uint8], stains: Stains, context: float) -> NDArray[np.float32]:
        """(2, H, W) in [0, 1] of a picture (H, W, 3) at `mpp`: nucleus, and depth inside of it."""
        ...


@dataclass(frozen=True)
class SegmentSettings:
    """How a slide is gone over. Of these only `instances` changes the result, and `fields` and `seed` its statistics.

    Attributes:
        tile: pixels at the method's mpp, side of what is worked on at once; memory grows with its square, by about 200
            bytes a pixel and process.
        halo: pixels around it that are looked at too; larger than any nucleus and than what the network sees.
        fields: squares of 256 pixels that stain statistics are taken from.
        seed: of their places.
        instances: how confidence becomes nuclei.
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
class Survey:
    """What is known about a slide before its nuclei are.

    Attributes:
        path: of the slide.
        mpp: µm per level-0 pixel.
        vendor: "plain" for pictures.
        mask: its tissue, which knows its size.
        fields: a sample of it, (H, W, 3) uint8 at the method's mpp.
        stains: None where there is nothing stained.
    """

    path: Path
    mpp: float
    vendor: str
    mask: TissueMask
    fields: list[NDArray[np.uint8]]
    stains: Stains | None


def survey(slide: Slide, mpp: float, settings: SegmentSettings = SegmentSettings()) -> Survey:
    """Tissue, a sample of fields at `mpp`, and the stains.

    Raises:
        SlideError: the slide cannot be read, or is greyscale.
    """
    mask = _tissue(slide)
    rng = np.random.default_rng(settings.seed)
    fields = sample_fields(slide, mask, mpp, settings.fields, rng)
    if not fields:
        return Survey(slide.path, slide.mpp, slide.vendor, mask, [], None)
    try:
        stains = estimate_stains(np.concatenate([f.reshape(-1, 3)[:: max(1, len(fields))] for f in fields]))
    except SlideError as error:
        raise SlideError(slide.path, error.what.partition(": ")[2], error.hint) from error
    if stains is None:
        log.warning("%s: nothing on it is stained, so it has no nuclei", slide.path.name)
    elif not stains.has_hematoxylin:
        what = "hardly any red is absorbed, as if there were no hematoxylin: look whether what is found are nuclei"
        log.warning("%s: %s", slide.path.name, what)
    elif stains.has_brown:
        what = "a brown stain, as of immunohistochemistry or tan collagen: of brown nuclei hardly any are found"
        log.warning("%s: %s", slide.path.name, what)
    return Survey(slide.path, slide.mpp, slide.vendor, mask, fields, stains)


@dataclass(frozen=True)
class SurveyTask:
    """A slide that a worker opens and surveys: its path, arguments of `open_slide`, and those of `survey`."""

    path: Path
    mpp_default: float | None
    mpp: float
    settings: SegmentSettings = SegmentSettings()


def survey_there(task: SurveyTask) -> Survey:
    """As `survey`, in a worker.

    Raises:
        SlideError: the slide cannot be opened or read, or is greyscale.
    """
    with open_slide(task.path, mpp_default=task.mpp_default) as slide:
        return survey(slide, task.mpp, task.settings)


def _tissue(slide: Slide) -> TissueMask:
    if max(slide.size.width, slide.size.height) * slide.mpp < _FIELD:
        return TissueMask(np.ones((1, 1), bool), slide.size)
    return find_tissue(slide)


def segment_rows(
    known: Survey, method: Method, settings: SegmentSettings, place: Place, slide: Slide | None = None, done: int = 0
) -> Iterator[tuple[int, int, Nuclei]]:
    """The nuclei of a slide, a row of tiles after the other.

    `place` reads tiles, a few ahead, and parts and outlines nuclei; the network runs here. A nucleus belongs to the
    tile that its centroid lies in.

    Args:
        known: its survey.
        method: finds nuclei.
        settings: how the slide is gone over; the nuclei do not depend on the tile size.
        place: answers in order; only a few tiles are under way at any time.
        slide: open, where `place` is this process; elsewhere workers open it by its path.
        done: rows that are left out.

    Yields:
        (row, rows in all, its nuclei in level-0 pixels).

    Raises:
        SlideError: the slide is damaged.
        WorkerDied, WorkerHung: a worker did, over one of its tiles.
    """
    rows = tile_rows(known, method.mpp, settings.tile, settings.halo)
    if known.stains is None:
        rows = [[] for _ in rows]
    context = method.prepare(known.fields, known.stains) if known.stains else 0.0
    scale = level0_length(1, method.mpp, known.mpp)
    for k, found in enumerate(by_row(rows[done:], known, method, context, settings.instances, place, slide), done):
        nuclei = joined([part.shifted(*tile.read[:2], scale) for tile, part in found])
        yield k, len(rows), _on_tissue(nuclei, known.mask)


def _on_tissue(nuclei: Nuclei, mask: TissueMask) -> Nuclei:
    if mask.mask.all() or not len(nuclei):
        return nuclei
    h, w = mask.mask.shape
    x = np.clip((nuclei.measures[:, 0] * (w / mask.size.width)).astype(np.int64), 0, w - 1)
    y = np.clip((nuclei.measures[:, 1] * (h / mask.size.height)).astype(np.int64), 0, h - 1)
    return nuclei.chosen(mask.mask[y, x])


class Parts:
    """The nuclei of a slide on disk while it is worked on, a file a row of tiles; a run that was killed goes on.

    Args:
        folder: holds the files; its name should fingerprint all that makes them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, row: int) -> Path:
        """Of a row's file."""
        return self.folder / f"row-{row:05d}.npz"

    def done(self) -> int:
        """How many rows stand, from the first."""
        row = 0
        while self.path(row).exists():
            row += 1
        return row

    def add(self, row: int, nuclei: Nuclei) -> None:
        """Keep a row, whole or not at all."""
        with store.whole(self.path(row)) as part, part.open("wb") as file:
            np.savez(file, points=nuclei.points, start=nuclei.start, measures=nuclei.measures)

    def remove(self) -> None:
        """Once the outputs stand."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __iter__(self) -> Iterator[Nuclei]:
        for row in range(self.done()):
            try:
                with np.load(self.path(row), allow_pickle=False) as data:
                    yield Nuclei(data["points"], data["start"], data["measures"])
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise FileFormatError(f"{self.path(row)}: damaged ({error})", "remove it and start again") from error


class _ArrayReader:
    """A picture in memory as a slide of one level."""

    vendor = "array"

    def __init__(self, rgb: NDArray[np.uint8]) -> None:
        self.rgb = rgb
        self.levels = (Level(Size(rgb.shape[1], rgb.shape[0]), 1.0),)
        self.properties: dict[str, str] = {}

    def read(self, level: int, x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], float, float]:
        return self.rgb[y : y + height, x : x + width], float(x), float(y)

    def close(self) -> None:
        pass


def picture_slide(image: NDArray[Any], mpp: float, name: str = "image") -> Slide:
    """A picture in memory as a slide.

    Args:
        image: (H, W, 3) or (H, W, 4, laid on white) of uint8, uint16 (full range) or floats in [0, 1].
        mpp: µm per pixel.

    Raises:
        SlideError: of another shape or kind, or an mpp out of range.
    """
    from histossl.mpp import RANGE_TEXT, usable

    if not usable(mpp):
        raise SlideError(name, f"an mpp of {mpp:g} is no microscope's", f"it must lie in {RANGE_TEXT}")
    return Slide(Path(name), _ArrayReader(eight_bit_rgb(image, name)), mpp)  # type: ignore[arg-type]


def eight_bit_rgb(image: NDArray[Any], name: str = "image") -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of what `picture_slide` takes."""
    if image.ndim != 3 or image.shape[2] not in (3, 4) or 0 in image.shape:
        what = "is greyscale" if image.ndim == 2 else f"has the shape {image.shape}"
        raise SlideError(name, f"{what}, not (rows, columns, 3)", "give an RGB image")
    if image.dtype == np.uint16:
        image = (image.astype(np.uint32) * 255 + 32767) // 65535
    elif image.dtype.kind == "f":
        if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
            raise SlideError(name, "has floats outside of [0, 1]", "scale them, or give uint8")
        image = np.rint(image * 255)
    elif image.dtype != np.uint8:
        raise SlideError(name, f"is of {image.dtype}", "give uint8, uint16 or floats in [0, 1]")
    if image.shape[2] == 4:
        alpha = image[..., 3:].astype(np.float32) / 255
        image = np.rint(image[..., :3] * alpha + 255 * (1 - alpha))
    return np.ascontiguousarray(image.astype(np.uint8)[..., :3])


def parts_key(known: Survey, state: str, method_key: str, settings: SegmentSettings) -> str:
    """What the nuclei of a slide depend on: the file and its state, its mpp, the method, the settings."""
    return fingerprint(str(known.path), state, known.mpp, method_key, settings)


def segment_slide(slide: Slide, known: Survey, method: Method, settings: SegmentSettings) -> Nuclei:
    """All nuclei of a slide at once, in memory, in level-0 pixels; see `segment_rows`."""
    return joined([nuclei for _, _, nuclei in segment_rows(known, method, settings, Here(), slide)])
