"""The durations of a study's stages, from the log of its runs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from histossl.core import safe_paths
from histossl.execution.claims import this_process
from histossl.execution.journal import append, parsed
from histossl.study.folder import Study
from histossl.training.distributed import is_rank_zero

P = ParamSpec("P")
T = TypeVar("T")

_CLOCK = 1.0  # seconds, resolution of the times in the log; intervals with a smaller gap are joined


def timed(stage: str) -> Callable[[Callable[Concatenate[Study, P], T]], Callable[Concatenate[Study, P], T]]:
    """Decorator that logs the duration of a stage; a stage that fails is not logged.

    Args:
        stage: name of the stage in the log.

    Returns:
        The decorator, for functions whose first argument is the study.
    """

    def around(work: Callable[Concatenate[Study, P], T]) -> Callable[Concatenate[Study, P], T]:
        @wraps(work)
        def timing(study: Study, *args: P.args, **more: P.kwargs) -> T:
            start = time.monotonic()
            result = work(study, *args, **more)
            if is_rank_zero():
                me = this_process()
                line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "run": me.token, "host": me.host}
                line |= {"pid": me.pid, "stage": stage, "seconds": round(time.monotonic() - start, 2)}
                with study.writing():
                    append(study, json.dumps(line) + "\n")
            return result

        return timing

    return around


def stage_times(study: Study) -> dict[str, float]:
    """The time that each stage took, over all runs.

    Times in which several processes or machines worked count once. Killed runs count with the slides that they had
    finished.

    Args:
        study: the study.

    Returns:
        Stage -> seconds, in the order of the log.
    """
    stretches: dict[str, list[tuple[float, float]]] = {}
    if not os.path.lexists(study.log):
        return {}
    with safe_paths.open_in(study.folder, study.log.name, "rb") as file:
        for line in map(parsed, file):
            if {"time", "stage", "seconds"} <= set(line):
                end = datetime.fromisoformat(line["time"]).timestamp()
                stretches.setdefault(line["stage"], []).append((end - line["seconds"], end))
    return {stage: _covered(found) for stage, found in stretches.items()}


def _covered(stretches: list[tuple[float, float]]) -> float:
    """The length of the union of intervals (begin, end)."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(stretches):
        total += max(0.0, end - (until if begin - until < _CLOCK else begin))
        until = max(until, end)
    return total
