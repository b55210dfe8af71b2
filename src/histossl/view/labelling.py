"""Labels that a user gives in the viewer: written into a column of slides.csv, which is kept as it was beside it."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Mapping
from datetime import datetime

import numpy as np

from histossl.core import atomic, safe_paths
from histossl.core.errors import LabelError, StudyError
from histossl.core.tables import EMPTY
from histossl.evaluate.label_next import LabelProbe, probe_so_far
from histossl.study.folder import Study
from histossl.view.cohort import Cohort

LONGEST = 64  # characters of a label and of the name of a column


class Labelling:
    """Writes labels of slides, and probes them.

    Args:
        study: whose slides.csv is written.
        cohort: its slides as the pages show them; its columns follow what is written.
        read_only: refuse to write.

    Attributes:
        reserved: columns that are not of slides.csv: the labels and predictions of the last probe.
        backup: name of the copy of slides.csv; "" before the first write.
    """

    def __init__(self, study: Study, cohort: Cohort, read_only: bool = False) -> None:
        self.study, self.cohort = study, cohort
        table = study.table if study.table.exists() else study.folder
        self.read_only = read_only or not (os.access(study.folder, os.W_OK) and os.access(table, os.W_OK))
        self.backup = ""
        self.reserved = {name for name in cohort.columns if name not in cohort.rows[0]}

    def write(self, column: str, labels: Mapping[int, str]) -> dict[int, str]:
        """Write labels into a column of slides.csv, which stays whole whatever happens.

        Before the first write of this viewer the table is copied to slides.csv.DATE-TIME.bak.

        Args:
            column: its name; it is made where the table has none. Columns of histossl are refused.
            labels: slide -> label, "" to take it away.

        Returns:
            slide -> the label that it had in that column; writing these undoes the change.

        Raises:
            StudyError: the study is read-only, a run is using it, the column may not be written, or the table has
                changed since it was read.
            LabelError: a label is too long, holds control characters, or is a word for "unknown".
        """
        if self.read_only:
            raise StudyError(f"{self.study.table.name}: this study is shown read-only", "labels are not written")
        self._check(column, labels)
        try:
            with self.study.lock():
                rows = self.study.slides()
                before = self._before(rows, column, labels)
                self._keep()
                of = {self.cohort.rows[slide]["slide_id"]: text.strip() for slide, text in labels.items()}
                self.study.write_slides([row | {column: of.get(row["slide_id"], row.get(column, ""))} for row in rows])
        except OSError as error:
            what = f"{self.study.table.name}: cannot be written ({error.strerror or error})"
            raise StudyError(what, "nothing was changed") from error
        values = self.cohort.columns.setdefault(column, [""] * len(self.cohort))
        for slide, text in labels.items():
            values[slide] = text.strip()
        for row, text in zip(self.cohort.rows, values, strict=True):
            row[column] = text
        return before

    def _check(self, column: str, labels: Mapping[int, str]) -> None:
        names = set(self.study.columns) | self.reserved
        for text in (column, *labels.values()):
            if len(text) > LONGEST or any(unicodedata.category(char)[0] == "C" for char in text):
                raise LabelError(f"{text[:LONGEST]!r}", f"give at most {LONGEST} characters that can be printed")
        if not column.strip() or column != column.strip():
            raise StudyError("a column needs a name", "without spaces around it")
        if column.casefold() in {name.casefold() for name in names}:
            raise StudyError(f"the column {column!r} is not for labels of this page", "choose another name")
        twin = [name for name in self.cohort.columns if name.casefold() == column.casefold() and name != column]
        if twin:
            raise StudyError(f"there is a column {twin[0]!r}", "write its name as it is")
        word = next((text for text in labels.values() if text.strip() and text.strip().lower() in EMPTY), None)
        if word is not None:
            raise LabelError(f"{word!r} means that a label is unknown", "leave the label empty to take it away")

    def _before(self, rows: list[dict[str, str]], column: str, labels: Mapping[int, str]) -> dict[int, str]:
        count, now = Counter(row["slide_id"] for row in rows), {row["slide_id"]: row for row in rows}
        shown = self.cohort.columns.get(column)
        for slide in labels:
            name = self.cohort.rows[slide]["slide_id"]
            seen = shown[slide] if shown else ""
            if count[name] != 1 or (now[name].get(column) or "") != seen:
                what = f"{self.study.table.name}: has changed since this page was made (slide {name})"
                raise StudyError(what, "start `histossl view` again; nothing was written")
        return {slide: (shown[slide] if shown else "") for slide in labels}

    def _keep(self) -> None:
        """Copy the table, once, as it was before the first label."""
        if self.backup:
            return
        name = f"{self.study.table.name}.{datetime.now():%Y%m%d-%H%M%S}.bak"
        with safe_paths.open_in(self.study.folder, self.study.table.name, "rb") as file:
            data = file.read()
        with atomic.whole(self.study.folder / name) as part:
            part.write_bytes(data)
        self.backup = name

    def probe(self, column: str) -> LabelProbe:
        """Probe the labels of a column.

        Args:
            column: one of the cohort's.

        Returns:
            The probe; its rows are those of the cohort's vectors.

        Raises:
            StudyError: the study has no vectors.
            LabelError: there are more than 20 different labels.
            KeyError: there is no such column.
        """
        vectors = self.cohort.vectors
        if vectors is None:
            raise StudyError("this study has no vectors yet", "run `histossl embed` first")
        values, slide_of = self.cohort.columns[column], self.cohort.slide_of
        labels = [values[slide_of[row]] for row in range(len(vectors))]
        return probe_so_far(vectors, labels, np.asarray(self.cohort.patients))
