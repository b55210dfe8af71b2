"""The commands of the second pillar: parameters are their flags, the returned number is the exit code.

What computes is imported when a command runs, after a first look at what it was given: that look takes no second.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from histossl.cli.first_look import look_for_device
from histossl.core.config import fingerprint
from histossl.core.console import say
from histossl.core.errors import FileFormatError, SettingsError
from histossl.core.hub import PREFIX, model_folder
from histossl.core.names import folded
from histossl.execution.cluster import open_workers
from histossl.execution.shared_table import SharedTable
from histossl.execution.workers import Workers
from histossl.nuclei.outputs import inputs_beside, refuse_to_replace
from histossl.nuclei.settings import AdaptSettings, ExportSettings, SegmentSettings, SelfTrainingSettings
from histossl.wsi.areas import AreaFolder, AreaSettings, SlideAreas
from histossl.wsi.folders import EXTENSIONS, Found, look_for_slides

if TYPE_CHECKING:
    from histossl.nuclei.segment import MethodName


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
    look_for_device(device)
    if method not in ("self-training", "patch-contrast"):
        raise SettingsError(f"no method {method!r} can be trained", "use self-training or patch-contrast")
    from histossl.cli.nuclei_learning import learn_model

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
    _look_at(model, adapt, device)
    given = _with_areas(inputs_beside(_files(inputs), inputs, out), _drawn(areas, area))
    files = list(given)
    from histossl.cli.nuclei_learning import adapted_here, learned_here, state_of
    from histossl.nuclei.segment import COLUMNS, SegmentJob, built, segment_inputs

    known = SharedTable(out, "nuclei.csv", COLUMNS).slides() if out.is_dir() else []
    refuse_to_replace(files, out, known)
    shared = SharedTable(out, "nuclei.csv", COLUMNS)
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


def _look_at(model: str, adapt: bool, device: str) -> None:
    look_for_device(device)
    if model not in ("general", "self", "prior") and not model.startswith(PREFIX) and not Path(model).exists():
        hint = "use general, self, prior, or a folder that `histossl nuclei train` wrote"
        raise FileFormatError(f"there is no model {model}", hint)
    if adapt and model in ("self", "prior"):
        raise SettingsError(f"{model} cannot be adapted", "take general, or a folder that `nuclei train` wrote")


def _files(inputs: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in inputs:
        if not path.exists():
            raise SettingsError(f"there is no {path}", "give images, slides, or folders of them")
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
    from histossl.wsi.named_areas import CoreGrid, open_areas

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
    from histossl.nuclei.segment import MethodName

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
