"""A function over slides on a Dask cluster, one that stands or one of SLURM jobs; workers may come and go.

Paths and settings travel, never open slides or models. All machines must see the slides and the study under the same
paths. dask.distributed and dask-jobqueue are an extra: `pip install histossl[cluster]`.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from histossl.encode import EncodeJob, EncodeSettings, Step, encode_slides
from histossl.encoders.zoo import TileEncoder, load_encoder
from histossl.errors import SettingsError
from histossl.scale import WorkerDied, Workers

A = TypeVar("A")
R = TypeVar("R")

_INSTALL = 'pip install "histossl[cluster]"'


class Cluster:
    """As `scale.Workers`, elsewhere.

    Args:
        client: of dask.distributed, connected.
        owned: what is closed with it.
    """

    def __init__(self, client: Any, *owned: Any) -> None:
        self._client, self._owned = client, owned

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def count(self) -> int:
        """Tasks that can run at once, as many as the workers that are there now have threads; at least one."""
        return max(1, sum(self._client.nthreads().values()))

    def submit(self, function: Callable[..., R], *args: Any) -> Any:
        """Run one task; a future with `result`, `done` and `exception`."""
        # Not pure: a function that writes files has to run as often as it is asked to.
        return self._client.submit(function, *args, pure=False)

    def map(self, function: Callable[[A], R], items: Iterable[A], ahead: int = 2) -> Iterator[tuple[A, R | Exception]]:
        """(item, result or the exception that it raised) as they end, `ahead` tasks waiting a thread of the cluster.

        A task whose worker goes begins again on another; one that takes several workers with it ends as `WorkerDied`.
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
                for future in wait(list(running), return_when="FIRST_COMPLETED").done:
                    yield running.pop(future), _answer(future)

    def close(self) -> None:
        """Give up what is under way, and let go of the cluster."""
        for one in (self._client, *self._owned):
            one.close()

    kill = close


def _answer(future: Any) -> Any:
    from distributed.scheduler import KilledWorker

    try:
        return future.result()
    except KilledWorker as error:
        return WorkerDied(f"its worker died, and others that tried it again ({error})")
    except Exception as error:  # noqa: BLE001 - the cluster's half of the one place where failures become records
        return error


def open_workers(count: int | None, timeout: float, scheduler: str, slurm: str) -> Workers | Cluster:
    """Where the work runs: processes here, or the cluster that is asked for.

    Args:
        count, timeout: of `Workers`.
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
            return Cluster(Client(scheduler, timeout=30))
        return _slurm(Client, slurm)
    except ImportError as error:
        raise SettingsError(f"a cluster needs {error.name}", _INSTALL) from error
    except (OSError, ValueError) as error:
        raise SettingsError(f"no Dask scheduler answers at {scheduler} ({error})", "is it running?") from error


def _slurm(client: Callable[..., Any], slurm: str) -> Cluster:
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
    return Cluster(client(cluster), cluster)


@dataclass(frozen=True)
class EncoderName:
    """How a worker builds the encoder: the arguments of `load_encoder`."""

    name: str
    seed: int
    device: str
    precision: str


@dataclass(frozen=True)
class EncodeTask:
    """A slide to encode somewhere."""

    job: EncodeJob
    encoder: EncoderName
    settings: EncodeSettings


def encode_on(
    cluster: Cluster, jobs: Iterable[EncodeJob], encoder: EncoderName, settings: EncodeSettings
) -> Iterator[Step]:
    """As `encode_slides`, a slide a task: one step a slide, when it is finished or given up."""
    tasks = (EncodeTask(job, encoder, settings) for job in jobs)
    for task, answer in cluster.map(encode_slide, tasks):
        yield Step(task.job, error=answer) if isinstance(answer, Exception) else answer


def encode_slide(task: EncodeTask) -> Step:
    """Encode a slide in this process, which builds the encoder once and reads in a thread."""
    steps = list(encode_slides([task.job], _built(task.encoder), task.settings, Here()))
    *_, last = steps
    if last.error is not None:
        return last
    return Step(
        task.job,
        sum(step.tiles for step in steps),
        last.finished,
        None,
        last.lost,
        last.why,
        last.made,
        sum(step.waited for step in steps),
        sum(step.read for step in steps),
        sum(step.cpu for step in steps),
    )


@functools.lru_cache(maxsize=1)
def _built(encoder: EncoderName) -> TileEncoder:
    return load_encoder(encoder.name, encoder.seed, encoder.device, encoder.precision)


class Here:
    """As `scale.Workers`, for what runs in a worker already: one thread, a few tasks ahead."""

    count = 1

    def map(self, function: Callable[[A], R], items: Iterable[A], ahead: int = 2) -> Iterator[tuple[A, R | Exception]]:
        """(item, result or the exception that it raised) in the order of `items`."""
        window: deque[tuple[A, Any]] = deque()
        with ThreadPoolExecutor(1) as thread:
            for item in items:
                window.append((item, thread.submit(function, item)))
                if len(window) >= ahead:
                    yield _finished(*window.popleft())
            while window:
                yield _finished(*window.popleft())


def _finished(item: A, future: Any) -> tuple[A, Any]:
    error = future.exception()
    if error is not None and not isinstance(error, Exception):
        raise error
    return item, error or future.result()
