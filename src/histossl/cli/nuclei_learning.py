"""What the nuclei commands learn before they segment: a model of the inputs, or one adapted to them.

What needs torch is imported when a command runs.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from histossl.core import atomic
from histossl.core.config import fingerprint
from histossl.core.console import progress_bar, say
from histossl.core.errors import SettingsError, SlideError, TrainingError
from histossl.execution.failures import failure_reason
from histossl.execution.workers import Workers
from histossl.nuclei.segment import MethodName, built
from histossl.nuclei.settings import AdaptSettings, PseudoLabelSettings, SelfTrainingSettings
from histossl.nuclei.stain_survey import StainSurvey, SurveyTask, survey_there
from histossl.wsi.slide import slide_state

if TYPE_CHECKING:
    from histossl.nuclei.patch_contrast import PatchContrast
    from histossl.nuclei.self_training import SelfTraining


def learn_model(
    files: list[Path],
    folder: Path,
    mpp_default: float | None,
    settings: SelfTrainingSettings,
    device: str,
    readers: Workers,
    method: str = "self-training",
) -> tuple[SelfTraining | PatchContrast, int]:
    """Learn a model of nuclei from the inputs that can be read.

    Args:
        files: the inputs.
        folder: where the caller will save the model; the training log goes beside it.
        mpp_default: micrometres per pixel of inputs that do not state it.
        settings: of the self-training; of patch contrast only its seed counts.
        device: of torch, or `auto`.
        readers: processes that read the inputs.
        method: `self-training` or `patch-contrast`.

    Returns:
        The model, and the number of inputs that cannot be read.

    Raises:
        TrainingError: the inputs show nothing to learn from.
    """
    from histossl.nuclei.patch_contrast import learn_patch_contrast
    from histossl.nuclei.patch_sampling import PatchContrastSettings
    from histossl.nuclei.segmenter import samples
    from histossl.nuclei.self_training import SelfTraining, learn

    published = PatchContrastSettings(seed=settings.seed)
    known, failed = _surveyed(
        files, mpp_default, published.mpp if method == "patch-contrast" else SelfTraining.mpp, readers
    )
    start = time.monotonic()
    logs = folder.parent / f".{folder.name}-training"
    taught = samples(known, settings.seed)
    if method == "patch-contrast":
        model = learn_patch_contrast([field for sample in taught for field in sample.fields], published, logs, device)
    else:
        model = learn(taught, settings, logs, device)
    say(f"learned on {len(known)} images in {time.monotonic() - start:.0f} s")
    return model, failed


def _surveyed(
    files: list[Path],
    mpp_default: float | None,
    mpp: float,
    readers: Workers,
    support: PseudoLabelSettings | None = None,
) -> tuple[list[StainSurvey], int]:
    """What is known about the inputs that can be read, and how many cannot."""
    known, failed = [], 0
    tasks = (SurveyTask(file, mpp_default, mpp, support=support) for file in files)
    with progress_bar("looking", len(files)) as bar:
        for task, answer in readers.map(survey_there, tasks):
            if isinstance(answer, Exception):
                failed += 1
                say(failure_reason(answer, task.path), "red")
            else:
                known.append(answer)
            bar.advance(1)
    return known, failed


def adapted_here(
    files: list[Path],
    out: Path,
    mpp_default: float | None,
    method: MethodName,
    settings: AdaptSettings,
    readers: Workers,
) -> MethodName:
    """Adapt a model to these inputs, or take the one in out/model that was adapted to them with these settings.

    Args:
        files: the inputs.
        out: folder of the results; the model is kept in out/model.
        mpp_default: micrometres per pixel of inputs that do not state it.
        method: the model to begin with, and its device.
        settings: of the adaptation.
        readers: processes that read the inputs.

    Returns:
        The model in out/model; `method` where the inputs show nothing to learn from.

    Raises:
        FileFormatError: the model to begin with cannot be read.
        SettingsError: it is of a kind that cannot be adapted.
    """
    from histossl.nuclei.adapt import adapt
    from histossl.nuclei.segmenter import samples
    from histossl.nuclei.self_training import SelfTraining

    teacher = built(method)
    if not isinstance(teacher, SelfTraining):
        raise SettingsError(f"{method.name}: such a model cannot be adapted", "take general, or leave out --adapt")
    states = [(str(file.resolve()), state_of(file)) for file in files]
    key = fingerprint(states, mpp_default, settings, method.key)
    folder = out / "model"
    made = folder / "inputs.json"
    if not (made.exists() and json.loads(made.read_text("utf-8")) == key):
        known, _ = _surveyed(files, mpp_default, SelfTraining.mpp, readers, teacher.support)
        start = time.monotonic()
        try:
            result = adapt(samples(known, settings.seed), teacher, settings, out / ".model-training", method.device)
        except TrainingError as error:
            say(f"{error.what}: {method.name} stands as it is", "yellow")
            return method
        gain = f"(sure nuclei found {result.before.sure:.3f} before, {result.after.sure:.3f} after; found again in "
        gain += f"another stain {result.before.steady:.3f} before, {result.after.steady:.3f} after)"
        what = "adapting helped" if result.helped else f"adapting did not help, {method.name} stands as it is"
        say(f"{what} {gain}, {time.monotonic() - start:.0f} s")
        result.model.save(folder)
        with atomic.whole(made) as part:
            part.write_text(json.dumps(key), "utf-8")
    return MethodName(str(folder), method.device, key)


def learned_here(
    files: list[Path],
    out: Path,
    mpp_default: float | None,
    settings: SelfTrainingSettings,
    device: str,
    readers: Workers,
) -> MethodName:
    """Learn a model from these inputs, or take the one in out/model that was learned from them with these settings.

    Args:
        files: the inputs.
        out: folder of the results; the model is kept in out/model.
        mpp_default: micrometres per pixel of inputs that do not state it.
        settings: of the self-training.
        device: of torch, or `auto`.
        readers: processes that read the inputs.

    Returns:
        The model in out/model; the prior where the inputs show nothing to learn from.
    """
    states = [(str(file.resolve()), state_of(file)) for file in files]
    key = fingerprint(states, mpp_default, settings)
    folder = out / "model"
    made = folder / "inputs.json"
    if not (made.exists() and json.loads(made.read_text("utf-8")) == key):
        try:
            model, _ = learn_model(files, folder, mpp_default, settings, device, readers)
        except TrainingError as error:
            # Empty images are no reason to stop: the prior finds nothing on them either, and says why.
            say(f"{error.what}: taking the prior", "yellow")
            return MethodName("prior", device, fingerprint("prior"))
        model.save(folder)
        with atomic.whole(made) as part:
            part.write_text(json.dumps(key), "utf-8")
    return MethodName(str(folder), device, key)


def state_of(file: Path) -> str:
    """As `slide_state`, without an error.

    Args:
        file: a slide or image.

    Returns:
        The state; empty where it cannot be found.
    """
    try:
        return slide_state(file)
    except SlideError:  # who reads it says why
        return ""
