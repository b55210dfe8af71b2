"""What a failed slide says: one line of the table and of the screen."""

from __future__ import annotations

import errno
from pathlib import Path

from histossl.core.console import say
from histossl.core.errors import HistosslError
from histossl.core.tables import Row


def fail(row: Row, error: str) -> None:
    """Mark a slide as failed, with the reason."""
    row |= failure(error)


def failure(error: str) -> Row:
    """What changes in the row of a slide that failed."""
    return {"status": "failed", "error": error}


def give_up_on_disk(error: Exception) -> None:
    """Raise what no other slide would fare better with: a disk that is full or cannot be written."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        raise error


def failure_reason(error: Exception, path: Path | None = None) -> str:
    """An error as one line of slides.csv; the slide's file is named where the error itself does not."""
    if isinstance(error, HistosslError):
        return str(error)
    name = f"{path.name}: " if path else ""
    return " ".join(f"{name}{type(error).__name__}: {error}".split())


def report_failures(rows: list[Row]) -> int:
    """One line on the screen for every failed slide; returns their number."""
    failed = [row for row in rows if row["status"] == "failed"]
    for row in failed:
        say(f"FAILED {row['error']}", "red")
    return len(failed)
