"""Tables as CSV: cells that a spreadsheet does not compute, rows as they were written."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from histossl.core.errors import file_errors

_FORMULA = re.compile("'*[=+\\-@\\t\\r]")


_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


V = TypeVar("V")


def cell(value: V) -> V | str:
    """A value for a cell of a table that people open: one more apostrophe before text that a spreadsheet would compute.

    Numbers stay as they are, also those that are text.
    """
    if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def text_of(cell: str) -> str:
    """The inverse of `cell` for text."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def writer(file: IO[str]) -> Any:
    """As `csv.writer`, with rows that end in a line feed and quotes around cells that hold any end of a line.

    csv of Python before 3.13 does not quote a carriage return where rows end in a line feed alone.
    """
    return csv.writer(_LineFeeds(file), lineterminator="\r\n")


def dict_writer(file: IO[str], columns: Sequence[str]) -> csv.DictWriter[str]:
    """As `csv.DictWriter`, with rows and cells as of `writer`; missing cells are empty."""
    return csv.DictWriter(_LineFeeds(file), list(columns), restval="", lineterminator="\r\n")


def write_frame(path: Path, frame: Any) -> None:
    """Write a data frame's columns as CSV with cells as of `cell`, six decimals, and rows as of `writer`."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        frame.map(cell).to_csv(_LineFeeds(file), index=False, float_format="%.6f", lineterminator="\r\n")


class _LineFeeds:
    """What `csv` writes rows to, a row a call."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row.removesuffix("\r\n") + "\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """The file is closed by its owner."""

    def __iter__(self) -> _LineFeeds:  # pandas takes for a file what has this
        return self


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table of ours, each by column, as they were before `cell`.

    Raises:
        FileFormatError: it cannot be read as CSV.
    """
    with (
        file_errors(path, "remove it and make it anew"),
        path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file,
    ):
        return [{name: text_of(text or "") for name, text in row.items() if name} for row in csv.DictReader(file)]


Row = dict[str, str]
