"""The slides of a study with their labels, vectors and predictions, as the pages show them."""

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

_NEAREST = 8  # similar slides that a page lists
_HIDDEN = ("slide_id", "path", "error", "made")  # columns that cannot colour a map


@dataclass(frozen=True)
class Cohort:
    """The slides of a study.

    Attributes:
        title: the study's name.
        rows: the rows of slides.csv, in its order; the pages number slides by these rows.
        columns: name -> text of each slide, "" where unknown: from slides.csv, labels and predictions.
        row_of: slide -> its row among the vectors; slides without a vector are absent.
        vectors: (V, d) float32, or None.
        patients: (V,) the patient of each vector; the slide id where the patient is unknown.
        predictions: slide -> the prediction of each linear probe.
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

    @property
    def slide_of(self) -> dict[int, int]:
        """Row of a vector -> its slide."""
        return {row: slide for slide, row in self.row_of.items()}

    def place(self, slide: int) -> SlideRef:
        """What is needed to open a slide.

        Args:
            slide: index of the slide, a row of slides.csv.

        Returns:
            Its key, path and mpp.
        """
        return SlideRef(slide, Path(self.rows[slide]["path"]), self.mpp(slide))

    def mpp(self, slide: int) -> float | None:
        """The resolution of a slide.

        Args:
            slide: index of the slide, a row of slides.csv.

        Returns:
            µm per level-0 pixel, positive; None where slides.csv has none.
        """
        mpp = number(self.rows[slide]["mpp"])
        return mpp if mpp and mpp > 0 else None

    def neighbours(self, slide: int) -> list[dict[str, Any]]:
        """The most similar slides of other patients.

        Args:
            slide: index of the slide, a row of slides.csv.

        Returns:
            At most eight dictionaries, the most similar first: `slide` (index), `name`, `similarity` and `said`, its
            first label; empty where the slide has no vector.
        """
        if self.vectors is None or slide not in self.row_of:
            return []
        from histossl.evaluate.search import nearest

        slide_of = self.slide_of
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
    """Read the slides of a study, with vectors and predictions where they exist.

    Args:
        study: the study; its slides.csv must list slides.

    Returns:
        The cohort.

    Raises:
        StudyError: the study has no slides.
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
    predictions, predicted = _predictions(study.folder / "predictions.csv", slide_of)
    columns = {name: values for name, values in (predicted | columns).items() if any(values)}
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
    """The predictions by slide; and as columns: the labels, and the predictions of the first embedding's probe."""
    found: dict[int, list[dict[str, Any]]] = {}
    columns: dict[str, list[str]] = {}
    if not path.exists():
        return found, columns
    rows = [row for row in tables.read_rows(path) if row.get("slide_id") in slide_of]
    if any(not {"target", "embedding"} <= set(row) for row in rows):
        what = f"{path}: has no columns target and embedding"
        raise FileFormatError(what, "run `histossl probe` again, or remove it")
    first = {row["target"]: row["embedding"] for row in reversed(rows)}
    for row in rows:
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
    """The number in a cell of a table.

    Args:
        text: the cell, or None where there is no such cell.

    Returns:
        The number; None where the cell holds no finite number.
    """
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
