"""Identifies slides: the row of slides.csv by the file, else by the file's content, else by its name."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from histossl.core.errors import SlideError, StudyError
from histossl.core.names import folded
from histossl.study.folder import COLUMNS, Row
from histossl.wsi.content import chosen_picture, content_of
from histossl.wsi.folders import lies_in

NOT_OURS = "not read: "  # prefix of complaints that another attempt to open the slide cannot resolve


@dataclass
class Merged:
    """The rows of a study, with those of the slides that were found first.

    Attributes:
        rows: of the slides that were found, in order, then of slides elsewhere, then of slides that are gone.
        notes: one line each for slides that were moved, copies, and names that occur twice.
    """

    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def merge(known: Sequence[Row], paths: Iterable[Path], study: Path) -> Merged:
    """The rows of slides.csv for the slides that were found; what users wrote there is kept.

    - A row belongs to the file that it names. If that is gone, it belongs to a file of the same content, else to the
      only file of its name, in any folder.
    - Rows of slides that exist but were not searched for stay as they are: folders add up.
    - Rows of slides that are gone stay, marked as failed.
    - A new file with the name and the content of an existing slide is a copy of it, and no slide. With another content
      it is another slide: the first six digits of its content follow its name, and where both are new, both names.
    - Files in the study's own subfolders are no slides.

    Args:
        known: the rows so far.
        paths: the slides that were found.
        study: the folder of the study.

    Returns:
        The new rows, and notes about what was changed.

    Raises:
        StudyError: two rows name one file and contradict each other.
    """
    work = _Merge(known, study)
    work.claim([path for path in paths if not lies_in(path, study)])
    work.adopt()
    work.name()
    return work.result()


class _Merge:
    def __init__(self, known: Sequence[Row], study: Path) -> None:
        self._by_path = _unique([dict(row) for row in known if not lies_in(Path(row["path"]), study)])
        self._of: dict[Path, Row] = {}  # file that was found -> its row
        self._new: list[Path] = []
        self._order: list[Path] = []
        self._elsewhere: list[Row] = []
        self._gone: list[Row] = []
        self._content: dict[Path, str] = {}
        self._said: list[str] = []

    def claim(self, paths: list[Path]) -> None:
        """Give each file the row that names it; sort the other rows by whether their file exists."""
        files = {str(chosen_picture(Path(text))[0]): row for text, row in self._by_path.items()}
        self._order = list(paths)
        for path in paths:
            row = files.pop(str(chosen_picture(path)[0]), None)
            if row is None:
                self._new.append(path)
            else:
                self._of[path] = row
                row["path"] = str(path) if chosen_picture(path)[1] is not None else row["path"]
        for text, row in files.items():
            (self._elsewhere if os.path.exists(text) else self._gone).append(row)
        self._same_file()

    def _same_file(self) -> None:
        """Match files by identity: a folder that is reached through a link or another mount has the same slides."""
        if not (self._new and self._elsewhere):
            return
        real = {os.path.realpath(chosen_picture(Path(row["path"]))[0]): row for row in self._elsewhere}
        for path in list(self._new):
            row = real.get(os.path.realpath(chosen_picture(path)[0]))
            if row is not None and row in self._elsewhere:
                self._elsewhere.remove(row)
                self._take(row, path)

    def adopt(self) -> None:
        """Give files without a row the rows whose file is gone."""
        if not (self._new and self._gone):
            return
        if any(row.get("content") for row in self._gone):
            holding = defaultdict(list)
            for path in self._new:
                holding[self._content_of(path)].append(path)
            by_content = self._adopted(lambda row: holding.get(row.get("content") or "-", []), most=None)
        else:
            by_content = []
        called = defaultdict(list)
        for path in self._new:
            called[folded(path.stem)].append(path)
        by_name = self._adopted(lambda row: called.get(folded(_stem(row)), []), most=1)
        for rows, how in ((by_content, "by content"), (by_name, "by name")):
            if rows:
                some = ", ".join(f"{_stem(row)} in {Path(row['path']).parent}" for row in rows[:3])
                more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
                count = "1 slide was" if len(rows) == 1 else f"{len(rows)} slides were"
                self._said.append(f"{count} found again {how}: {some}{more}; what slides.csv said of them is kept")

    def _adopted(self, candidates: Callable[[Row], list[Path]], most: int | None) -> list[Row]:
        found = []
        for row in list(self._gone):
            there = [path for path in candidates(row) if path not in self._of]
            if not there or (most is not None and len(there) > most):
                continue
            same = [path for path in there if folded(path.stem) == folded(_stem(row))]
            self._gone.remove(row)
            self._take(row, (same or there)[0])
            found.append(row)
        return found

    def _take(self, row: Row, path: Path) -> None:
        """Assign a file to a row; a chosen picture of several stays chosen."""
        _, picture = chosen_picture(Path(row["path"]))
        renamed = folded(path.stem) != folded(_stem(row))
        if renamed:
            self._said.append(f"{row['slide_id']} is called {path.stem} now: {path}")
            row["slide_id"] = ""
        row["path"] = str(path) if picture is None else f"{path}#{picture}"
        self._new.remove(path)
        self._of[path] = row

    def name(self) -> None:
        """Name every slide; a file with the name and the content of another one is a copy of it."""
        standing: dict[str, list[Row]] = defaultdict(list)
        for row in (*self._of.values(), *self._elsewhere, *self._gone):
            standing[folded(_stem(row))].append(row)
        doubled = {id(row) for rows in _by_id(standing).values() for row in rows[1:] if row in self._of.values()}
        for path, row in self._of.items():
            if not row["slide_id"] or id(row) in doubled:
                twins = [other for other in standing[folded(_stem(row))] if other is not row and other["slide_id"]]
                row["slide_id"] = self._id(path, bool(twins))
        groups: dict[str, list[Path]] = defaultdict(list)
        for path in self._new:
            groups[folded(path.stem)].append(path)
        for name, paths in groups.items():
            self._name_new(paths, standing.get(name, []))

    def _name_new(self, paths: list[Path], standing: list[Row]) -> None:
        there = [row for row in standing if row not in self._gone]
        if len(paths) == 1 and not standing:
            self._add(paths[0], self._id(paths[0], False))
            return
        first = {(row.get("content") or self._content_of(_file(row))): row["path"] for row in there}
        kept = []
        for path in paths:
            content = self._content_of(path)
            if content in first and content:
                self._said.append(f"{path} is a copy of {first[content]}, and is not read a second time")
            else:
                first[content] = str(path)
                kept.append(path)
        twins = len(kept) > 1 or bool(standing)
        for path in kept:
            self._add(path, self._id(path, twins))
        if kept and twins:
            ids = ", ".join(f"{self._of[path]['slide_id']} ({path})" for path in kept[:3])
            self._said.append(f"different slides are called {kept[0].stem}; name them so in tables of labels: {ids}")

    def _add(self, path: Path, name: str) -> None:
        self._of[path] = dict.fromkeys(COLUMNS, "") | {"path": str(path), "slide_id": name}

    def _id(self, path: Path, twin: bool) -> str:
        stem = unicodedata.normalize("NFC", chosen_picture(path)[0].stem)
        return f"{stem}~{(self._content_of(path) or str(len(self._of)))[:6]}" if twin else stem

    def _content_of(self, path: Path) -> str:
        if path not in self._content:
            try:
                self._content[path] = content_of(path)
            except SlideError:  # the survey reports why, when it opens the file
                self._content[path] = ""
        return self._content[path]

    def result(self) -> Merged:
        """The rows in their order; those of slides that are gone are marked."""
        rows = [self._of[path] for path in self._order if path in self._of]
        for row in (*rows, *self._elsewhere):
            if row["error"].startswith(NOT_OURS):
                row |= {"status": "failed", "error": ""}
        for row in self._gone:
            where = Path(row["path"])
            what = f"{NOT_OURS}{where.name} is no longer there, in {where.parent}"
            hint = "put it back, or give the folder where it lies now: what is written in its row is kept for it"
            row |= {"status": "failed", "error": f"{what}; {hint}"}
        return Merged([*rows, *self._elsewhere, *self._gone], self._said)


def _stem(row: Row) -> str:
    return chosen_picture(Path(row["path"]))[0].stem


def _file(row: Row) -> Path:
    return chosen_picture(Path(row["path"]))[0]


def _by_id(standing: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Rows that share an id."""
    found: dict[str, list[Row]] = defaultdict(list)
    for rows in standing.values():
        for row in rows:
            if row["slide_id"]:
                found[folded(row["slide_id"])].append(row)
    return {name: rows for name, rows in found.items() if len(rows) > 1}


def _unique(rows: list[Row]) -> dict[str, Row]:
    """Rows by path.

    Raises:
        StudyError: two rows name one file, and users wrote different values into them.
    """
    found: dict[str, Row] = {}
    for row in rows:
        other = found.setdefault(row["path"], row)
        fields = [
            {name: text for name, text in one.items() if name in ("patient_id", "mpp") or name not in COLUMNS}
            for one in (row, other)
        ]
        if fields[0] != fields[1]:
            names = sorted(name for name in fields[0] if fields[0].get(name) != fields[1].get(name))
            what = f"slides.csv: two rows name {row['path']} and differ in {', '.join(names)}"
            raise StudyError(what, "leave the one that is right")
    return found
