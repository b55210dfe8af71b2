"""Segments inputs and writes their nuclei as files. Several runs on one folder share the inputs, as in a study."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histossl.core.config import fingerprint
from histossl.core.console import progress_bar, say
from histossl.core.errors import SettingsError, SlideError
from histossl.core.tables import Row
from histossl.execution.cluster import Cluster
from histossl.execution.failures import failure, failure_reason, give_up_on_disk
from histossl.execution.journal import Journal, StageQueue
from histossl.execution.shared_table import SharedTable
from histossl.execution.workers import Executor, SerialExecutor, ThreadExecutor, Workers, result_of
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


def segment_input(executor: Executor, shown: bool, job: SegmentJob) -> Row:
    """Segment an input and write its files: the network runs here, `executor` reads, separates and outlines.

    A run that was killed resumes at the row of tiles that it had reached.

    Args:
        executor: runs the work on the CPU.
        shown: whether a progress bar is shown.
        job: the input, its settings and the folder of its files.

    Returns:
        The changed columns of its row of nuclei.csv.

    Raises:
        SlideError: the input cannot be read, or was changed while it was read.
        WorkerDied, WorkerHung: a worker died or hung on it.
    """
    start, method = time.monotonic(), built(job.method)
    look = SurveyTask(job.path, job.mpp_default, method.mpp, job.running, job.areas, method.supported)
    known = result_of(executor, survey_there, look)
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
    count = _write(job, known, parts)
    result_of(executor, _write_overlay, (job, known.mpp, parts))
    if doubt := doubt_about_mpp(usual_size(parts), known.mpp):
        say(f"{job.path.name}: {doubt}", "yellow")
    parts.remove()
    square = known.mask.size.width * known.mask.size.height * known.mpp**2 / 1e6
    square *= float(known.mask.mask.mean()) if job.areas else 1
    seconds = time.monotonic() - start
    cells = {"nuclei": f"{count}", "mm2": f"{square:.4f}", "seconds": f"{seconds:.2f}"}
    return cells | {"status": "done", "error": "", "made": job.made}


def _write(job: SegmentJob, known: StainSurvey, parts: Parts) -> int:
    write, picture = job.write, known.vendor == "plain"
    count = export.write_geojson(job.geojson, parts, known.mpp)
    if write.parquet:
        export.write_parquet(job.file(".parquet"), parts, known.mpp)
    if write.density:
        write_density(job.file(DENSITY), density_map(parts, known.mask, known.mpp))
    if write.zarr or write.h5ad or (write.labels and picture):
        everything = concatenate(list(parts))
        if write.h5ad:
            export.write_anndata(job.file(".h5ad"), everything, known.mpp, job.slide_id)
        if write.zarr:
            export.write_zarr(job.file(".zarr"), everything, known.mask.size, known.mpp)
        if write.labels and picture:
            export.write_label_tiff(job.file(".tif"), everything, known.mask.size)
    return count


def _write_overlay(task: tuple[SegmentJob, float, Parts]) -> None:
    job, mpp, parts = task
    with open_slide(job.path, mpp) as slide:
        export.write_overlay(job.overlay, slide, parts)
        if job.write.sheet:
            rng = np.random.default_rng(job.running.seed)
            write_sheet(job.file("-sheet.jpg"), slide, concatenate(list(parts)), rng)


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
            for job, answer in _segmented(offers, pool):
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


def _segmented(jobs: Iterator[SegmentJob], pool: Workers | Cluster) -> Iterator[tuple[SegmentJob, Row | Exception]]:
    if isinstance(pool, Cluster):
        return pool.spread(functools.partial(_segment_there, pool.timeout), jobs)
    return SerialExecutor().map(functools.partial(segment_input, pool, True), jobs)


def _segment_there(timeout: float | None, job: SegmentJob) -> Row:
    return segment_input(ThreadExecutor(timeout), False, job)


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
