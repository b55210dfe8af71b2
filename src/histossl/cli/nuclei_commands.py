"""The commands of the second pillar: parameters are their flags, the returned number is the exit code.

What needs torch is imported when a command runs.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
import shapely
from rich.table import Table

from histossl.cli.nuclei_learning import adapted_here, learn_model, learned_here, state_of
from histossl.core import atomic, tables
from histossl.core.config import fingerprint
from histossl.core.console import console, say
from histossl.core.errors import LabelError, SettingsError
from histossl.core.hub import model_folder
from histossl.core.names import folded
from histossl.execution.cluster import open_workers
from histossl.execution.shared_table import SharedTable
from histossl.execution.workers import Workers
from histossl.nuclei import strata
from histossl.nuclei.geojson import Outlined, label_image, read_outlined
from histossl.nuclei.maps import DENSITY
from histossl.nuclei.metrics import METRICS, Scores, summarise
from histossl.nuclei.metrics import score as score_labels
from histossl.nuclei.outputs import inputs_beside, refuse_to_replace
from histossl.nuclei.pseudo_labels import AdaptSettings, SelfTrainingSettings
from histossl.nuclei.segment import COLUMNS, ExportSettings, MethodName, SegmentJob, built, segment_inputs
from histossl.nuclei.stain_survey import SegmentSettings
from histossl.wsi.areas import AreaFolder, AreaSettings, SlideAreas
from histossl.wsi.folders import EXTENSIONS, Found, look_for_slides
from histossl.wsi.named_areas import CoreGrid, open_areas


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
        model, failed = learn_model(files, out, mpp_default, self_training, device, readers, method)
    model.save(out)
    say(f"done: {out}", "green")
    return 1 if failed else 0


def segment(
    inputs: list[Path],
    *,
    out: Path,
    model: str = "general",
    adapt: bool = False,
    areas: Path | None = None,
    mpp_default: float | None = None,
    area: AreaSettings = AreaSettings(),
    self_training: SelfTrainingSettings = SelfTrainingSettings(),
    adapting: AdaptSettings = AdaptSettings(),
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
        model: general (the model that comes with the package), self (learn on the inputs first, then segment them),
            prior (a threshold, no learning), a folder that `nuclei train` wrote, or hf:OWNER/NAME.
        adapt: train on from the model on the inputs first, and take the result where it is judged better, without
            labels; else the model stands.
        areas: a folder of the areas that nuclei are looked for in: GeoJSON of QuPath, GeoParquet, GeoPackage or mask
            images, named as the slides; their union counts; see docs/how-to/areas.md.
        mpp_default: µm per pixel of images that carry none.
        area: which of the areas count, and what happens to slides without any.
        self_training: how `self` learns.
        adapting: how `adapt` does.
        running: how slides are gone over.
        write: which files are written.
        workers: processes that read slides, and part and outline nuclei.
        timeout: seconds that a worker may take for a tile before it is killed, and the slide given up.
        scheduler: work on the Dask cluster at this address, such as tcp://host:8786, instead of on this machine alone.
        slurm: work in so many SLURM jobs, as JOBS or JOBS:NAME; see docs/scale.md.
        device: auto, cpu or cuda.
    """
    given = _with_areas(inputs_beside(_files(inputs), inputs, out), _drawn(areas, area))
    files = list(given)
    known = SharedTable(out, "nuclei.csv", COLUMNS).slides() if out.is_dir() else []
    refuse_to_replace(files, out, known)
    shared = SharedTable(out, "nuclei.csv", COLUMNS)
    if adapt and model in ("self", "prior"):
        raise SettingsError(f"{model} cannot be adapted", "take general, or a folder that `nuclei train` wrote")
    if adapt or model == "self":
        # One run learns, the others wait for its model.
        with shared.share(_waiting), shared.learning(_waiting_for_model), Workers(workers, timeout) as readers:
            if adapt:
                method = adapted_here(files, shared.folder, mpp_default, _named(model, device), adapting, readers)
            else:
                method = learned_here(files, shared.folder, mpp_default, self_training, device, readers)
    else:
        method = _named(model, device)
    built(method)  # a model that cannot be read is told before any slide is
    with shared.share(_waiting), open_workers(workers, timeout, scheduler, slurm) as pool:
        about = shared.folder, mpp_default, method, running, write
        jobs = [SegmentJob(file.stem, file, state_of(file), *about, own) for file, own in given.items()]
        rows = segment_inputs(shared, jobs, pool)
    failed = sum(row["status"] == "failed" for row in rows)
    say(f"done: {sum(int(row['nuclei'] or 0) for row in rows)} nuclei in {len(rows) - failed} images, {out}", "green")
    return 1 if failed else 0


