"""Locks of a folder that several runs may hold: shared or exclusive, gone with the process that held them.

Where the system has `fcntl`, a lock is an `flock` on a file that stays open; elsewhere (Windows) it is filelock's
`ReadWriteLock`, which SQLite backs. Both end with the process, however that ends.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from histossl.core import safe_paths
from histossl.core.errors import StudyError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LONGEST = 300  # characters of the names of holders that are shown


class FolderLock:
    """A lock file in a folder, open until the block is left.

    Args:
        folder: of the lock file, writable.
        name: of the lock file; a link there is refused.

    Raises:
        StudyError: the file is a link, cannot be written, or its disk has no locks.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        try:
            self._file = safe_paths.open_in(self.folder, self.name, "a+")
            if fcntl is None:
                self._portable = _read_write_lock(self.folder / f"{self.name}.db")
        except OSError as error:
            raise StudyError(f"{self.folder}: cannot be written ({error.strerror})", "choose another --out") from error
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._file is not None
        if fcntl is None:
            self._release_portable()
            self._portable.close()
        self._file.close()  # which ends an flock
        self._file = None

    def exclusive(self, wait: bool = True) -> bool:
        """Hold it alone, giving up a shared hold.

        Args:
            wait: until no other process holds it.

        Returns:
            False where others hold it and `wait` is False.

        Raises:
            StudyError: the disk has no locks.
        """
        if fcntl is not None:
            return self._flock(fcntl.LOCK_EX, wait)
        self._release_portable()
        return self._portable_lock(self._portable.acquire_write, wait)

    def shared(self, wait: bool = True) -> bool:
        """Hold it beside others that share it, giving up an exclusive hold.

        Args:
            wait: until no other process holds it alone.

        Returns:
            False where another holds it alone and `wait` is False.

        Raises:
            StudyError: the disk has no locks.
        """
        if fcntl is not None:
            return self._flock(fcntl.LOCK_SH, wait)
        self._release_portable()
        return self._portable_lock(self._portable.acquire_read, wait)

    def holders(self) -> str:
        """Who holds it, as they have written it; "unknown" where they have not."""
        names = [line for line in self._lines() if line]
        return "; ".join(names)[:_LONGEST] or "unknown"

    def others(self) -> str:
        """As `holders`, without this process; "" where there is none."""
        return "; ".join(line for line in self._lines() if line not in ("", _me()))[:_LONGEST]

    def sign(self) -> None:
        """Write the name of this process into the file; the caller is the only one who writes."""
        me = _me()
        self._rewrite([*(line for line in self._lines() if line not in ("", me)), me])

    def unsign(self) -> None:
        """Take the name of this process out again, and leave those of others."""
        me = _me()
        self._rewrite([line for line in self._lines() if line not in ("", me)])

    def clear(self) -> None:
        """Remove the names of processes that were killed; for the holder of an exclusive lock."""
        self._rewrite([])

    def _lines(self) -> list[str]:
        assert self._file is not None
        self._file.seek(0)
        return self._file.read(2**16).splitlines()

    def _rewrite(self, lines: list[str]) -> None:
        assert self._file is not None
        self._file.seek(0)
        self._file.truncate()
        self._file.write("".join(f"{line}\n" for line in lines))
        self._file.flush()

    def _flock(self, how: int, wait: bool) -> bool:
        assert self._file is not None
        assert fcntl is not None
        try:
            fcntl.flock(self._file, how if wait else how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._no_locks(error) from error
        return True

    def _portable_lock(self, acquire, wait: bool) -> bool:
        from filelock import Timeout

        try:
            acquire(timeout=-1 if wait else 0, blocking=wait)
        except Timeout:
            return False
        except (OSError, RuntimeError, ValueError) as error:
            raise self._no_locks(error) from error
        return True

    def _release_portable(self) -> None:
        with suppress(RuntimeError):  # not held
            self._portable.release(force=True)

    def _no_locks(self, error: Exception) -> StudyError:
        why = getattr(error, "strerror", None) or error
        return StudyError(f"{self.folder / self.name}: its disk has no locks ({why})", "choose another --out")


@contextmanager
def exclusive_lock(folder: Path, name: str) -> Iterator[FolderLock]:
    """Hold a lock file of a folder alone, waiting for it.

    Args:
        folder: of the lock file, writable.
        name: of the lock file.

    Yields:
        The lock, held until the block is left.

    Raises:
        StudyError: as `FolderLock`.
    """
    with FolderLock(folder, name) as lock:
        lock.exclusive()
        yield lock


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _read_write_lock(path: Path):
    from filelock import ReadWriteLock

    if path.is_symlink():
        raise StudyError(*safe_paths.link_refused(path))
    # Not a singleton: two holders in one process exclude each other, as two open files do under flock.
    return ReadWriteLock(str(path), is_singleton=False)
