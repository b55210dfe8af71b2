"""The slides of a study: found, told apart, surveyed, and written into slides.csv."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from histossl.core.console import progress_bar
from histossl.core.errors import HistosslError, StudyError
from histossl.execution.failures import fail, failure, failure_reason, give_up_on_disk, report_failures
from histossl.execution.journal import Journal, StageQueue
from histossl.execution.workers import Executor
from histossl.study.folder import COLUMNS, Row, Study, slide_names
from histossl.study.survey import SurveyJob, inspect_fingerprint, survey_fingerprint, survey_slide
from histossl.wsi.slide import find_slides, slide_state
from histossl.wsi.tiles import TileSpec
from histossl.wsi.tissue import TissueSettings


@dataclass(frozen=True)
class InspectSettings:
    """How tissue is found and tiles are laid: the settings of `inspect`."""

    tissue: TissueSettings
    tile: TileSpec


def inspect_slides(
    study: Study, slides: Path, mpp_default: float | None, tissue: TissueSettings, tile: TileSpec, workers: Executor
) -> int:
    """Open every slide, find its tissue, lay its tiles: slides.csv, tiles/ and qc/. Returns the number of failures.

    Raises:
        SettingsError: `mpp_default` is out of range.
        StudyError: no slides, or a study made with other settings.
    """
    place = Path(os.path.abspath(slides))
    paths = [place] if place.is_file() else find_slides(place)
    if not paths:
        raise StudyError(f"{slides}: no slides in it", "give a folder of .svs, .tif, .ndpi, .mrxs, .png, .jpg, ...")
    study.settle("inspect", InspectSettings(tissue, tile), study.folder / "tiles")
    ledger = Journal(study)
    with study.writing():
        known = study.slides()
        rows = merge([dict(row) for row in known], paths)
        if rows != known:
            study.write_slides(rows)
    laying, stand = inspect_fingerprint(tissue, tile), ExistingProducts(study)
    jobs: list[tuple[Row, SurveyJob]] = []
    wrong: list[tuple[Row, Row]] = []
    for row in rows:
        mpp, no_number = _number(row["mpp"])
        if no_number:
            wrong.append((row, failure(f"slides.csv: mpp {row['mpp']!r} is not a number; correct it")))
        elif not row["error"].startswith(NOT_OURS) and not _surveyed(row, mpp, laying, stand):
            name, path = row["slide_id"], Path(row["path"])
            jobs.append((row, SurveyJob(name, path, mpp, mpp_default, tissue, tile, study.tiles(name), study.qc(name))))
    # Before the first product is replaced: what a row says of it does not outlive it.
    wrong += [(row, {"made": ""}) for row, _ in jobs if row["made"]]
    ledger.write("check", wrong)
    _survey(ledger, jobs, workers)
    return report_failures(rows)


NOT_OURS = "not read: "  # how complaints begin that no opening of the slide can mend


def merge(known: list[Row], paths: list[Path]) -> list[Row]:
    """The rows of slides.csv for the slides at hand: what users wrote stays, new slides come, gone ones are marked."""
    by_path = {row["path"]: row for row in known}
    merged = []
    for path, (name, complaint) in zip(paths, slide_names(paths), strict=True):
        row = by_path.pop(str(path), dict.fromkeys(COLUMNS, "") | {"path": str(path)})
        row["slide_id"] = name
        if complaint or row["error"].startswith(NOT_OURS):
            fail(row, NOT_OURS + complaint if complaint else "")
        merged.append(row)
    for row in by_path.values():
        fail(row, f"{NOT_OURS}{Path(row['path']).name} is no longer there; put it back or delete its row")
        merged.append(row)
    return merged


class ExistingProducts:
    """The products of a study by name, read once: to list 100,000 files is quicker than to ask for each."""

    def __init__(self, study: Study) -> None:
        self._names = {room: _names(study.folder / room) for room in ("qc", "tiles", "features", "views")}

    def __call__(self, room: str, name: str) -> bool:
        """Whether a room has that file."""
        return name in self._names[room]


def _names(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except FileNotFoundError:
        return set()


def _surveyed(row: Row, mpp: float | None, laying: str, stand: ExistingProducts) -> bool:
    """Whether a slide's tiles stand, made of this very file with these settings and this mpp."""
    if mpp is None or row["status"] == "failed":
        return False
    try:
        made = survey_fingerprint(slide_state(Path(row["path"])), mpp, laying)
    except HistosslError:
        return False
    name = row["slide_id"]
    return row["made"].partition("-")[0] == made and stand("qc", f"{name}.jpg") and stand("tiles", f"{name}.h5")


def _survey(ledger: Journal, jobs: list[tuple[Row, SurveyJob]], workers: Executor) -> None:
    with StageQueue(ledger, "inspect", jobs) as shift, progress_bar("slides", len(jobs)) as bar:
        for mine in shift.rounds():
            for job, answer in workers.map(survey_slide, mine):
                if isinstance(answer, Exception):
                    give_up_on_disk(answer)
                    shift.finish(job.slide_id, failure(failure_reason(answer, job.path)))
                else:
                    found = {name: str(value) for name, value in vars(answer).items()}
                    shift.finish(job.slide_id, found | {"status": "inspected", "error": ""})
                bar.advance(1 + len(shift.listen()))


def _number(text: str) -> tuple[float | None, bool]:
    """The number in a cell, None where it is empty; and whether it is not a number."""
    if not text.strip():
        return None, False
    try:
        return float(text), False
    except ValueError:
        return None, True
