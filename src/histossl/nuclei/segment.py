"""Segments inputs and writes their nuclei as files. Several runs on one folder share the inputs, as in a study."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from histossl.core.config import fingerprint
from histossl.core.console import progress_bar, say
from histossl.core.errors import SettingsError, SlideError
from histossl.core.tables import Row
from histossl.execution.cluster import Cluster
from histossl.execution.failures import failure, failure_reason, give_up_on_disk
from histossl.execution.journal import Journal, StageQueue
from histossl.execution.shared_table import SharedTable
from histossl.execution.workers import Executor, ThreadExecutor, Workers, result_or_error
from histossl.nuclei import export
from histossl.nuclei.instances import concatenate
from histossl.nuclei.maps import DENSITY, density_map, write_density, write_sheet
from histossl.nuclei.method import Method
from histossl.nuclei.partial_results import Parts, parts_key
from histossl.nuclei.settings import ExportSettings
from histossl.nuclei.stain_survey import SegmentSettings, StainSurvey, SurveyTask, survey_there
from histossl.nuclei.tiled_inference import segment_rows
from histossl.nuclei.usual import doubt_about_mpp, usual_size
from histossl.wsi.areas import SlideAreas
from histossl.wsi.slide import open_slide, slide_state
from histossl.wsi.tissue import TissueMask

COLUMNS = ("file", "status", "nuclei", "mm2", "seconds", "error", "slide_id", "path", "made")
"""Columns of nuclei.csv; status is done or failed."""


@dataclass(frozen=True)
class MethodName:
    """How a worker builds the method: `prior` or a model's folder, the device, and the key of the model."""

    name: str
    device: str
    key: str


@functools.lru_cache(maxsize=1)
def built(method: MethodName) -> Method:
    """The method of a name.

    Args:
        method: the name and the device.

    Returns:
        The method, built once per process.

    Raises:
        FileFormatError: the model cannot be read.
    """
    from histossl.nuclei.segmenter import load_method

    return load_method(method.name, method.device)


@dataclass(frozen=True)
class SegmentJob:
    """One input to segment.

    Attributes:
        slide_id: its name without ending; the names of its files begin with it.
        path: of the input.
        state: state of its file when the run began, empty where there was none.
        out: the folder of the results.
        mpp_default: µm per pixel where it carries none.
        method: finds nuclei.
        running: settings of the segmentation.
        write: which files are written.
        areas: the user's areas, outside of which no nuclei are looked for.
    """

    slide_id: str
    path: Path
    state: str
    out: Path
    mpp_default: float | None
    method: MethodName
    running: SegmentSettings
    write: ExportSettings
    areas: SlideAreas | None = None

    @property
    def made(self) -> str:
        """The fingerprint of its files."""
        about = str(self.path), self.state, self.mpp_default, self.method.key, self.running, self.write
        return fingerprint(*about, *([self.areas.made] if self.areas else []))

    def file(self, ending: str) -> Path:
        """The path of one of its files.

        Args:
            ending: what follows the slide's name, such as ".geojson.gz".

        Returns:
            The path. It is put together as text: names may hold dots, which `with_suffix` would cut.
        """
        return self.out / (self.slide_id + ending)

    @property
    def geojson(self) -> Path:
        """The file that every input ends with."""
        return self.file(".geojson.gz" if self.write.gzip else ".geojson")

    @property
    def overlay(self) -> Path:
        """The picture of it."""
        return self.file("-overlay.jpg")


