"""Tiles of many slides, in batches in which every slide counts the same, for encoders to learn from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histossl.core.errors import FileFormatError, SlideError, TrainingError
from histossl.encoders.settings import StreamPlan
from histossl.execution.workers import ThreadExecutor, Workers
from histossl.wsi import tile_files
from histossl.wsi.stain_norm import Change
from histossl.wsi.tile_reader import ReadJob, read_tiles
from histossl.wsi.tiles import TileSpec


@dataclass(frozen=True)
class TileSource:
    """Where the tiles of one slide lie.

    Attributes:
        slide_id: for messages.
        path, mpp: of the slide.
        tile: what its tiles are.
        tiles_path: the HDF5 file of their places.
        area: of the slide that they lie in, "" for all of it.
        change: of the colours of its tiles; None leaves them.
    """

    slide_id: str
    path: Path
    mpp: float
    tile: TileSpec
    tiles_path: Path
    area: str = ""
    change: Change | None = None


class TileStream:
    """Batches of tiles from slides, a function of seed and step alone, read ahead by worker processes.

    A slide of which a batch cannot be read is left out of that batch, and counted.

    Args:
        sources: the slides, in a fixed order.
        plan: how many tiles of how many slides, how often.
        workers: who reads.
    """

    def __init__(self, sources: Sequence[TileSource], plan: StreamPlan, workers: Workers | ThreadExecutor) -> None:
        self.sources, self.plan, self.workers = sources, plan, workers
        self.tiles = [tile_files.read_tiles_of(source.tiles_path) for source in sources]
        self.total = sum(len(tiles.xy) for tiles in self.tiles)
        self.failures: dict[str, str] = {}
        self._next = -1
        self._answers: Iterator[tuple[ReadJob, NDArray[np.uint8] | Exception]] = iter(())
        self._last: Tensor | None = None

    def __call__(self, step: int) -> Tensor:
        """(B, H, W, 3) uint8 tiles of a step; steps in order come fast, others are read anew.

        Raises:
            TrainingError: not one slide of the batch can be read.
        """
        if self._last is not None and step == self._next - 1:
            return self._last
        if step != self._next:
            depth = 2 * self.plan.slides // self.workers.count + 1
            jobs = (job for s in range(step, self.plan.steps) for job in self.jobs(s))
            self._answers = self.workers.map(read_tiles, jobs, ahead=max(2, depth))
        self._next = step + 1
        found = [self._tiles(*next(self._answers)) for _ in self.jobs(step)]
        tiles = np.concatenate([part for part in found if part is not None] or [np.empty((0, 1, 1, 3), np.uint8)])
        if len(tiles) < 2:
            raise TrainingError(f"no tile of step {step} can be read: {next(iter(self.failures.values()))}")
        self._last = torch.from_numpy(tiles)
        return self._last

    def jobs(self, step: int) -> list[ReadJob]:
        """What is read for a step: tiles of the next slides of a shuffled round, in equal parts.

        Args:
            step: from 0 on.

        Returns:
            A job a slide, `plan.batch` tiles in all.
        """
        wanted, rng = self.plan.batch, np.random.default_rng([self.plan.seed, 0, step])
        slides = min(self.plan.slides, len(self.sources), wanted)
        places = np.arange(step * slides, (step + 1) * slides)
        found = []
        for position, k in enumerate(self._slide(int(place)) for place in places):
            source, tiles = self.sources[k], self.tiles[k]
            count = wanted // slides + (position < wanted % slides)
            chosen = np.sort(rng.choice(len(tiles.xy), count, replace=count > len(tiles.xy)))
            xy, tile = tiles.xy[chosen], source.tile
            about = source.path, source.mpp, xy, tiles.extent, tile.mpp, tile.px
            found.append(ReadJob(k, step, *about, change=source.change))
        return found

    def _slide(self, place: int) -> int:
        """The slide at a place of the endless row of shuffled rounds, in which every slide comes once a round."""
        turn, position = divmod(place, len(self.sources))
        return int(np.random.default_rng([self.plan.seed, 1, turn]).permutation(len(self.sources))[position])

    def _tiles(self, job: ReadJob, answer: NDArray[np.uint8] | Exception) -> NDArray[np.uint8] | None:
        if isinstance(answer, Exception):
            what = str(answer) if isinstance(answer, SlideError) else f"{job.path.name}: {answer}"
            self.failures.setdefault(self.sources[job.slide].slide_id, what)
            return None
        return answer


def tiles_trained_on(folder: Path) -> set[str]:
    """The slides that a tile encoder was trained on.

    Args:
        folder: that `save_encoder` wrote.

    Returns:
        Their names, as in config.json.

    Raises:
        FileFormatError: the folder holds no tile encoder with its settings.
    """
    try:
        return set(json.loads((folder / "config.json").read_text(encoding="utf-8"))["slides"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{folder}: no tile encoder with its settings ({error})"
        raise FileFormatError(what, "remove it to train anew, or give it as --encoder") from error
