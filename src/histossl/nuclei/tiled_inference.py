"""Segments the tiles of a slide, row by row: workers read and outline, the network runs in this process."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histossl.execution.workers import Executor, ThreadExecutor
from histossl.nuclei.instances import InstanceSettings, Nuclei, concatenate, nuclei_of_tile
from histossl.nuclei.method import Method
from histossl.nuclei.pseudo_labels import SlideTree, sure_nuclei
from histossl.nuclei.stain_survey import SegmentSettings, StainSurvey
from histossl.wsi.geometry import Region, Size, level0_length
from histossl.wsi.slide import Slide, open_slide
from histossl.wsi.tissue import TissueMask

_SQUARE = 256  # pixels
_SQUARES = (
    32  # squares that are kept for the next tile, 6 MB; a tile of the default size touches five or six in each column
)


@dataclass(frozen=True)
class Tile:
    """The core of a tile, and the rectangle that is read for it; (x0, y0, x1, y1) in pixels of `tile_mpp`."""

    core: tuple[int, int, int, int]
    read: tuple[int, int, int, int]


def tile_rows(known: StainSurvey, mpp: float, side: int, halo: int) -> list[list[Tile]]:
    """Find the tiles that touch tissue, row by row.

    Args:
        known: the slide's survey.
        mpp: µm per pixel of tiles.
        side: side of a tile in pixels.
        halo: pixels that are read around a tile.

    Returns:
        The rows of tiles; rows without tissue are empty.
    """
    work = Region.whole(known.mask.size).pixels(mpp, known.mpp)
    rows = []
    for top in range(0, work.height, side):
        row = []
        for left in range(0, work.width, side):
            core = (left, top, min(left + side, work.width), min(top + side, work.height))
            if _touches(known.mask, core, work):
                x0, y0, x1, y1 = core
                read = (max(0, x0 - halo), max(0, y0 - halo), min(work.width, x1 + halo), min(work.height, y1 + halo))
                row.append(Tile(core, read))
        rows.append(row)
    return rows


def _touches(mask: TissueMask, core: tuple[int, int, int, int], size: Size) -> bool:
    h, w = mask.mask.shape
    x0, x1 = math.floor(core[0] * w / size.width), math.ceil(core[2] * w / size.width)
    y0, y1 = math.floor(core[1] * h / size.height), math.ceil(core[3] * h / size.height)
    return bool(mask.mask[y0:y1, x0:x1].any())


@dataclass(frozen=True)
class _Look:
    """A tile to read."""

    row: int
    tile: Tile
    path: Path
    slide_mpp: float
    mpp: float


@dataclass(frozen=True)
class _Part:
    """A tile that went through the network; what is left to do with it: the arguments of `nuclei_of_tile`."""

    row: int
    tile: Tile
    arguments: tuple


def by_row(
    rows: Sequence[Sequence[Tile]],
    known: StainSurvey,
    method: Method,
    context: Any,
    tree: SlideTree | None,
    settings: InstanceSettings,
    executor: Executor,
    slide: Slide | None,
) -> Iterator[list[tuple[Tile, Nuclei]]]:
    """Segment tiles and collect their nuclei row by row; see `segment_rows`.

    Args:
        rows: the rows of tiles, each from left to right.
        known: the survey of the slide, with stains.
        method: its network runs here.
        context: what `method.prepare` returned for the slide.
        tree: the slide's sure nuclei, where they support the method.
        settings: how nuclei are separated.
        executor: reads and outlines tiles.
        slide: the open slide, or None where each worker opens it itself.

    Yields:
        The tiles and nuclei of a row, in pixels at `tile_mpp` within the tile that was read.

    Raises:
        SlideError: the slide is damaged.
        WorkerDied, WorkerHung: a worker died or hung on a tile.
    """
    found: list[list[tuple[Tile, Nuclei]]] = [[] for _ in rows]
    looks = iter([_Look(k, tile, known.path, known.mpp, known.tile_mpp) for k, row in enumerate(rows) for tile in row])
    parts: deque[_Part] = deque()

    def tasks() -> Iterator[_Look | _Part]:
        while (task := parts.popleft() if parts else next(looks, None)) is not None:
            yield task

    do = functools.partial(_do, _Pictures(slide, known.tile_mpp) if slide else None)
    given, more = 0, True  # rows that were yielded
    while more:
        for task, answer in executor.map(do, tasks()):
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, Nuclei):
                found[task.row].append((task.tile, answer))
                # All rows before are complete, since tiles come back in order.
                while given < task.row:
                    yield _taken(found, given)
                    given += 1
            else:
                assert known.stains is not None
                # A byte is fine enough for a confidence, and a quarter of the data to send.
                confidence = np.rint(method.confidence(answer, known.stains, context) * 255).astype(np.uint8)
                about = (known.stains, method.mpp, settings, _inside(task.tile), method.learned)
                arguments = (answer, confidence, *about, task.tile.read[:2], tree, known.tile_mpp)
                parts.append(_Part(task.row, task.tile, arguments))
        more = bool(parts)  # outlines are left to do after the last tile was read
    for k in range(given, len(rows)):
        yield _taken(found, k)


def _do(pictures: _Pictures | None, task: _Look | _Part) -> NDArray[np.uint8] | Nuclei:
    if isinstance(task, _Part):
        return nuclei_of_tile(*task.arguments)
    return (pictures or _kept(task.path, task.slide_mpp, task.mpp))(task.tile)


@functools.lru_cache(maxsize=1)
def _kept(path: Path, slide_mpp: float, mpp: float) -> _Pictures:
    """A slide that stays open in a worker until another slide is requested."""
    return _Pictures(open_slide(path, slide_mpp), mpp)


def _taken(found: list[list[tuple[Tile, Nuclei]]], k: int) -> list[tuple[Tile, Nuclei]]:
    row, found[k] = found[k], []
    return row


def _inside(tile: Tile) -> tuple[int, int, int, int]:
    """The core in pixels of the rectangle that was read."""
    left, top = tile.read[:2]
    x0, y0, x1, y1 = tile.core
    return x0 - left, y0 - top, x1 - left, y1 - top


class _Pictures:
    """Pictures of tiles, composed of squares of a fixed grid.

    Resampled pixels are rounded, so that a pixel can differ between overlapping pictures that are read separately.
    """

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


def segment_rows(
    known: StainSurvey,
    method: Method,
    settings: SegmentSettings,
    executor: Executor,
    slide: Slide | None = None,
    done: int = 0,
) -> Iterator[tuple[int, int, Nuclei]]:
    """Find the nuclei of a slide, one row of tiles after the other.

    `executor` reads tiles, a few ahead, and separates and outlines nuclei; the network runs here. A nucleus belongs to
    the tile whose core contains its centroid.

    Args:
        known: the survey of the slide.
        method: finds nuclei.
        settings: settings of the segmentation; the nuclei do not depend on the tile size.
        executor: runs a few tiles at a time, and returns them in order.
        slide: the open slide, where `executor` is this process; None where workers open it by its path.
        done: number of first rows that are left out.

    Yields:
        (row, rows in all, its nuclei in level-0 pixels).

    Raises:
        SlideError: the slide is damaged.
        WorkerDied, WorkerHung: a worker died or hung on one of its tiles.
    """
    rows = tile_rows(known, known.tile_mpp, settings.tile, settings.halo)
    if known.stains is None:
        rows = [[] for _ in rows]
    sure, context = known.sure, None
    if known.stains:
        if method.support and sure is None:
            sure = sure_nuclei(known.fields, known.stains, method.mpp, method.support)
        context = method.prepare(known.fields, known.stains, sure)
    tree = sure.tree if sure else None
    scale = level0_length(1, known.tile_mpp, known.mpp)
    found_rows = by_row(rows[done:], known, method, context, tree, settings.instances, executor, slide)
    for k, found in enumerate(found_rows, done):
        nuclei = concatenate([part.shifted(*tile.read[:2], scale) for tile, part in found])
        yield k, len(rows), _on_tissue(nuclei, known.mask)


def _on_tissue(nuclei: Nuclei, mask: TissueMask) -> Nuclei:
    if mask.mask.all() or not len(nuclei):
        return nuclei
    h, w = mask.mask.shape
    x = np.clip((nuclei.measures[:, 0] * (w / mask.size.width)).astype(np.int64), 0, w - 1)
    y = np.clip((nuclei.measures[:, 1] * (h / mask.size.height)).astype(np.int64), 0, h - 1)
    return nuclei.chosen(mask.mask[y, x])


def segment_slide(slide: Slide, known: StainSurvey, method: Method, settings: SegmentSettings) -> Nuclei:
    """Find all nuclei of a slide in memory; see `segment_rows`.

    Args:
        slide: the open slide.
        known: its survey.
        method: the method.
        settings: settings of the segmentation.

    Returns:
        The nuclei, in level-0 pixels.
    """
    return concatenate([nuclei for _, _, nuclei in segment_rows(known, method, settings, ThreadExecutor(), slide)])
