"""The commands of the second pillar: parameters are their flags, the returned number is the exit code.

What needs torch is imported when a command runs.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from histossl.core import atomic, tables
from histossl.core.config import fingerprint
from histossl.core.console import console, progress_bar, say
from histossl.core.errors import LabelError, SettingsError, SlideError, TrainingError
from histossl.execution.cluster import open_workers
from histossl.execution.failures import failure_reason
from histossl.execution.shared_table import SharedTable
from histossl.execution.workers import Workers
from histossl.nuclei import export
from histossl.nuclei.instances import Nuclei, concatenate
from histossl.nuclei.metrics import METRICS, Scores, summarise
from histossl.nuclei.metrics import score as score_labels
from histossl.nuclei.outputs import inputs_beside, refuse_to_replace
from histossl.nuclei.pseudo_labels import SelfTrainingSettings
from histossl.nuclei.segment import COLUMNS, ExportSettings, MethodName, SegmentJob, built, segment_inputs
from histossl.nuclei.stain_survey import SegmentSettings, SurveyTask, survey_there
from histossl.wsi.slide import EXTENSIONS, find_slides, slide_state

if TYPE_CHECKING:
    from histossl.nuclei.patch_contrast import PatchContrast
    from histossl.nuclei.self_training import SelfTraining


def train(
    images: list[Path],
    *,
    out: Path,
    method: str = "self-training",
    mpp_default: float | None = None,
    self_training: SelfTrainingSettings = SelfTrainingSettings(),
    device: str = "auto",
) -> int:
    """Learn nuclei from images or slides, without labels.

    Args:
        images: images, slides, or folders of them.
        out: the folder of the model.
        method: self-training (the default) or patch-contrast (Boserup and Selvan's, with its published numbers).
        mpp_default: µm per pixel of images that carry none.
        self_training: how the default method learns.
        device: auto, cpu or cuda.
    """
    files = _files(images)
    if method not in ("self-training", "patch-contrast"):
        raise SettingsError(f"no method {method!r} can be trained", "use self-training or patch-contrast")
    with Workers() as readers:
        model, failed = _learn(files, out, mpp_default, self_training, device, readers, method)
    model.save(out)
    say(f"done: {out}", "green")
    return 1 if failed else 0


def segment(
    inputs: list[Path],
    *,
    out: Path,
    model: str = "self",
    mpp_default: float | None = None,
    self_training: SelfTrainingSettings = SelfTrainingSettings(),
    running: SegmentSettings = SegmentSettings(),
    write: ExportSettings = ExportSettings(),
    workers: int | None = None,
    timeout: float = 900,
    scheduler: str = "",
    slurm: str = "",
    device: str = "auto",
) -> int:
    """Find the nuclei of images and slides; for QuPath and other tools.

    Args:
        inputs: images, slides, or folders of them.
        out: the folder of what is found; a run that was killed goes on in it.
        model: self (learn on the inputs first, then segment them), prior (no learning), or a folder that
            `nuclei train` wrote.
        mpp_default: µm per pixel of images that carry none.
        self_training: how `self` learns.
        running: how slides are gone over.
        write: which files are written.
        workers: processes that read slides, and part and outline nuclei.
        timeout: seconds that a worker may take for a tile before it is killed, and the slide given up.
        scheduler: work on the Dask cluster at this address, such as tcp://host:8786, instead of on this machine alone.
        slurm: work in so many SLURM jobs, as JOBS or JOBS:NAME; see docs/scale.md.
        device: auto, cpu or cuda.
    """
    files = [Path(os.path.abspath(file)) for file in inputs_beside(_files(inputs), inputs, out)]
    twice = sorted(stem for stem, count in Counter(file.stem for file in files).items() if count > 1)
    if twice:
        raise SettingsError(f"several inputs are called {', '.join(twice[:3])}", "segment them into different folders")
    known = SharedTable(out, "nuclei.csv", COLUMNS).slides() if out.is_dir() else []
    refuse_to_replace(files, out, known)
    roll = SharedTable(out, "nuclei.csv", COLUMNS)
    if model == "self":
        # One run learns, the others wait for its model.
        with roll.share(_waiting), roll.learning(_waiting_for_model), Workers(workers, timeout) as readers:
            method = _learned_here(files, roll.folder, mpp_default, self_training, device, readers)
    else:
        # The real path: however it is spelt, a model segments an input once.
        folder = str(Path(model).resolve()) if Path(model).exists() else model
        method = MethodName(folder, device, fingerprint(folder, _model_state(model)))
    built(method)  # a model that cannot be read is told before any slide is
    with roll.share(_waiting), open_workers(workers, timeout, scheduler, slurm) as pool:
        jobs = [
            SegmentJob(file.stem, file, _state(file), roll.folder, mpp_default, method, running, write)
            for file in files
        ]
        rows = segment_inputs(roll, jobs, pool)
    failed = sum(row["status"] == "failed" for row in rows)
    say(f"done: {sum(int(row['nuclei'] or 0) for row in rows)} nuclei in {len(rows) - failed} images, {out}", "green")
    return 1 if failed else 0


def score(prediction: Path, truth: Path, out: Path | None = None, seed: int = 0) -> int:
    """Dice, AJI, PQ, F1, precision and recall of nuclei against ground truth, with bootstrap intervals.

    Args:
        prediction: a label image or GeoJSON, or a folder of them.
        truth: the same, with the same names; label images (TIFF or PNG of integers) or GeoJSON in pixels.
        out: a CSV, a row an image.
        seed: of the bootstrap.
    """
    scores: dict[str, Scores] = {}
    for name, a, b in _pairs(prediction, truth):
        scores[name] = score_labels(*_read_pair(a, b))
    table = Table(box=None, header_style="bold")
    for column in ("image", *METRICS):
        table.add_column(column, justify="left" if column == "image" else "right")
    for name, one in scores.items():
        table.add_row(name, *(f"{value:.3f}" for value in astuple(one)))
    means = summarise(list(scores.values()), np.random.default_rng(seed))
    table.add_row("mean", *(f"{means[m].mean:.3f}" for m in METRICS), style="bold")
    table.add_row("95 %", *(f"{means[m].low:.3f}-{means[m].high:.3f}" for m in METRICS))
    console.print(table)
    if out is not None:
        with atomic.whole(out) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = tables.writer(file)
            writer.writerow(("image", *METRICS))
            writer.writerows((tables.cell(name), *astuple(one)) for name, one in scores.items())
    return 0


def _files(inputs: Sequence[Path]) -> list[Path]:
    files = [file for path in inputs for file in (find_slides(path) if path.is_dir() else [path])]
    if not files:
        raise SettingsError("no images or slides there", f"formats are {', '.join(sorted(EXTENSIONS))}")
    return files


def _learn(
    files: list[Path],
    folder: Path,
    mpp_default: float | None,
    settings: SelfTrainingSettings,
    device: str,
    readers: Workers,
    method: str = "self-training",
) -> tuple[SelfTraining | PatchContrast, int]:
    from histossl.nuclei.patch_contrast import learn_patch_contrast
    from histossl.nuclei.patch_sampling import PatchContrastSettings
    from histossl.nuclei.segmenter import samples
    from histossl.nuclei.self_training import SelfTraining, learn

    published = PatchContrastSettings(seed=settings.seed)
    mpp = published.mpp if method == "patch-contrast" else SelfTraining.mpp
    known, failed = [], 0
    tasks = (SurveyTask(file, mpp_default, mpp) for file in files)
    with progress_bar("looking", len(files)) as bar:
        for task, answer in readers.map(survey_there, tasks):
            if isinstance(answer, Exception):
                failed += 1
                say(failure_reason(answer, task.path), "red")
            else:
                known.append(answer)
            bar.advance(1)
    start = time.monotonic()
    logs = folder.parent / f".{folder.name}-training"
    taught = samples(known, settings.seed)
    if method == "patch-contrast":
        model = learn_patch_contrast([field for sample in taught for field in sample.fields], published, logs, device)
    else:
        model = learn(taught, settings, logs, device)
    say(f"learned on {len(known)} images in {time.monotonic() - start:.0f} s")
    return model, failed


def _learned_here(
    files: list[Path],
    out: Path,
    mpp_default: float | None,
    settings: SelfTrainingSettings,
    device: str,
    readers: Workers,
) -> MethodName:
    """The model of these inputs: the one in out/model, where it was learned from just these with these settings."""
    states = [(str(file.resolve()), _state(file)) for file in files]
    key = fingerprint(states, mpp_default, settings)
    folder = out / "model"
    made = folder / "inputs.json"
    if not (made.exists() and json.loads(made.read_text("utf-8")) == key):
        try:
            model, _ = _learn(files, folder, mpp_default, settings, device, readers)
        except TrainingError as error:
            # Empty images are no reason to stop: the prior finds nothing on them either, and says why.
            say(f"{error.what}: taking the prior", "yellow")
            return MethodName("prior", device, fingerprint("prior"))
        model.save(folder)
        with atomic.whole(made) as part:
            part.write_text(json.dumps(key), "utf-8")
    return MethodName(str(folder), device, key)


def _state(file: Path) -> str:
    try:
        return slide_state(file)
    except SlideError:  # who reads it says why
        return ""


def _waiting(holder: str) -> None:
    say(f"waiting for another run that needs the folder for itself ({holder})", "yellow")


def _waiting_for_model() -> None:
    say("waiting for another run that learns the model", "yellow")


def _model_state(model: str) -> list[object]:
    weights = Path(model) / "model.safetensors"
    return [str(weights.resolve()), weights.stat().st_size, weights.stat().st_mtime_ns] if weights.exists() else []


_LABEL_FILES = (".tif", ".tiff", ".png", ".geojson", ".geojson.gz")


def _pairs(prediction: Path, truth: Path) -> list[tuple[str, Path, Path]]:
    for path in (prediction, truth):
        if not path.exists():
            raise LabelError(f"there is no {path}")
    if prediction.is_file() and truth.is_file():
        return [(truth.name, prediction, truth)]
    if prediction.is_file() or truth.is_file():
        raise LabelError("one of prediction and truth is a file, the other a folder", "give two files or two folders")
    a, b = _labels_in(prediction), _labels_in(truth)
    if set(a) != set(b):
        lost, extra = sorted(set(b) - set(a)), sorted(set(a) - set(b))
        told = [
            f"{len(names)} only in {path}: {', '.join(names[:3])}"
            for names, path in ((lost, truth), (extra, prediction))
            if names
        ]
        raise LabelError(f"the two folders do not match ({'; '.join(told)})", "files are matched by their names")
    return [(name, a[name], b[name]) for name in sorted(b)]


def _labels_in(folder: Path) -> dict[str, Path]:
    """Files by name without ending; of a nucleus's label image and GeoJSON the former."""
    found: dict[str, Path] = {}
    for ending in reversed(_LABEL_FILES):
        for path in folder.iterdir():
            if path.name.endswith(ending) and not path.name.startswith("."):
                found[path.name.removesuffix(ending)] = path
    if not found:
        raise LabelError(f"{folder} holds no label images or GeoJSON", f"endings are {', '.join(_LABEL_FILES)}")
    return found


def _read_pair(prediction: Path, truth: Path) -> tuple[np.ndarray, np.ndarray]:
    a, b = _read_labels(prediction), _read_labels(truth)
    if isinstance(a, Nuclei) and isinstance(b, Nuclei):
        far = export.extent(concatenate([a, b]))
        size = export.Size(int(far.width), int(far.height))
        return export.label_image(a, size), export.label_image(b, size)
    if isinstance(a, Nuclei):
        assert isinstance(b, np.ndarray)
        return export.label_image(a, export.Size(b.shape[1], b.shape[0])), b
    if isinstance(b, Nuclei):
        return a, export.label_image(b, export.Size(a.shape[1], a.shape[0]))
    return a, b


def _read_labels(path: Path) -> np.ndarray | Nuclei:
    if path.name.endswith((".geojson", ".geojson.gz")):
        return export.read_geojson(path)
    from skimage.io import imread

    try:
        labels = np.squeeze(imread(path))
    except (OSError, ValueError, SyntaxError) as error:
        raise LabelError(f"{path}: no label image ({error})") from error
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise LabelError(f"{path}: labels must be (H, W) integers, got {labels.shape} of {labels.dtype}")
    return labels
