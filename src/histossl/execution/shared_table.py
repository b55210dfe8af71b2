"""A folder with a table of slides that several runs share: slides.csv of a study, nuclei.csv of found nuclei."""

from __future__ import annotations

import csv
import fcntl
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from histossl.core import atomic, tables
from histossl.core.errors import StudyError
from histossl.core.tables import Row, decimal_point, read_table
from histossl.execution.claims import Claims


class SharedTable:
    """A table of slides with its log, its locks, and the claims of running processes.

    Args:
        folder: created where it does not exist.
        table: name of the CSV file.
        columns: columns that the table always has, in order.

    Raises:
        StudyError: the folder cannot be created or is a file.
    """

    def __init__(self, folder: str | Path, table: str, columns: Sequence[str]) -> None:
        self.folder = Path(os.path.abspath(folder))  # absolute: workers on other machines receive it
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"{folder}: cannot be made ({error.strerror})", "choose another --out") from error
        self.table, self.columns = self.folder / table, tuple(columns)
        self.log = self.folder / "log.jsonl"
        self.claims = self.folder / ".claims"

    @contextmanager
    def lock(self, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold an exclusive lock during the block; the system releases it with the process, even if that is killed.

        Args:
            waiting: called with the name of the holder before waiting for it; None raises instead of waiting.

        Yields:
            None, once the lock is held.

        Raises:
            StudyError: another run holds the lock, the folder cannot be written, or its disk has no locks.
        """
        with self._lock_file() as handle:
            if not _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                handle.seek(0)
                holder = handle.read().strip() or "unknown"
                if waiting is None:
                    raise StudyError(f"{self.folder}: another run is using it ({holder})", "wait for it to end")
                waiting(holder)
                _flock(handle, fcntl.LOCK_EX)
            self._clear_up()
            with _signed(handle):
                yield

    @contextmanager
    def share(self, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold a shared lock during the block: many runs may share it, and it excludes `lock`.

        Args:
            waiting: called with the name of the holder of the exclusive lock, before waiting for it.

        Yields:
            None, once the lock is held.

        Raises:
            StudyError: the folder cannot be written, or its disk has no locks.
        """
        with self._lock_file() as handle:
            if _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                self._clear_up()
                _flock(handle, fcntl.LOCK_SH)
            elif not _flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB):
                handle.seek(0)
                waiting(handle.read().strip() or "unknown")
                _flock(handle, fcntl.LOCK_SH)
            with _signed(handle):
                yield

    @contextmanager
    def learning(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Within `share`: one run at a time trains what all runs need; runs that have it already are not delayed.

        Args:
            waiting: called before waiting for another run.

        Yields:
            None, once this run may train.
        """
        with (self.folder / ".learning").open("a") as handle:
            if not _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                waiting()
                _flock(handle, fcntl.LOCK_EX)
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within `share`, for short times: no other run writes the table or the log during the block."""
        with (self.folder / ".writing").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _lock_file(self) -> IO[str]:
        try:
            return open(self.folder / ".lock", "a+", encoding="utf-8")
        except OSError as error:
            raise StudyError(f"{self.folder}: cannot be written ({error.strerror})", "choose another --out") from error

    def _clear_up(self) -> None:
        # On disks whose locks do not reach other machines, claims still show that other runs are alive.
        with Claims(self.claims) as claims:
            if not any(claim.alive for claim in claims.all()):
                atomic.sweep(self.folder)

    def slides(self) -> list[Row]:
        """The rows of the table, in its order; none where there is no file yet.

        Raises:
            StudyError: the file is not a table of slides.
        """
        if not self.table.exists():
            return []
        found = read_table(self.table, StudyError, ours=True)
        missing = {"slide_id", "path"} - set(found.columns)
        if missing:
            what = f"{self.table}: lacks the column {', '.join(sorted(missing))}; it has {', '.join(found.columns[:8])}"
            raise StudyError(what, "put back the header row; the other columns stay as they are")
        empty = dict.fromkeys((*self.columns, *found.columns), "")
        rows = [empty | {name: text for name, text in row.items() if name} for row in found.rows.values()]
        for row in rows:
            row["mpp"] = decimal_point(row.get("mpp", ""))  # spreadsheets of half the world write 0,5
        return rows

    def write_slides(self, rows: list[Row]) -> None:
        """Replace the table as a whole; columns that users added stay.

        Args:
            rows: the rows, in order.

        Raises:
            OSError: the table cannot be written.
        """
        columns = dict.fromkeys([*self.columns, *(name for row in rows for name in row)])
        with (
            atomic.whole(self.table) as part,
            part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: tables.cell(text) for name, text in row.items()} for row in rows)


def _flock(handle: IO[str], how: int) -> bool:
    """Whether the lock was acquired; False where others hold it."""
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StudyError(f"{handle.name}: its disk has no locks ({error.strerror})", "choose another --out") from error
    return True


@contextmanager
def _signed(handle: IO[str]) -> Iterator[None]:
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}")
    handle.flush()
    yield
    handle.truncate(0)
