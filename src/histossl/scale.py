"""A function over slides in worker processes; a worker that dies takes one task down, not the run."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, TypeVar

A = TypeVar("A")
R = TypeVar("R")


class WorkerDied(Exception):
    """The process that ran this task ended without an answer: a crash in native code, or killed for its memory."""


class Workers:
    """Processes that run functions over slides.

    Args:
        count: how many; None is one a core, but at most eight.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = count or min(8, os.cpu_count() or 1)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; what they are at is given up."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def submit(self, function: Callable[..., R], *args: Any) -> Future[R]:
        """Run one task; the processes start with the first."""
        if self._pool is None:
            # spawn: neither open slides nor the threads of torch survive a fork.
            self._pool = ProcessPoolExecutor(self.count, multiprocessing.get_context("spawn"), initializer=_calm)
        return self._pool.submit(function, *args)

    def map(self, function: Callable[[A], R], items: Iterable[A], ahead: int = 2) -> Iterator[tuple[A, R | Exception]]:
        """(item, result or the exception that it raised) in the order of `items`, `ahead` tasks waiting a worker.

        After a worker's death every task in flight runs again, one at a time, until the one that kills is known: that
        one ends as `WorkerDied`, the others as they do.
        """
        window: deque[_Task] = deque()
        for item in items:
            window.append(_Task(self, function, item))
            if len(window) >= self.count * ahead:
                yield self._finish(window)
        while window:
            yield self._finish(window)

    def _finish(self, window: deque[_Task]) -> tuple[Any, Any]:
        task = window.popleft()
        for _ in ("among others", "alone"):
            try:
                return task.item, task.result()
            except BrokenProcessPool:
                self.close()
                for lost in (task, *window):
                    lost.future = None
            except Exception as error:  # noqa: BLE001 - the one place where any failure of a slide becomes its record
                return task.item, error
        return task.item, WorkerDied("its worker process died (a crash in native code, or out of memory)")


class _Task(Generic[A, R]):
    """A task that can be given again after the pool broke under it."""

    def __init__(self, workers: Workers, function: Callable[[A], R], item: A) -> None:
        self.workers, self.function, self.item = workers, function, item
        try:
            self.future: Future[R] | None = workers.submit(function, item)
        except BrokenProcessPool:
            self.future = None

    def result(self) -> R:
        if self.future is None:
            self.future = self.workers.submit(self.function, self.item)
        return self.future.result()


def _calm() -> None:
    """Ctrl-C ends the main process, which ends its workers; they print no stack traces of their own."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The network computes in step on all cores: a reader that pushes one of its threads aside makes the others wait.
    os.nice(19)
    os.environ["OMP_NUM_THREADS"] = "1"