def segment_each(
    jobs: Iterable[SegmentJob], executor: Executor, shown: bool
) -> Iterator[tuple[SegmentJob, Row | Exception]]:
    """Segment inputs and write their files: the network runs here, `executor` reads, separates and outlines.

    While the network sees one input, the next are surveyed and the files of the last are written. A run that was killed
    resumes at the row of tiles that it had reached.

    Args:
        jobs: the inputs, their settings and the folder of their files; drawn a few ahead.
        executor: runs the work on the CPU.
        shown: whether a progress bar is shown.

    Yields:
        (input, the changed columns of its row of nuclei.csv or the exception that it raised): a SlideError where the
        input cannot be read or was changed while it was read, WorkerDied or WorkerHung where a worker did on it.
    """
    surveys = executor.map(_surveyed, map(_look, jobs), ahead=1)
    find = functools.partial(_find, executor, shown)
    found = (_Stage(look.job, result_or_error(find, _Stage(look.job, answer))) for look, answer in surveys)
    # A thread: millions of nuclei take longer to write than a worker may take for a tile.
    written = (_Stage(last.job, answer) for last, answer in ThreadExecutor().map(_write, found))
    for last, answer in executor.map(_write_overlay, written, ahead=1):
        if not isinstance(answer, Exception):
            done = last.value
            if done.doubt:
                say(f"{last.job.path.name}: {done.doubt}", "yellow")
            done.parts.remove()
            answer = done.row
        yield last.job, answer


V = TypeVar("V")


@dataclass(frozen=True)
class _Stage(Generic[V]):
    """An input, and what the last step made of it, or why it failed."""

    job: SegmentJob
    answer: V | Exception

    @property
    def value(self) -> V:
        """Raises what the last step raised."""
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@dataclass(frozen=True)
class _Look:
    """What a worker needs to survey an input."""

    job: SegmentJob
    task: SurveyTask


def _look(job: SegmentJob) -> _Look:
    method = built(job.method)
    return _Look(job, SurveyTask(job.path, job.mpp_default, method.mpp, job.running, job.areas, method.support))


def _surveyed(look: _Look) -> tuple[StainSurvey, float]:
    """The survey of an input, and the seconds that it took."""
    start = time.monotonic()
    return survey_there(look.task), time.monotonic() - start


@dataclass(frozen=True)
class _Found:
    """An input whose nuclei are found: its mpp, tissue and nuclei, whether it is a picture, and the time taken."""

    mpp: float
    mask: TissueMask
    picture: bool
    parts: Parts
    seconds: float


@dataclass(frozen=True)
class _Done:
    """An input whose files are written, but for the overlay."""

    mpp: float
    parts: Parts
    row: Row
    doubt: str


def _find(executor: Executor, shown: bool, last: _Stage[tuple[StainSurvey, float]]) -> _Found:
    job, (known, seconds) = last.job, last.value
    start, method = time.monotonic() - seconds, built(job.method)
    drawn = job.areas.made if job.areas else ""
    parts = Parts(job.out / f".{job.slide_id}-{parts_key(known, job.state, job.method.key, job.running, drawn)}")
    done, found = parts.done(), 0
    with progress_bar(job.path.name, None, done, shown) as bar:
        for row, _, nuclei in segment_rows(known, method, job.running, executor, None, done):
            parts.add(row, nuclei)
            found += len(nuclei)
            bar.advance(1)
            bar.say(f"{found / (time.monotonic() - start):.0f} nuclei/s")
    if slide_state(job.path) != job.state:
        raise SlideError(job.path, "was changed while it was read", "run again once it is copied")
    return _Found(known.mpp, known.mask, known.vendor == "plain", parts, time.monotonic() - start)


def _write(last: _Stage[_Found]) -> _Done:
    start, job, found = time.monotonic(), last.job, last.value
    write, parts, mpp, size = job.write, found.parts, found.mpp, found.mask.size
    count = export.write_geojson(job.geojson, parts, mpp)
    if write.parquet:
        export.write_parquet(job.file(".parquet"), parts, mpp)
    if write.density:
        write_density(job.file(DENSITY), density_map(parts, found.mask, mpp))
    if write.zarr or write.h5ad or (write.labels and found.picture):
        everything = concatenate(list(parts))
        if write.h5ad:
            export.write_anndata(job.file(".h5ad"), everything, mpp, job.slide_id)
        if write.zarr:
            export.write_zarr(job.file(".zarr"), everything, size, mpp)
        if write.labels and found.picture:
            export.write_label_tiff(job.file(".tif"), everything, size)
    square = size.width * size.height * mpp**2 / 1e6 * (float(found.mask.mask.mean()) if job.areas else 1)
    seconds = found.seconds + time.monotonic() - start
    cells = {"nuclei": f"{count}", "mm2": f"{square:.4f}", "seconds": f"{seconds:.2f}"}
    row = cells | {"status": "done", "error": "", "made": job.made}
    return _Done(mpp, parts, row, doubt_about_mpp(usual_size(parts), mpp))


