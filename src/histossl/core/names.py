"""One normal form for the names of slides, patients and sites, in any spelling of disks, spreadsheets and people."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping

_WHOLE = re.compile(r"([0-9]+)\.0+")
_ZEROS = re.compile(r"(?<![0-9.])0+(?=[0-9])")
_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")  # soft hyphens, zero-width characters, direction marks

BARCODE = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?=-|$)")  # names the site, then the patient


def folded(name: str) -> str:
    """The normal form of a name: `P01` and `p01 `, `1` and `1.0`, composed and decomposed characters are one.

    Case does not count, nor do spaces around the name, invisible characters, and the zeros that a spreadsheet adds
    after a whole number. Leading zeros count: `007` and `7` may be two patients.

    Args:
        name: the name as it is written.

    Returns:
        The form that is equal for all spellings of the name.
    """
    text = unicodedata.normalize("NFC", _UNSEEN.sub("", name))
    text = unicodedata.normalize("NFC", " ".join(text.split()).casefold())
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def spellings(names: Iterable[str]) -> dict[str, str]:
    """Choose one spelling for each name.

    Args:
        names: names in any spelling, repeated or not.

    Returns:
        Name -> the first spelling that occurs, if possible one without a spreadsheet's zeros; a name with only one
        spelling -> itself.
    """
    every = list(dict.fromkeys(names))
    first: dict[str, str] = {}
    for name in every:
        key = folded(name)
        if key not in first or (_WHOLE.fullmatch(first[key].strip()) and not _WHOLE.fullmatch(name.strip())):
            first[key] = name
    return {name: first[folded(name)] for name in every}


def clashes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Find different names that have the same normal form.

    Args:
        names: names in any spelling.

    Returns:
        Pairs (first spelling, name), one for each name that is not the first spelling.
    """
    return [(first, name) for name, first in spellings(names).items() if name != first]


def spelling_notes(kind: str, taken: Mapping[str, str], most: int = 3) -> list[str]:
    """Note the names that were read as another spelling.

    Args:
        kind: what the names are, in the plural, such as "slides".
        taken: name -> the spelling that it was read as.
        most: how many names the note lists.

    Returns:
        One line; nothing where all names were read as they are written.
    """
    other = [(name, spelt) for name, spelt in taken.items() if name != spelt]
    if not other:
        return []
    some = ", ".join(f"{name!r} as {spelt!r}" for name, spelt in other[:most])
    more = f" and {len(other) - most} more" if len(other) > most else ""
    same = " (they look alike: accents are composed in one and not in the other)" if _alike(other[0]) else ""
    return [f"{kind} that are spelt in two ways were read as one: {some}{more}{same}"]


def _alike(pair: tuple[str, str]) -> bool:
    a, b = (unicodedata.normalize("NFC", name) for name in pair)
    return a == b


def bare(column: str) -> str:
    """Remove case, spaces, hyphens and underscores from a column's name: `Slide ID` and `slide_id` are the same.

    Args:
        column: the name as it is written.

    Returns:
        The name in the form for comparisons.
    """
    return re.sub(r"[\s_\-]+", "", column.casefold())


def barcode(slide: str) -> tuple[str, str]:
    """Read a TCGA barcode.

    Args:
        slide: the name of a slide.

    Returns:
        The patient and the site, both "" where the name has no barcode.
    """
    found = BARCODE.match(slide)
    return (found[0], found[0].split("-")[1]) if found else ("", "")


def listed(names: Iterable[str], most: int = 5, quote: bool = True) -> str:
    """Names for a message: the first ones, and how many more there are.

    Args:
        names: the names.
        most: how many are written out.
        quote: whether each is put in quotes.

    Returns:
        Text such as "'a', 'b' and 3 more".
    """
    names = [repr(name) if quote else name for name in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def row_list(lines: Collection[int]) -> str:
    """Rows of a table for a message: the first three, and how many more there are.

    Args:
        lines: numbers of the rows.

    Returns:
        Text such as "rows 2, 5, 6 and 3 more".
    """
    return ("row " if len(lines) == 1 else "rows ") + listed(map(str, lines), 3, quote=False)


def without_zeros(name: str) -> str:
    """The normal form of a name without zeros at the begin of its numbers, which spreadsheets drop.

    Args:
        name: the name as it is written.

    Returns:
        The form that is equal for `P007` and `p7`; a number after a point keeps its zeros.
    """
    return _ZEROS.sub("", folded(name))


def zero_suspicions(kind: str, names: Iterable[str]) -> list[str]:
    """Find names that differ by leading zeros alone.

    Args:
        kind: what the names are, in the plural.
        names: in one spelling each.

    Returns:
        One line, or nothing.
    """
    first: dict[str, str] = {}
    pairs = [(first.setdefault(without_zeros(name), name), name) for name in dict.fromkeys(names)]
    some = [f"{a!r} and {b!r}" for a, b in pairs if a != b]
    if not some:
        return []
    what = f"{kind} differ by leading zeros alone, which spreadsheets drop: {listed(some, 3, quote=False)}"
    return [f"{what}: if they are the same, write them alike"]


class Known:
    """Known names, which can be looked up in any spelling.

    Args:
        names: the names; where several have the same normal form, the first one is kept.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._spelt: dict[str, str] = {}
        for name in names:
            self._spelt.setdefault(folded(name), name)

    def get(self, name: str) -> str | None:
        """Look up a name in any spelling.

        Args:
            name: the name as it is written.

        Returns:
            The known spelling, or None.
        """
        return self._spelt.get(folded(name))

    def __contains__(self, name: str) -> bool:
        return folded(name) in self._spelt
