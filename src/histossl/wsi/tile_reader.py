"""A batch of tiles of a slide, read in a worker process; imports no torch, so that a worker is small."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import SlideError
from histossl.wsi.geometry import Region
from histossl.wsi.slide import Slide, open_slide


@dataclass(frozen=True)
class ReadJob:
    """A batch of tiles to read in a worker.

    Attributes:
        slide: position of the slide in the caller's list.
        step: position of this batch among the slide's.
        path, mpp: of the slide.
        xy: (n, 2) level-0 top-left corners.
        extent: level-0 pixels of a tile's side.
        tile_mpp: of the tiles.
        px: pixels of a tile's side.
    """

    slide: int
    step: int
    path: Path
    mpp: float
    xy: NDArray[np.int64]
    extent: float
    tile_mpp: float
    px: int


@dataclass(frozen=True)
class TileBatch:
    """What was read.

    Attributes:
        tiles: (n, px, px, 3) uint8; zeros where a tile cannot be decoded.
        lost: (k,) indices of those, ascending.
        why: of the first of them; empty where there is none.
        seconds, cpu: that reading took, by the clock and of the processor: where they differ, it was the disk.
    """

    tiles: NDArray[np.uint8]
    lost: NDArray[np.int64]
    why: str
    seconds: float
    cpu: float


@functools.lru_cache(maxsize=1)
def _slide(path: Path, mpp: float) -> Slide:
    return open_slide(path, mpp)


def read_batch(job: ReadJob) -> TileBatch:
    """Read a batch of tiles; a worker keeps its last slide open. A tile that cannot be decoded is tried twice.

    Raises:
        SlideError: the slide cannot be opened.
    """
    start, busy = time.perf_counter(), time.process_time()
    tiles = np.zeros((len(job.xy), job.px, job.px, 3), np.uint8)
    lost: dict[int, str] = {}
    for k, (x, y) in enumerate(job.xy):
        region = Region(float(x), float(y), job.extent, job.extent)
        for _ in ("with the handle that stands", "with a new one"):
            slide = _slide(job.path, job.mpp)
            try:
                tiles[k] = slide.read(region, job.tile_mpp)
                lost.pop(k, None)
                break
            except SlideError as error:
                _slide.cache_clear()
                lost[k] = error.what
    why = next(iter(lost.values()), "")
    return TileBatch(
        tiles, np.array(list(lost), np.int64), why, time.perf_counter() - start, time.process_time() - busy
    )


def read_tiles(job: ReadJob) -> NDArray[np.uint8]:
    """The tiles of `read_batch`, (n, px, px, 3) uint8.

    Raises:
        SlideError: the slide cannot be opened or a tile cannot be decoded.
    """
    batch = read_batch(job)
    if len(batch.lost):
        raise SlideError(job.path, batch.why.removeprefix(f"{job.path.name}: "), "the file is damaged or cut short")
    return batch.tiles
