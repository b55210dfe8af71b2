"""The log of finished slides, and how several runs share the slides of one table.

log.jsonl has one line per finished slide, of all runs. The table (slides.csv of a study, nuclei.csv of found nuclei)
is updated from the log every few seconds. So a killed run loses no line, two runs never overwrite each other's rows,
and what users write into the table stays.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import IO, Any, Generic, TypeVar

from histossl.core import safe_paths
from histossl.core.tables import Row
from histossl.execution.claims import Claims, this_process
from histossl.execution.shared_table import SharedTable

J = TypeVar("J")

Line = dict[str, Any]
"""A line of log.jsonl: time, run, host, pid, stage, slide_id, path, and `row`: the changes to the table."""

_BLOCK = 2**16  # bytes of the log read at once
_PAUSE = 0.5  # seconds between two checks of slides that other runs work on


class Journal:
    """A table of slides and its log, kept consistent.

    Args:
        shared: the table; the caller holds its lock, alone or shared.
        seconds: least time between two writes of the table; it is also at least fifty times as long as one write takes.
    """

    def __init__(self, shared: SharedTable, seconds: float = 5) -> None:
        self.shared, self.seconds = shared, seconds
        self._read = self._size()
        self.rows = self.flush()

    def write(self, stage: str, lines: Sequence[tuple[Row, Row]], **more: object) -> None:
        """Log changes to rows of the table, and apply them.

        Args:
            stage: name of the stage that changes them.
            lines: (row, its changes); rows are changed in place.
            more: further JSON values for the lines of the log.
        """
        me = this_process()
        about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "run": me.token, "host": me.host}
        text = ""
        for row, changes in lines:
            row |= changes
            one = about | {"pid": me.pid, "stage": stage, "slide_id": row["slide_id"], "path": row["path"]}
            text += _text(one | more | {"row": changes})
        with self.shared.writing():
            append(self.shared, text)
        if time.monotonic() > self._due:
            self.flush()

    def news(self) -> list[Line]:
        """The lines that other runs have written since the last call."""
        size, mine = self._size(), this_process().token
        if size <= self._read:
            return []
        with _open_log(self.shared, "rb") as file:
            file.seek(self._read)
            text = file.read(size - self._read)
        whole = text.rpartition(b"\n")[0]
        self._read += len(whole) + bool(whole)
        return [line for line in map(parsed, whole.splitlines()) if "row" in line and line.get("run") != mine]

    def flush(self) -> list[Row]:
        """Update the table from the log of all runs; returns its rows."""
        start = time.monotonic()
        with self.shared.writing():
            rows, behind = caught_up(self.shared)
            if behind:
                self.shared.write_slides(rows)
                append(self.shared, _text({"kept": True}))
        now = time.monotonic()
        self._due = now + max(self.seconds, 50 * (now - start))
        return rows

    def _size(self) -> int:
        try:
            return self.shared.log.stat().st_size
        except FileNotFoundError:
            return 0


def caught_up(shared: SharedTable) -> tuple[list[Row], bool]:
    """The table, with the changes that were logged after it was last written.

    Args:
        shared: the table.

    Returns:
        The rows, and whether the log has such changes.

    Raises:
        StudyError: the table cannot be read.
    """
    rows = shared.slides()
    lines = lines_since(shared, lambda line: "kept" in line)
    if lines:
        by_path = {row["path"]: row for row in rows}  # a slide may have been renamed
        by_area = {(row["path"], row["slide_id"]): row for row in rows if _is_area(row)}
        for line in lines:
            path = line.get("path", "")
            row = by_area.get((path, line.get("slide_id", "")), by_path.get(path))
            if row is not None and _is_area(row) and row["slide_id"] != line.get("slide_id"):
                row = None
            if row is not None:
                row |= line["row"]
    return rows, bool(lines)


def _is_area(row: Row) -> bool:
    """Whether a row is of an area of a slide, of which there may be several."""
    return bool(row.get("area")) and "@" in row["slide_id"]


def lines_since(shared: SharedTable, stop: Callable[[Line], bool], most: int | None = None) -> list[Line]:
    """The last lines of the log about slides.

    Args:
        shared: the table.
        stop: called from the last line backwards; the first line for which it is true ends the search.
        most: bytes of the log to read at most, roughly; None reads all of it.

    Returns:
        The lines after that one, oldest first.
    """
    found: list[Line] = []
    try:
        with _open_log(shared, "rb") as file:
            for text in _backwards(file, most):
                line = parsed(text)
                if line and stop(line):
                    break
                if "row" in line:
                    found.append(line)
    except FileNotFoundError:
        pass
    return found[::-1]


def _backwards(file: IO[bytes], most: int | None) -> Iterator[bytes]:
    """The lines of a file, the last first."""
    at = size = file.seek(0, os.SEEK_END)
    rest = b""
    while at > 0 and (most is None or size - at < most):
        length = min(at, _BLOCK)
        at -= length
        file.seek(at)
        first, *lines = (file.read(length) + rest).split(b"\n")
        yield from reversed(lines)
        rest = first
    if at == 0:
        yield rest


def append(shared: SharedTable, text: str) -> None:
    """Append lines to a log; the caller must hold `SharedTable.writing`.

    Args:
        shared: the table.
        text: whole lines.
    """
    with _open_log(shared, "a+b") as file:
        # A full disk may have cut the last line short.
        file.write(("" if _ends_whole(file) else "\n").encode() + text.encode("utf-8", "surrogateescape"))


def _open_log(shared: SharedTable, mode: str) -> IO[bytes]:
    return safe_paths.open_in(shared.folder, shared.log.name, mode)


def _text(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def parsed(text: bytes) -> Line:
    """A line of a log.

    Args:
        text: UTF-8 JSON.

    Returns:
        The line; empty where it was cut short, or is not one that histossl writes.
    """
    try:
        found = json.loads(text.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and _is_ours(found) else {}


def _is_ours(line: Line) -> bool:
    """Whether what a line says is of the types that we write."""
    texts, numbers = ("stage", "slide_id", "path", "run", "host", "limit"), ("seconds", "tiles", "lost")
    if not all(isinstance(line.get(name, ""), str) for name in texts):
        return False
    if not all(isinstance(line.get(name, 0), int | float) and abs(line.get(name, 0)) < 1e15 for name in numbers):
        return False
    row = line.get("row", {})
    if not isinstance(row, dict) or not all(isinstance(text, str) for text in row.values()):
        return False
    try:
        return "time" not in line or datetime.fromisoformat(line["time"]).tzinfo is not None
    except (ValueError, TypeError):
        return False


def _ends_whole(file: IO[bytes]) -> bool:
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


class StageQueue(Generic[J]):
    """A run's share of a stage: claims slides one by one, logs their results and releases them.

    Args:
        journal: the journal of the table.
        stage: name of the stage.
        jobs: (row of the table, job) of all slides that are not done; other runs may do some of them.
    """

    def __init__(self, journal: Journal, stage: str, jobs: Sequence[tuple[Row, J]]) -> None:
        self.journal, self.stage = journal, stage
        self.left = {row["slide_id"]: (row, job) for row, job in jobs}
        self.claims = Claims(journal.shared.claims)
        self._begun: dict[str, float] = {}

    def __enter__(self) -> StageQueue[J]:
        self.claims.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.journal.flush()
            self.claims.sweep()
        finally:
            self.claims.__exit__(*exc)

    def rounds(self) -> Iterator[Iterator[J]]:
        """Rounds of jobs for this run, until all are done by some run.

        A round ends when all remaining slides are claimed by other runs; a later round offers those that they release
        without finishing.
        """
        while self.left:
            had = len(self._begun), len(self.left)
            yield self._offers()
            self.listen()
            if self.left and had == (len(self._begun), len(self.left)):
                time.sleep(_PAUSE)

    def listen(self) -> list[Row]:
        """The rows of slides that other runs have finished since the last call."""
        found = []
        for line in self.journal.news():
            name = line.get("slide_id", "")
            if line.get("stage") == self.stage and name in self.left and line.get("path") == self.left[name][0]["path"]:
                row, _ = self.left.pop(name)
                row |= line["row"]
                found.append(row)
        return found

    def finish(self, name: str, changes: Row, **more: object) -> None:
        """Log the result of a slide and release its claim.

        Args:
            name: the slide, one that `rounds` offered.
            changes: to its row.
            more: further JSON values for the line of the log.
        """
        row, _ = self.left.pop(name)
        seconds = round(time.monotonic() - self._begun[name], 2)
        tiles = int(changes.get("tiles") or row.get("tiles") or 0)
        self.journal.write(self.stage, [(row, changes)], tiles=tiles, seconds=seconds, **more)
        self.claims.release(name)

    def _offers(self) -> Iterator[J]:
        for name in list(self.left):
            # After the claim, read the log again: another run may have finished the slide before it released it.
            if name in self.left and name not in self._begun and self.claims.take(name):
                self.listen()
                if name in self.left:
                    self._begun[name] = time.monotonic()
                    yield self.left[name][1]
                else:
                    self.claims.release(name)
