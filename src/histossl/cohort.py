"""The slides of a study: found, told apart, surveyed, and written into slides.csv."""

from __future__ import annotations

import errno
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from histossl.console import progress_bar, say
from histossl.content import chosen_picture
from histossl.errors import HistosslError, StudyError
from histossl.folders import Found, is_ours, lies_in, look_for_slides
from histossl.identity import NOT_OURS, merge
from histossl.ledger import Ledger, Shift
from histossl.mpp import jumps
from histossl.names import folded
from histossl.scale import Place
from histossl.slide import slide_state
from histossl.study import COLUMNS, Row, Study
from histossl.survey import SurveyJob, laying_fingerprint, survey_fingerprint, survey_slide
from histossl.tables import number
from histossl.tiles import TileSpec
from histossl.tissue import TissueSettings


@dataclass(frozen=True)
class Laying:
    """How tissue is found and tiles are laid: the settings of `inspect`."""

    tissue: TissueSettings
    tile: TileSpec


def inspect_slides(
    study: Study, slides: Path, mpp_default: float | None, tissue: TissueSettings, tile: TileSpec, workers: Place
) -> int:
    """Open every slide, find its tissue, lay its tiles: slides.csv, tiles/ and qc/. Returns the number of failures.

    Raises:
        SettingsError: `mpp_default` is out of range.
        StudyError: no slides, or a study made with other settings.
    """
    place = Path(os.path.abspath(slides))
    found = Found([place]) if chosen_picture(place)[0].is_file() else look_for_slides(place, study.folder)
    if not found.slides and not found.passed:
        told = ", ".join(f"{count} {ending}" for ending, count in found.others.most_common(5))
        what = f"{slides}: no slides in it" + (f", only files of other kinds ({told})" if told else "")
        raise StudyError(what, "give a folder of .svs, .tif, .ndpi, .mrxs, .png, .jpg, ...")
    if found.slides == [place] and (lies_in(place, study.folder) or any(map(is_ours, place.parents))):
        raise StudyError(f"{slides}: lies in a folder that this program wrote, so it is no slide", "give the slide")
    study.settle("inspect", Laying(tissue, tile), study.folder / "tiles")
    ledger = Ledger(study)
    with study.writing():
        known = study.slides()
        merged = merge(known, found.slides, study.folder)
        rows = _with_passed(merged.rows, found)
        if rows != known:
            study.write_slides(rows)
    laying, stand = laying_fingerprint(tissue, tile), Standing(study)
    jobs: list[tuple[Row, SurveyJob]] = []
    wrong: list[tuple[Row, Row]] = []
    for row in rows:
        mpp, no_number = _number(row["mpp"])
        if no_number:
            wrong.append((row, failure(f"slides.csv: mpp {row['mpp']!r} is not a number; correct it")))
        elif not row["error"].startswith(NOT_OURS) and not _surveyed(row, mpp, laying, stand):
            name, path = row["slide_id"], Path(row["path"])
            job = SurveyJob(name, path, mpp, mpp_default, tissue, tile, study.tiles(name), study.qc(name))
            jobs.append((row, replace(job, content=row["content"])))
    # Before the first product is replaced: what a row says of it does not outlive it.
    wrong += [(row, {"made": ""}) for row, _ in jobs if row["made"]]
    ledger.write("check", wrong)
    _survey(ledger, jobs, workers)
    failed = report_failures(rows)
    for line in (*merged.said, *_said(found)):
        say(f"note: {line}", "yellow")
    for line in suspicions(rows):
        say(f"SUSPECT {line}", "yellow")
    return failed


def _with_passed(rows: list[Row], found: Found) -> list[Row]:
    """The rows, and a failed one for each file that is not read and may be a slide, unless one of its name is read."""
    known = {folded(row["slide_id"]) for row in rows}
    paths = {row["path"]: row for row in rows}
    more = []
    for path, why in found.passed.items():
        complaint = failure(f"{NOT_OURS}{path.name} {why}")
        if str(path) in paths:
            paths[str(path)] |= complaint
        elif folded(path.stem) not in known:
            known.add(folded(path.stem))
            more.append(dict.fromkeys(COLUMNS, "") | {"slide_id": path.stem, "path": str(path)} | complaint)
    return rows + more


