"""Tables as CSV: cells that a spreadsheet does not compute, rows as they were written."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    pass

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


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table of ours, each by column, as they were before `cell`."""
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        return [{name: text_of(text or "") for name, text in row.items() if name} for row in csv.DictReader(file)]


Row = dict[str, str]
