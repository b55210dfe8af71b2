"""A method over a whole slide: tissue only, tile by tile at a fixed mpp, every nucleus once, in bounded memory."""

from __future__ import annotations

import functools
import logging
import math
import shutil
import zipfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from histossl import store
from histossl.config import fingerprint
from histossl.errors import FileFormatError, SettingsError, SlideError
from histossl.geometry import Region, Size, level0_length
from histossl.nuclei.instances import InstanceSettings, Nuclei, joined, nuclei_of_tile
from histossl.nuclei.stain import Stains, estimate_stains, sample_fields
from histossl.readers import Level
from histossl.scale import Workers
from histossl.slide import Slide
from histossl.tissue import TissueMask, find_tissue

log = logging.getLogger(__name__)

_SQUARE = 256  # pixels
_SQUARES = 32  # that are kept for the next tile, 6 MB; a tile of the default size touches five or six in each column
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
        mask: its tissue.
        fields: a sample of it, (H, W, 3) uint8 at the method's mpp.
        stains: None where there is nothing stained, or no hematoxylin.
    """

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
        return Survey(mask, [], None)
    try:
        stains = estimate_stains(np.concatenate([f.reshape(-1, 3)[:: max(1, len(fields))] for f in fields]))
    except SlideError as error:
        raise SlideError(slide.path, error.what.partition(": ")[2], error.hint) from error
    if stains is None:
        log.warning("%s: nothing on it is stained, so it has no nuclei", slide.path.name)
    elif not stains.has_hematoxylin:
        log.warning("%s: no hematoxylin found (no stain absorbs red), so no nuclei are looked for", slide.path.name)
        stains = None
    elif stains.has_brown:
        log.warning("%s: brown stain, as in immunohistochemistry: only blue nuclei are found", slide.path.name)
    return Survey(mask, fields, stains)


def _tissue(slide: Slide) -> TissueMask:
    if max(slide.size.width, slide.size.height) * slide.mpp < _FIELD:
        return TissueMask(np.ones((1, 1), bool), slide.size)
    return find_tissue(slide)


@dataclass(frozen=True)
class Tile:
    """What a square of a slide owns, and what is read for it; (x0, y0, x1, y1) in pixels at the method's mpp."""

    core: tuple[int, int, int, int]
    read: tuple[int, int, int, int]


def tile_rows(slide: Slide, mask: TissueMask, mpp: float, settings: SegmentSettings) -> list[list[Tile]]:
    """The tiles that touch tissue, row by row; rows without any are empty."""
    width, height = _work_size(slide, mpp).width, _work_size(slide, mpp).height
    rows = []
    for top in range(0, height, settings.tile):
        row = []
        for left in range(0, width, settings.tile):
            core = (left, top, min(left + settings.tile, width), min(top + settings.tile, height))
            if _touches(mask, core, Size(width, height)):
                x0, y0, x1, y1 = core
                halo = settings.halo
                read = (max(0, x0 - halo), max(0, y0 - halo), min(width, x1 + halo), min(height, y1 + halo))
                row.append(Tile(core, read))
        rows.append(row)
    return rows


def _work_size(slide: Slide, mpp: float) -> Size:
    return Region.whole(slide.size).pixels(mpp, slide.mpp)


def _touches(mask: TissueMask, core: tuple[int, int, int, int], size: Size) -> bool:
    h, w = mask.mask.shape
    x0, x1 = math.floor(core[0] * w / size.width), math.ceil(core[2] * w / size.width)
    y0, y1 = math.floor(core[1] * h / size.height), math.ceil(core[3] * h / size.height)
    return bool(mask.mask[y0:y1, x0:x1].any())


def segment_rows(
    slide: Slide, known: Survey, method: Method, settings: SegmentSettings, workers: Workers | None, done: int = 0
) -> Iterator[tuple[int, int, Nuclei]]:
    """The nuclei of a slide, a row of tiles after the other.

    A tile's picture is read ahead in a thread, the network runs here, and nuclei are parted and outlined in `workers`
    (here too where there are none). A nucleus belongs to the tile that its centroid lies in.

    Args:
        slide: open.
        known: its survey.
        method: finds nuclei.
        settings: how the slide is gone over; the nuclei do not depend on the tile size.
        workers: processes; only a few tiles are under way at any time.
        done: rows that are left out.

    Yields:
        (row, rows in all, its nuclei in level-0 pixels).
    """
    rows = tile_rows(slide, known.mask, method.mpp, settings)
    if known.stains is None:
        rows = [[] for _ in rows]
    context = method.prepare(known.fields, known.stains) if known.stains else 0.0
    scale = level0_length(1, method.mpp, slide.mpp)
    for k, found in enumerate(_by_row(slide, rows[done:], known, method, context, settings, workers), done):
        nuclei = joined([part.shifted(*tile.read[:2], scale) for tile, part in found])
        yield k, len(rows), _on_tissue(nuclei, known.mask)


