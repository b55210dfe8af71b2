"""Splits as others write them: who trained and who was tested."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from histossl.core.errors import LabelError
from histossl.evaluate.labels import SLIDE_COLUMNS, find_column, read_label_rows

SIDES = ("train", "val", "test")
_SPELT = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test", "held-out": "test"}


@dataclass(frozen=True)
class Split:
    """One split of slides.

    Attributes:
        name: of the file, with its folder below the one asked for, and of the fold.
        sides: slide -> the sides it is named on, of train, val and test; one slide on two sides is a finding.
        lines: slide -> the row of the file that names it first, the header being row 1.
    """

    name: str
    sides: dict[str, tuple[str, ...]]
    lines: dict[str, int]

    def on(self, *sides: str) -> list[str]:
        """The slides of these sides, in the order of the file."""
        return [slide for slide, found in self.sides.items() if set(found) & set(sides)]


def read_splits(path: Path) -> list[Split]:
    """Read a split file, or every .csv below a folder.

    - columns train, test and perhaps val, each a list of slides, of different lengths (Giga-SSL, CLAM);
    - a slide a row and the same columns of True and False (CLAM's `_bool` files);
    - `slide_id` and `split`, of train, val and test;
    - `slide_id` and `fold`: each fold is tested once, by what the others taught.

    Raises:
        LabelError: none of these; a side is empty; nothing there.
    """
    path = Path(path)
    files = sorted(path.rglob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise LabelError(f"{path}: no .csv in it", "give a split file or a folder of them")
    found = []
    for file in files:
        name = str(file.relative_to(path).with_suffix("")) if path.is_dir() else file.stem
        found += _splits(file, name)
    for split in found:
        if not split.on("train") or not split.on("test"):
            raise LabelError(f"{split.name}: a split needs slides to train and slides to test", "see the two columns")
    return found


def _splits(file: Path, name: str) -> list[Split]:
    columns, rows = read_label_rows(file)
    slide, side, fold = (find_column(columns, names) for names in (SLIDE_COLUMNS, ("split", "set"), ("fold",)))
    lists = {column: _side(column) for column in columns if _side(column) in SIDES}
    if {"train", "test"} <= set(lists.values()):
        values = {row[column].lower() for row in rows.values() for column in lists}
        if values <= {"true", "false", "0", "1", "0.0", "1.0"}:
            # CLAM's slides stand in a column without a name, which is the first of the file.
            key = slide or ""
            named = [
                (row[key], lists[c], line)
                for line, row in rows.items()
                for c in lists
                if row[c].lower() in ("true", "1", "1.0")
            ]
        else:
            named = [(row[c], lists[c], line) for c in lists for line, row in rows.items() if row[c]]
        return [_split(name, named)]
    if slide and side:
        odd = [line for line, row in rows.items() if _side(row[side]) not in SIDES]
        if odd:
            raise LabelError(
                f"{file.name}: row {odd[0]}: {rows[odd[0]][side]!r} is no side", "write train, val or test"
            )
        return [_split(name, [(row[slide], _side(row[side]), line) for line, row in rows.items()])]
    if slide and fold:
        folds = sorted({row[fold] for row in rows.values()})
        return [
            _split(
                f"{name}, fold {k}",
                [(row[slide], "test" if row[fold] == k else "train", line) for line, row in rows.items()],
            )
            for k in folds
        ]
    raise LabelError(f"{file.name}: no split in {', '.join(columns)}", "it needs train and test, or slide_id and fold")


def _side(word: str) -> str:
    word = word.strip().lower()
    return _SPELT.get(word, word)


def _split(name: str, named: list[tuple[str, str, int]]) -> Split:
    sides: dict[str, tuple[str, ...]] = {}
    lines: dict[str, int] = {}
    for slide, side, line in named:
        sides[slide] = tuple(dict.fromkeys((*sides.get(slide, ()), side)))
        lines.setdefault(slide, line)
    return Split(name, sides, lines)
