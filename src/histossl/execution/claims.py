"""Claims: which run works on which slide, so that runs on several machines share the slides of one study.

A claim is a file that only one process can create. Its owner touches it regularly. A claim that has not been touched
for long, or whose process is known to be dead, is taken over by creating the claim of the next number. If the owner
was only suspended and resumes, the slide is processed twice, and its files are replaced by the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from histossl.core import safe_paths
from histossl.core.errors import StudyError

EXPIRY = 180.0
"""Seconds without a touch after which a claim of another machine has expired."""

_LONGEST = 2**16  # characters of a claim


@dataclass(frozen=True)
class Owner:
    """A process, identified uniquely across machines and time.

    Attributes:
        host: name of the machine.
        system: the boot of the machine and the namespace of its process numbers.
        pid: process number.
        born: start of the process, seconds since 1970.
    """

    host: str
    system: str
    pid: int
    born: float

    @property
    def token(self) -> str:
        """A short identifier, safe in file names."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def dead(self) -> bool:
        """Whether the process is known to have ended; False for processes of other systems, which cannot be checked."""
        if self.system != this_process().system:
            return False
        try:
            process = psutil.Process(self.pid)
            # The start time may shift by up to two seconds: it is computed from the system clock, which may be reset.
            return abs(process.create_time() - self.born) > 2 or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


@dataclass(frozen=True)
class Claim:
    """A claim as other processes see it.

    Attributes:
        name: the slide that is claimed; "?" where the file is not complete.
        owner: the process that holds it, None where the file is not complete.
        alive: whether the claim is valid: it has not expired and its owner is not known to be dead.
        age: seconds since it was last touched.
    """

    name: str
    owner: Owner | None
    alive: bool
    age: float


@functools.cache
def _this_system() -> str:
    """Identifies the host, its current boot, and the namespace of process numbers: a container has its own."""
    marks = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        with suppress(OSError):
            marks.append(read())
    return " ".join(marks)


def this_process() -> Owner:
    """The current process."""
    return _owner(os.getpid())


@functools.cache
def _owner(pid: int) -> Owner:
    return Owner(socket.gethostname(), _this_system(), pid, psutil.Process(pid).create_time())


