"""The probe that is kept: fitted on all labelled patients, with all that a prediction of a new slide is judged by."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from scipy.special import log_softmax

import histossl
from histossl.core.atomic import whole_folder
from histossl.core.config import from_dict, to_dict
from histossl.core.console import say
from histossl.core.errors import FileFormatError, LabelError, SettingsError, file_errors
from histossl.evaluate.conformal import fit_calibration, nearest_patients, strangeness
from histossl.evaluate.labels import Labels
from histossl.evaluate.linear import LinearScore, fit_task
from histossl.evaluate.patients import by_patient, patients_of, steady_maps
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.sources import Source
from histossl.evaluate.steady import Steady
from histossl.evaluate.targets import Task, make_task

FORMAT = "histossl probe 1"
MEAN_PART = "mean"  # as the slide encoder calls it
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class FittedTarget:
    """One target of a fitted probe.

    Attributes:
        target: its name.
        kind: classes, numbers or survival.
        names: of the classes, sorted; empty of numbers and survival.
        score: the linear model, fitted on all labelled slides.
        rows: (n,) int64, the labelled slides among those of the probe.
        truth: (n,) float64, the class by its place in `names`, or the number; (n, 2) time and event of survival.
        held_out: (n, C) float64, the scores of these slides by models that did not see their patients.
        slope: of the calibration of the classes, see `fit_calibration`.
        offsets: (classes,) likewise.
    """

    target: str
    kind: str
    names: tuple[str, ...]
    score: LinearScore
    rows: NDArray[np.int64]
    truth: NDArray[np.float64]
    held_out: NDArray[np.float64]
    slope: float = 1.0
    offsets: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def labels(self) -> list[str]:
        """The labels of the slides in `rows`, as text."""
        if self.kind == "survival":
            return [f"{time:g}{'' if event else '+'}" for time, event in self.truth]
        return [self.names[int(value)] if self.names else f"{value:g}" for value in self.truth]


@dataclass(frozen=True)
class FittedProbe:
    """A probe that can be applied to vectors of new slides.

    Attributes:
        embedding: the name of the vectors.
        ids: N slides, or patients where the settings say so, all of the cohort.
        patients: (N,) text, the patient of each.
        vectors: (N, d) float32.
        strange: (N,) float64, how far each lies from the other patients, see `strangeness`.
        unlearned: (d,) bool, the numbers that this is measured by, see `unlearned_numbers`.
        targets: what it predicts.
        settings: of the probe.
        stages: settings of the stages that made the vectors; empty where nobody says.
    """

    embedding: str
    ids: tuple[str, ...]
    patients: NDArray
    vectors: NDArray[np.float32]
    strange: NDArray[np.float64]
    unlearned: NDArray[np.bool_]
    targets: tuple[FittedTarget, ...]
    settings: ProbeSettings
    stages: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Write model.safetensors and config.json, whole or not at all; `load_probe` reads them.

        Args:
            folder: of the probe; an existing one is replaced.
        """
        arrays = {"vectors": self.vectors, "strange": self.strange, "unlearned": self.unlearned}
        told = []
        for k, one in enumerate(self.targets):
            parts = {"weights": one.score.weights, "intercept": one.score.intercept, "rows": one.rows}
            parts |= {"truth": one.truth, "held_out": one.held_out, "offsets": one.offsets}
            arrays |= {f"{k}.{name}": values for name, values in parts.items()}
            about = {"target": one.target, "kind": one.kind, "names": list(one.names), "slope": one.slope}
            told.append(about | {"scores": list(one.score.names)})
        config = {"format": FORMAT, "histossl": histossl.__version__, "embedding": self.embedding, "targets": told}
        config |= {"settings": to_dict(self.settings), "stages": dict(self.stages)}
        config |= {"slides": list(self.ids), "patients": self.patients.tolist()}
        with whole_folder(folder) as part:
            (part / WEIGHTS).write_bytes(save({name: np.ascontiguousarray(v) for name, v in arrays.items()}))
            (part / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False), "utf-8")


