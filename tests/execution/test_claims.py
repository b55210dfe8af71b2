"""Claims: of all processes that want a thing, one has it; what a dead one held is taken over."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from histossl.execution.claims import Claims, this_process

spawn = multiprocessing.get_context("spawn")


def work(folder: Path, seed: int, things: int, expiry: float) -> None:
    """Do every thing that is not done: a line in done/THING, by whoever has claimed it."""
    order = random.Random(seed).sample(range(things), things)
    with Claims(folder / "claims", expiry) as claims:
        while left := [k for k in order if not (folder / f"done-{k}").exists()]:
            for k in left:
                if claims.take(f"thing {k}"):
                    if not (folder / f"done-{k}").exists():
                        with (folder / f"begun-{k}").open("a") as file:
                            file.write(f"{os.getpid()}\n")
                        time.sleep(0.001)
                        (folder / f"done-{k}").touch()
                    claims.release(f"thing {k}")


def test_processes_share_things_and_none_is_done_twice_or_left_out(tmp_path):
    crew = [spawn.Process(target=work, args=(tmp_path, seed, 120, 60.0)) for seed in range(4)]
    for process in crew:
        process.start()
    for process in crew:
        process.join()
        assert process.exitcode == 0
    begun = [(tmp_path / f"begun-{k}").read_text().split() for k in range(120)]
    assert [len(lines) for lines in begun] == [1] * 120
    assert len({pid for (pid,) in begun}) > 1
    assert not (tmp_path / "claims").exists()


def hold(folder: Path, expiry: float) -> None:
    claims = Claims(folder, expiry).__enter__()
    claims.take("a")
    (folder.parent / "held").touch()
    time.sleep(60)


def holder(tmp_path: Path, expiry: float):
    process = spawn.Process(target=hold, args=(tmp_path / "claims", expiry))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.005)
    return process


def test_what_a_killed_process_held_is_taken_at_once(tmp_path):
    process = holder(tmp_path, 60.0)
    with Claims(tmp_path / "claims", 60.0) as claims:
        assert not claims.take("a")
        assert [(c.name, c.alive, c.owner.pid) for c in claims.all()] == [("a", True, process.pid)]
        os.kill(process.pid, signal.SIGKILL)
        # Not waited for, so a zombie: it is dead all the same.
        start = time.monotonic()
        while not claims.take("a"):
            assert time.monotonic() - start < 60
        assert [(c.name, c.alive, c.owner) for c in claims.all()] == [("a", True, this_process())]
    process.join()
    assert not (tmp_path / "claims").exists()


def test_what_the_dead_have_left_is_swept_and_what_the_living_hold_is_not(tmp_path):
    process = holder(tmp_path, 60.0)
    with Claims(tmp_path / "claims", 60.0) as claims:
        assert claims.take("b")
        claims.sweep()
        assert {claim.name for claim in claims.all()} == {"a", "b"}
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        claims.sweep()
        assert [claim.name for claim in claims.all()] == ["b"]
        assert claims.take("a")
    assert not (tmp_path / "claims").exists()


LEASE = 3.0  # seconds; a busy machine may keep a process from its next sign of life for two


def test_a_heartbeat_keeps_a_claim_and_a_stopped_process_loses_it(tmp_path):
    process = holder(tmp_path, LEASE)
    with Claims(tmp_path / "claims", LEASE) as claims:
        end = time.monotonic() + 2 * LEASE
        while time.monotonic() < end:
            assert not claims.take("a")
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGSTOP)
        start = time.monotonic()
        while not claims.take("a"):
            assert time.monotonic() - start < 60
            time.sleep(0.02)
        assert time.monotonic() - start > 0.5
        # The sleeper wakes and lets go of what is no longer its own: the claim stays ours.
        os.kill(process.pid, signal.SIGCONT)
        os.kill(process.pid, signal.SIGTERM)
        process.join()
        assert not _as_another(tmp_path / "claims")


def _as_another(folder: Path) -> bool:
    code = "import sys; from pathlib import Path; from histossl.execution.claims import Claims\n"
    code += f"with Claims(Path(sys.argv[1]), {LEASE}) as c: print(c.take('a'))"
    found = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    return found.stdout.strip() == "True"


@pytest.mark.parametrize("text", ["", "{", '{"name": "a"}', "[]"])
def test_a_claim_whose_writer_was_killed_counts_until_it_expires(tmp_path, text):
    with Claims(tmp_path, 0.4) as claims:
        claims._path("a", 1).write_text(text)
        assert not claims.take("a")
        time.sleep(0.5)
        assert claims.take("a")


def test_a_takeover_that_came_too_late_is_given_up(tmp_path):
    """What it saw expired has changed meanwhile, or another has followed already."""
    with Claims(tmp_path, 5.0) as claims:
        for late in ("touched", "gone", "followed"):
            first = claims._path(late, 1)
            first.write_text("")
            os.utime(first, (0, 0))
            real, held = claims._create, []

            def create(path: Path, name: str, late=late, first=first, real=real, held=held) -> bool:
                if path != first and not held:
                    held.append(path)
                    if late == "touched":
                        os.utime(first)
                    if late == "gone":
                        first.unlink()
                    if late == "followed":
                        claims._path(late, 3).write_text("")
                return real(path, name)

            claims._create = create
            assert not claims.take(late)
            assert held
            assert not held[0].exists()
            claims._create = real