class Claims:
    """The claims in a folder; claims of this process are touched by a thread until the block ends.

    Args:
        folder: on a disk that all runs see; created with the first claim and removed after the last.
        expiry: seconds without a touch after which a claim expires, the same for all runs.
    """

    def __init__(self, folder: Path, expiry: float = EXPIRY) -> None:
        self.folder, self.expiry = folder, expiry
        self._held: dict[str, list[Path]] = {}  # name -> the claims it follows, and its own at the end
        self._loose: set[Path] = set()  # being made or removed: an interrupt may come amid that
        self._change = threading.Lock()
        self._over = threading.Event()
        self._beat = threading.Thread(target=self._keep_alive, daemon=True)
        self._clock = folder / f"clock-{this_process().token}"
        self._entered = False  # until then nothing is written

    def __enter__(self) -> Claims:
        self._entered = True
        self._beat.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._beat.join()
        for name in list(self._held):
            self.release(name)
        for path in self._loose:
            claim, _ = self._look(path)
            if claim is not None and claim.owner in (None, this_process()):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty where others have claims in it
            for clock in self.folder.glob("clock-*"):  # also those of killed runs; a live run creates its own again
                clock.unlink(missing_ok=True)
            self.folder.rmdir()

    def take(self, name: str) -> bool:
        """Claim a slide.

        Another run may have done the slide just before it released the claim: check again after this returns True.

        Args:
            name: the slide.

        Returns:
            True where this process holds the claim; False where another process holds it or takes it over meanwhile.

        Raises:
            OSError: the folder cannot be written.
        """
        if name in self._held:
            return True
        taken = self._taken(name)
        self._loose.clear()
        return taken

    def _taken(self, name: str) -> bool:
        seen: list[tuple[Path, int]] = []
        while True:
            path = self._path(name, len(seen) + 1)
            self._loose.add(path)
            if self._create(path, name):
                break
            claim, touched = self._look(path)
            if claim is None or claim.alive:
                return False
            seen.append((path, touched))
        # The expired claims must be unchanged, and no other process may have created the next number meanwhile.
        if any(_touched(old) != then for old, then in seen) or self._path(name, len(seen) + 2).exists():
            path.unlink(missing_ok=True)
            return False
        with self._change:
            self._held[name] = [*(old for old, _ in seen), path]
        return True

    def release(self, name: str) -> None:
        """Release a claim of this process.

        Args:
            name: a slide that this process has claimed.
        """
        self._loose.update(self._held[name])
        with self._change:
            paths = self._held.pop(name)
        for path in paths:  # own claim last: while it exists no other process can take over
            path.unlink(missing_ok=True)
        self._loose.difference_update(paths)

    def sweep(self) -> None:
        """Remove claims of dead runs: a slide that was finished just before its run was killed is not taken again."""
        for path in self._files():
            claim, _ = self._look(path)
            if claim is not None and not claim.alive:
                path.unlink(missing_ok=True)  # a process that is taking it over notices this and gives up

    def all(self) -> list[Claim]:
        """Every claim in the folder."""
        last = {path.stem: path for path in self._files()}  # the claim of the highest number is the valid one
        found = (self._look(path)[0] for path in last.values())
        return [claim for claim in found if claim is not None]

    def _files(self) -> list[Path]:
        try:
            return sorted(path for path in self.folder.iterdir() if not path.name.startswith("clock-"))
        except OSError:
            return []

    def _path(self, name: str, number: int) -> Path:
        # Slide names may contain any character and be too long for another suffix.
        return self.folder / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.{number:04d}"

    def _create(self, path: Path, name: str) -> bool:
        while True:
            try:
                file = safe_paths.open_in(self.folder, path.name, "x")
            except FileExistsError:
                return False
            except FileNotFoundError:  # another run has ended and removed the folder
                self.folder.mkdir(parents=True, exist_ok=True)
                continue
            with file:
                json.dump({"name": name, **asdict(this_process())}, file)
            return True

    def _look(self, path: Path) -> tuple[Claim | None, int]:
        """(The claim, its modification time in ns); the claim is None where the file no longer exists."""
        try:
            with safe_paths.open_in(self.folder, path.name, "r") as file:
                text = file.read(_LONGEST)
                touched = os.fstat(file.fileno()).st_mtime_ns
        except (FileNotFoundError, StudyError):  # a link or a folder is no claim
            return None, 0
        age = (self._now() - touched) / 1e9
        try:
            found = json.loads(text)
            name = found.pop("name")
            owner = Owner(**found)
        except (
            ValueError,
            TypeError,
            AttributeError,
            KeyError,
            RecursionError,
        ):  # being written, or its writer was killed
            return Claim("?", None, age < self.expiry, age), touched
        return Claim(name, owner, age < self.expiry and not owner.dead(), age), touched

    def _now(self) -> int:
        """The time in ns by the clock of the disk that holds the claims: clocks of machines may differ by hours.

        Outside of the block nothing is written, and it is this machine's clock, or the newest claim's time if later.
        """
        for _ in range(10 if self._entered else 0):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with safe_paths.open_in(self.folder, self._clock.name, "a") as clock:
                    os.utime(clock.fileno() if os.utime in os.supports_fd else self._clock)
                    return os.fstat(clock.fileno()).st_mtime_ns
            except FileNotFoundError:  # a run that has just ended swept it away
                continue
            except OSError:  # the disk is read-only
                break
        return max([time.time_ns(), *(_touched(path) or 0 for path in self._files())])

    def _keep_alive(self) -> None:
        while not self._over.wait(self.expiry / 9):
            with self._change:
                paths = [paths[-1] for paths in self._held.values()]
            for path in paths:
                with suppress(OSError):  # let go of in between, or the disk is away for a while
                    os.utime(path, follow_symlinks=os.utime not in os.supports_follow_symlinks)


def _touched(path: Path) -> int | None:
    try:
        return path.lstat().st_mtime_ns
    except OSError:
        return None
