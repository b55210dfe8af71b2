"""Worker processes: order, errors, and the death of one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from histossl.core.errors import SlideError
from histossl.execution.workers import WorkerDied, WorkerHung, Workers


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


def hang(item: int) -> int:
    if item in (2, 3):
        signal.pause()
    return os.getpid()


def test_a_task_that_hangs_is_ended_and_costs_itself_only():
    with Workers(2) as workers:
        start = time.monotonic()
        list(workers.map(hang, [0, 1]))
        workers.timeout = max(2.0, 3 * (time.monotonic() - start))  # where the machine is busy all takes longer
        answers = dict(workers.map(hang, range(6)))
    assert {k: type(v) for k, v in answers.items()} == {k: WorkerHung if k in (2, 3) else int for k in range(6)}
    assert "no answer in" in str(answers[2])


def slow(item: int) -> int:
    time.sleep(0.5)
    return item


def test_maps_in_one_another_lose_nothing_when_a_worker_dies() -> None:
    """The inner tasks kill workers while outer ones run and wait: those run again, and are not blamed."""
    with Workers(2) as workers:
        found = {item: (answer, dict(workers.map(job, [8, 5, 9]))) for item, answer in workers.map(slow, range(6), 3)}
    assert {k: v for k, (v, _) in found.items()} == {k: k for k in range(6)}
    for _, inner in found.values():
        assert inner[8] == 64
        assert isinstance(inner[5], WorkerDied)
        assert isinstance(inner[9], WorkerDied)


def test_a_deadly_outer_task_costs_itself_only() -> None:
    with Workers(2) as workers:
        found = {k: (v, dict(workers.map(job, [8, 10, 11]))) for k, v in workers.map(job, [0, 5, 1, 9, 2])}
    assert all(inner == {8: 64, 10: 100, 11: 121} for _, inner in found.values())
    assert {k: v for k, (v, _) in found.items() if k not in (5, 9)} == {0: 0, 1: 1, 2: 4}
    assert all(isinstance(found[k][0], WorkerDied) for k in (5, 9))


def greedy(size: int) -> int:
    return len(bytearray(size))


def test_a_task_that_wants_too_much_memory_fails_and_its_process_goes_on():
    with Workers(1, memory=4 * 2**30) as workers:
        answers = [answer for _, answer in workers.map(greedy, [10, 8 * 2**30, 20])]
    assert (answers[0], answers[2]) == (10, 20)
    assert isinstance(answers[1], MemoryError)


def test_an_error_does_not_wait_for_what_workers_are_at():
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Workers(1) as workers:
        workers.submit(time.sleep, 600)
        raise KeyboardInterrupt
    assert time.monotonic() - start < 300


def test_workers_die_with_the_main_process():
    code = """
import os, sys, time
from histossl.execution.workers import Workers
workers = Workers(1)
print(workers.submit(os.getpid).result(), flush=True)
workers.submit(time.sleep, 600)
os.kill(os.getpid(), 9)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(process.stdout)
    end = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.01)


def niceness(_: int) -> int:
    return psutil.Process().nice()


def test_workers_have_the_priority_of_the_main_process():
    """Further back they starve on a machine where others work, too."""
    with Workers(1) as workers:
        assert dict(workers.map(niceness, [0])) == {0: psutil.Process().nice()}


def half_an_answer(begun: Path | None) -> int | bytes:
    """Ends this process when it has sent a thousand bytes of its answer, unless it was begun before."""
    if begun is None:
        return os.getpid()
    if not begun.exists():
        begun.touch()

        def send(self, data, *_):
            os.write(self.fileno(), bytes(data)[:1000])
            os.kill(os.getpid(), signal.SIGKILL)

        Connection._send = send
    return bytes(100_000)


@pytest.mark.parametrize("timeout", [None, 120])
def test_a_worker_that_is_killed_amid_its_answer_does_not_hold_up_the_run(tmp_path, timeout):
    """Half an answer lies in the pipe then, for whose rest the pool waits for ever."""
    with Workers(1, timeout) as workers:
        answers = [answer for _, answer in workers.map(half_an_answer, [None, tmp_path / "begun", None])]
    assert answers[1] == bytes(100_000)
    assert answers[0] != answers[2]  # another process