def _write_overlay(last: _Stage[_Done]) -> None:
    job, done = last.job, last.value
    with open_slide(job.path, done.mpp) as slide:
        export.write_overlay(job.overlay, slide, done.parts)
        if job.write.sheet:
            rng = np.random.default_rng(job.running.seed)
            write_sheet(job.file("-sheet.jpg"), slide, concatenate(list(done.parts)), rng)


def segment_inputs(shared: SharedTable, jobs: Sequence[SegmentJob], pool: Workers | Cluster) -> list[Row]:
    """Segment all inputs that are not done, together with other runs on the same folder.

    Args:
        shared: the shared table nuclei.csv.
        jobs: the inputs; their names differ.
        pool: on a cluster each input is a task; processes here read, separate and outline, one input at a time.

    Returns:
        The rows of all these inputs.

    Raises:
        SettingsError: the table has another input of the same name.
    """
    journal = Journal(shared)
    with shared.writing():
        known = shared.slides()
        rows = _merged(known, jobs)
        if rows != known:
            shared.write_slides(rows)
    by_path = {row["path"]: row for row in rows}
    mine = [(by_path[str(job.path)], job) for job in jobs]
    left = [(row, job) for row, job in mine if not _stands(row, job)]
    with StageQueue(journal, "nuclei", left) as shift:
        for offers in shift.rounds():
            answers = (
                pool.spread(functools.partial(_segment_there, pool.timeout), offers)
                if isinstance(pool, Cluster)
                else segment_each(offers, pool, True)
            )
            for job, answer in answers:
                if isinstance(answer, Exception):
                    give_up_on_disk(answer)
                    answer = failure(failure_reason(answer, job.path)) | dict.fromkeys(("nuclei", "mm2", "made"), "")
                    say(f"FAILED {answer['error']}", "red")
                else:
                    say(f"{job.path.name}: {answer['nuclei']} nuclei in {answer['seconds']} s")
                shift.finish(job.slide_id, answer)
                shift.listen()
                say(f"{len(mine) - len(shift.left)} of {len(mine)} done")
    return [row for row, _ in mine]


def _segment_there(timeout: float | None, job: SegmentJob) -> Row:
    [(_, answer)] = segment_each([job], ThreadExecutor(timeout), False)
    if isinstance(answer, Exception):
        raise answer
    return answer


def _merged(known: list[Row], jobs: Sequence[SegmentJob]) -> list[Row]:
    mine = {job.slide_id: str(job.path) for job in jobs}
    rows = []
    for row in known:
        path = mine.get(row["slide_id"], row["path"])
        if path == row["path"]:
            rows.append(row)
        elif Path(row["path"]).exists():  # else the slides were moved
            what = f"{path} has the name of {row['path']}, whose nuclei are there already"
            raise SettingsError(what, "segment them into different folders")
    there = {row["path"] for row in rows}
    for job in jobs:
        if str(job.path) not in there:
            about = {"file": job.path.name, "slide_id": job.slide_id, "path": str(job.path)}
            rows.append(dict.fromkeys(COLUMNS, "") | about)
    return rows


def _stands(row: Row, job: SegmentJob) -> bool:
    files = job.geojson, job.overlay
    return row["status"] == "done" and row["made"] == job.made and all(file.exists() for file in files)
