"""How long the stages of a study took, from the log that its runs write."""

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

_CLOCK = 1.0  # seconds to which the log tells when; stretches that are nearer than this are one


def timed(stage: str) -> Callable[[Callable[Concatenate[Study, P], T]], Callable[Concatenate[Study, P], T]]:
    """Makes a stage write down how long it took; one that fails does not."""

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
    """Stage -> seconds by the clock in which somebody was at work on it, of all runs together, in the order they began.

    Of slides that were done at the same time, by whichever process or machine, the time counts once; that of runs which
    were killed counts for the slides that they had done.
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
    """The length of the union."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(stretches):
        total += max(0.0, end - (until if begin - until < _CLOCK else begin))
        until = max(until, end)
    return total
