"""Rows of slides.csv where each area of a slide has its own: named, and told from the rows of whole slides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from histossl.core.console import progress_bar
from histossl.core.errors import StudyError
from histossl.core.tables import number
from histossl.execution.failures import failure, failure_reason
from histossl.execution.workers import Executor
from histossl.study.folder import COLUMNS, Row
from histossl.study.identity import NOT_OURS
from histossl.wsi.areas import AreaFolder, SlideAreas
from histossl.wsi.named_areas import CoreGrid, NameJob, area_ids, name_areas, slide_of
from histossl.wsi.tissue import TissueSettings

_KEY = "rows of its areas"  # a column that only stands while rows are merged


@dataclass
class NamedAreas:
    """The areas of slides that get a vector each.

    Attributes:
        of: path of a slide -> class -> area.
        failed: path of a slide -> why its areas cannot be named.
    """

    of: dict[Path, dict[str, SlideAreas]] = field(default_factory=dict)
    failed: dict[Path, str] = field(default_factory=dict)


def name_all(
    paths: Iterable[Path],
    rows: Sequence[Row],
    given: Mapping[str, SlideAreas] | None,
    mpp_default: float | None,
    tissue: TissueSettings,
    cores: Path,
    workers: Executor,
) -> NamedAreas:
    """Name the areas of slides.

    Args:
        paths: the slides.
        rows: of slides.csv, whose mpp counts.
        given: stem of a slide -> its files; None for the cores of microarrays.
        mpp_default: µm per pixel of slides that state none.
        tissue: how tissue is found.
        cores: the folder of the files of cores.
        workers: read the files and the slides.

    Returns:
        The areas, of slides that have any files and exist.
    """
    mpps = {Path(row["path"]): row["mpp"] for row in rows}
    jobs = []
    for path in dict.fromkeys(paths):
        if path.exists() and (given is None or path.stem in given):
            areas = None if given is None else given[path.stem]
            jobs.append(NameJob(path, areas, _mpp(mpps.get(path, "")), mpp_default, tissue, cores / _file(path)))
    found = NamedAreas()
    with progress_bar("areas", len(jobs)) as bar:
        for job, answer in workers.map(name_areas, jobs):
            if isinstance(answer, Exception):
                found.failed[job.path] = failure_reason(answer, job.path)
            else:
                found.of[job.path] = answer
            bar.advance(1)
    return found


def _file(path: Path) -> str:
    return f"{path.stem}.geojson"


def _mpp(text: str) -> float | None:
    try:
        return number(text) if text.strip() else None
    except ValueError:  # what is wrong with the row is said when it is checked
        return None


class AreaRows:
    """The rows of a study's areas, put aside while slides are matched to files: a row a slide.

    Args:
        rows: of slides.csv.

    Raises:
        StudyError: rows of one slide differ in mpp or patient.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.whole: list[Row] = []
        self._kept: dict[str, dict[str, Row]] = {}
        of_path: dict[str, Row] = {}
        for row in rows:
            if not row.get("area") or "@" not in row["slide_id"]:  # a user's own column may be called so
                self.whole.append(row)
                continue
            path = row["path"]
            if path not in of_path:
                of_path[path] = self._slide(row)
                self.whole.append(of_path[path])
            first = of_path[path]
            for name in ("patient_id", "mpp"):
                first[name] = first[name] or row[name]
                if row[name] and row[name] != first[name]:
                    what = f"slides.csv: the areas of {first['slide_id']} differ in {name}"
                    raise StudyError(what, "write the same for all areas of a slide")
            self._kept[path][row["area"]] = row

    def _slide(self, row: Row) -> Row:
        self._kept[row["path"]] = {}
        plain = dict.fromkeys(COLUMNS, "") | {
            name: text for name, text in row.items() if name not in COLUMNS or name in ("path", "patient_id", "content")
        }
        return plain | {"slide_id": slide_of(row["slide_id"], row["area"]), _KEY: row["path"]}

    def expand(self, rows: Sequence[Row], named: NamedAreas) -> list[Row]:
        """A row for each area.

        Args:
            rows: a row a slide, as they were matched.
            named: the areas of the slides that have any.

        Returns:
            The rows; slides without areas keep theirs, and areas that are no longer there are marked as failed.
        """
        found = []
        for row in rows:
            kept = self._kept.get(row.pop(_KEY, ""), {})
            areas = named.of.get(Path(row["path"]))
            gone = row["error"].startswith(NOT_OURS)
            if areas is None and kept and (gone or Path(row["path"]) in named.failed):
                told = ("path", "status", "error") if gone else ("path",)
                found += [known | {key: row[key] for key in told} for known in kept.values()]
            elif not areas:
                found.append(row)
            else:
                found += self._rows(row, list(areas), kept)
        return found

    def _rows(self, row: Row, names: Sequence[str], kept: Mapping[str, Row]) -> list[Row]:
        told = {name: name or "area" for name in names}
        ids = area_ids(row["slide_id"], list(told.values()))
        users = {name: text for name, text in row.items() if name not in COLUMNS}
        found = []
        for area in told.values():
            fresh = dict.fromkeys(COLUMNS, "") | {name: row[name] for name in ("mpp", "content")} | users
            about = {"slide_id": ids[area], "path": row["path"], "area": area, "patient_id": row["patient_id"]}
            known = kept.get(area, fresh)
            if known["slide_id"] not in ("", ids[area]) or known["error"].startswith(NOT_OURS):
                known = known | {"status": "", "error": "", "made": ""}
            found.append(known | about)
        for area in set(kept) - set(told.values()):
            what = f"{NOT_OURS}{Path(row['path']).name}: its files of areas no longer name {area}"
            found.append(kept[area] | failure(f"{what}; draw it again, or remove the row") | {"path": row["path"]})
        return found


def areas_in_memory(
    paths: Sequence[Path],
    areas: AreaFolder | CoreGrid | None,
    mpp: tuple[float | None, float | None],
    tissue: TissueSettings,
    cores: Path,
    workers: Executor,
) -> tuple[list[tuple[str, Path, SlideAreas | None]], dict[str, str]]:
    """What has tiles of its own where no study is: slides, or each of their areas.

    Args:
        paths: the slides, each of a name of its own.
        areas: the areas; None for all tissue.
        mpp: µm per level-0 pixel of all slides, and of those that state none.
        tissue: how tissue is found.
        cores: the folder of the files of cores.
        workers: read the files and the slides.

    Returns:
        (slide_id, path, area or None) of each; and slide -> why it has none.
    """
    if areas is None:
        return [(path.stem, path, None) for path in paths], {}
    given = areas.of(path.stem for path in paths)[0] if isinstance(areas, AreaFolder) else None
    lacking = [path for path in paths if given is not None and path.stem not in given]
    failed, found = {}, []
    if areas.settings.missing == "refuse" and isinstance(areas, AreaFolder):
        failed = {path.stem: f"{path.name}: {areas.lacking(path.stem)}" for path in lacking}
    rows = [{"path": str(path), "mpp": str(mpp[0] or "")} for path in paths]
    named = name_all(paths, rows, given, mpp[1], tissue, cores, workers) if areas.settings.each else NamedAreas()
    failed |= {path.stem: why for path, why in named.failed.items()}
    for path in paths:
        if own := named.of.get(path):
            ids = area_ids(path.stem, [name or "area" for name in own])
            found += [(ids[name or "area"], path, one) for name, one in own.items()]
        elif path.stem not in failed and (path not in lacking or areas.settings.missing == "whole"):
            found.append((path.stem, path, (given or {}).get(path.stem)))
    return found, failed
