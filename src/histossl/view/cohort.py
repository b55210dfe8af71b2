"""What a study knows of its slides, as the pages show it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histossl.core import tables
from histossl.core.embeddings import read_embeddings
from histossl.core.errors import FileFormatError, StudyError
from histossl.study.folder import Row, Study
from histossl.view.reading import SlideRef

_NEAREST = 8
_HIDDEN = ("slide_id", "path", "error", "made")  # columns that colour no map


@dataclass(frozen=True)
class Cohort:
    """The slides of a study.

    Attributes:
        title: the study's name.
        rows: of slides.csv, in its order; slide k of a page is row k.
        columns: name -> text of each slide, "" where unknown: of slides.csv, labels, predictions.
        row_of: slide -> its row among the vectors; those without a vector are not in it.
        vectors: (V, d) float32, or None.
        patients: (V,) the patient of each vector; the slide's own name where nobody says.
        predictions: slide -> what each linear probe says of it.
    """

    title: str
    rows: list[Row]
    columns: dict[str, list[str]]
    row_of: dict[int, int] = field(default_factory=dict)
    vectors: NDArray[np.float32] | None = None
    patients: NDArray = field(default_factory=lambda: np.empty(0, object))
    predictions: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, slide: int) -> SlideRef:
        """Where a slide lies."""
        return SlideRef(slide, Path(self.rows[slide]["path"]), self.mpp(slide))

    def mpp(self, slide: int) -> float | None:
        """µm per level-0 pixel, or None."""
        mpp = number(self.rows[slide]["mpp"])
        return mpp if mpp and mpp > 0 else None

    def neighbours(self, slide: int) -> list[dict[str, Any]]:
        """The slides of other patients most like one, the most similar first."""
        if self.vectors is None or slide not in self.row_of:
            return []
        from histossl.evaluate.search import nearest

        slide_of = {row: k for k, row in self.row_of.items()}
        hits = nearest(self.vectors, self.patients, self.row_of[slide], _NEAREST)
        return [
            {
                "slide": slide_of[hit.row],
                "name": self.rows[slide_of[hit.row]]["slide_id"],
                "similarity": round(hit.similarity, 3),
                "said": self._label(slide_of[hit.row]),
            }
            for hit in hits
        ]

    def _label(self, slide: int) -> str:
        """The first of a slide's labels, if it has any."""
        labels = ((name, values[slide]) for name, values in self.columns.items() if name not in self.rows[slide])
        return next((f"{name}: {value}" for name, value in labels if value), "")


def read_cohort(study: Study) -> Cohort:
    """What stands in a study: slides.csv at least; vectors and predictions where they were made.

    Raises:
        StudyError: there are no slides in it.
        FileFormatError: its vectors cannot be read.
    """
    rows = study.slides()
    if not rows:
        raise StudyError(f"{study.folder}: no slides in it", "run `histossl inspect SLIDES --out` first")
    slide_of = {row["slide_id"]: k for k, row in enumerate(rows)}
    patients = study.patients()
    rows = [row | {"patient_id": patients.get(row["slide_id"], "")} for row in rows]
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in _HIDDEN]
    columns = {name: [row.get(name) or "" for row in rows] for name in names}
    predictions, told = _predictions(study.folder / "predictions.csv", slide_of)
    columns = {name: values for name, values in (told | columns).items() if any(values)}
    return Cohort(study.folder.resolve().name, rows, columns, *_vectors(study, slide_of, rows), predictions)


def _vectors(
    study: Study, slide_of: dict[str, int], rows: list[Row]
) -> tuple[dict[int, int], NDArray[np.float32] | None, NDArray]:
    if not study.embeddings.exists():
        return {}, None, np.empty(0, object)
    found = read_embeddings(study.embeddings)
    kept = [(k, slide_of[str(name)]) for k, name in enumerate(found.slides.index) if str(name) in slide_of]
    vectors = next(iter(found.vectors.values()))[[k for k, _ in kept]]
    patients = np.array([rows[slide]["patient_id"] or rows[slide]["slide_id"] for _, slide in kept], object)
    return {slide: row for row, (_, slide) in enumerate(kept)}, vectors, patients


def _predictions(path: Path, slide_of: dict[str, int]) -> tuple[dict[int, list[dict[str, Any]]], dict[str, list[str]]]:
    """By slide; and as columns: the labels, and what the first embedding's probe predicted."""
    found: dict[int, list[dict[str, Any]]] = {}
    columns: dict[str, list[str]] = {}
    if not path.exists():
        return found, columns
    told = [row for row in tables.read_rows(path) if row.get("slide_id") in slide_of]
    if any(not {"target", "embedding"} <= set(row) for row in told):
        what = f"{path}: has no columns target and embedding"
        raise FileFormatError(what, "run `histossl probe` again, or remove it")
    first = {row["target"]: row["embedding"] for row in reversed(told)}
    for row in told:
        slide = slide_of[row["slide_id"]]
        shares = {name[2:-1]: number(value) for name, value in row.items() if name and name.startswith("p(")}
        found.setdefault(slide, []).append(
            {name: row.get(name) or "" for name in ("target", "embedding", "truth", "predicted")}
            | {"shares": {name: share for name, share in shares.items() if share is not None}}
        )
        if row["embedding"] == first[row["target"]]:
            for name, kind in ((row["target"], "truth"), (f"{row['target']}, predicted", "predicted")):
                columns.setdefault(name, [""] * len(slide_of))[slide] = row.get(kind) or ""
    return found, columns


def number(text: str | None) -> float | None:
    """The finite number in a cell, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
