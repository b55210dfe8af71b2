"""The slides of a study: found, identified, surveyed, and written into slides.csv."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from histossl.core.config import from_dict, to_dict
from histossl.core.console import progress_bar, say
from histossl.core.errors import HistosslError, SlideError, StudyError
from histossl.core.names import folded
from histossl.core.tables import number
from histossl.execution.failures import failure, failure_reason, give_up_on_disk, report_failures
from histossl.execution.journal import Journal, StageQueue
from histossl.execution.workers import Executor
from histossl.study.area_rows import AreaRows, NamedAreas, name_all
from histossl.study.folder import COLUMNS, Row, Study
from histossl.study.identity import NOT_OURS, merge
from histossl.study.survey import SurveyJob, inspect_fingerprint, survey_fingerprint, survey_slide
from histossl.wsi.areas import AreaFolder, SlideAreas
from histossl.wsi.artefacts import KINDS, left_out_of, left_out_text
from histossl.wsi.content import chosen_picture, content_of
from histossl.wsi.folders import NOT_SLIDES, Found, is_ours, lies_in, look_for_slides
from histossl.wsi.mpp import jumps
from histossl.wsi.named_areas import CoreGrid
from histossl.wsi.slide import slide_state
from histossl.wsi.tiles import TileSpec
from histossl.wsi.tissue import TissueSettings


@dataclass(frozen=True)
class InspectSettings:
    """How tissue is found and tiles are placed: the settings of `inspect`."""

    tissue: TissueSettings
    tile: TileSpec


def inspect_slides(
    study: Study,
    found: Found,
    mpp_default: float | None,
    tissue: TissueSettings,
    tile: TileSpec,
    workers: Executor,
    areas: AreaFolder | CoreGrid | None = None,
) -> int:
    """Open every slide, find its tissue and place its tiles: slides.csv, tiles/ and qc/.

    Args:
        study: the study; made where there is none.
        found: of `find_slides`.
        mpp_default: µm per pixel of slides that state none; None to refuse them.
        tissue: how tissue is found.
        tile: size and distance of the tiles.
        workers: survey the slides.
        areas: the areas that tiles are laid in; None lays them on all tissue.

    Returns:
        The number of slides that failed.

    Raises:
        SettingsError: `mpp_default` is out of range.
        StudyError: the study was made with other settings.
    """
    given = _given(found, study, areas) if isinstance(areas, AreaFolder) else {}
    if areas and areas.settings.missing == "skip":
        found = replace(found, slides=[path for path in found.slides if path.stem in given])
    settings = to_dict(InspectSettings(tissue, tile)) | ({"areas": areas.told} if areas else {})
    study.settle("inspect", settings, study.folder / "tiles")
    journal, named = Journal(study), _named(study, found, areas, given, mpp_default, tissue, workers)
    with study.writing():
        known = study.slides()
        of_areas = AreaRows(known)
        merged = merge(of_areas.whole, found.slides, study.folder)
        rows = of_areas.expand(_with_passed(merged.rows, found), named)
        if rows != known:
            study.write_slides(rows)
    jobs: list[tuple[Row, SurveyJob]] = []
    wrong: list[tuple[Row, Row]] = []
    laying, exists = inspect_fingerprint(tissue, tile), ExistingProducts(study)
    for row in rows:
        name, path = row["slide_id"], Path(row["path"])
        mpp, complaint = _checked(row, given, areas, named)
        own = named.of.get(path, {}).get(row["area"]) or given.get(path.stem)
        if complaint:
            wrong.append((row, failure(complaint)))
        elif not row["error"].startswith(NOT_OURS) and not _surveyed(row, mpp, laying, own, exists):
            job = SurveyJob(name, path, mpp, mpp_default, tissue, tile, study.tiles(name), study.qc(name))
            inside = study.area_mask(name) if own else None
            jobs.append((row, replace(job, content=row["content"], areas=own, mask_path=inside)))
    # Before the first product is replaced: a row must not describe a product that no longer exists.
    wrong += [(row, {"made": ""}) for row, _ in jobs if row["made"]]
    journal.write("check", wrong)
    _survey(journal, jobs, workers)
    say_left_out(rows)
    failed = report_failures(rows)
    told = [f"note: {line}" for line in (*merged.notes, *_notes(found))]
    for line in (*told, *(f"SUSPECT {line}" for line in suspicions(rows))):
        say(line, "yellow")
    return failed


def lay_within(study: Study, areas: AreaFolder | CoreGrid, workers: Executor) -> int:
    """Lay the tiles of an inspected study anew, inside of areas.

    Args:
        study: the study; its settings of tissue and tiles stay.
        areas: the areas that tiles are laid in.
        workers: survey the slides.

    Returns:
        The number of slides that failed.

    Raises:
        StudyError: the study was not inspected, is used by another run, or has features, which are of its tiles as
            they lie now; or slides without areas are to be skipped.
    """
    told = dict(study.settings().get("inspect", {}))
    if not told:
        raise StudyError(f"{study.folder}: has no tiles of its own", "run `histossl inspect SLIDES --out STUDY`")
    if areas.settings.missing == "skip":
        what = "to skip slides is to choose them, which `histossl inspect` does"
        raise StudyError(f"{study.folder}: {what}", "inspect with --areas into another --out, or --area.missing whole")
    tiles = study.folder / "tiles"
    if told.pop("areas", None) != areas.told and not any((study.folder / "features").glob("*.h5")):
        if others := study.others():
            what = f"{study.folder}: another run is using its tiles: {others}"
            raise StudyError(what, "wait for it to end, or inspect into another --out")
        for laid in tiles.glob("*.h5"):
            laid.unlink()
    chosen = from_dict(InspectSettings, told)
    paths = sorted({Path(row["path"]) for row in study.slides()})
    return inspect_slides(study, Found(paths), None, chosen.tissue, chosen.tile, workers, areas)


def _named(
    study: Study,
    found: Found,
    areas: AreaFolder | CoreGrid | None,
    given: dict[str, SlideAreas],
    mpp_default: float | None,
    tissue: TissueSettings,
    workers: Executor,
) -> NamedAreas:
    """The areas that have rows of their own; none where a slide has one."""
    if areas is None or not areas.settings.each:
        return NamedAreas()
    rows = study.slides()
    paths = [*found.slides, *(Path(row["path"]) for row in rows)]
    files = given if isinstance(areas, AreaFolder) else None
    return name_all(paths, rows, files, mpp_default, tissue, study.areas, workers)


def find_slides(folder: Path, slides: Path) -> Found:
    """The slides in the folder, or the one slide; a command asks this before it makes a study's folder.

    Args:
        folder: of the study, which need not exist.
        slides: a folder of slides, or one slide.

    Returns:
        What lies there.

    Raises:
        StudyError: there are no slides, or a table was given in their place.
    """
    place = Path(os.path.abspath(slides))
    if place.is_file() and place.suffix.lower() in NOT_SLIDES:
        hint = "give a slide or a folder of slides; a table of labels goes to --labels"
        raise StudyError(f"{slides}: a {place.suffix.lower()} file is no slide", hint)
    found = Found([place]) if chosen_picture(place)[0].is_file() else look_for_slides(place, folder)
    if not found.slides and not found.passed:
        counted = ", ".join(f"{count} {ending}" for ending, count in found.others.most_common(5))
        what = f"{slides}: no slides in it" + (f", only files of other kinds ({counted})" if counted else "")
        raise StudyError(what, "give a folder of .svs, .tif, .ndpi, .mrxs, .png, .jpg, ...")
    if found.slides == [place] and (
        lies_in(place, folder)
        or is_ours(place.parent)
        or any(is_ours(up) and lies_in(place, up) for up in place.parents)
    ):
        raise StudyError(f"{slides}: lies in a folder that this program wrote, so it is no slide", "give the slide")
    return found


def _given(found: Found, study: Study, areas: AreaFolder) -> dict[str, SlideAreas]:
    """The areas of the slides that have any, by the names of the slides' files; says what does not match."""
    stems = [path.stem for path in found.slides]
    given, strangers = areas.of([*stems, *(Path(row["path"]).stem for row in study.slides())])
    if not given:
        what = f"{areas.folder}: none of its files is of one of {len(stems)} slides ({strangers[0]} is not)"
        raise StudyError(what, "name each file as its slide, such as slide-1.geojson")
    if strangers:
        some = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
        say(f"note: {len(strangers)} files of areas are of none of the slides: {some}", "yellow")
    lacking = sum(stem not in given for stem in stems)
    if lacking and areas.settings.missing != "refuse":
        what = "are skipped" if areas.settings.missing == "skip" else "count whole"
        say(f"note: {lacking} slides that have no area {what}", "yellow")
    return given


