"""What runs write down as they go, and how several of them share the slides of one table.

log.jsonl is a line a slide that was done, by whichever run; the table (slides.csv of a study, nuclei.csv of what was
found) is brought up to it every few seconds. So a run that is killed loses no line, two runs never overwrite each
other's rows, and what users write into the table stays.
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
"""A line of log.jsonl: time, run, host, pid, stage, slide_id, path, and `row`: what changes in the table."""

_BLOCK = 2**16
_PAUSE = 0.5  # seconds between two looks at slides that other runs are at


class Journal:
    """A table of slides and its log, kept in step.

    Args:
        roll: the caller holds it, alone or shared.
        seconds: at least so long between two writings of the table, and fifty times as long as one takes.
    """

    def __init__(self, roll: SharedTable, seconds: float = 5) -> None:
        self.roll, self.seconds = roll, seconds
        self._read = self._size()
        self.rows = self.flush()

    def write(self, stage: str, lines: Sequence[tuple[Row, Row]], **more: object) -> None:
        """Write down what changes in rows of the table, and change them.

        Args:
            stage: that changes them.
            lines: (row, its changes).
            more: beside them, for who reads the log.
        """
        me = this_process()
        about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "run": me.token, "host": me.host}
        text = ""
        for row, changes in lines:
            row |= changes
            one = about | {"pid": me.pid, "stage": stage, "slide_id": row["slide_id"], "path": row["path"]}
            text += _text(one | more | {"row": changes})
        with self.roll.writing():
            append(self.roll, text)
        if time.monotonic() > self._due:
            self.flush()

    def news(self) -> list[Line]:
        """What other runs have written since the last call."""
        size, mine = self._size(), this_process().token
        if size <= self._read:
            return []
        with _open_log(self.roll, "rb") as file:
            file.seek(self._read)
            text = file.read(size - self._read)
        whole = text.rpartition(b"\n")[0]
        self._read += len(whole) + bool(whole)
        return [line for line in map(parsed, whole.splitlines()) if "row" in line and line.get("run") != mine]

    def flush(self) -> list[Row]:
        """Bring the table up to the log, whoever wrote it; returns its rows."""
        start = time.monotonic()
        with self.roll.writing():
            rows, behind = caught_up(self.roll)
            if behind:
                self.roll.write_slides(rows)
                append(self.roll, _text({"kept": True}))
        now = time.monotonic()
        self._due = now + max(self.seconds, 50 * (now - start))
        return rows

    def _size(self) -> int:
        try:
            return self.roll.log.stat().st_size
        except FileNotFoundError:
            return 0


def caught_up(roll: SharedTable) -> tuple[list[Row], bool]:
    """The table with all that the log says since it was last written; and whether that is anything."""
    rows = roll.slides()
    lines = lines_since(roll, lambda line: "kept" in line)
    if lines:
        by_path = {row["path"]: row for row in rows}
        for line in lines:
            row = by_path.get(line.get("path", ""))
            if row is not None:
                row |= line["row"]
    return rows, bool(lines)


def lines_since(roll: SharedTable, stop: Callable[[Line], bool], most: int | None = None) -> list[Line]:
    """The last lines of the log about slides, oldest first, back to the one that `stop` takes for the end.

    Args:
        roll: whose log.
        stop: whether a line ends the search.
        most: bytes of the log to look through; None is all of it.
    """
    found: list[Line] = []
    try:
        with _open_log(roll, "rb") as file:
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


def append(roll: SharedTable, text: str) -> None:
    """Add lines to a log; the caller is the only one who writes.

    Args:
        roll: whose log.
        text: whole lines.
    """
    with _open_log(roll, "a+b") as file:
        # A full disk may have cut the last line short.
        file.write(("" if _ends_whole(file) else "\n").encode() + text.encode("utf-8", "surrogateescape"))


def _open_log(roll: SharedTable, mode: str) -> IO[bytes]:
    return safe_paths.open_in(roll.folder, roll.log.name, mode)


def _text(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def parsed(text: bytes) -> Line:
    """A line of a log; empty where it was cut short, or is none of ours."""
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
    """A run's share of a stage: it claims slides, does them, writes down what came of them and lets them go.

    Args:
        ledger: of the table.
        stage: its name.
        jobs: (row of the table, job) of all slides that are not done; of these other runs do some.
    """

    def __init__(self, ledger: Journal, stage: str, jobs: Sequence[tuple[Row, J]]) -> None:
        self.ledger, self.stage = ledger, stage
        self.left = {row["slide_id"]: (row, job) for row, job in jobs}
        self.claims = Claims(ledger.roll.claims)
        self._begun: dict[str, float] = {}

    def __enter__(self) -> StageQueue[J]:
        self.claims.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.ledger.flush()
            self.claims.sweep()
        finally:
            self.claims.__exit__(*exc)

    def rounds(self) -> Iterator[Iterator[J]]:
        """Rounds of jobs that are this run's, until all are done by somebody.

        A round is over when no more can be had; those that others hold come in a later one, should they let them go.
        """
        while self.left:
            had = len(self._begun), len(self.left)
            yield self._offers()
            self.listen()
            if self.left and had == (len(self._begun), len(self.left)):
                time.sleep(_PAUSE)

    def listen(self) -> list[Row]:
        """The rows of slides that other runs have done since the last call."""
        found = []
        for line in self.ledger.news():
            name = line.get("slide_id", "")
            if line.get("stage") == self.stage and name in self.left and line.get("path") == self.left[name][0]["path"]:
                row, _ = self.left.pop(name)
                row |= line["row"]
                found.append(row)
        return found

    def finish(self, name: str, changes: Row, **more: object) -> None:
        """Write down what came of a slide; from here on it is nobody's."""
        row, _ = self.left.pop(name)
        seconds = round(time.monotonic() - self._begun[name], 2)
        tiles = int(changes.get("tiles") or row.get("tiles") or 0)
        self.ledger.write(self.stage, [(row, changes)], tiles=tiles, seconds=seconds, **more)
        self.claims.release(name)

    def _offers(self) -> Iterator[J]:
        for name in list(self.left):
            if name in self.left and name not in self._begun and self.claims.take(name):
                self.listen()
                if name in self.left:
                    self._begun[name] = time.monotonic()
                    yield self.left[name][1]
                else:
                    self.claims.release(name)
