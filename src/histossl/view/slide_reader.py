"""What the viewer reads of slides and nuclei: in threads, or in worker processes with limits of time and memory."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from histossl.core.errors import SlideError
from histossl.execution.workers import Workers
from histossl.study.folder import Row, Study
from histossl.view.cohort import Cohort
from histossl.view.overlays import Overlays, slide_facts, within
from histossl.view.pyramid import SIDE
from histossl.view.reading import SlideCache, thumbnail, tile_picture

PICTURES = ("tile", "thumbnail", "facts")
"""What needs the slide itself, and is answered soon; all else is an overlay, and may take longer."""

_START = 120.0  # seconds that a worker process may take to start
_POLL = 0.1  # seconds between two looks at whether anybody waits for an answer


@dataclass(frozen=True)
class ReaderLimits:
    """What a worker process of the viewer may use before it is ended.

    Attributes:
        seconds: for a picture of a slide.
        overlay_seconds: for an overlay.
        unwatched: seconds after which an answer is given up that nobody waits for any more.
        memory: bytes of address space.
    """

    seconds: float = 15.0
    overlay_seconds: float = 60.0
    unwatched: float = 1.0
    memory: int = 4 * 2**30


class LocalReader:
    """Reads in the calling thread.

    Args:
        study: of the slides.
        cohort: the same study's slides.
        nuclei: folder of nuclei, a file a slide.
    """

    def __init__(self, study: Study, cohort: Cohort, nuclei: Path) -> None:
        self.study, self.cohort, self.shelf = study, cohort, SlideCache()
        self.overlays = Overlays(study, cohort, self.shelf, nuclei)

    def answer(self, what: str, slide: int, *place: int, gone: threading.Event | None = None) -> bytes | None:
        """A part of the page of a slide, or None where there is no such thing.

        Args:
            what: one of `PICTURES`, or the name of a method of `Overlays`.
            slide: its number.
            place: of a tile its level, column and row; of an overlay its number or cell.
            gone: is set when nobody waits for the answer any more; a thread cannot be ended, and goes on.

        Raises:
            SlideError, FileFormatError: it cannot be read.
            NoTile: there is no such tile.
        """
        if what == "tile":
            level, column, row = place
            return tile_picture(self.shelf, self.cohort.place(slide), level, column, row)
        if what == "thumbnail":
            drawn = self.study.qc(self.cohort.rows[slide]["slide_id"])
            known = drawn if within(drawn, self.study.folder) else None
            return thumbnail(self.shelf, self.cohort.place(slide), known)
        if what == "facts":
            facts = slide_facts(self.cohort, self.overlays, self.shelf, slide)
            return json.dumps(facts | {"side": SIDE}).encode()
        return getattr(self.overlays, what)(slide, *place)

    def close(self) -> None:
        """Close open slides."""
        self.shelf.close()


@dataclass(frozen=True)
class _Task:
    study: Path
    nuclei: Path
    slide: int
    row: Row
    what: str
    place: tuple[int, ...]


class ProcessReader:
    """Reads in worker processes: one that takes too long, or too much memory, is ended and started anew.

    Args:
        study: of the slides.
        cohort: the same study's slides.
        nuclei: folder of nuclei, a file a slide.
        pictures: worker processes for pictures of slides.
        limits: of each.
    """

    def __init__(
        self, study: Study, cohort: Cohort, nuclei: Path, pictures: int, limits: ReaderLimits = ReaderLimits()
    ) -> None:
        self.study, self.cohort, self.nuclei, self.limits = study, cohort, nuclei.absolute(), limits
        self._workers = [Workers(1, memory=limits.memory) for _ in range(pictures)]
        self._overlays = [(threading.Lock(), Workers(1, memory=limits.memory)) for _ in range(2)]
        self._free: SimpleQueue[Workers] = SimpleQueue()
        for worker in self._workers:
            worker.submit(_ready)  # it starts before the first page asks
            self._free.put(worker)
        self._given_up: dict[tuple[str, int], str] = {}
        self._over = threading.Event()

    def answer(self, what: str, slide: int, *place: int, gone: threading.Event | None = None) -> bytes | None:
        """As `LocalReader.answer`; blocks until a worker is free.

        Args:
            what: one of `PICTURES`, or the name of a method of `Overlays`.
            slide: its number.
            place: of a tile its level, column and row; of an overlay its number or cell.
            gone: is set when nobody waits for the answer any more.

        Returns:
            As `LocalReader.answer`.

        Raises:
            SlideError: also where it took too long or too much memory before: it is then not tried again.
        FileFormatError, NoTile: as `LocalReader.answer`.
            CancelledError: nobody waits for it, or the viewer is being closed.
        """
        picture = what in PICTURES
        kind = ("picture" if picture else "overlay", slide)
        if kind in self._given_up:
            raise SlideError(self.cohort.rows[slide]["path"], self._given_up[kind])
        task = _Task(self.study.folder, self.nuclei, slide, dict(self.cohort.rows[slide]), what, place)
        limit = self.limits.seconds if picture else self.limits.overlay_seconds
        try:
            if not picture:
                # Always the same worker for a slide: it keeps the slide's outlines.
                alone, worker = self._overlays[slide % len(self._overlays)]
                with alone:
                    return self._asked(worker, task, limit, gone)
            worker = self._free.get()
            try:
                return self._asked(worker, task, limit, gone)
            finally:
                self._free.put(worker)
        except (_TooLong, MemoryError, BrokenProcessPool) as error:
            if self._over.is_set():
                raise CancelledError from error
            why = str(error) if isinstance(error, _TooLong) else "needs more memory than the viewer gives to a slide"
            self._given_up[kind] = f"{why}; it is not shown"
            raise SlideError(task.row["path"], self._given_up[kind]) from error

    def _asked(self, worker: Workers, task: _Task, limit: float, gone: threading.Event | None) -> bytes | None:
        if self._over.is_set():
            raise CancelledError
        try:
            future = worker.submit(_answer_there, task)
            _wait(worker, worker.awake, _START, self._over.is_set)
            begun = time.monotonic()

            def unwatched() -> bool:
                waited = time.monotonic() - begun
                return self._over.is_set() or bool(gone and gone.is_set() and waited > self.limits.unwatched)

            return _wait(worker, future, limit, unwatched)
        except BrokenProcessPool:
            worker.kill()
            raise

    def close(self) -> None:
        """End all worker processes, whatever they are at."""
        self._over.set()
        for worker in (*self._workers, *(worker for _, worker in self._overlays)):
            worker.kill()


class _TooLong(Exception):
    pass


def _wait(worker: Workers, future: Future[Any], limit: float, unwatched: Callable[[], bool]) -> Any:
    """The result of a future; its worker is killed when the time is over or nobody waits."""
    end = time.monotonic() + limit
    while True:
        try:
            return future.result(_POLL)
        except TimeoutError:
            if future.done():  # the task itself raised it
                raise
            if unwatched():
                worker.kill()
                raise CancelledError from None
            if time.monotonic() > end:
                worker.kill()
                raise _TooLong(f"gave no answer in {limit:g} s") from None


def _ready() -> None:
    """What a worker does first: its imports."""


_readers: dict[tuple[Path, Path], LocalReader] = {}  # of a worker process


def _answer_there(task: _Task) -> bytes | None:
    key = task.study, task.nuclei
    if key not in _readers:
        rows: Any = {}  # by number, of those slides that this process was asked for
        _readers[key] = LocalReader(Study(task.study), Cohort("", rows, {}), task.nuclei)
    reader = _readers[key]
    reader.cohort.rows[task.slide] = task.row
    return reader.answer(task.what, task.slide, *task.place)
