"""Worker processes: order, errors, and the death of one."""

from __future__ import annotations

import os
import signal
import time

import pytest

from histossl.errors import SlideError
from histossl.scale import WorkerDied, Workers


def job(item: int) -> int:
    if item == 3:
        raise SlideError("three.svs", "is no slide")
    if item in (5, 9):
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(0.002 * (7 - item % 7))
    return item * item


def test_answers_come_in_order_and_a_dead_worker_costs_one_task_only():
    with Workers(2) as workers:
        answers = dict(workers.map(job, range(14)))
    assert list(answers) == list(range(14))
    assert {k: v for k, v in answers.items() if k not in (3, 5, 9)} == {
        k: k * k for k in range(14) if k not in (3, 5, 9)
    }
    assert isinstance(answers[3], SlideError)
    assert str(answers[3]) == "three.svs: is no slide"
    assert isinstance(answers[5], WorkerDied)
    assert isinstance(answers[9], WorkerDied)


def test_tasks_are_drawn_only_a_few_ahead():
    drawn = []

    def items():
        for k in range(40):
            if k not in (3, 5, 9):
                drawn.append(k)
                yield k

    with Workers(1) as workers:
        for done, _ in enumerate(workers.map(job, items(), ahead=3), 1):
            assert len(drawn) <= done + 2


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_to_do_starts_no_process(count):
    with Workers(count) as workers:
        assert list(workers.map(job, [])) == []
        assert workers._pool is None
