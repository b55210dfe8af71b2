"""Imports features of another tool, or of another study, into a study.

The features are not copied: the study's HDF5 files link to them. Only views/, which training reads at random, is
written, in 16 bits.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from histossl.core.config import to_dict
from histossl.core.console import progress_bar
from histossl.core.errors import FileFormatError, StudyError
from histossl.core.names import folded
from histossl.core.sidecars import files_of
from histossl.encoders.external import hash_of
from histossl.execution.failures import fail, failure_reason, give_up_on_disk, report_failures
from histossl.execution.workers import Executor
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.pretrain_settings import PretrainSettings, trained_as
from histossl.gigassl.published import load_published
from histossl.gigassl.views import ViewSettings
from histossl.study.folder import COLUMNS, Row, Study, slide_names
from histossl.study.import_file import FeatureOrigin, ImportJob, import_file
from histossl.wsi.slide import find_slides


def import_features(study: Study, origin: FeatureOrigin, spatial: bool, executor: Executor) -> int:
    """Import a folder of features into a study: slides.csv, features/ and views/.

    Files that cannot be used are left out, with the reason in slides.csv. Slides that were imported before and have not
    changed are kept.

    Args:
        study: the study, locked; empty, or imported from the same folder before.
        origin: the features, of histossl, TRIDENT, CLAM (h5 and pt) or STAMP.
        spatial: whether the slide encoder needs coordinates; if not, files without them are accepted.
        executor: reads the files. They may be strangers': a damaged one may kill or hang its process.

    Returns:
        The number of slides that were left out.

    Raises:
        StudyError: the folder has no features, or the study was made from other data.
        FileFormatError: the features have two lengths that are equally frequent.
        OSError: the disk is full or read-only.
    """
    files = feature_files(origin.folder)
    if "inspect" in study.settings():
        raise StudyError(f"{study.folder}: made from slides, not from features", "use another --out")
    about = {"adopted": os.path.abspath(origin.folder), "stride": origin.stride, "mpp": origin.mpp}
    study.settle("encode", about, study.folder / "features")
    pictures = {} if origin.slides is None else {folded(path.stem): path for path in find_slides(origin.slides)}
    rows = _rows(study, files, pictures)
    by_name = {row["slide_id"]: row for row, _ in rows}
    jobs = (ImportJob(study.folder, row, path, origin, spatial) for row, path in rows if path is not None)
    dims: dict[str, int] = {}
    with progress_bar("slides", sum(path is not None for _, path in rows)) as bar:
        for job, answer in executor.map(import_file, jobs):
            bar.advance(1)
            row = by_name[job.row["slide_id"]]
            if isinstance(answer, Exception):
                give_up_on_disk(answer)
                fail(row, failure_reason(answer, job.path))
            else:
                dims[row["slide_id"]], changes = answer
                row |= changes
    table = [row for row, _ in rows]
    study.write_slides(table)
    if dims:
        _leave_out_other_encoders(study, by_name, dims)
        study.write_slides(table)
    return report_failures(table)


def take_encoder(study: Study, weights: Path) -> None:
    """Use a slide encoder that was trained elsewhere as that of a study: slide-encoder/.

    Args:
        study: the study, locked.
        weights: the slide-encoder folder of another study, or a checkpoint published by the authors of Giga-SSL; views
            then have five random tiles, as in their code.

    Raises:
        StudyError: the study already has another slide encoder.
        FileFormatError: no slide encoder can be read from `weights`.
    """
    if weights.is_dir():
        encoder, about = SlideEncoder.load(weights), trained_as(weights)
    else:
        encoder = load_published(weights)
        view = ViewSettings(tiles=5, windows=0, scale_min=0.5, scale_max=2.0, any_angle=True)
        settings = to_dict(PretrainSettings(view=view, encoder=encoder.settings))
        about = {"fingerprint": hash_of(encoder), "features": "published", "slides": None, "pretrain": settings}
    if study.slide_encoder.is_dir():
        if trained_as(study.slide_encoder)["fingerprint"] == about["fingerprint"]:
            return
        hint = f"use another --out, or remove {study.slide_encoder}"
        raise StudyError(f"{study.slide_encoder}: another slide encoder than {weights}", hint)
    encoder.save(study.slide_encoder, about, *encoder.rival)


def feature_files(folder: Path) -> list[Path]:
    """The files of features in a folder, or in its subfolders as CLAM names them.

    Args:
        folder: the folder.

    Returns:
        One file per slide, .h5 rather than .pt, sorted by name.

    Raises:
        StudyError: there are no such files.
    """
    for place in (folder, folder / "h5_files", folder / "features", folder / "pt_files"):
        found = {path.stem: path for kinds in ((".pt",), (".h5", ".hdf5")) for path in files_of(place, kinds)[0]}
        if found:
            return [found[name] for name in sorted(found)]
    raise StudyError(f"{folder}: no .h5 or .pt files of features", "give a folder with one file per slide")


def _rows(study: Study, files: list[Path], pictures: dict[str, Path]) -> list[tuple[Row, Path | None]]:
    """One row per file, which keeps what users wrote, and a failed row for each slide whose file no longer exists."""
    known = {folded(row["slide_id"]): row for row in study.slides()}
    rows: list[tuple[Row, Path | None]] = []
    for path, (name, complaint) in zip(files, slide_names(files), strict=True):
        row = known.pop(folded(name), dict.fromkeys(COLUMNS, "") | {"slide_id": name})
        row["path"] = str(pictures.get(folded(name), row["path"]))
        row |= {"status": "", "error": ""}
        if complaint:
            fail(row, complaint)
        rows.append((row, None if complaint else path))
    for row in known.values():
        fail(row, f"{row['slide_id']}: its features are no longer there; put them back: its row is kept until then")
        rows.append((row, None))
    return rows


def _leave_out_other_encoders(study: Study, rows: dict[str, Row], dims: dict[str, int]) -> None:
    """Mark as failed the slides whose features have another length than most: another encoder made them."""
    (most, count), *others = Counter(dims.values()).most_common()
    if others and others[0][1] == count:
        raise FileFormatError(
            f"{study.folder}: {count} slides have features of {most} numbers and {count} of {others[0][0]}",
            "they are of two encoders; put them into two folders",
        )
    for name, dim in dims.items():
        if dim != most:
            fail(rows[name], f"{name}: features of {dim} numbers among others of {most}; use one tile encoder for all")