def _said(found: Found) -> list[str]:
    """What lies there beside the slides, in a few lines."""
    said = []
    if found.passed:
        kinds = Counter(path.suffix.lower() or "no ending" for path in found.passed)
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        said.append(f"passed over: {len(found.passed)} files that may be slides ({told}); see what is wrong with each")
    if found.links:
        some = ", ".join(f"{link} to {target.name}" for link, target in list(found.links.items())[:3])
        more = f" and {len(found.links) - 3} more" if len(found.links) > 3 else ""
        said.append(f"links to slides that are there by their own names were not read: {some}{more}")
    if found.others:
        told = ", ".join(f"{count} {kind}" for kind, count in found.others.most_common(8))
        said.append(f"files of other kinds: {told}")
    return said


def suspicions(rows: Sequence[Row]) -> list[str]:
    """What looks as if something were wrong with the slides: one line each, for a person to judge."""
    holding: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.get("content") and row["status"] != "failed":
            holding[row["content"]].append(row["slide_id"])
    said = [
        f"{' and '.join(names[:3])} hold the same: if they are one slide, leave one, or give them one patient_id"
        for names in holding.values()
        if len(names) > 1
    ]
    mpps = {row["slide_id"]: number(row["mpp"]) for row in rows if row["mpp"] and row["status"] != "failed"}
    return said + jumps(mpps)


def fail(row: Row, error: str) -> None:
    """Mark a slide as failed, with the reason."""
    row |= failure(error)


def failure(error: str) -> Row:
    """What changes in the row of a slide that failed."""
    return {"status": "failed", "error": error}


class Standing:
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


def _surveyed(row: Row, mpp: float | None, laying: str, stand: Standing) -> bool:
    """Whether a slide's tiles stand, made of this very file with these settings and this mpp."""
    if mpp is None or row["status"] == "failed":
        return False
    try:
        made = survey_fingerprint(slide_state(Path(row["path"])), mpp, laying)
    except HistosslError:
        return False
    name = row["slide_id"]
    return row["made"].partition("-")[0] == made and stand("qc", f"{name}.jpg") and stand("tiles", f"{name}.h5")


def _survey(ledger: Ledger, jobs: list[tuple[Row, SurveyJob]], workers: Place) -> None:
    with Shift(ledger, "inspect", jobs) as shift, progress_bar("slides", len(jobs)) as bar:
        for mine in shift.rounds():
            for job, answer in workers.map(survey_slide, mine):
                if isinstance(answer, Exception):
                    give_up_on_disk(answer)
                    shift.finish(job.slide_id, failure(reason(answer, job.path)))
                else:
                    found = {name: str(value) for name, value in vars(answer).items()}
                    shift.finish(job.slide_id, found | {"status": "inspected", "error": ""})
                bar.advance(1 + len(shift.listen()))


def give_up_on_disk(error: Exception) -> None:
    """Raise what no other slide would fare better with: a disk that is full or cannot be written."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        raise error


def reason(error: Exception, path: Path | None = None) -> str:
    """An error as one line of slides.csv; the slide's file is named where the error itself does not."""
    if isinstance(error, HistosslError):
        return str(error)
    name = f"{path.name}: " if path else ""
    return " ".join(f"{name}{type(error).__name__}: {error}".split())


def report_failures(rows: list[Row]) -> int:
    """One line on the screen for every failed slide; returns their number."""
    failed = [row for row in rows if row["status"] == "failed"]
    for row in failed:
        say(f"FAILED {row['error']}", "red")
    return len(failed)


def _number(text: str) -> tuple[float | None, bool]:
    """The number in a cell, None where it is empty; and whether it is not a number."""
    if not text.strip():
        return None, False
    try:
        return number(text), False
    except ValueError:
        return None, True
