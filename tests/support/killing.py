"""Kills runs at random moments, and compares what they end with."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from histossl.cli.main import main
from histossl.core.atomic import JOURNAL

# Children of a process that has imported torch already: two hundred of them cost seconds each otherwise.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["support.warmed"])
# Its sys.path is that of a new Python, which finds no module of the tests.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])


def quietly(*commands: list[str]) -> None:
    """Run commands in this process, one after the other, and end it with the exit code of the last."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing), contextlib.redirect_stdout(nothing):
        sys.exit([main(command) for command in commands][-1])


def child(*commands: list[str]) -> BaseProcess:
    """A process that runs commands; it has begun."""
    process = server.Process(target=quietly, args=commands)
    process.start()
    return process


def digest(folder: Path) -> dict[str, str]:
    """Every file of a folder but logs and locks."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(_timeless(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", ".learning", ".writing", "log.jsonl", JOURNAL)
        and not path.name.startswith("events.out")
    }  # fmt: skip


def same_files(found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Fail with the names of the files that differ; this module's assertions are not explained by pytest."""
    differ = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    assert not differ, differ


def _timeless(path: Path) -> bytes:
    """The content, without the seconds that each slide took and the report's table of times."""
    data = path.read_bytes()
    if path.name == "nuclei.csv":
        return re.sub(rb",\d+\.\d\d,", b",,", data)
    if path.name == "report.html":
        return re.sub(rb'<details open id="times">.*?</details>', b"", data, flags=re.DOTALL)
    return data


def kill_at_random(
    begin: Callable[[], BaseProcess], out: Path, undisturbed: Mapping[str, str], kills: int, seed: int
) -> int:
    """Begin, kill, begin again; every folder that comes to its end is compared, and removed.

    Args:
        begin: starts a process that writes into `out`.
        out: the folder.
        undisturbed: `digest` of a folder that nobody disturbed.
        kills: how many, of the process itself or of one of its workers.
        seed: of the moments and the victims.

    Returns:
        How many came to their end.
    """
    rng, ended, span = random.Random(seed), 0, 4.0
    while kills:
        start = time.monotonic()
        process = begin()
        process.join(rng.uniform(0, span))
        if process.is_alive():
            kills, span = kills - 1, 1.1 * span  # on a busy machine nothing would ever come to its end
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # it may end of itself just now
                workers = psutil.Process(process.pid).children()
                os.kill(rng.choice([process.pid, *(worker.pid for worker in workers)]), signal.SIGKILL)
        process.join()
        if process.exitcode == 0:
            span = max(0.5, 1.2 * (time.monotonic() - start))
            same_files(digest(out), undisturbed)
            shutil.rmtree(out)
            ended += 1
    while (process := begin()).join() or process.exitcode != 0:
        pass  # a slide whose worker was killed twice is begun anew
    same_files(digest(out), undisturbed)
    return ended + 1