def score(
    prediction: Path,
    truth: Path,
    out: Path | None = None,
    seed: int = 0,
    *,
    by: str = "",
    images: Path | None = None,
    mpp: float = 0.25,
) -> int:
    """Dice, AJI, PQ, F1, precision and recall of nuclei against ground truth, with bootstrap intervals.

    Args:
        prediction: a label image or GeoJSON, or a folder of them.
        truth: the same, with the same names; label images (TIFF or PNG of integers) or GeoJSON in pixels.
        out: a CSV, a row an image.
        seed: of the bootstrap.
        by: also the recall of nuclei in groups: area, darkness, or both as area,darkness.
        images: for the darkness: the image, or the folder of images, that the labels are of, with the same names.
        mpp: for the area: µm per pixel of the labels.
    """
    kinds = strata.kinds_of(by, images)
    scores: dict[str, Scores] = {}
    found: list[strata.Found] = []
    for name, a, b in _pairs(prediction, truth):
        pair = _read_pair(a, b)
        scores[name] = score_labels(*pair)
        if scores[name].dice < _STRANGERS and all(labels.any() for labels in pair):
            what = f"SUSPECT {name}: nuclei and truth hardly overlap, Dice {scores[name].dice:.3f}"
            say(f"{what}: are both of this picture, and in its pixels rather than µm?", "yellow")
        if kinds:
            density = strata.density_of(images, b, name) if images else None
            found.append(strata.found_nuclei(*pair, mpp, density))
    table = Table(box=None, header_style="bold")
    for column in ("image", *METRICS):
        table.add_column(column, justify="left" if column == "image" else "right")
    for name, one in scores.items():
        table.add_row(name, *(f"{value:.3f}" for value in astuple(one)))
    means = summarise(list(scores.values()), np.random.default_rng(seed))
    table.add_row("mean", *(f"{means[m].mean:.3f}" for m in METRICS), style="bold")
    table.add_row("95 %", *(f"{means[m].low:.3f}-{means[m].high:.3f}" for m in METRICS))
    console.print(table)
    for kind in kinds:
        console.print(_groups_table(strata.grouped(found, kind), kind))
    if out is not None:
        with atomic.whole(out) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = tables.writer(file)
            writer.writerow(("image", *METRICS))
            writer.writerows((tables.cell(name), *astuple(one)) for name, one in scores.items())
    return 0


def _groups_table(groups: list[strata.Group], kind: str) -> Table:
    table = Table(box=None, header_style="bold")
    unit = "area, µm²" if kind == "area" else "darkness / median"
    for column in (unit, "nuclei", "recall", "missed"):
        table.add_column(column, justify="right")
    for group in groups:
        name = f"{group.low:g} to {group.high:g}" if np.isfinite(group.high) else f"from {group.low:g}"
        table.add_row(name, str(group.nuclei), f"{group.recall:.3f}", f"{group.missed:.3f}")
    return table


