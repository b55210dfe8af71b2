"""How failed slides are reported: one line in the table and on the screen."""

from __future__ import annotations

import errno
from pathlib import Path

from histossl.core.console import say
from histossl.core.errors import HistosslError
from histossl.core.tables import Row

_EACH = 3  # slides with the same reason that are named one by one


def fail(row: Row, error: str) -> None:
    """Mark a slide as failed.

    Args:
        row: the slide's row, changed in place.
        error: the reason, one line.
    """
    row |= failure(error)


def failure(error: str) -> Row:
    """The changes to the row of a failed slide.

    Args:
        error: the reason, one line.

    Returns:
        `status` and `error`.
    """
    return {"status": "failed", "error": error}


def give_up_on_disk(error: Exception) -> None:
    """Raise errors that would also stop every other slide: a disk that is full or read-only.

    Args:
        error: what a slide raised; other errors are ignored.

    Raises:
        OSError: `error` itself.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        raise error


def failure_reason(error: Exception, path: Path | None = None) -> str:
    """An error as one line of slides.csv.

    Args:
        error: what the slide raised.
        path: the slide's file, to name it in errors of other libraries, which may not.

    Returns:
        One line of text.
    """
    if isinstance(error, HistosslError):
        return str(error)
    name = f"{path.name}: " if path else ""
    return " ".join(f"{name}{type(error).__name__}: {error}".split())


def report_failures(rows: list[Row]) -> int:
    """Print the failures: a line for each slide, or for all slides with the same reason where there are many.

    Args:
        rows: rows of the table.

    Returns:
        The number of failed slides.
    """
    failed = [row for row in rows if row["status"] == "failed"]
    reasons: dict[str, list[Row]] = {}
    for row in failed:
        reasons.setdefault(row["error"].partition(": ")[2] or row["error"], []).append(row)
    for reason, rows_of_it in reasons.items():
        if len(rows_of_it) > _EACH:
            some = ", ".join(row["slide_id"] for row in rows_of_it[:_EACH])
            say(f"FAILED {len(rows_of_it)} slides: {reason} ({some} and {len(rows_of_it) - _EACH} more)", "red")
        else:
            for row in rows_of_it:
                say(f"FAILED {row['error']}", "red")
    return len(failed)
