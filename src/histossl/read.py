"""A batch of tiles of a slide, read in a worker process; imports no torch, so that a worker is small."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histossl.errors import SlideError
from histossl.geometry import Region
from histossl.slide import Slide, open_slide


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


@functools.lru_cache(maxsize=1)
def _slide(path: Path, mpp: float) -> Slide:
    return open_slide(path, mpp)


def read_tiles(job: ReadJob) -> NDArray[np.uint8]:
    """Read a batch of tiles, (n, px, px, 3) uint8; a worker keeps its last slide open.

    Raises:
        SlideError: the slide cannot be opened or a tile cannot be decoded.
    """
    tiles = np.empty((len(job.xy), job.px, job.px, 3), np.uint8)
    try:
        slide = _slide(job.path, job.mpp)
        for k, (x, y) in enumerate(job.xy):
            tiles[k] = slide.read(Region(float(x), float(y), job.extent, job.extent), job.tile_mpp)
    except SlideError:
        _slide.cache_clear()
        raise
    return tiles
