"""Lets another process read an HDF5 file first: one byte in it can make the library hang, or crash, for good.

HDF5 holds the interpreter while it reads, so that neither a thread nor Ctrl-C ends a reader that hangs. The one that
reads first ends with this one, and after `SECONDS` for a file.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE

from histossl.core.errors import FileFormatError

SECONDS = 60.0  # for a file; of large data sets only the index is read

_lock = threading.Lock()
_reader: tuple[int, subprocess.Popen[bytes]] | None = None  # of which process; a fork has none
_passed: dict[str, tuple[int, ...]] = {}
_needed = True


def not_needed() -> None:
    """Say that this process may hang or die of a file: whoever began it has a time limit for it."""
    global _needed
    _needed = False


def pass_trial(path: Path) -> None:
    """Come back once another process has read an HDF5 file and come back from it.

    Each state of a file is tried once. Errors of the file are no business of this function. Where no such process can
    be begun, no file is tried.

    Args:
        path: of a regular file.

    Raises:
        FileFormatError: the process hangs, dies, or runs out of memory.
    """
    if not _needed:
        return
    name, about = os.path.abspath(path), os.stat(path)
    state = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    with _lock:
        if _passed.get(name) == state or (reader := _running()) is None:
            return
        answer = _answer(reader, name)
        if not answer and reader.returncode == -getattr(signal, "SIGKILL", 9) and (reader := _running()):
            answer = _answer(reader, name)  # somebody else ended it, and perhaps not because of this file
        if answer == b"yes\n":
            _passed[name] = state
            return
    what = "takes more memory than there may be" if answer else "hangs or kills the library that reads it"
    raise FileFormatError(f"{path} {what}", "it is damaged or made to do so: write it anew")


def _answer(reader: subprocess.Popen[bytes], name: str) -> bytes:
    """What the reader says; nothing where the file was its end."""
    assert reader.stdin is not None
    assert reader.stdout is not None
    answer = b""
    with suppress(BrokenPipeError):
        reader.stdin.write(os.fsencode(name).hex().encode() + b"\n")
        reader.stdin.flush()
        answer = reader.stdout.readline()
    if not answer:
        reader.wait()
    return answer


def _running() -> subprocess.Popen[bytes] | None:
    global _reader, _needed
    if _reader is None or _reader[0] != os.getpid() or _reader[1].poll() is not None:
        script = Path(__file__).with_name("trial_reader.py")
        # -P: our modules beside the script are not to be taken for others of their names.
        command = [sys.executable, "-P", str(script), str(SECONDS)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        try:
            reader = subprocess.Popen(command, env=environment, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
        except OSError:
            _needed = False
            return None
        atexit.register(_end, os.getpid(), reader)
        assert reader.stdout is not None
        if reader.stdout.readline() != b"ready\n":
            _needed = False
            return None
        _reader = os.getpid(), reader
    return _reader[1]


def _end(process: int, reader: subprocess.Popen[bytes]) -> None:
    if process == os.getpid():
        reader.kill()
        reader.wait()
        for pipe in (reader.stdin, reader.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
