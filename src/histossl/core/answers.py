"""What a command was asked for, on standard output: tables for people, one JSON object for scripts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from histossl.core.console import answers, printable

_FOLDS = 40  # characters; longer text is folded into lines
_found: dict[str, Any] | None = None


def begin(as_json: bool) -> None:
    """Begin the answer of a command.

    Args:
        as_json: whether it is one JSON object, printed by `finish`, instead of tables.
    """
    global _found
    _found = {} if as_json else None


def finish() -> None:
    """Print the JSON object, where one was asked for."""
    global _found
    if _found is not None:
        sys.stdout.write(json.dumps(_plain(_found), indent=1, ensure_ascii=True) + "\n")
    _found = None


def give(name: str, value: Any, shown: Table | str | None = None) -> None:
    """Add a part of the answer.

    Args:
        name: its key in the JSON object.
        value: what the object holds; numbers that are not finite become null.
        shown: what people see instead: a table of rich, or plain text; None shows them nothing.
    """
    if _found is not None:
        _found[name] = value
    elif shown is not None:
        answers.print(escape(shown) if isinstance(shown, str) else shown)


def give_rows(
    name: str, rows: Sequence[Mapping[str, Any]], styles: Mapping[str, str] | None = None, value: Any = None
) -> None:
    """Add a table; headers are never cut.

    On a terminal the columns that fit are shown, from the left, and the others are named; elsewhere all of them.

    Args:
        name: its key in the JSON object.
        rows: column -> value, the same columns in every row.
        styles: column -> style of rich.
        value: what the JSON object holds instead of the rows.
    """
    if _found is not None or not rows:
        give(name, [dict(row) for row in rows] if value is None else value)
        return
    cells = {str(column): [_cell(row[column]) for row in rows] for column in rows[0]}
    widths = {column: max(len(column), *map(_width, texts)) for column, texts in cells.items()}
    whole = max(1, sum(widths.values()) + 2 * len(widths))
    left, shown = answers.width if answers.is_terminal else whole, []
    for column, wide in widths.items():
        needed = min(wide, max(_FOLDS, len(column))) + 2
        if needed > left and shown:
            break
        left -= needed
        shown.append(column)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in shown:
        number = all(isinstance(row[column], int | float) for row in rows)
        style = (styles or {}).get(column)
        width = widths[column] if widths[column] <= _FOLDS or not answers.is_terminal else None
        table.add_column(
            escape(printable(column)),
            justify="right" if number else "left",
            style=style,
            min_width=width,
            overflow="fold",
        )
    for texts in zip(*(cells[column] for column in shown), strict=True):
        table.add_row(*map(escape, texts))
    answers.print(table, width=None if answers.is_terminal else whole, crop=False)
    if lost := [column for column in cells if column not in shown]:
        answers.print(escape(f"not shown for want of room: {', '.join(lost)} (a wider window, or --json)"))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3f}"
    return str(value)


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(printable(text))


def _plain(value: Any) -> Any:
    """A value as JSON has it: numbers of numpy as Python's, those that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
