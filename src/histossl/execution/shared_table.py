"""A folder with a table of slides that several runs share: slides.csv of a study, nuclei.csv of found nuclei."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from histossl.core import atomic, safe_paths, tables
from histossl.core.errors import StudyError
from histossl.core.tables import Row, decimal_point, read_table
from histossl.execution.claims import Claims
from histossl.execution.locks import FolderLock, exclusive_lock

LOCK, LEARNING, WRITING, CLAIMS, LOG = ".lock", ".learning", ".writing", ".claims", "log.jsonl"
_LOCKS = (LOCK, LEARNING, WRITING)
_OWN_NAMES = (*_LOCKS, *(f"{name}.db" for name in _LOCKS), CLAIMS, LOG, atomic.JOURNAL)


class SharedTable:
    """A table of slides, the log of what was done to them, and the claims of the runs that work on them.

    Args:
        folder: created where it does not exist.
        table: name of the CSV file.
        columns: of the table, in order; rows may add more.
        rooms: names of folders in it that may be links to folders which HISTOSSL_LINKS allows.

    Attributes:
        linked: one line for each link that is followed.

    Raises:
        StudyError: the folder cannot be made, is a file, or holds a link that is not allowed.
    """

    def __init__(
        self, folder: str | Path, table: str, columns: Sequence[str], rooms: frozenset[str] = frozenset()
    ) -> None:
        self.folder = Path(os.path.abspath(folder))  # it travels to workers on other machines
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"{folder}: cannot be made ({error.strerror})", "choose another --out") from error
        self.table, self.columns = self.folder / table, tuple(columns)
        self.log = self.folder / LOG
        self.claims = self.folder / CLAIMS
        self.linked = self._refuse_links(rooms)

    def _refuse_links(self, rooms: frozenset[str]) -> list[str]:
        notes = safe_paths.refuse_links(self.folder, (*_OWN_NAMES, self.table.name), rooms)
        for subfolder in ("logs", "heatmaps"):  # their subfolders are few, and files are written into them
            folder = self.folder / subfolder
            if safe_paths.is_own_folder(folder):
                safe_paths.refuse_links(folder, sorted(os.listdir(folder)))
        return notes

    @contextmanager
    def lock(self, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold the folder for this process alone; the hold ends with the process, however that ends.

        Args:
            waiting: called with the names of the holders before they are waited for; None does not wait.

        Raises:
            StudyError: another run holds the lock, the folder cannot be written, or its disk has no locks.
        """
        with FolderLock(self.folder, LOCK) as lock:
            if not lock.exclusive(wait=False):
                if waiting is None:
                    what = f"{self.folder}: another run is using it ({lock.holders()})"
                    raise StudyError(what, "wait for it to end")
                waiting(lock.holders())
                lock.exclusive()
            lock.clear()
            self._clear_up()
            with self._signed(lock):
                yield
            self._clear_up()  # what workers that were killed left

    @contextmanager
    def share(self, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold the folder together with other runs that share it; a run that wants it alone waits for all of them.

        Args:
            waiting: called with the name of a run that holds it alone, before that run is waited for.

        Raises:
            StudyError: the folder cannot be written, or its disk has no locks.
        """
        with FolderLock(self.folder, LOCK) as lock:
            if lock.exclusive(wait=False):
                lock.clear()
                self._clear_up()
                lock.shared()
            elif not lock.shared(wait=False):
                waiting(lock.holders())
                lock.shared()
            with self._signed(lock):
                yield
            if lock.exclusive(wait=False):
                self._clear_up()

    def others(self) -> str:
        """Within `share` or `lock`: the names of the other runs that hold the folder; "" where there is none."""
        with FolderLock(self.folder, LOCK) as lock:
            return lock.others()

    @contextmanager
    def learning(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Within `share`: one run learns what all runs need, while the others wait; later runs find it done.

        Args:
            waiting: called before waiting for another run.

        Yields:
            None, once this run may train.
        """
        with FolderLock(self.folder, LEARNING) as lock:
            if not lock.exclusive(wait=False):
                waiting()
                lock.exclusive()
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """For moments: no other run writes what is read and written in the block."""
        with exclusive_lock(self.folder, WRITING):
            yield

    @contextmanager
    def _signed(self, lock: FolderLock) -> Iterator[None]:
        with self.writing():
            lock.sign()
        try:
            yield
        finally:
            with suppress(OSError), self.writing():  # the disk may be full: the error in the block counts
                lock.unsign()

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
        if not os.path.lexists(self.table):
            return []
        with safe_paths.open_in(self.folder, self.table.name, "rb"):
            pass  # a link or a pipe is refused before it is read
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
            writer = tables.dict_writer(file, list(columns))
            writer.writeheader()
            writer.writerows({name: tables.cell(text) for name, text in row.items()} for row in rows)
