"""The report of a study: all its results on one page."""

from __future__ import annotations

import json
import os
from importlib import metadata

import pandas as pd

from histossl.core import tables
from histossl.core.embeddings import read_embeddings
from histossl.study.folder import COLUMNS, Study
from histossl.study.remote_tasks import GIGA
from histossl.study.times import stage_times


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
            training=pd.read_csv(log) if log.exists() else None,
            vectors=None if vectors is None else vectors.vectors[GIGA],
            ids=ids,
            labels=_probed_labels(study),
            probe=json.loads(probed.read_text(encoding="utf-8")) if probed.exists() else None,
            slide_bytes=sum(os.path.getsize(row["path"]) for row in encoded if os.path.exists(row["path"])),
            settings=study.settings(),
            versions={
                name: metadata.version(name) for name in ("histossl", "torch", "scikit-learn", "openslide-python")
            },
            durations=stage_times(study),
            sheets=[sheet for sheet in sheets if sheet],
        ),
    )


def _probed_labels(study: Study) -> pd.DataFrame | None:
    """The labels that the probe used, one column per target, to colour the map of slides."""
    path = study.folder / "predictions.csv"
    if not path.exists():
        return None
    table = pd.DataFrame(tables.read_rows(path))
    return table.drop_duplicates(["target", "slide_id"]).pivot(index="slide_id", columns="target", values="truth")
