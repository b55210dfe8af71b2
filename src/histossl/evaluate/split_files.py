"""Reads the split files of other tools: which slides train, validate and test."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from histossl.core.errors import LabelError
from histossl.core.names import Known, folded, listed, row_list
from histossl.core.sidecars import is_sidecar
from histossl.core.tables import EMPTY, read_table
from histossl.evaluate.labels import SLIDE_COLUMNS, absent_slides, find_column

SIDES = ("train", "val", "test")
_ALIASES = {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "testing": "test",
    "held-out": "test",
}


@dataclass(frozen=True)
class Split:
    """One split of slides.

    Attributes:
        name: of the file, relative to the folder that was read, and of the fold.
        sides: slide -> its sides, of train, val and test; a slide on two sides is kept with both, for the audit.
        lines: slide -> the first row of the file that names it; the header is row 1.
    """

    name: str
    sides: dict[str, tuple[str, ...]]
    lines: dict[str, int]

    def on(self, *sides: str) -> list[str]:
        """List the slides of some sides.

        Args:
            sides: of train, val and test.

        Returns:
            Slides on at least one of the sides, in the order of the file.
        """
        return [slide for slide, found in self.sides.items() if set(found) & set(sides)]

    def named_as(self, slides: Iterable[str]) -> Split:
        """The split with its slides spelt as known slides are.

        Args:
            slides: the known slides.

        Returns:
            The split; names of unknown slides do not change.
        """
        known = Known(slides)
        spelt = {slide: known.get(slide) or slide for slide in self.sides}
        return Split(
            self.name,
            {spelt[slide]: sides for slide, sides in self.sides.items()},
            {spelt.get(slide, slide): line for slide, line in self.lines.items()},
        )

    def only(self, slides: Collection[str]) -> Split:
        """The split without unknown slides.

        Args:
            slides: the slides to keep.

        Returns:
            The smaller split.
        """
        kept = {slide: sides for slide, sides in self.sides.items() if slide in slides}
        return Split(self.name, kept, {slide: self.lines[slide] for slide in kept})


def read_splits(path: Path) -> list[Split]:
    """Read a split file, or every .csv below a folder.

    Formats:

    - columns `train`, `test` and optionally `val`, each a list of slides, of different lengths (Giga-SSL, CLAM);
    - one row per slide, with the same columns of True and False (CLAM's `_bool` files);
    - columns `slide_id` and `split`, with train, val or test;
    - columns `slide_id` and `fold`: each fold is tested once, the others train.

    Args:
        path: of a file or a folder.

    Returns:
        The splits, in the order of the files' names; a file with folds gives one per fold.

    Raises:
        LabelError: the folder has no .csv, a file has none of these formats, or a split has no slides to train or test.
    """
    path = Path(path)
    files = sorted(p for p in path.rglob("*.csv") if not is_sidecar(p.name)) if path.is_dir() else [path]
    if not files:
        raise LabelError(f"{path}: no .csv in it", "give a split file or a folder of them")
    found = []
    for file in files:
        name = str(file.relative_to(path).with_suffix("")) if path.is_dir() else file.stem
        found += _splits(file, name)
    for split in found:
        if not split.on("train") or not split.on("test"):
            raise LabelError(f"{split.name}: a split needs slides to train and slides to test", "check its columns")
    return found


def _splits(file: Path, name: str) -> list[Split]:
    columns, rows = (table := read_table(file, LabelError)).columns, table.rows
    slide, side, fold = (find_column(columns, names) for names in (SLIDE_COLUMNS, ("split", "set"), ("fold",)))
    lists = {column: _side(column) for column in columns if _side(column) in SIDES}
    if {"train", "test"} <= set(lists.values()):
        values = {row[column].lower() for row in rows.values() for column in lists}
        if values <= {"true", "false", "0", "1", "0.0", "1.0"}:
            # CLAM writes the slides in the first column, which has no name.
            key = slide or ""
            if not all(key in row for row in rows.values()):
                what = f"{file.name}: no column names the slides; it has {listed(columns, 5)}"
                raise LabelError(what, "name it slide_id")
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
        odd = {line: row[side] for line, row in rows.items() if _side(row[side]) not in SIDES}
        if odd:
            what = f"{file.name}: {row_list(odd)}: {listed(dict.fromkeys(odd.values()), 3)} is no side"
            raise LabelError(what, "write train, val or test, or leave the row out")
        return [_split(name, [(row[slide], _side(row[side]), line) for line, row in rows.items()])]
    if slide and fold:
        fold_of = {line: folded(row[fold]) for line, row in rows.items()}  # 1 and 1.0 are one
        none = [line for line, k in fold_of.items() if k in EMPTY]
        if none:
            raise LabelError(f"{file.name}: no fold in {row_list(none)}", "write one, or leave the row out")
        return [
            _split(
                f"{name}, fold {k}",
                [(row[slide], "test" if fold_of[line] == k else "train", line) for line, row in rows.items()],
            )
            for k in sorted(set(fold_of.values()))
        ]
    hint = "it needs the slides of train and test, or slide_id and split or fold; a patient's slides have a row each"
    raise LabelError(f"{file.name}: no split in {', '.join(columns)}", hint)


def _side(word: str) -> str:
    word = word.strip().lower()
    return _ALIASES.get(word, word)


def _split(name: str, named: list[tuple[str, str, int]]) -> Split:
    sides: dict[str, tuple[str, ...]] = {}
    lines: dict[str, int] = {}
    first: dict[str, str] = {}
    for written, side, line in named:
        slide = first.setdefault(folded(written), written)  # a slide in two spellings on two sides is one slide
        sides[slide] = tuple(dict.fromkeys((*sides.get(slide, ()), side)))
        lines.setdefault(slide, line)
    return Split(name, sides, lines)


def known_slides(splits: Sequence[Split], slides: Collection[str]) -> tuple[list[Split], tuple[str, ...]]:
    """Reduce splits to known slides, spelt as these are.

    Args:
        splits: the splits as read.
        slides: the known slides.

    Returns:
        The splits, and complaints about the slides that were left out of each.

    Raises:
        LabelError: a side has no known slide, or a name differs from a slide's only in its extension.
    """
    found, complaints = [], []
    for split in splits:
        spelt = split.named_as(slides)
        lost = {slide: spelt.lines[slide] for slide in spelt.sides if slide not in slides}
        there = set(spelt.sides) - set(lost)
        complaints += absent_slides(split.name, lost, sorted(slides), there, "slides of the split")
        kept = spelt.only(slides)
        for side in ("train", "test"):
            if not kept.on(side):
                what = f"{split.name}: none of the slides to {side} is known: {listed(lost, 3)}"
                raise LabelError(what, "are these the table and vectors of the split?")
        found.append(kept)
    return found, tuple(complaints)
