"""A function over slides on a Dask cluster, one that stands or one of SLURM jobs; workers may come and go.

Paths and settings travel, never open slides or models. All machines must see the slides and the study under the same
paths. dask.distributed and dask-jobqueue are an extra: `pip install histossl[cluster]`.
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
_GONE = "the Dask scheduler has gone", "no slide is lost: the same command goes on once one stands"


class Cluster:
    """As `scale.Workers`, elsewhere.

    Args:
        client: of dask.distributed, connected.
        timeout: seconds that a task of `map` may take before it is given up; None waits for ever.
        owned: what is closed with it.
    """

    def __init__(self, client: Any, timeout: float | None = None, *owned: Any) -> None:
        self._client, self.timeout, self._owned = client, timeout, owned

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def count(self) -> int:
        """Tasks that can run at once, as many as the workers that are there now have threads; at least one."""
        return max(1, sum(self._asked(self._client.nthreads).values()))

    def submit(self, function: Callable[..., R], *args: Any) -> Any:
        """Run one task; a future with `result`, `done` and `exception`."""
        # Not pure: a function that writes files has to run as often as it is asked to.
        return self._client.submit(function, *args, pure=False)

    def map(self, function: Callable[[A], R], items: Iterable[A], ahead: int = 2) -> Iterator[tuple[A, R | Exception]]:
        """(item, result or the exception that it raised) as they end, `ahead` tasks waiting a thread of the cluster.

        A task whose worker goes begins again on another; one that takes several workers with it ends as `WorkerDied`.
        One that takes too long ends as `WorkerHung`; what hangs is left behind in its worker, which goes on.
        """
        return self.spread(functools.partial(_in_time, function, self.timeout), items, ahead)

    def spread(
        self, function: Callable[[A], R], items: Iterable[A], ahead: int = 2
    ) -> Iterator[tuple[A, R | Exception]]:
        """As `map`, of functions that keep the time of each of their steps themselves."""
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
                for future in self._asked(wait, list(running), return_when="FIRST_COMPLETED").done:
                    yield running.pop(future), _answer(future)

    def _asked(self, function: Callable[..., Any], *args: Any, **more: Any) -> Any:
        try:
            if self._client.scheduler is not None:
                return function(*args, **more)
        except (CancelledError, OSError) as error:
            raise SettingsError(*_GONE) from error
        raise SettingsError(*_GONE)

    def close(self) -> None:
        """Give up what is under way, and let go of the cluster."""
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
    except CancelledError as error:  # no slide is to blame
        raise SettingsError(*_GONE) from error
    except Exception as error:  # noqa: BLE001 - the cluster's half of the one place where failures become records
        return error


def open_workers(count: int | None, timeout: float, scheduler: str, slurm: str) -> Workers | Cluster:
    """Where the work runs: processes here, or the cluster that is asked for.

    Args:
        count: of `Workers`.
        timeout: seconds that a task of `map` may take, here or there.
        scheduler: the address of a Dask scheduler that stands, such as tcp://host:8786; or empty.
        slurm: JOBS or JOBS:NAME: so many SLURM jobs, as the section `slurm` (or NAME) of dask-jobqueue's settings
            describes them; or empty.

    Raises:
        SettingsError: both are asked for, the extra is not installed, or no scheduler answers.
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
    """Where a whole slide is a task: on the cluster, or in this very process beside its workers."""
    return pool if isinstance(pool, Cluster) else SerialExecutor()


def _slurm(client: Callable[..., Any], slurm: str, timeout: float) -> Cluster:
    from dask_jobqueue.slurm import SLURMCluster

    jobs, _, name = slurm.partition(":")
    if not jobs.isdigit() or int(jobs) < 1:
        raise SettingsError(f"--slurm {slurm}: not a number of jobs", "such as 20, or 20:gpu")
    try:
        cluster = SLURMCluster(config_name=name or "slurm")
    except (ValueError, TypeError, KeyError) as error:
        hint = "see docs/scale.md: cores and memory stand in ~/.config/dask/jobqueue.yaml"
        raise SettingsError(f"--slurm {slurm}: {error}", hint) from error
    cluster.scale(jobs=int(jobs))
    return Cluster(client(cluster), timeout, cluster)
