"""Reads the classes in a column of labels, and finds those that may say that there is no label."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from histossl.core.errors import LabelError
from histossl.core.names import listed, row_list
from histossl.core.tables import EMPTY, number

_NO_NAMES = (*EMPTY, "-", "none", "null", "unknown", "missing", "not available", "not known")
_NO_CLASSES = (
    "-", "unknown", "missing", "not available", "not applicable", "not known", "not done", "n.d.", "nd", "n.a.", "k.a.",
    "tbd", "pending", "excluded",
)  # fmt: skip
_CODES = (-1, -9, -99, -999, -9999, 9, 99, 999, 9999)
_DATES = re.compile(
    r"[0-9]{1,2}[-. ]+[^\W\d_]{3,4}\.?|[^\W\d_]{3,4}\.?[- ][0-9]{2}|[0-9]{4}-[0-9]{2}-[0-9]{2}( 00:00:00)?"
)


def known_name(text: str) -> str:
    """The name of a patient or a site in a cell.

    Args:
        text: the text of the cell.

    Returns:
        The text, or "" where it is empty or a word for what is not known.
    """
    return "" if text.strip().lower() in _NO_NAMES else text.strip()


def read_classes(where: str, cells: Mapping[int, str], name: str) -> dict[int, str]:
    """Read the classes, or the numbers, in a column.

    Args:
        where: name of the table, for the errors.
        cells: line of the file -> text.
        name: name of the column.

    Returns:
        Line -> class, for the lines that have one; numbers that are written differently are one class.

    Raises:
        LabelError: the column mixes words and numbers, or has classes that differ by case alone. Names the rows.
    """
    words, numbers = {}, {}
    for line, value in cells.items():
        if value.lower() in EMPTY:
            continue
        try:
            found = number(value)
        except ValueError:
            words[line] = value
        else:
            numbers[line] = str(int(found)) if found.is_integer() else repr(found)
    if words and numbers:
        kind, few = min(("words", words), ("numbers", numbers), key=lambda pair: len(pair[1]))
        raise LabelError(
            f"{where}: column {name!r} mixes words and numbers: {kind} in {row_list(few)}: "
            + listed(dict.fromkeys(few.values()), 3),
            "write all classes in words, or all in numbers; leave cells without a label empty",
        )
    spelt = defaultdict(set)
    for value in words.values():
        spelt[value.casefold()].add(value)
    double = [sorted(forms) for forms in spelt.values() if len(forms) > 1]
    if double:
        lines = [line for line, value in words.items() if value in double[0][1:]]
        raise LabelError(
            f"{where}: column {name!r}: {listed(double[0])} differ only by case ({row_list(lines)})",
            "spell a class one way",
        )
    return words | numbers


def odd_classes(name: str, classes: Mapping[int, str]) -> list[str]:
    """Find classes and numbers that may stand for a missing label, and those that a spreadsheet made dates of.

    Args:
        name: of the column.
        classes: line of the file -> class.

    Returns:
        One line per suspicion.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for line, value in classes.items():
        rows[value].append(line)
    found = []
    for value in [value for value in rows if value.lower() in _NO_CLASSES and not (value == "-" and "+" in rows)]:
        what = f"{name}: is {value!r} a class ({row_list(rows[value])})? if it says that there is no label"
        found.append(f"{what}, leave these cells empty")
    for value in _codes(rows):
        what = f"{name}: is {value} a value ({row_list(rows[value])})? the others are far from it; if it is a code"
        found.append(f"{what} for missing labels, leave these cells empty")
    dates = [value for value in rows if _DATES.fullmatch(value)]
    if dates:
        what = f"{name}: {listed(dates, 3)} ({row_list(rows[dates[0]])}) looks like a date"
        found.append(f"{what}: spreadsheets make dates of 3-4 and 3+4; save such columns as text")
    return found


def _codes(rows: Mapping[str, list[int]]) -> list[str]:
    """Numbers that are usual codes for missing values and lie far from all other numbers."""
    try:
        values = {value: float(value) for value in rows}
    except ValueError:
        return []
    others = [value for value in values.values() if value not in _CODES] or [0.0]
    low, high = min(others), max(others)
    margin = max(1.0, (high - low) / 2)
    least = low - margin if low < 0 else 0.0
    far = [text for text, value in values.items() if value in _CODES and (value < least or value > high + margin)]
    return far if len(values) > 2 else []