def load_probe(folder: Path) -> FittedProbe:
    """Read what `FittedProbe.save` wrote.

    Args:
        folder: with model.safetensors and config.json.

    Returns:
        The probe.

    Raises:
        FileFormatError: a file is missing, cut short, or of something else.
    """
    hint = "give a study after `histossl probe`, or what `histossl export` wrote of its probe"
    if not (folder / CONFIG).is_file():
        raise FileFormatError(f"{folder}: no probe is kept here", hint)
    with file_errors(folder, hint):
        config, arrays = json.loads((folder / CONFIG).read_text("utf-8")), _arrays(folder / WEIGHTS)
        if config["format"] != FORMAT:
            raise ValueError(f"its format is {config['format']!r}")
        ids, patients = tuple(map(str, config["slides"])), np.array(config["patients"], dtype=str)
        vectors, strange = arrays["vectors"], arrays["strange"]
        if not len(ids) == len(patients) == len(vectors) == len(strange):
            raise ValueError(f"{len(ids)} slides, {len(patients)} patients, {len(vectors)} vectors")
        unlearned = arrays.get("unlearned", np.ones(vectors.shape[1], bool))  # of probes of before, all numbers
        if unlearned.shape != vectors.shape[1:] or unlearned.dtype != bool:
            raise ValueError(f"unlearned {unlearned.shape} {unlearned.dtype} of vectors {vectors.shape}")
        targets = tuple(_target(about, k, arrays) for k, about in enumerate(config["targets"]))
        settings = from_dict(ProbeSettings, config["settings"])
        about = targets, settings, config["stages"]
        return FittedProbe(str(config["embedding"]), ids, patients, vectors, strange, unlearned, *about)


def _arrays(path: Path) -> dict[str, NDArray]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _target(about: Mapping[str, Any], k: int, arrays: Mapping[str, NDArray]) -> FittedTarget:
    parts = {name: arrays[f"{k}.{name}"] for name in ("weights", "intercept", "rows", "truth", "held_out", "offsets")}
    score = LinearScore(tuple(map(str, about["scores"])), parts.pop("weights"), parts.pop("intercept"))
    n, d = len(parts["rows"]), arrays["vectors"].shape[1]
    if score.weights.shape != (d, len(score.names)) or not len(parts["truth"]) == len(parts["held_out"]) == n:
        raise ValueError(f"target {about['target']!r} has arrays of other shapes")
    names = tuple(map(str, about["names"]))
    return FittedTarget(str(about["target"]), str(about["kind"]), names, score, slope=float(about["slope"]), **parts)


def fit_probe(source: Source, labels: Labels, settings: ProbeSettings) -> FittedProbe:
    """Fit a probe on all labelled patients, and score each of them by a model of the others.

    Args:
        source: of the vectors; the first embedding is taken.
        labels: of the slides. A target that cannot be probed is left out where another can.
        settings: of the probe; the folds are those of its first repeat.

    Returns:
        The probe.

    Raises:
        SettingsError: a remedy for sites is set: it takes the slides of a site together, and a new slide is alone.
        LabelError: no target can be probed.
    """
    if settings.site_remedy != "none":
        what = f"probe.site_remedy is {settings.site_remedy}: a new slide alone has no mean of its site"
        raise SettingsError(what, "a probe to be applied to new slides takes --probe.site-remedy none")
    labels = replace(labels, sites={**source.sites, **labels.sites})
    maps = steady_maps(source, labels, settings)
    if settings.unit == "patient":
        source, labels, _ = by_patient(source, labels, settings.combine)
    name, vectors = next(iter(source.vectors.items()))
    targets, failed = [], []
    for target in labels.targets:
        try:
            task = make_task(target, source.ids, labels, settings)
        except LabelError as error:
            failed.append(error)
            continue
        targets.append(_fit(task, vectors[task.rows], settings, None if task.times is None else maps.get(name)))
    if not targets:
        raise failed[0]
    patients = patients_of(source, labels)
    unlearned = unlearned_numbers(source)
    looked_at = vectors[:, unlearned]
    strange = strangeness(nearest_patients(looked_at, looked_at, patients, patients)[1])
    about = tuple(targets), settings, source.stages
    return FittedProbe(name, source.ids, patients, vectors, strange, unlearned, *about)


