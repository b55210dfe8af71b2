"""A function over slides in worker processes; a worker that dies takes one task down, not the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

import psutil

try:
    import resource
except ImportError:  # Windows: workers then have no limit of memory, as `histossl doctor` says
    resource = None  # type: ignore[assignment]

A = TypeVar("A")
R = TypeVar("R")


class Executor(Protocol):
    """What runs a function over slides, somewhere: `Workers`, `ThreadExecutor`, `cluster.Cluster`."""

    def map(self, function: Callable[[A], R], items: Iterable[A], ahead: int = 2) -> Iterator[tuple[A, R | Exception]]:
        """(item, result or the exception that it raised); in which order, and how far ahead, each says itself."""
        ...


class WorkerDied(Exception):
    """The process that ran this task ended without an answer: a crash in native code, or killed for its memory."""


class WorkerHung(Exception):
    """What ran this task gave no answer in the time that a task may take, and was killed or left behind."""


class Workers:
    """Processes that run functions over slides.

    Args:
        count: how many; None is one a core, but at most eight.
        timeout: seconds that a task of `map` may take before its process is killed; None waits for ever.
        memory: bytes of address space of a process; what would need more fails with a MemoryError. None is a fair share
            of the machine's memory, at least 4 GiB.
    """

    def __init__(self, count: int | None = None, timeout: float | None = None, memory: int | None = None) -> None:
        self.count = count or min(8, os.cpu_count() or 1)
        self.timeout = timeout
        self.memory = memory or max(4 * 2**30, psutil.virtual_memory().total * 3 // 4 // self.count)
        self._pool: ProcessPoolExecutor | None = None
        self.awake: Future[int]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        # After an error or Ctrl-C nobody waits for what they are at.
        self.close() if kind is None else self.kill()

    def close(self) -> None:
        """End the processes once they are through with what they are at; what waits is given up."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def kill(self) -> None:
        """End the processes now, whatever they are at."""
        pool, self._pool = self._pool, None
        if pool is not None:
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, function: Callable[..., R], *args: Any) -> Future[R]:
        """Run one task; the processes start with the first."""
        # Ctrl-C ends this process, which ends its workers: from birth on they do not hear it themselves.
        with _ctrl_c_blocked():
            if self._pool is None:
                # spawn: neither open slides nor the threads of torch survive a fork.
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(
                    self.count, context, initializer=_start_worker, initargs=(self.memory,)
                )
                self.awake = self._pool.submit(os.getpid)
            return self._pool.submit(function, *args)

    def map(self, function: Callable[[A], R], items: Iterable[A], ahead: int = 2) -> Iterator[tuple[A, R | Exception]]:
        """(item, result or the exception that it raised) in the order of `items`, `ahead` tasks waiting a worker.

        After a worker's death every task in flight runs again, one at a time, until the one that kills is known: that
        one ends as `WorkerDied`, the others as they do. One that takes too long ends as `WorkerHung`, and those in
        flight beside it run again.
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
                return task.item, task.result(self.timeout)
            except BrokenProcessPool:
                self._begin_again(task, window)
            except Exception as error:  # noqa: BLE001 - the one place where any failure of a slide becomes its record
                if isinstance(error, TimeoutError) and not task.done():
                    self._begin_again(task, window)
                    return task.item, WorkerHung(f"its worker process gave no answer in {self.timeout:g} s")
                return task.item, error
        return task.item, WorkerDied("its worker process died (a crash in native code, or out of memory)")

    def _begin_again(self, task: _Task, window: deque[_Task]) -> None:
        self.kill()
        for lost in (task, *window):
            lost.future = None


class _Task(Generic[A, R]):
    """A task that can be given again after the pool broke under it."""

    def __init__(self, workers: Workers, function: Callable[[A], R], item: A) -> None:
        self.workers, self.function, self.item = workers, function, item
        try:
            self.future: Future[R] | None = workers.submit(function, item)
        except BrokenProcessPool:
            self.future = None

    def result(self, timeout: float | None) -> R:
        if self.future is None:
            self.future = self.workers.submit(self.function, self.item)
        self.workers.awake.result()  # processes may take long to start
        return self.future.result(timeout)

    def done(self) -> bool:
        return self.future is not None and self.future.done()


def result_of(executor: Executor, function: Callable[[A], R], item: A) -> R:
    """The result of a single task; raises what it raised."""
    [(_, answer)] = executor.map(function, [item])
    if isinstance(answer, Exception):
        raise answer
    return answer


def result_or_error(function: Callable[[A], R], item: A) -> R | Exception:
    """The result, or the exception that it raised: for a slide that is worked on in this very process."""
    try:
        return function(item)
    except Exception as error:  # noqa: BLE001 - any failure of a slide becomes its record
        return error


class SerialExecutor:
    """Tasks in this very process, for what uses all of its cores by itself."""

    def map(self, function: Callable[[A], R], items: Iterable[A], ahead: int = 2) -> Iterator[tuple[A, R | Exception]]:
        """(item, result or the exception that it raised) in the order of `items`, drawn one at a time."""
        for item in items:
            yield item, result_or_error(function, item)


class ThreadExecutor:
    """As `Workers`, for what runs in a worker already: a thread, a few tasks ahead.

    Args:
        timeout: seconds that a task may take before its thread is left behind, for no thread can be killed; None waits
            for ever.
    """

    count = 1

    def __init__(self, timeout: float | None = None) -> None:
        self.timeout = timeout

    def map(self, function: Callable[[A], R], items: Iterable[A], ahead: int = 2) -> Iterator[tuple[A, R | Exception]]:
        """(item, result or the exception that it raised) in the order of `items`; what hangs ends as `WorkerHung`."""
        thread, window = _Thread(), deque[tuple[A, Future[R | Exception]]]()

        def finish() -> tuple[A, R | Exception]:
            nonlocal thread, window
            item, future = window.popleft()
            try:
                return item, future.result(self.timeout)
            except TimeoutError:
                thread.leave()
                thread = _Thread()
                window = deque((later, thread.submit(function, later)) for later, _ in window)
                return item, WorkerHung(f"it gave no answer in {self.timeout:g} s")

        try:
            for item in items:
                window.append((item, thread.submit(function, item)))
                if len(window) >= ahead:
                    yield finish()
            while window:
                yield finish()
        finally:
            thread.leave()


class _Thread:
    """A thread that does tasks in order; unlike those of an executor nobody waits for it at the end."""

    def __init__(self) -> None:
        self._todo: SimpleQueue[tuple[Future, Callable, Any] | None] = SimpleQueue()
        self._left = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, function: Callable[[A], R], item: A) -> Future[R | Exception]:
        future: Future[R | Exception] = Future()
        self._todo.put((future, function, item))
        return future

    def leave(self) -> None:
        """It ends with what it is at."""
        self._left.set()
        self._todo.put(None)

    def _run(self) -> None:
        while (task := self._todo.get()) is not None and not self._left.is_set():
            future, function, item = task
            try:
                future.set_result(result_or_error(function, item))
            except BaseException as error:  # noqa: BLE001 - for who waits
                future.set_exception(error)


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Threads and processes that start in the block do not hear Ctrl-C, where the system can say so."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its start, which comes with the first process, would lift the block again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(memory: int) -> None:
    """Limit a worker to its share of memory and one thread, and end it with the main process.

    Its priority stays that of the main process: with a lower one it would starve on a machine where others work, too.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if resource is not None:
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        with suppress(ValueError, OSError):  # macOS has the limit, but may refuse to set it
            resource.setrlimit(resource.RLIMIT_AS, (memory if most < 0 else min(memory, most), most))
    os.environ["OMP_NUM_THREADS"] = "1"
