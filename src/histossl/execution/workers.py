"""Runs a function over slides in worker processes; a worker that dies fails one task, not the run."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

import psutil

from histossl.core import trial

try:
    import resource
except ImportError:  # Windows: workers then have no limit of memory, as `histossl doctor` says
    resource = None  # type: ignore[assignment]

A = TypeVar("A")
R = TypeVar("R")


_LOOK = 1.0  # seconds after which somebody looks whether the processes still live


class Executor(Protocol):
    """Runs a function over slides: `Workers`, `SerialExecutor`, `ThreadExecutor`, `cluster.Cluster`."""

    def map(self, function: Callable[[A], R], items: Iterable[A], ahead: int = 2) -> Iterator[tuple[A, R | Exception]]:
        """Run a function over items.

        Args:
            function: of one item.
            items: drawn as needed.
            ahead: how many tasks are started before the first ends; the unit depends on the executor.

        Yields:
            (item, result or the exception that it raised); the order depends on the executor.
        """
        ...


class WorkerDied(Exception):
    """The process of this task ended without a result: a crash in native code, or killed for its memory."""


class WorkerHung(Exception):
    """This task took longer than the timeout; its process was killed, or its thread abandoned."""


class Workers:
    """Processes that run functions over slides.

    Args:
        count: number of processes; None is one per core, but at most eight.
        timeout: seconds that a task of `map` may take before its process is killed; None waits forever.
        memory: bytes of address space of a process; a task that needs more fails with a MemoryError. None is an equal
            share of three quarters of the machine's memory, at least 4 GiB.
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
        # After an error or Ctrl-C, do not wait for running tasks.
        self.close() if kind is None else self.kill()

    def close(self) -> None:
        """End the processes after their running tasks; waiting tasks are cancelled."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def kill(self) -> None:
        """End the processes immediately."""
        pool, self._pool = self._pool, None
        if pool is not None:
            for process in list((pool._processes or {}).values()):
                process.kill()
            # A worker that was killed amid an answer leaves half of it. Its reader in this process waits for the rest
            # as long as anybody could write it, this process included.
            pool._result_queue._writer.close()  # type: ignore[attr-defined]
            pool.shutdown(wait=True, cancel_futures=True)

    def lost(self) -> bool:
        """Whether a process has ended, of which the pool itself need not know: see `kill`."""
        processes = list((self._pool._processes or {}).values()) if self._pool else []
        return any(process.exitcode is not None for process in processes)

    def submit(self, function: Callable[..., R], *args: Any) -> Future[R]:
        """Run one task; the processes start with the first task.

        Args:
            function: must be picklable.
            args: its arguments, picklable.

        Returns:
            The future of its result.
        """
        # Workers inherit a mask that blocks Ctrl-C: it ends this process, which then ends its workers.
        with _ctrl_c_blocked():
            if self._pool is None:
                # spawn: neither open slides nor the threads of torch survive a fork.
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(
                    self.count, context, initializer=_start_worker, initargs=(self.memory, self.timeout is not None)
                )
                self.awake = self._pool.submit(os.getpid)
            return self._pool.submit(function, *args)

    def map(self, function: Callable[[A], R], items: Iterable[A], ahead: int = 2) -> Iterator[tuple[A, R | Exception]]:
        """Run a function over items.

        When a worker dies, the tasks in flight run again, one at a time: one that kills its worker again gives
        `WorkerDied`. A task that takes longer than `timeout` gives `WorkerHung`, and the tasks in flight beside it run
        again.

        Args:
            function: of one item; must be picklable.
            items: drawn as needed.
            ahead: tasks in flight per worker.

        Yields:
            (item, result or the exception that it raised), in the order of `items`.
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
            except Exception as error:  # noqa: BLE001 - any failure of a slide becomes its record
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
    """A task that can be submitted again after its pool broke."""

    def __init__(self, workers: Workers, function: Callable[[A], R], item: A) -> None:
        self.workers, self.function, self.item = workers, function, item
        self.future: Future[R] | None = None
        with suppress(BrokenProcessPool):
            self._submit()

    def _submit(self) -> Future[R]:
        self.future = self.workers.submit(self.function, self.item)
        self.pool = self.workers._pool
        return self.future

    def _begun(self) -> Future[R]:
        """The future; a new one where another `map` ended the pool, for which this task is not to blame."""
        future = self.future
        if future is None or (self.pool is not self.workers._pool and not _has_answer(future)):
            return self._submit()
        return future

    def result(self, timeout: float | None) -> R:
        future = self._begun()
        self.workers.awake.result()  # so that the timeout does not include the start of the processes
        end, lost = math.inf if timeout is None else time.monotonic() + timeout, 0
        while True:
            try:
                return future.result(max(0.0, min(_LOOK, end - time.monotonic())))
            except TimeoutError:
                if future.done() or time.monotonic() >= end:
                    raise
                lost = lost + 1 if self.workers.lost() else 0
                if lost > 1:  # the pool notices at once, but where it waits for the rest of an answer
                    raise BrokenProcessPool from None

    def done(self) -> bool:
        return self.future is not None and self.future.done()


