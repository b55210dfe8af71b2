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
from histossl.core.tables import Row
from histossl.execution.claims import Claims

"""A slide: text by column; slide_id and path are always there."""


class SharedTable:
    """A table of slides, the log of what was done to them, and who is at work on them.

    Args:
        folder: made where there is none.
        table: name of the CSV file.
        columns: that it has whatever the rows say, in order.

    Raises:
        StudyError: the folder cannot be made or is a file.
    """

    def __init__(self, folder: str | Path, table: str, columns: Sequence[str]) -> None:
        self.folder = Path(os.path.abspath(folder))  # it travels to workers on other machines
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"{folder}: cannot be made ({error.strerror})", "choose another --out") from error
        self.table, self.columns = self.folder / table, tuple(columns)
        self.log = self.folder / "log.jsonl"
        self.claims = self.folder / ".claims"

    @contextmanager
    def lock(self, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold the study for this process alone; the hold ends with the process, however that ends.

        Args:
            waiting: called with who holds it, before it is waited for; None does not wait.

        Raises:
            StudyError: another run holds it, or the folder cannot be written.
        """
        with self._lock_file() as handle:
            if not _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                handle.seek(0)
                holder = handle.read().strip() or "unknown"
                if waiting is None:
                    raise StudyError(f"{self.folder}: another run is at work on it ({holder})", "wait for it to end")
                waiting(holder)
                _flock(handle, fcntl.LOCK_EX)
            self._clear_up()
            with _signed(handle):
                yield

    @contextmanager
    def share(self, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold the study together with other runs that share it; who wants it alone waits for them, and they for him.

        Args:
            waiting: called with who holds it alone, before he is waited for.

        Raises:
            StudyError: the folder cannot be written.
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
        """Within `share`: what one run learns for all, the others wait for, and those that are past it go on.

        Args:
            waiting: called before another run is waited for.
        """
        with (self.folder / ".learning").open("a") as handle:
            if not _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                waiting()
                _flock(handle, fcntl.LOCK_EX)
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """For moments: what is read and written in the block, no other run writes meanwhile."""
        with (self.folder / ".writing").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _lock_file(self) -> IO[str]:
        try:
            return open(self.folder / ".lock", "a+", encoding="utf-8")
        except OSError as error:
            raise StudyError(f"{self.folder}: cannot be written ({error.strerror})", "choose another --out") from error

    def _clear_up(self) -> None:
        # Where the disk's locks do not reach other machines, their claims do.
        with Claims(self.claims) as claims:
            if not any(claim.alive for claim in claims.all()):
                atomic.sweep(self.folder)

    def slides(self) -> list[Row]:
        """The rows of the table, in its order; none where there is no file yet.

        Raises:
            StudyError: not such a table.
        """
        if not self.table.exists():
            return []
        try:
            with self.table.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
                reader = csv.reader(file, strict=True)
                header = next(reader, [])
                missing = {"slide_id", "path"} - set(header)
                cells = [row for row in reader if row]
        except (csv.Error, OSError) as error:
            raise StudyError(f"{self.table}: cannot be read ({error})", "mend or remove it") from error
        if missing or any(len(row) > len(header) for row in cells):
            what = f"lacks the column {', '.join(sorted(missing))}" if missing else "has rows longer than its header"
            raise StudyError(f"{self.table}: {what}", "separate by commas; mend or remove it")
        empty = dict.fromkeys((*self.columns, *header), "")
        return [empty | dict(zip(header, map(tables.text_of, row), strict=False)) for row in cells]

    def write_slides(self, rows: list[Row]) -> None:
        """Replace the table, whole; columns that users added stay."""
        columns = dict.fromkeys([*self.columns, *(name for row in rows for name in row)])
        with (
            atomic.whole(self.table) as part,
            part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: tables.cell(text) for name, text in row.items()} for row in rows)


def _flock(handle: IO[str], how: int) -> bool:
    """Whether a lock could be had; False where others have it."""
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
