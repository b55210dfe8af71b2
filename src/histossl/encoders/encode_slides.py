"""Encodes slides one after the other, while workers read the tiles of the next ones."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from histossl.core.errors import HistosslError
from histossl.encoders.encode import EncodeJob, EncodeSettings, SlideEncoding
from histossl.encoders.tile_encoder import TileEncoder
from histossl.execution.workers import Executor
from histossl.wsi.artefacts import TileArtefacts
from histossl.wsi.tile_reader import ReadJob, TileBatch, read_batch


@dataclass(frozen=True)
class Step:
    """The progress of a slide by one batch.

    Attributes:
        job: the slide.
        tiles: number of tiles encoded in this batch.
        finished: whether features and views are written.
        error: why the slide failed, or None.
        lost: number of tiles that cannot be decoded and are left out.
        why: the reason for the first of them.
        made: fingerprint of the features and views.
        waited: seconds of waiting for the batch.
        read: seconds that a worker took to read the batch, by the clock.
        cpu: the same, of processor time.
        artefacts: what the tiles show, once they are written.
    """

    job: EncodeJob
    tiles: int = 0
    finished: bool = False
    error: Exception | None = None
    lost: int = 0
    why: str = ""
    made: str = ""
    waited: float = 0.0
    read: float = 0.0
    cpu: float = 0.0
    artefacts: TileArtefacts | None = None


def encode_slides(
    jobs: Iterable[EncodeJob], encoder: TileEncoder, settings: EncodeSettings, workers: Executor
) -> Iterator[Step]:
    """Encode slides one after the other, while workers read tiles ahead, also those of the next slides.

    A slide with undecodable tiles is encoded again without them. After an error the other slides go on. If the caller
    stops early, unfinished files are removed.

    Args:
        jobs: the slides; each is taken only when its reading starts.
        encoder: of tiles.
        settings: of the encoding.
        workers: read the tiles; they must answer in order.

    Yields:
        The progress of a slide, after every batch and error.
    """
    turns = _Turns(jobs, encoder, settings)
    try:
        while True:
            for read, answer, waited in _timed(workers.map(read_batch, turns.reads())):
                slide = turns.at_work.get(read.slide)
                if slide is not None:
                    step = _step(slide, read, answer, waited)
                    later = (slide.incomplete or slide.resting) and not step.error
                    if step.finished or step.error or later:
                        del turns.at_work[read.slide]
                    if later:
                        turns.again.append(slide)
                    yield step
                while turns.unfit:
                    yield turns.unfit.popleft()
            yield from turns.unfit
            turns.unfit.clear()
            if not turns.again:
                return
    finally:
        for slide in (*turns.at_work.values(), *turns.again):
            slide.drop(GeneratorExit())


class _Turns:
    """What is read next: the slides, and again those that are incomplete or resting."""

    def __init__(self, jobs: Iterable[EncodeJob], encoder: TileEncoder, settings: EncodeSettings) -> None:
        self.jobs, self.encoder, self.settings = iter(jobs), encoder, settings
        self.positions = itertools.count()
        self.at_work: dict[int, SlideEncoding] = {}
        self.again: deque[SlideEncoding] = deque()
        self.unfit: deque[Step] = deque()

    def reads(self) -> Iterator[ReadJob]:
        """The batches to read, slide after slide."""
        for job in itertools.chain(self.jobs, (None,)):
            if job is not None:
                yield from self._begin(job)
            while self.again:
                yield from self._begin(self.again[0].job, self.again.popleft())

    def _begin(self, job: EncodeJob, before: SlideEncoding | None = None) -> Iterator[ReadJob]:
        position = next(self.positions)
        if before is not None and before.resting:
            slide, before.position = before, position
        else:
            lost, why = (before.lost | before.lost_now, before.why) if before else (frozenset[int](), "")
            try:
                slide = SlideEncoding(job, position, self.encoder, self.settings, lost, why)
            except HistosslError as error:
                self.unfit.append(Step(job, error=error))
                return
        self.at_work[position] = slide
        yield from itertools.takewhile(lambda _: position in self.at_work, slide.reads())


class Incomplete(Exception):
    """A slide has to be encoded again without its lost tiles."""


def _timed(answers: Iterator[tuple[ReadJob, Any]]) -> Iterator[tuple[ReadJob, Any, float]]:
    start = time.perf_counter()
    for read, answer in answers:
        yield read, answer, time.perf_counter() - start
        start = time.perf_counter()


def _step(slide: SlideEncoding, read: ReadJob, answer: TileBatch | Exception, waited: float) -> Step:
    if isinstance(answer, Exception):
        slide.drop(answer)
        return Step(slide.job, error=answer)
    try:
        slide.add(answer)
    except (HistosslError, OSError) as error:  # OSError: the disk is full or the folder is read-only
        slide.drop(error)
        return Step(slide.job, error=error)
    if slide.incomplete:
        slide.drop(Incomplete())
    tiles = 0 if slide.lost_now else len(read.xy)
    seconds = (waited, answer.seconds, answer.cpu)
    done = (len(slide.lost), slide.why, slide.made, *seconds, slide.artefacts)
    return Step(slide.job, tiles, slide.finished, None, *done)
