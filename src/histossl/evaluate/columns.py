"""Finds the columns of a table that are a vector: never row numbers, constants, names, or other facts on a slide."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histossl.core.errors import FileFormatError
from histossl.core.names import bare

_UNNAMED = re.compile(r"(unnamed:?\s*[0-9]*(\.[0-9]+)?|index|level_?[0-9]+|row(_?(number|id|nr|no))?|)", re.IGNORECASE)
_NUMBERED = re.compile(r"(.*?)[_\-. ]?([0-9]+)")
_ABOUT = frozenset(
    [
        "age",
        "sex",
        "gender",
        "label",
        "target",
        "class",
        "stage",
        "grade",
        "tiles",
        "ntiles",
        "width",
        "height",
        "mpp",
        "magnification",
        "year",
        "fold",
        "split",
        "os",
        "ostime",
        "osevent",
        "time",
        "event",
        "survival",
        "status",
        "batch",
        "weight",
        "id",
        "score",
    ]
)  # names, in the form of `bare`, that no feature has
_FEW = 8  # a table of at least this many slides is needed to tell a row number from chance


@dataclass(frozen=True)
class Vector:
    """The vector that a table holds.

    Attributes:
        columns: its names, in order.
        values: (N, d) float32.
        notes: one line each for columns that were left out, and for a vector that was not declared.
        declared: whether its columns share a prefix and are numbered, or were named by the user.
    """

    columns: tuple[str, ...]
    values: NDArray[np.float32]
    notes: tuple[str, ...]
    declared: bool


def vector_of(name: str, numbers: pd.DataFrame, wanted: Sequence[str] = ()) -> Vector:
    """Find the columns that are the vector.

    They are those requested; else those of one prefix and a number (f0, f1, ...; 0, 1, ...), all others are left out
    and named; else all columns that are left, if they are of one kind.

    Args:
        name: name of the file, for messages.
        numbers: the numeric columns of the table; "" or `Unnamed: 0` is one without a name.
        wanted: names or prefixes of the columns to take; `f` takes f0, f1, ...

    Returns:
        The columns, their values, and notes about columns that were left out.

    Raises:
        FileFormatError: no column is left, or several sets of columns could be meant.
    """
    names = [str(column) for column in numbers.columns]
    values = numbers.to_numpy(np.float64)
    left, notes = list(range(len(names))), []
    if wanted:
        left = [k for k in left if names[k] in wanted or prefix_of(names[k]) in wanted]
        if not left:
            raise FileFormatError(f"{name}: no column is called {', '.join(wanted)}", f"it has {_some(names)}")
    else:
        for what, odd in _odd(names, values).items():
            gone = [k for k in left if k in odd]
            if gone:
                some = _some([names[k] or "without a name" for k in gone])
                notes.append(f"{name}: left out of the vector: {what} {some}")
                left = [k for k in left if k not in odd]
        left, more = _declared(name, names, left)
        notes += more
    if not left:
        why = "; ".join(notes) or "it has none"
        raise FileFormatError(f"{name}: no column of numbers is left that is a vector: {why}", "name them: --columns")
    declared = bool(wanted) or len({prefix_of(names[k]) for k in left} - {None}) == 1
    if not declared:
        notes += _undeclared(name, [names[k] for k in left], values[:, left])
    with np.errstate(over="ignore"):  # inf is refused by the caller, who knows the slides
        vector = values[:, left].astype(np.float32)
    return Vector(tuple(names[k] for k in left), vector, tuple(notes), declared)


def prefix_of(column: str) -> str | None:
    """The text before the number of a numbered column: `f` of f12 and f_12, "" of 12.

    Args:
        column: name of the column.

    Returns:
        The text, or None where the column is not numbered.
    """
    found = _NUMBERED.fullmatch(column)
    return found[1] if found else None


def _odd(names: list[str], values: NDArray[np.float64]) -> dict[str, set[int]]:
    """Kind of column that is no feature -> its columns."""
    unnamed = {k for k, column in enumerate(names) if _UNNAMED.fullmatch(column.strip())}
    rows = {k for k in range(len(names)) if is_row_number(values[:, k])}
    constant = {k for k in range(len(names)) if len(values) > 1 and np.ptp(values[:, k]) == 0}
    about = {k for k, column in enumerate(names) if bare(column) in _ABOUT}
    return {
        "columns without a name,": unnamed,
        "row numbers,": rows,
        "constant columns,": constant,
        "columns that say something else of a slide,": about,
    }


def is_row_number(column: NDArray) -> bool:
    """Whether a column counts its rows: whole numbers that only rise, or only fall, from row to row.

    Args:
        column: (N,) numbers.

    Returns:
        True for row numbers; False for a column of few rows.
    """
    if len(column) < _FEW or not np.isfinite(column).all() or (column != np.rint(column)).any():
        return False
    steps = np.diff(column)
    return bool((steps > 0).all() or (steps < 0).all())


def row_numbers(values: NDArray) -> list[int]:
    """Find the columns of an array that count its rows, see `is_row_number`.

    Args:
        values: (N, d) numbers.

    Returns:
        The indices of these columns.
    """
    if len(values) < _FEW:
        return []
    first = values[:_FEW]  # most columns are excluded by their first values
    maybe = np.flatnonzero((first == np.rint(first)).all(axis=0))
    return [int(k) for k in maybe if is_row_number(values[:, k])]


def _declared(name: str, names: list[str], left: list[int]) -> tuple[list[int], list[str]]:
    """The columns of the one numbered prefix, and notes on the others; all columns where none is numbered."""
    groups: dict[str, list[int]] = {}
    for k in left:
        prefix = prefix_of(names[k])
        if prefix is not None:
            groups.setdefault(prefix, []).append(k)
    groups = {prefix: found for prefix, found in groups.items() if len(found) > 1}
    if not groups:
        return left, []
    if len(groups) > 1:
        some = "; ".join(f"{prefix!r} with {len(found)} columns" for prefix, found in list(groups.items())[:3])
        hint = "say which are the vector by one or more prefixes: --columns '[\"" + next(iter(groups)) + "\"]'"
        raise FileFormatError(f"{name}: several sets of numbered columns could be the vector: {some}", hint)
    (found,) = groups.values()
    others = [names[k] for k in left if k not in found]
    if not others:
        return found, []
    what = f"{name}: left out of the vector, which is {names[found[0]]} to {names[found[-1]]}: column {_some(others)}"
    return found, [f"{what} (--columns takes others)"]


def _undeclared(name: str, names: list[str], values: NDArray[np.float64]) -> list[str]:
    """Notes on a vector whose columns have no numbers.

    Raises:
        FileFormatError: its columns are of different kinds, so that some are likely something else.
    """
    whole = (values == np.rint(values)).all(axis=0)
    if whole.any() and not whole.all():
        others = [column for column, is_odd in zip(names, whole, strict=True) if not is_odd]
        hint = f"say which are the vector, such as --columns '{json.dumps(others[:6])}'"
        odd = _some([column for column, is_odd in zip(names, whole, strict=True) if is_odd])
        raise FileFormatError(f"{name}: column {odd} holds whole numbers, the others do not: is it a feature?", hint)
    return [f"{name}: the vector is taken to be {len(names)} columns, {_some(names)}; --columns says it otherwise"]


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def check_against_label(
    name: str, columns: Sequence[str], values: NDArray, truth: NDArray, target: str, named: bool
) -> list[str]:
    """Refuse a vector of which one column is the label, or ranks the slides by it.

    Args:
        name: of the file.
        columns: d names.
        values: (n, d) of the slides that have the label.
        truth: (n,) int classes, or float numbers.
        target: name of the label.
        named: the columns were named by the user: those that rank by the label are then only reported.

    Returns:
        One line each for columns that are suspect and were requested.

    Raises:
        FileFormatError: a column equals the label or ranks the slides by it; names it.
    """
    if len(truth) < 2 * _FEW or len(np.unique(truth)) < 2:
        return []
    equal = [k for k in range(values.shape[1]) if _is_label(values[:, k], truth)]
    ranked = [k for k in range(values.shape[1]) if k not in equal and _ranks_as(values[:, k], truth)]
    hint = "take it out of the table, or name the columns of the vector: --columns"
    if equal:
        some = _some([columns[k] for k in equal])
        raise FileFormatError(f"{name}: column {some} is the label {target!r} itself, in all {len(truth)} slides", hint)
    if ranked and not named:
        some = _some([columns[k] for k in ranked])
        what = f"{name}: column {some} alone ranks all {len(truth)} slides by the label {target!r}: is it made from it?"
        raise FileFormatError(what, hint)
    return [f"column {columns[k]!r} alone ranks all slides by the label {target!r}" for k in ranked]


def _is_label(column: NDArray, truth: NDArray) -> bool:
    """Whether each value of a column stands for one class, or is the number itself in some unit."""
    if len(np.unique(truth)) > min(20, len(truth) // 2):
        if truth.dtype.kind not in "fi" or not np.ptp(column):
            return False
        return bool(abs(np.corrcoef(column, truth)[0, 1]) > 1 - 1e-9)
    values, of = np.unique(column, return_inverse=True)
    kinds, kind = np.unique(truth, return_inverse=True)
    return len(values) == len(kinds) and len(np.unique(of * len(kinds) + kind)) == len(kinds)


def _ranks_as(column: NDArray, truth: NDArray) -> bool:
    """Whether the order of a column separates the classes, or sorts the numbers, without exception."""
    kinds, kind = np.unique(truth, return_inverse=True)
    if len(kinds) > 20:
        order = np.argsort(column, kind="stable")
        steps = np.diff(np.asarray(truth)[order])
        return bool((steps >= 0).all() or (steps <= 0).all())
    if np.bincount(kind).min() < 5:
        return False
    low = np.array([column[kind == k].min() for k in range(len(kinds))])
    high = np.array([column[kind == k].max() for k in range(len(kinds))])
    order = np.argsort(low)
    return bool((high[order][:-1] < low[order][1:]).all())
