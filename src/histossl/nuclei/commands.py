"""The commands of the second pillar: parameters are their flags, the returned number is the exit code.

What needs torch is imported when a command runs.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from histossl import store
from histossl.config import fingerprint
from histossl.console import console, progress_bar, say
from histossl.errors import LabelError, SettingsError, SlideError, TrainingError
from histossl.nuclei import export
from histossl.nuclei.instances import Nuclei, joined
from histossl.nuclei.lessons import ContrastSettings
from histossl.nuclei.metrics import METRICS, Scores, summarise
from histossl.nuclei.metrics import score as score_labels
from histossl.nuclei.predict import Parts, SegmentSettings, parts_key, segment_rows, survey
from histossl.scale import Workers
from histossl.slide import EXTENSIONS, Slide, find_slides, open_slide

if TYPE_CHECKING:
    from histossl.nuclei.contrast import Contrast
    from histossl.nuclei.paper import Paper
    from histossl.nuclei.predict import Method


@dataclass(frozen=True)
class ExportSettings:
    """Which files are written beside the overlay and the GeoJSON.

    Attributes:
        gzip: whether the GeoJSON is gzipped (QuPath opens it as it is).
        parquet: GeoParquet, a row a nucleus.
        zarr: OME-Zarr labels.
        labels: a label image (int32 TIFF) for plain pictures.
    """

    gzip: bool = False
    parquet: bool = False
    zarr: bool = False
    labels: bool = True


def train(
    images: list[Path],
    *,
    out: Path,
    method: str = "contrast",
    mpp_default: float | None = None,
    contrast: ContrastSettings = ContrastSettings(),
    device: str = "auto",
) -> int:
    """Learn nuclei from images or slides, without labels.

    Args:
        images: images, slides, or folders of them.
        out: the folder of the model.
        method: contrast (the default) or paper (Boserup and Selvan's, with its published numbers).
        mpp_default: µm per pixel of images that carry none.
        contrast: how the default method learns.
        device: auto, cpu or cuda.
    """
    files = _files(images)
    if method not in ("contrast", "paper"):
        raise SettingsError(f"no method {method!r} can be trained", "take contrast or paper")
    model, failed = _learn(files, out, mpp_default, contrast, device, method)
    model.save(out)
    say(f"done: {out}", "green")
    return 1 if failed else 0


def segment(
    inputs: list[Path],
    *,
    out: Path,
    model: str = "self",
    mpp_default: float | None = None,
    contrast: ContrastSettings = ContrastSettings(),
    running: SegmentSettings = SegmentSettings(),
    write: ExportSettings = ExportSettings(),
    workers: int | None = None,
    device: str = "auto",
) -> int:
    """Find the nuclei of images and slides; for QuPath and other tools.

    Args:
        inputs: images, slides, or folders of them.
        out: the folder of what is found; a run that was killed goes on in it.
        model: self (learn on the inputs first, then segment them), prior (no learning), or a folder that
            `nuclei train` wrote.
        mpp_default: µm per pixel of images that carry none.
        contrast: how `self` learns.
        running: how slides are gone over.
        write: which files are written.
        workers: processes that part and outline nuclei.
        device: auto, cpu or cuda.
    """
    from histossl.nuclei.segmenter import load_method

    files = _files(inputs)
    stems = [file.stem for file in files]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise SettingsError(f"several inputs are called {', '.join(twice[:3])}", "segment them into different folders")
    method: Method
    if model == "self":
        try:
            method, key = _learned_here(files, out, mpp_default, contrast, device)
        except TrainingError as error:
            # Empty images are no reason to stop: the prior finds nothing on them either, and says why.
            say(f"{error.what}: taking the prior", "yellow")
            method, key = load_method("prior"), fingerprint("prior")
    else:
        method = load_method(model, device)
        key = fingerprint(model, _model_state(model))
    rows, failed = [], 0
    with Workers(workers) as pool:
        for file in files:
            try:
                rows.append(_segment_one(file, out, mpp_default, method, key, running, write, pool))
            except SlideError as error:
                failed += 1
                say(f"{file.name}: {error.what.removeprefix(file.name + ': ')}; {error.hint}", "red")
                rows.append({"file": file.name, "status": "failed", "error": str(error)})
            _write_summary(out / "nuclei.csv", rows)
    say(
        f"done: {sum(int(row.get('nuclei', 0)) for row in rows)} nuclei in {len(files) - failed} images, {out}", "green"
    )
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
        with store.whole(out) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("image", *METRICS))
            writer.writerows((name, *astuple(one)) for name, one in scores.items())
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
    settings: ContrastSettings,
    device: str,
    method: str = "contrast",
) -> tuple[Contrast | Paper, int]:
    from histossl.nuclei.contrast import Contrast, learn
    from histossl.nuclei.paper import learn_paper
    from histossl.nuclei.patches import PaperSettings
    from histossl.nuclei.segmenter import samples

    published = PaperSettings(seed=settings.seed)
    mpp = published.mpp if method == "paper" else Contrast.mpp
    known, failed = [], 0
    with progress_bar("looking", len(files)) as bar:
        for file in files:
            try:
                with open_slide(file, mpp_default=mpp_default) as slide:
                    known.append(survey(slide, mpp))
            except SlideError as error:
                failed += 1
                say(str(error), "red")
            bar.advance(1)
    start = time.monotonic()
    logs = folder.parent / f".{folder.name}-training"
    taught = samples(known, settings.seed)
    if method == "paper":
        model = learn_paper([field for sample in taught for field in sample.fields], published, logs, device)
    else:
        model = learn(taught, settings, logs, device)
    say(f"learned on {len(known)} images in {time.monotonic() - start:.0f} s")
    return model, failed


def _learned_here(
    files: list[Path], out: Path, mpp_default: float | None, settings: ContrastSettings, device: str
) -> tuple[Method, str]:
    """The model of these inputs: the one in out/model, where it was learned from just these with these settings."""
    from histossl.nuclei.contrast import Contrast

    states = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()]
    key = fingerprint(states, mpp_default, settings)
    folder = out / "model"
    made = folder / "inputs.json"
    if made.exists() and json.loads(made.read_text("utf-8")) == key:
        return Contrast.load(folder, device), key
    model, _ = _learn(files, folder, mpp_default, settings, device)
    model.save(folder)
    with store.whole(made) as part:
        part.write_text(json.dumps(key), "utf-8")
    return model, key


def _model_state(model: str) -> list[object]:
    weights = Path(model) / "model.safetensors"
    return [str(weights.resolve()), weights.stat().st_size, weights.stat().st_mtime_ns] if weights.exists() else []


def _segment_one(
    file: Path,
    out: Path,
    mpp_default: float | None,
    method: Method,
    key: str,
    running: SegmentSettings,
    write: ExportSettings,
    pool: Workers,
) -> dict[str, object]:
    """Segment one slide, write its files, and return its row of the summary."""
    start = time.monotonic()
    with open_slide(file, mpp_default=mpp_default) as slide:
        parts = Parts(out / f".{file.stem}-{parts_key(slide, key, running)}")
        known = survey(slide, method.mpp, running)
        done, found = parts.done(), 0
        small = slide.size.width * slide.size.height * (slide.mpp / method.mpp) ** 2 <= 2 * running.tile**2
        with progress_bar(file.name, None, done) as bar:
            for row, _, nuclei in segment_rows(slide, known, method, running, None if small else pool, done):
                parts.add(row, nuclei)
                found += len(nuclei)
                bar.advance(1)
                bar.say(f"{found / (time.monotonic() - start):.0f} nuclei/s")
        count = _write(slide, parts, out, write)
        square = slide.size.width * slide.size.height * slide.mpp**2 / 1e6
        parts.remove()
    seconds = time.monotonic() - start
    say(f"{file.name}: {count} nuclei in {seconds:.1f} s")
    return {"file": file.name, "status": "done", "nuclei": count, "mm2": round(square, 4), "seconds": round(seconds, 2)}


def _write(slide: Slide, parts: Parts, out: Path, write: ExportSettings) -> int:
    stem = out / slide.path.stem
    name = ".geojson.gz" if write.gzip else ".geojson"
    count = export.write_geojson(_with(stem, name), parts, slide.mpp)
    if write.parquet:
        export.write_parquet(_with(stem, ".parquet"), parts, slide.mpp)
    if write.zarr or (write.labels and slide.vendor == "plain"):
        everything = joined(list(parts))
        if write.zarr:
            export.write_zarr(_with(stem, ".zarr"), everything, slide.size, slide.mpp)
        if write.labels and slide.vendor == "plain":
            export.write_label_tiff(_with(stem, ".tif"), everything, slide.size)
    export.write_overlay(_with(stem, "-overlay.jpg"), slide, parts)
    return count


def _with(stem: Path, ending: str) -> Path:
    """Names may hold dots, so with_suffix will not do."""
    return stem.parent / (stem.name + ending)


_COLUMNS: tuple[str, ...] = ("file", "status", "nuclei", "mm2", "seconds", "error")


def _write_summary(path: Path, rows: list[dict[str, object]]) -> None:
    with store.whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


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
        far = export.extent(joined([a, b]))
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