def _by_row(
    slide: Slide,
    rows: Sequence[Sequence[Tile]],
    known: Survey,
    method: Method,
    context: float,
    settings: SegmentSettings,
    workers: Workers | None,
) -> Iterator[list[tuple[Tile, Nuclei]]]:
    waiting: deque[tuple[int, Tile, Future[Nuclei]]] = deque()
    found: list[list[tuple[Tile, Nuclei]]] = [[] for _ in rows]
    limit = 0 if workers is None else workers.count + 1
    tiles = [(k, tile) for k, row in enumerate(rows) for tile in row]
    given = 0  # rows handed out
    picture = _Pictures(slide, method.mpp)
    with ThreadPoolExecutor(1) as reader:
        ahead = deque(reader.submit(picture, tile) for _, tile in tiles[:2])
        for at, (k, tile) in enumerate(tiles):
            rgb = ahead.popleft().result()
            if at + 2 < len(tiles):
                ahead.append(reader.submit(picture, tiles[at + 2][1]))
            assert known.stains is not None
            # A byte is fine enough for a confidence, and a fourth of what travels.
            confidence = np.rint(method.confidence(rgb, known.stains, context) * 255).astype(np.uint8)
            task = (rgb, confidence, known.stains, method.mpp, settings.instances, _inside(tile), method.learned)
            waiting.append((k, tile, _submit(workers, (*task, tile.read[:2]))))
            while len(waiting) > limit:
                row, done, result = waiting.popleft()
                found[row].append((done, result.result()))
                # All of the rows before are complete, for tiles come back in order.
                while given < row:
                    yield _taken(found, given)
                    given += 1
        for row, done, result in waiting:
            found[row].append((done, result.result()))
    for k in range(given, len(rows)):
        yield _taken(found, k)


def _taken(found: list[list[tuple[Tile, Nuclei]]], k: int) -> list[tuple[Tile, Nuclei]]:
    row, found[k] = found[k], []
    return row


def _submit(workers: Workers | None, task: tuple) -> Future[Nuclei]:
    if workers is not None:
        return workers.submit(nuclei_of_tile, *task)
    result: Future[Nuclei] = Future()
    result.set_result(nuclei_of_tile(*task))
    return result


def _inside(tile: Tile) -> tuple[int, int, int, int]:
    """The core in pixels of what was read."""
    left, top = tile.read[:2]
    x0, y0, x1, y1 = tile.core
    return x0 - left, y0 - top, x1 - left, y1 - top


class _Pictures:
    """What is read for tiles, put together from squares of a fixed grid: a resampled pixel is rounded, and would not be
    the same in every picture that it is part of."""

    def __init__(self, slide: Slide, mpp: float) -> None:
        self.slide, self.mpp = slide, mpp
        self.square = functools.lru_cache(maxsize=_SQUARES)(self._read)

    def __call__(self, tile: Tile) -> NDArray[np.uint8]:
        x0, y0, x1, y1 = tile.read
        left, top = x0 // _SQUARE, y0 // _SQUARE
        columns, rows = range(left, -(-x1 // _SQUARE)), range(top, -(-y1 // _SQUARE))
        picture = np.concatenate([np.concatenate([self.square(x, y) for x in columns], 1) for y in rows])
        return picture[y0 - top * _SQUARE : y1 - top * _SQUARE, x0 - left * _SQUARE : x1 - left * _SQUARE]

    def _read(self, column: int, row: int) -> NDArray[np.uint8]:
        side = _SQUARE * level0_length(1, self.mpp, self.slide.mpp)
        return self.slide.read(Region(column * side, row * side, side, side), self.mpp)


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


def parts_key(slide: Slide, method_key: str, settings: SegmentSettings) -> str:
    """What the nuclei of a slide depend on: the file, its mpp, the method, the settings."""
    state = slide.path.stat()
    return fingerprint(str(slide.path.resolve()), state.st_size, state.st_mtime_ns, slide.mpp, method_key, settings)


def segment_slide(
    slide: Slide, known: Survey, method: Method, settings: SegmentSettings, workers: Workers | None = None
) -> Nuclei:
    """All nuclei of a slide at once, in memory, in level-0 pixels; see `segment_rows`."""
    return joined([nuclei for _, _, nuclei in segment_rows(slide, known, method, settings, workers)])
