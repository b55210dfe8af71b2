"""One normal form for the names of slides, patients and sites, however a disk, a spreadsheet or a person spelt them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping

_WHOLE = re.compile(r"([0-9]+)\.0+")
_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")  # soft hyphens, zero widths, marks of direction


def folded(name: str) -> str:
    """The form by which two spellings of a name are one: `P01` and `p01 `, `1` and `1.0`, composed and decomposed.

    Case does not count, nor do spaces around it, signs that nobody sees, and the zeros that a spreadsheet puts behind a
    whole number. Zeros in front count: `007` and `7` may well be two patients.
    """
    text = unicodedata.normalize("NFC", _UNSEEN.sub("", name))
    text = unicodedata.normalize("NFC", " ".join(text.split()).casefold())
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def spellings(names: Iterable[str]) -> dict[str, str]:
    """Each name -> the first spelling of it, without a spreadsheet's zeros; a name that is spelt one way, itself."""
    every = list(dict.fromkeys(names))
    first: dict[str, str] = {}
    for name in every:
        key = folded(name)
        if key not in first or (_WHOLE.fullmatch(first[key].strip()) and not _WHOLE.fullmatch(name.strip())):
            first[key] = name
    return {name: first[folded(name)] for name in every}


def clashes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of different names that are one in their normal form, each name with the first that is like it."""
    return [(first, name) for name, first in spellings(names).items() if name != first]


def told(kind: str, taken: Mapping[str, str], most: int = 3) -> list[str]:
    """One line about the names that were read as another spelling; none where there is none.

    Args:
        kind: of the names, in the plural.
        taken: name -> the spelling that it was read as.
        most: how many are named.
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


class Known:
    """Names that are known, found again in any spelling.

    Args:
        names: all different in their normal form; of those that are not the first counts.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._spelt: dict[str, str] = {}
        for name in names:
            self._spelt.setdefault(folded(name), name)

    def get(self, name: str) -> str | None:
        """The known spelling of a name, or None."""
        return self._spelt.get(folded(name))

    def __contains__(self, name: str) -> bool:
        return folded(name) in self._spelt