def say_left_out(rows: Sequence[Row]) -> None:
    """Say how many tiles of how many slides are left out because of artefacts, where any are.

    Args:
        rows: of slides.csv.
    """
    counts = [left_out_of(row.get("artefacts", "")) for row in rows]
    told = left_out_text(sum(counts, np.zeros(len(KINDS), np.int64)))
    if told:
        say(f"note: {told}, of {sum(map(np.any, counts))} slides (--tissue.drop)", "yellow")


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


def _notes(found: Found) -> list[str]:
    """Notes on the other files in the folder, in a few lines."""
    notes = []
    if found.passed:
        kinds = Counter(path.suffix.lower() or "no ending" for path in found.passed)
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        notes.append(
            f"passed over: {len(found.passed)} files that may be slides ({counted}); see what is wrong with each"
        )
    if found.links:
        some = ", ".join(f"{link} to {target.name}" for link, target in list(found.links.items())[:3])
        more = f" and {len(found.links) - 3} more" if len(found.links) > 3 else ""
        notes.append(f"links to slides that are there by their own names were not read: {some}{more}")
    if found.others:
        counted = ", ".join(f"{count} {kind}" for kind, count in found.others.most_common(8))
        notes.append(f"files of other kinds: {counted}")
    return notes


def suspicions(rows: Sequence[Row]) -> list[str]:
    """Find what may be wrong with the slides: files of the same content, and a differing mpp.

    Args:
        rows: rows of slides.csv.

    Returns:
        One line per suspicion, for a person to judge.
    """
    holding: dict[str, dict[str, str]] = defaultdict(dict)  # areas of a slide are of one file
    for row in rows:
        if row.get("content") and row["status"] != "failed":
            holding[row["content"]].setdefault(row["path"], row["slide_id"])
    notes = [
        f"{' and '.join(names[:3])} hold the same: if they are one slide, leave one, or give them one patient_id"
        for names in (list(by_path.values()) for by_path in holding.values())
        if len(names) > 1
    ]
    mpps = {row["slide_id"]: number(row["mpp"]) for row in rows if row["mpp"] and row["status"] != "failed"}
    return notes + jumps(mpps)


