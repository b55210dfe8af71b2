"""The report of a study: all its results on one page."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from histossl.core import tables
from histossl.core.embeddings import read_embeddings
from histossl.core.errors import READ_ERRORS, FileFormatError, file_errors
from histossl.study.folder import COLUMNS, Row, Study
from histossl.study.remote_tasks import GIGA
from histossl.study.times import stage_times
from histossl.wsi.synth.recipe import SOFTWARE


def report_study(study: Study) -> None:
    """Write report.html of a study, with the results that exist.

    The same study gives the same bytes, except for the durations of its stages.

    Args:
        study: the study.

    Raises:
        FileFormatError: the embeddings cannot be read.
        OSError: the report cannot be written.
    """
    from histossl.view.report.page import ReportInput, write_report
    from histossl.view.report.sheets import heatmaps_sheet, hits_sheet, nuclei_sheet

    patients = study.patients()
    slides = [row | {"patient_id": patients.get(row["slide_id"], "")} for row in study.slides()]
    vectors = read_embeddings(study.embeddings) if study.embeddings.exists() else None
    if vectors is not None and GIGA not in vectors.vectors:
        raise FileFormatError(f"{study.embeddings}: holds no vectors {GIGA!r}", "run `histossl embed` again")
    encoded = [row for row in slides if row["status"] == "encoded"]
    qc = {row["slide_id"]: study.qc(row["slide_id"]) for row in encoded}
    ids = [] if vectors is None else [str(name) for name in vectors.slides.index]
    alike = None if vectors is None else hits_sheet(vectors.vectors[GIGA], ids, patients, qc)
    sheets = alike, heatmaps_sheet(study.folder), nuclei_sheet(study.folder)
    probed = study.folder / "probe.json"
    log = study.logs / "pretrain" / "log.csv"
    write_report(
        study.report,
        ReportInput(
            title=study.folder.resolve().name,
            slides=pd.DataFrame(slides, columns=pd.Index(COLUMNS)),
            qc=qc,
            training=_training(log),
            vectors=None if vectors is None else vectors.vectors[GIGA],
            ids=ids,
            labels=_probed_labels(study, patients),
            probe=_probe(probed),
            slide_bytes=sum(os.path.getsize(row["path"]) for row in encoded if os.path.exists(row["path"])),
            settings=study.settings(),
            versions={
                name: metadata.version(name) for name in ("histossl", "torch", "scikit-learn", "openslide-python")
            },
            durations=stage_times(study),
            sheets=[sheet for sheet in sheets if sheet],
            painted=_painted(encoded),
        ),
    )


def _painted(rows: list[Row]) -> bool:
    """Whether the slides are of `histossl synth`; three of them speak for all."""
    from tifffile import TiffFile

    found = []
    for row in rows[:3]:
        try:
            with TiffFile(row["path"]) as file:
                found.append(file.pages.first.tags.valueof("Software") == SOFTWARE)
        except READ_ERRORS:  # no TIFF, or moved
            found.append(False)
    return bool(found) and all(found)


def _training(log: Path) -> pd.DataFrame | None:
    """The figures that pretraining has written."""
    if not log.exists():
        return None
    with file_errors(log, "remove it, or run `histossl pretrain` again"):
        return pd.read_csv(log)


def _probe(path: Path) -> dict[str, Any] | None:
    """The content of probe.json."""
    if not path.exists():
        return None
    with file_errors(path, "run `histossl probe` again, or remove it"):
        found = json.loads(path.read_text(encoding="utf-8"))
        for row in [*found["table"], *found.get("numbers", ()), *found.get("survival", ())]:
            _check_row(row)
        return found


def _check_row(row: dict[str, Any]) -> None:
    """Raise a ValueError or KeyError where a row of probe.json lacks what the page shows of it."""
    from histossl.view.report.page import KINDS

    if not any(name in row for name in KINDS):
        raise ValueError("a row without a score")
    score = next(name for name in KINDS if name in row)
    numbers = [row[name] for name in (score, KINDS[score][1], "low", "high", "difference_low", "difference_high")]
    numbers += [row["n_classes"]] if score == "auroc" else []
    if not all(value is None or isinstance(value, int | float) for value in numbers):
        raise ValueError(f"a row of {str(row.get('target'))[:40]!r} without numbers")
    if not all(isinstance(row[name], str | int) for name in ("target", "embedding", "n_labelled")):
        raise ValueError("a row without names of target and embedding")


def _probed_labels(study: Study, patients: Mapping[str, str]) -> pd.DataFrame | None:
    """The labels that the probe used, one column per target, to colour the map of slides.

    Where the probe's unit is the patient, the label is that of all slides of the patient.
    """
    path = study.folder / "predictions.csv"
    if not path.exists():
        return None
    with file_errors(path, "run `histossl probe` again, or remove it"):
        table = pd.DataFrame(tables.read_rows(path), columns=pd.Index(["target", "slide_id", "truth"]))
        if table.isna().to_numpy().any():
            raise ValueError("no columns target, slide_id and truth")
    found = table.drop_duplicates(["target", "slide_id"]).pivot(index="slide_id", columns="target", values="truth")
    rows = {
        slide: patient for slide, patient in patients.items() if slide not in found.index and patient in found.index
    }
    of_patients = found.loc[list(rows.values())].set_axis(list(rows)) if rows else found.iloc[:0]
    return pd.concat([found, of_patients])