def _has_answer(future: Future) -> bool:
    return future.done() and not future.cancelled() and not isinstance(future.exception(), BrokenProcessPool)


def result_of(executor: Executor, function: Callable[[A], R], item: A) -> R:
    """The result of a single task.

    Args:
        executor: runs the task.
        function: of the item.
        item: the item.

    Returns:
        The result.

    Raises:
        Exception: what the task raised, or that its worker died or hung.
    """
    [(_, answer)] = executor.map(function, [item])
    if isinstance(answer, Exception):
        raise answer
    return answer


def result_or_error(function: Callable[[A], R], item: A) -> R | Exception:
    """The result of a task in this process, or its exception.

    Args:
        function: of the item.
        item: the item.

    Returns:
        The result, or the exception that it raised.
    """
    try:
        return function(item)
    except Exception as error:  # noqa: BLE001 - any failure of a slide becomes its record
        return error


class SerialExecutor:
    """Runs tasks in this process, for functions that use all cores by themselves."""

    def map(self, function: Callable[[A], R], items: Iterable[A], ahead: int = 2) -> Iterator[tuple[A, R | Exception]]:
        """Run a function over items, one at a time.

        Args:
            function: of one item.
            items: drawn one at a time.
            ahead: not used.

        Yields:
            (item, result or the exception that it raised), in the order of `items`.
        """
        for item in items:
            yield item, result_or_error(function, item)


class ThreadExecutor:
    """Like `Workers`, but in one thread: for code that already runs in a worker.

    Args:
        timeout: seconds that a task may take before its thread is abandoned (a thread cannot be killed); None waits
            forever.
    """

    count = 1

    def __init__(self, timeout: float | None = None) -> None:
        self.timeout = timeout

    def map(self, function: Callable[[A], R], items: Iterable[A], ahead: int = 2) -> Iterator[tuple[A, R | Exception]]:
        """Run a function over items; a task that takes longer than `timeout` gives `WorkerHung`.

        Args:
            function: of one item.
            items: drawn as needed.
            ahead: tasks in flight.

        Yields:
            (item, result or the exception that it raised), in the order of `items`.
        """
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
    """A thread that runs tasks in order; a daemon, unlike those of an executor, so that the process can end."""

    def __init__(self) -> None:
        self._todo: SimpleQueue[tuple[Future, Callable, Any] | None] = SimpleQueue()
        self._left = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, function: Callable[[A], R], item: A) -> Future[R | Exception]:
        future: Future[R | Exception] = Future()
        self._todo.put((future, function, item))
        return future

    def leave(self) -> None:
        """Tell the thread to end after its running task."""
        self._left.set()
        self._todo.put(None)

    def _run(self) -> None:
        while (task := self._todo.get()) is not None and not self._left.is_set():
            future, function, item = task
            try:
                future.set_result(result_or_error(function, item))
            except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
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


def _start_worker(memory: int, limited: bool) -> None:
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
    if limited:  # a file that hangs this process costs a task
        trial.not_needed()