class ExistingProducts:
    """The products of a study by name, read once: to list 100,000 files is faster than to query each."""

    def __init__(self, study: Study) -> None:
        self._names = {
            subfolder: _names(study.folder / subfolder) for subfolder in ("qc", "tiles", "features", "views")
        }

    def __call__(self, subfolder: str, name: str) -> bool:
        """Whether a subfolder has that file."""
        return name in self._names[subfolder]


def _names(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except FileNotFoundError:
        return set()


def _surveyed(row: Row, mpp: float | None, laying: str, areas: SlideAreas | None, exists: ExistingProducts) -> bool:
    """Whether a slide's tiles exist, made of the same file with these settings, this mpp and these areas."""
    if mpp is None or row["status"] == "failed":
        return False
    try:
        made = survey_fingerprint(slide_state(Path(row["path"])), mpp, laying, areas)
    except HistosslError:
        return False
    name = row["slide_id"]
    return row["made"].partition("-")[0] == made and exists("qc", f"{name}.jpg") and exists("tiles", f"{name}.h5")


def _survey(journal: Journal, jobs: list[tuple[Row, SurveyJob]], workers: Executor) -> None:
    with StageQueue(journal, "inspect", jobs) as shift, progress_bar("slides", len(jobs)) as bar:
        for mine in shift.rounds():
            for job, answer in workers.map(survey_slide, mine):
                if isinstance(answer, Exception):
                    give_up_on_disk(answer)
                    # With it the slide keeps its identity once the file is repaired.
                    known = {"content": job.content or _content(job.path)}
                    shift.finish(job.slide_id, failure(failure_reason(answer, job.path)) | known)
                else:
                    found = {name: str(value) for name, value in vars(answer).items()}
                    shift.finish(job.slide_id, found | {"status": "inspected", "error": ""})
                bar.advance(1 + len(shift.listen()))


def _content(path: Path) -> str:
    """The fingerprint of a file, "" of one that cannot be read."""
    try:
        return content_of(path)
    except SlideError:
        return ""


def _checked(
    row: Row, given: dict[str, SlideAreas], areas: AreaFolder | CoreGrid | None, named: NamedAreas
) -> tuple[float | None, str]:
    """The mpp in a row, None where it has none; and what is wrong with the row, else ""."""
    mpp, no_number = _number(row["mpp"])
    path = Path(row["path"])
    if no_number:
        return mpp, f"slides.csv: mpp {row['mpp']!r} is not a number; write µm per pixel, such as 0.25"
    if row["error"].startswith(NOT_OURS):
        return mpp, ""
    if isinstance(areas, AreaFolder) and areas.settings.missing != "whole" and path.stem not in given:
        return mpp, f"{path.name}: {areas.lacking(path.stem)}"
    if path in named.failed:
        return mpp, named.failed[path]
    return mpp, ""


def _number(text: str) -> tuple[float | None, bool]:
    """The number in a cell, None where it is empty; and whether it is not a number."""
    if not text.strip():
        return None, False
    try:
        return number(text), False
    except ValueError:
        return None, True