def _files(inputs: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in inputs:
        found = look_for_slides(path) if path.is_dir() else Found([path])
        files += found.slides
        if found.passed:
            some = "; ".join(f"{file.name} {why}" for file, why in list(found.passed.items())[:3])
            more = f"; and {len(found.passed) - 3} more" if len(found.passed) > 3 else ""
            say(f"note: passed over {len(found.passed)} files that may be slides: {some}{more}", "yellow")
    if not files:
        raise SettingsError("no images or slides there", f"formats are {', '.join(sorted(EXTENSIONS))}")
    return files


def _drawn(areas: Path | None, settings: AreaSettings) -> AreaFolder | None:
    found = open_areas(areas, settings)
    if isinstance(found, CoreGrid):
        raise SettingsError("nuclei are looked for in all cores of a microarray anyway", "leave --areas out")
    return found


def _with_areas(found: Sequence[Path], areas: AreaFolder | None) -> dict[Path, SlideAreas | None]:
    """The inputs and their areas, None where all tissue counts; no two of them are called the same."""
    files = [Path(os.path.abspath(file)) for file in found]
    given = areas.chosen(files) if areas else dict.fromkeys(files)
    twice = sorted(
        stem for stem, count in Counter(folded(file.stem) for file in files if file in given).items() if count > 1
    )
    if twice:
        raise SettingsError(f"several inputs are called {', '.join(twice[:3])}", "segment them into different folders")
    return given


def _waiting(holder: str) -> None:
    say(f"waiting for another run that needs the folder for itself ({holder})", "yellow")


def _waiting_for_model() -> None:
    say("waiting for another run that learns the model", "yellow")


def _named(model: str, device: str) -> MethodName:
    """The method of a name, which goes before a folder that is called the same, or of a model's folder."""
    if model == "prior":
        return MethodName(model, device, fingerprint(model))
    if model == "general":
        from histossl.nuclei.segmenter import GENERAL

        weights = (GENERAL / "model.safetensors").read_bytes()
        return MethodName(model, device, fingerprint(model, hashlib.sha256(weights).hexdigest()))
    # The real path: however it is spelt, a model segments an input once.
    model = str(model_folder(model))
    folder = str(Path(model).resolve()) if Path(model).exists() else model
    return MethodName(folder, device, fingerprint(folder, _model_state(model)))


def _model_state(model: str) -> list[object]:
    weights = Path(model) / "model.safetensors"
    return [str(weights.resolve()), weights.stat().st_size, weights.stat().st_mtime_ns] if weights.exists() else []


_STRANGERS = 0.05  # Dice below this is that of nuclei of another picture or in another unit
_LABEL_FILES = (".tif", ".tiff", ".png", ".json", ".geojson", ".geojson.gz")


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
        details = [
            f"{len(names)} only in {path}: {', '.join(names[:3])}"
            for names, path in ((lost, truth), (extra, prediction))
            if names
        ]
        raise LabelError(f"the two folders do not match ({'; '.join(details)})", "files are matched by their names")
    return [(name, a[name], b[name]) for name in sorted(b)]


def _labels_in(folder: Path) -> dict[str, Path]:
    """Files by name without ending; of a nucleus's label image and GeoJSON the former."""
    found: dict[str, Path] = {}
    for ending in reversed(_LABEL_FILES):
        for path in folder.iterdir():
            named = path.name.endswith(ending) and not path.name.startswith(".")
            if named and not path.name.endswith(DENSITY):  # a map is no label image
                found[path.name.removesuffix(ending)] = path
    if not found:
        raise LabelError(f"{folder} holds no label images or GeoJSON", f"endings are {', '.join(_LABEL_FILES)}")
    return found


def _read_pair(prediction: Path, truth: Path) -> tuple[np.ndarray, np.ndarray]:
    read = _read_labels(prediction), _read_labels(truth)
    sizes = [labels.shape for labels in read if isinstance(labels, np.ndarray)]
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        what = f"{prediction} is {sizes[0][1]} x {sizes[0][0]} pixels, {truth} {sizes[1][1]} x {sizes[1][0]}"
        raise LabelError(what, "score label images of the same picture")
    shapes = [labels.shapes for labels in read if not isinstance(labels, np.ndarray)]
    far = np.max([shapely.total_bounds(part)[2:] for part in shapes if len(part)] or [[1, 1]], axis=0)
    height, width = sizes[0] if sizes else (max(1, int(np.ceil(far[1]))), max(1, int(np.ceil(far[0]))))
    a, b = (part if isinstance(part, np.ndarray) else label_image(part, height, width) for part in read)
    return a, b


def _read_labels(path: Path) -> np.ndarray | Outlined:
    if path.name.endswith((".geojson", ".geojson.gz", ".json")):
        found = read_outlined(path)
        if details := found.note():
            say(f"note: {path}: {details}", "yellow")
        return found
    from skimage.io import imread
    from skimage.measure import label as connected

    try:
        labels = np.squeeze(imread(path))
    except (OSError, ValueError, SyntaxError) as error:
        raise LabelError(f"{path}: no label image ({error})") from error
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        what = f"{path}: labels must be (H, W) integers, got {labels.shape} of {labels.dtype}"
        raise LabelError(what, "save a label image: 0 for background, a number for each nucleus")
    pieces = np.asarray(connected(labels, connectivity=1)).max() if len(np.unique(labels)) == 2 else 0
    if pieces > 2:
        what = f"{path}: is a mask: its {pieces} pieces have one number, {labels.max()}"
        raise LabelError(what, "give each nucleus a number of its own")
    return labels
