"""Runs a function over slides on a Dask cluster, an existing one or one of SLURM jobs, whose workers may change.

Tasks carry paths and settings, never open slides or models. All machines must see the slides and the study under the
same paths. dask.distributed and dask-jobqueue are an extra: `pip install histossl[cluster]`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from histossl.core.errors import SettingsError
from histossl.execution.workers import Executor, SerialExecutor, ThreadExecutor, WorkerDied, Workers, result_of

A = TypeVar("A")
R = TypeVar("R")

_INSTALL = 'pip install "histossl[cluster]"'
_GONE = "the connection to the Dask scheduler is lost", "no slide is lost: run the same command again to continue"


class Cluster:
    """Like `Workers`, on a Dask cluster.

    Args:
        client: connected client of dask.distributed.
        timeout: seconds that a task of `map` may take before it is given up; None waits forever.
        owned: objects to close with the cluster, such as the SLURM jobs.
    """

    def __init__(self, client: Any, timeout: float | None = None, *owned: Any) -> None:
        self._client, self.timeout, self._owned = client, timeout, owned

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def count(self) -> int:
        """Tasks that can run at once: the threads of all workers connected now, at least one."""
        return max(1, sum(self._call(self._client.nthreads).values()))

    def submit(self, function: Callable[..., R], *args: Any) -> Any:
        """Run one task.

        Args:
            function: must be picklable.
            args: its arguments, picklable.

        Returns:
            A Dask future with `result`, `done` and `exception`.
        """
        # Not pure: Dask would answer a repeated call of a pure function from its cache, but functions write files.
        return self._client.submit(function, *args, pure=False)

    def map(self, function: Callable[[A], R], items: Iterable[A], ahead: int = 2) -> Iterator[tuple[A, R | Exception]]:
        """Run a function over items.

        A task whose worker is lost starts again on another; one that ends several workers gives `WorkerDied`. A task
        that takes longer than `timeout` gives `WorkerHung`; its thread stays in the worker, which continues.

        Args:
            function: of one item; must be picklable.
            items: drawn as needed.
            ahead: tasks in flight per thread of the cluster.

        Yields:
            (item, result or the exception that it raised), in the order in which they end.

        Raises:
            SettingsError: the scheduler is lost.
        """
        return self.spread(functools.partial(_in_time, function, self.timeout), items, ahead)

    def spread(
        self, function: Callable[[A], R], items: Iterable[A], ahead: int = 2
    ) -> Iterator[tuple[A, R | Exception]]:
        """Like `map`, without a timeout per item: for functions that limit the time of their own steps.

        Args:
            function: of one item; must be picklable.
            items: drawn as needed.
            ahead: tasks in flight per thread of the cluster.

        Yields:
            (item, result or the exception that it raised), in the order in which they end.

        Raises:
            SettingsError: the scheduler is lost.
        """
        from distributed import wait

        running: dict[Any, A] = {}
        items = iter(items)
        more = True
        while more or running:
            while more and len(running) < self.count * ahead:
                for item in items:
                    running[self.submit(function, item)] = item
                    break
                else:
                    more = False
            if running:
                for future in self._call(wait, list(running), return_when="FIRST_COMPLETED").done:
                    yield running.pop(future), _answer(future)

    def _call(self, function: Callable[..., Any], *args: Any, **more: Any) -> Any:
        try:
            if self._client.scheduler is not None:
                return function(*args, **more)
        except (CancelledError, OSError) as error:
            raise SettingsError(*_GONE) from error
        raise SettingsError(*_GONE)

    def close(self) -> None:
        """Cancel all tasks and disconnect from the cluster."""
        for one in (self._client, *self._owned):
            one.close()

    kill = close


def _in_time(function: Callable[[A], R], timeout: float | None, item: A) -> R:
    return result_of(ThreadExecutor(timeout), function, item)


def _answer(future: Any) -> Any:
    from distributed.scheduler import KilledWorker

    try:
        return future.result()
    except KilledWorker as error:
        return WorkerDied(f"its worker died, and others that tried it again ({error})")
    except CancelledError as error:  # the scheduler is lost: no failure of a slide
        raise SettingsError(*_GONE) from error
    except Exception as error:  # noqa: BLE001 - any failure of a slide becomes its record, as in `Workers`
        return error


def open_workers(count: int | None, timeout: float, scheduler: str, slurm: str) -> Workers | Cluster:
    """Start local worker processes, or connect to the requested cluster.

    Args:
        count: number of local processes, as of `Workers`.
        timeout: seconds that a task of `map` may take.
        scheduler: address of a running Dask scheduler, such as tcp://host:8786; or empty.
        slurm: JOBS or JOBS:NAME, the number of SLURM jobs, which the section `slurm` (or NAME) of dask-jobqueue's
            settings describes; or empty.

    Returns:
        The workers; the caller closes them.

    Raises:
        SettingsError: both clusters are requested, the extra is not installed, or no scheduler answers.
    """
    if not scheduler and not slurm:
        return Workers(count, timeout)
    if scheduler and slurm:
        raise SettingsError("--scheduler and --slurm are two clusters", "give one of them")
    try:
        from distributed import Client

        if scheduler:
            return Cluster(Client(scheduler, timeout=30), timeout)
        return _slurm(Client, slurm, timeout)
    except ImportError as error:
        raise SettingsError(f"a cluster needs {error.name}", _INSTALL) from error
    except (OSError, ValueError) as error:
        raise SettingsError(f"no Dask scheduler answers at {scheduler} ({error})", "is it running?") from error


def slide_executor(pool: Workers | Cluster) -> Executor:
    """The executor for tasks that are whole slides.

    Args:
        pool: as `open_workers` gives it.

    Returns:
        The cluster itself; in place of local workers an executor in this process, which uses all cores by itself.
    """
    return pool if isinstance(pool, Cluster) else SerialExecutor()


def _slurm(client: Callable[..., Any], slurm: str, timeout: float) -> Cluster:
    from dask_jobqueue.slurm import SLURMCluster

    jobs, _, name = slurm.partition(":")
    if not jobs.isdigit() or int(jobs) < 1:
        raise SettingsError(f"--slurm {slurm}: not a number of jobs", "such as 20, or 20:gpu")
    try:
        cluster = SLURMCluster(config_name=name or "slurm")
    except (ValueError, TypeError, KeyError) as error:
        hint = "see docs/scale.md: set cores and memory in ~/.config/dask/jobqueue.yaml"
        raise SettingsError(f"--slurm {slurm}: {error}", hint) from error
    cluster.scale(jobs=int(jobs))
    return Cluster(client(cluster), timeout, cluster)
