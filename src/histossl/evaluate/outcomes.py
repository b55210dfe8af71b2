"""Survival outcomes in a table of labels: which columns they are, and what their cells say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import LabelError
from histossl.core.names import bare, listed, row_list
from histossl.core.tables import EMPTY, number

_TIME = re.compile(r"(?P<name>.*?)(?P<word>(survival)?time)?(in)?(?P<unit>days|weeks|months|years)?")
_CENSORED = ("censored", "censor", "censoring", "cens")
_EVENTS = ("event", "status", "dead", "died", "death", "deceased", "vitalstatus", *_CENSORED, "")
_HAPPENED = {"1", "true", "yes", "y", "event", "dead", "died", "death", "deceased", "progression", "progressed",
             "recurrence", "recurred", "relapse", "relapsed"}  # fmt: skip
_NOT_YET = {"0", "false", "no", "n", "noevent", "alive", "living", "censored", "censor", "diseasefree"}
_CODED = re.compile(r"([01]):.*")  # cBioPortal writes 1:DECEASED and 0:LIVING
_DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}")
_LONGEST = {"days": 40_000, "weeks": 6_000, "months": 1_300, "years": 110}  # a life
_A_YEAR = {"days": 365.25, "weeks": 52.2, "months": 12, "years": 1}
_SHORTER = {"weeks": "days", "months": "days or weeks", "years": "days, weeks or months"}
_HALF, _ANY = 20, 40  # years: few cohorts are followed so long by half of their patients, or by any
_BRIEF = 300  # days: a cohort of which nobody was followed longer may be one of months


@dataclass(frozen=True)
class Outcome:
    """The two columns of a survival target.

    Attributes:
        time: the column of the time from the start to the event or to the last contact.
        event: the column that says whether the event happened at that time.
        unit: days, weeks, months or years, as the name of the column says; else "".
    """

    time: str
    event: str
    unit: str


def find_outcomes(where: str, columns: Sequence[str], time: str = "", event: str = "") -> dict[str, Outcome]:
    """Find survival targets by the names of their columns, such as `os_months` and `os_event`, `OS.time` and `OS`.

    Args:
        where: name of the table, for the errors.
        columns: the columns that may be targets.
        time: the column of the time, where it is named.
        event: the column of the event, where it is named.

    Returns:
        Name of the target -> its columns. A target is called as its columns begin, or `survival`.

    Raises:
        LabelError: a named column is absent, or only one of the two is named.
    """
    if bool(time) != bool(event):
        raise LabelError(f"{where}: survival needs a time and an event", "name both: --probe.time and --probe.event")
    lost = [name for name in (time, event) if name and name not in columns]
    if lost:
        raise LabelError(f"{where}: no column {listed(lost)}", f"it has {listed(columns)}")
    if time:
        stem = _stem(time)
        return {(stem[0] if stem else "") or time: Outcome(time, event, stem[1] if stem else "")}
    by_key = {_key(name): name for name in reversed(columns)}
    found = {}
    for column in columns:
        if stem := _stem(column):
            start = _key(stem[0])
            pair = next((by_key[start + end] for end in _EVENTS if start + end in by_key and start + end), None)
            if pair is not None:
                found.setdefault(stem[0] or "survival", Outcome(column, pair, stem[1]))
    return found


def _key(column: str) -> str:
    return bare(column).replace(".", "")


def _stem(column: str) -> tuple[str, str] | None:
    """What precedes the words of time in the name of a column, and the unit; None where there are no such words."""
    found = _TIME.fullmatch(_key(column))
    if not found or not (found["word"] or found["unit"]):
        return None
    letters = [k for k, c in enumerate(column) if _key(c)]
    end = letters[len(found["name"])]
    return column[:end].strip(" _-."), found["unit"] or ""


def read_outcome(where: str, rows: dict[int, dict[str, str]], outcome: Outcome) -> tuple[dict[int, str], list[str]]:
    """Read the times and events of a survival target.

    Args:
        where: name of the table, for the errors.
        rows: line of the file -> column -> text.
        outcome: the two columns.

    Returns:
        Line -> outcome as text, "12.5" with and "12.5+" without an event, for the lines that have one; and complaints
        about rows that are left out: one of the two cells is empty, or the time is 0, which tells nothing.

    Raises:
        LabelError: times that are not numbers, or negative; events that are neither yes nor no. Names the rows.
    """
    found: dict[int, str] = {}
    half, nothing = [], []
    times = {line: row[outcome.time] for line, row in rows.items()}
    events = {line: row[outcome.event] for line, row in rows.items()}
    both = [line for line in rows if times[line].lower() not in EMPTY and events[line].lower() not in EMPTY]
    half = [line for line in rows if (times[line].lower() in EMPTY) != (events[line].lower() in EMPTY)]
    values = _times(where, {line: times[line] for line in both}, outcome)
    happened = _events(where, {line: events[line] for line in both}, outcome.event)
    nothing = [line for line in both if values[line] == 0]
    found = {line: f"{values[line]!r}{'' if happened[line] else '+'}" for line in both if values[line] > 0}
    notes = [f"{where}: no {outcome.time} or no {outcome.event} in {row_list(half)}"] if half else []
    if nothing:
        notes.append(f"{where}: {outcome.time} is 0, nobody was followed, in {row_list(nothing)}")
    return found, notes


def _times(where: str, cells: dict[int, str], outcome: Outcome) -> dict[int, float]:
    values, words = {}, {}
    for line, text in cells.items():
        try:
            values[line] = number(text)
        except ValueError:
            words[line] = text
    below = [line for line, value in values.items() if not 0 <= value < np.inf]
    if words:
        kind = "dates" if all(map(_DATE.match, words.values())) else "no numbers"
        some = f"{row_list(words)}: {listed(dict.fromkeys(words.values()), 3)}"
        hint = "give the time from the start to the event or last contact, in one unit, such as months"
        raise LabelError(f"{where}: {outcome.time} holds {kind} in {some}", hint)
    if below:
        what = f"{where}: {outcome.time} is negative in {row_list(below)}"
        raise LabelError(what, "correct them, or leave these cells empty")
    over = [line for line, value in values.items() if value > _LONGEST.get(outcome.unit, np.inf)]
    if over:
        what = f"{where}: {outcome.time} is longer than a life in {row_list(over)}"
        raise LabelError(what, f"the column's name says {outcome.unit}: write all times in one unit")
    return values


def _events(where: str, cells: dict[int, str], column: str) -> dict[int, bool]:
    found, odd = {}, {}
    if _key(column).endswith(_CENSORED):
        coded = {line: text for line, text in cells.items() if not text.lower().startswith(("cens", "event"))}
        if coded:
            some = f"{next(iter(coded.values()))!r} in {column}"
            what = f"{where}: does {some} mean censored or an event ({row_list(coded)})?"
            raise LabelError(what, "call the column event, with 1 for an event and 0 for censored")
    for line, text in cells.items():
        coded = _CODED.fullmatch(text)
        word = coded[1] if coded else _key(text.removesuffix(".0"))
        if word in _HAPPENED or word in _NOT_YET:
            found[line] = word in _HAPPENED
        else:
            odd[line] = text
    if odd:
        what = f"{where}: {column} is neither event nor censored in {row_list(odd)}"
        raise LabelError(f"{what}: {listed(dict.fromkeys(odd.values()), 3)}", "write 1 for an event, 0 for censored")
    return found


def odd_times(outcomes: Mapping[str, Outcome], values: Mapping[str, Mapping[int, str]]) -> list[str]:
    """Find times that are likely in another unit than their column says: a life is long enough for 900 days as months.

    Args:
        outcomes: target -> its columns.
        values: target -> line of the file -> outcome as text, of `read_outcome`.

    Returns:
        One line per suspicion.
    """
    found = []
    for name, outcome in outcomes.items():
        if not outcome.unit or not values.get(name):
            continue
        times = dict(zip(values[name], followed(np.array(list(values[name].values())))[:, 0], strict=True))
        year, half, longest = _A_YEAR[outcome.unit], float(np.median(list(times.values()))), max(times.values())
        beyond = [line for line, time in times.items() if time > _ANY * year]
        what = ""
        if outcome.unit in _SHORTER and half > _HALF * year:
            what = f"half of the times are longer than {half:g} {outcome.unit} ({half / year:.0f} years)"
        elif outcome.unit in _SHORTER and beyond:
            what = f"up to {longest:g} {outcome.unit} ({longest / year:.0f} years) in {row_list(beyond)}"
        if what:
            found.append(f"{outcome.time}: {what}: are these {_SHORTER[outcome.unit]}?")
        elif outcome.unit == "days" and longest < _BRIEF:
            found.append(f"{outcome.time}: nobody was followed longer than {longest:g} days: are these months?")
    return found


def followed(values: NDArray) -> NDArray[np.float64]:
    """The inverse of the text of outcomes.

    Args:
        values: (n,) text, such as "12.5" and "12.5+".

    Returns:
        (n, 2) float64: time, and 1 with an event and 0 without.
    """
    return np.array([[float(v.removesuffix("+")), float(not v.endswith("+"))] for v in map(str, values)])
