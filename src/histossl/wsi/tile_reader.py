"""Reads batches of tiles in worker processes; does not import torch, so that workers need little memory."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import SlideError
from histossl.wsi.artefacts import tile_scores
from histossl.wsi.geometry import Region
from histossl.wsi.slide import Slide, open_slide
from histossl.wsi.stain_norm import Change


@dataclass(frozen=True)
class ReadJob:
    """A batch of tiles to read in a worker.

    Attributes:
        slide: index of the slide in the caller's list.
        step: index of this batch among those of the slide.
        path: the slide's file.
        mpp: µm per level-0 pixel of the slide.
        xy: (n, 2) int64, top-left corners (x, y) in level-0 pixels.
        extent: side of a tile in level-0 pixels.
        tile_mpp: µm per pixel of a tile.
        px: side of a tile in its own pixels.
        judged: whether artefacts are looked for; they are judged on the pixels as they are.
        change: of the colours of the tiles; None leaves them.
    """

    slide: int
    step: int
    path: Path
    mpp: float
    xy: NDArray[np.int64]
    extent: float
    tile_mpp: float
    px: int
    judged: bool = False
    change: Change | None = None


@dataclass(frozen=True)
class TileBatch:
    """The tiles that were read.

    Attributes:
        tiles: (n, px, px, 3) uint8 RGB; zeros where a tile cannot be decoded.
        lost: (k,) int64, ascending, indices of tiles that cannot be decoded.
        why: the error of the first of them; empty where all were decoded.
        seconds: time that reading took.
        cpu: processor seconds of the same; the rest is spent waiting for the disk.
        scores: (n, 2) float32, see `artefacts.tile_scores`; (n, 0) where nobody asked.
    """

    tiles: NDArray[np.uint8]
    lost: NDArray[np.int64]
    why: str
    seconds: float
    cpu: float
    scores: NDArray[np.float32]


@functools.lru_cache(maxsize=1)
def _slide(path: Path, mpp: float) -> Slide:
    return open_slide(path, mpp)


def read_batch(job: ReadJob) -> TileBatch:
    """Read a batch of tiles; the process keeps its last slide open. A tile that cannot be decoded is tried twice.

    Args:
        job: the tiles to read.

    Returns:
        The tiles, also where some cannot be decoded.

    Raises:
        SlideError: the slide cannot be opened.
    """
    start, busy = time.perf_counter(), time.process_time()
    tiles = np.zeros((len(job.xy), job.px, job.px, 3), np.uint8)
    lost: dict[int, str] = {}
    for k, (x, y) in enumerate(job.xy):
        region = Region(float(x), float(y), job.extent, job.extent)
        for _ in ("with the open handle", "with a new one"):  # after an error a handle of OpenSlide is unusable
            slide = _slide(job.path, job.mpp)
            try:
                tiles[k] = slide.read(region, job.tile_mpp)
                lost.pop(k, None)
                break
            except SlideError as error:
                _slide.cache_clear()
                lost[k] = error.what
    why = next(iter(lost.values()), "")
    scores = tile_scores(tiles, job.tile_mpp) if job.judged else np.empty((len(tiles), 0), np.float32)
    if job.change is not None:
        tiles = job.change(tiles)
    took = time.perf_counter() - start, time.process_time() - busy
    return TileBatch(tiles, np.array(list(lost), np.int64), why, *took, scores)


def read_tiles(job: ReadJob) -> NDArray[np.uint8]:
    """Read a batch of tiles, all of which must be readable.

    Args:
        job: the tiles to read.

    Returns:
        (n, px, px, 3) uint8 RGB.

    Raises:
        SlideError: the slide cannot be opened or a tile cannot be decoded.
    """
    batch = read_batch(job)
    if len(batch.lost):
        raise SlideError(job.path, batch.why.removeprefix(f"{job.path.name}: "), "the file is damaged or cut short")
    return batch.tiles