def unlearned_numbers(source: Source) -> NDArray[np.bool_]:
    """The numbers of the first vectors that no slide encoder learned on the known slides: the mean of the tiles.

    By what was learned on the known slides, prototypes above all, they lie wider apart than new slides of the same
    kind, which then look as if nothing were unlike them.

    Args:
        source: of the vectors.

    Returns:
        (d,) bool; all, where nobody says which the parts are.
    """
    count = next(iter(source.vectors.values())).shape[1]
    found = np.array([name == MEAN_PART for name in source.parts], bool)
    return found if len(found) == count and found.any() else np.ones(count, bool)


def keep_probe(source: Source, labels: Labels, settings: ProbeSettings, folder: Path) -> None:
    """Fit a probe and keep it for new slides; where it cannot be kept, say so, and remove an earlier one.

    Args:
        source: as of `fit_probe`.
        labels: likewise.
        settings: likewise.
        folder: of the probe.
    """
    try:
        fit_probe(source, labels, settings).save(folder)
    except SettingsError as error:
        shutil.rmtree(folder, ignore_errors=True)
        say(f"note: no probe is kept for new slides: {error}", "yellow")


def _fit(task: Task, values: NDArray, settings: ProbeSettings, mapped: Steady | None) -> FittedTarget:
    values = values if mapped is None else mapped(values)
    everyone = fit_task(task, np.arange(len(values)), values, settings, "all labelled slides")
    held_out = np.empty((len(values), len(everyone.names)))
    for fold in range(settings.folds):
        train, test = np.flatnonzero(task.folds[0] != fold), np.flatnonzero(task.folds[0] == fold)
        held_out[test] = fit_task(task, train, values, settings, "")(values[test])
    if mapped is not None:
        everyone = replace(everyone, weights=mapped(everyone.weights.T).T)  # of vectors as they are
    truth, about = np.asarray(task.truth, np.float64), (task.target, task.kind)
    if task.names is None:
        return FittedTarget(*about, (), everyone, task.rows, truth, held_out)
    slope, offsets = fit_calibration(log_probabilities(held_out), task.truth, task.patients)
    names = tuple(map(str, task.names))
    return FittedTarget(*about, names, everyone, task.rows, truth, held_out, slope, offsets)


def log_probabilities(scores: NDArray) -> NDArray[np.float64]:
    """The logarithms of the classes' probabilities.

    Args:
        scores: (n, 1) logits of the second of two classes, or (n, K) of K classes.

    Returns:
        (n, classes).
    """
    return log_softmax(np.hstack([np.zeros_like(scores), scores]) if scores.shape[1] == 1 else scores, axis=1)


def made_by(stages: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a vector out of a slide, besides the slide.

    Args:
        stages: settings of the stages; may be empty.

    Returns:
        Name -> what identifies it, None where nobody says. The number format is no part of it.
    """
    found = {name: value for name, value in stages.items() if isinstance(value, dict)}
    tile, slide = found.get("encode", {}).get("encoder"), found.get("slide-encoder")
    embed = {name: value for name, value in found.get("embed", {}).items() if name != "precision"}
    return {
        "tile encoder": {k: v for k, v in tile.items() if k != "dtype"} if isinstance(tile, dict) else None,
        "tiles": found.get("inspect", {}).get("tile"),
        "slide encoder": slide,
        "views of the embedding": embed if slide else None,
    }


def check_vectors(probe: FittedProbe, source: Source) -> None:
    """Refuse vectors of other encoders than those that the probe was fitted on.

    Args:
        probe: the probe.
        source: the new vectors; the first embedding is looked at.

    Raises:
        FileFormatError: they are of another encoder, of one that nobody names, or of another length.
    """
    ours, theirs = made_by(probe.stages), made_by(source.stages)
    if other := [name for name in ours if ours[name] != theirs[name]]:
        unknown = all(theirs[name] is None for name in other)
        words = "nothing says that these vectors are of the same" if unknown else "these vectors are of another"
        what = f"the probe does not fit: {words} {' and '.join(other)}"
        raise FileFormatError(what, "embed the slides with the encoders of the study of the probe, or give the slides")
    values = next(iter(source.vectors.values()))
    if values.shape[1] != probe.vectors.shape[1]:
        what = f"the probe takes vectors of {probe.vectors.shape[1]} numbers, and these have {values.shape[1]}"
        raise FileFormatError(what, "embed the slides with the encoders of the study of the probe")
