"""A probe as files: a linear model with its calibration and its cohort, which judges new slides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

import histossl
from histossl.core.atomic import whole_folder
from histossl.core.config import to_dict
from histossl.core.errors import FileFormatError, LabelError
from histossl.evaluate.heatmap import LinearScore, fit_score
from histossl.evaluate.labels import Labels
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.sources import Source
from histossl.evaluate.targets import make_task

FORMAT = "histossl probe 1"
NEAREST = 5  # slides behind a distance, and patients that are shown
RARE = 0.01  # share of the cohort's own slides that lie as far from the others as what is called unlike it


@dataclass(frozen=True)
class Prediction:
    """What a saved probe says of one slide.

    Attributes:
        probabilities: class -> calibrated probability; they sum to 1.
        chosen: the conformal set: it holds the true class of a share `coverage` of new patients of the same kind.
        farther: share of the cohort's own slides that lie farther from the slides of other patients than this one does.
        nearest: (patient, slide, class, distance), the most similar slide of each of the nearest patients.
        known: whether the slide is one of those that the probe was made of.
    """

    probabilities: dict[str, float]
    chosen: tuple[str, ...]
    farther: float
    nearest: tuple[tuple[str, str, str, float], ...]
    known: bool

    @property
    def unlike(self) -> bool:
        """Whether the slide is unlike everything in the cohort, so that nothing that is said of it can be relied on."""
        return self.farther < RARE


@dataclass(frozen=True)
class SavedProbe:
    """A logistic regression on slide vectors, with what is needed to trust a single prediction.

    A fifth of the patients (a fold) is not trained on: on one slide of each, drawn at random, the probabilities are
    calibrated, and the conformal scores taken.

    Attributes:
        target: what is predicted.
        names: (classes,) text.
        score: the linear model.
        calibration: (K, C + 1), logits to logits: weights, then intercept; K = 1 for two classes.
        misfits: (n,) 1 − probability of the true class, one for each patient that was not trained on.
        vectors: (N, d) float32 of the cohort.
        slides: (N,), patients: (N,), labels: (N,), text.
        encoder: fingerprint of the slide encoder of the vectors.
        about: further entries: settings, figures.
    """

    target: str
    names: tuple[str, ...]
    score: LinearScore
    calibration: NDArray[np.float64]
    misfits: NDArray[np.float64]
    vectors: NDArray[np.float32]
    slides: tuple[str, ...]
    patients: tuple[str, ...]
    labels: tuple[str, ...]
    encoder: str
    about: Mapping[str, Any] = field(default_factory=dict)

    def predict(self, vector: NDArray, slide: str = "", coverage: float = 0.9) -> Prediction:
        """Judge a slide.

        Args:
            vector: (d,) of the slide encoder that `encoder` names.
            slide: its name, to know whether it is one of the cohort.
            coverage: share of new patients whose class the set should hold, in (0, 1).

        Returns:
            The prediction.
        """
        logits = self.score(vector[None])
        misfit = 1 - _probabilities(logits)[0]
        rank = int(np.ceil((len(self.misfits) + 1) * coverage))
        limit = np.inf if rank > len(self.misfits) else np.sort(self.misfits)[rank - 1]
        calibrated = _probabilities(logits @ self.calibration[:, :-1].T + self.calibration[:, -1])[0]
        distance, nearest = self._near(vector)
        own = self._own_distances()
        return Prediction(
            dict(zip(self.names, map(float, calibrated), strict=True)),
            tuple(name for name, value in zip(self.names, misfit, strict=True) if value <= limit),
            float((own > distance).mean()),
            nearest,
            slide in self.slides,
        )

    def _scaled(self, values: NDArray) -> NDArray[np.float64]:
        deviation = self.vectors.std(axis=0)
        return (np.asarray(values, np.float64) - self.vectors.mean(axis=0)) / np.where(deviation > 0, deviation, 1)

    def _near(self, vector: NDArray) -> tuple[float, tuple[tuple[str, str, str, float], ...]]:
        """Mean distance of the nearest slides, and the nearest patients with theirs."""
        far = np.linalg.norm(self._scaled(self.vectors) - self._scaled(vector[None]), axis=1)
        found: dict[str, tuple[str, str, str, float]] = {}
        for k in np.argsort(far, kind="stable"):
            found.setdefault(self.patients[k], (self.patients[k], self.slides[k], self.labels[k], float(far[k])))
        return float(np.sort(far)[:NEAREST].mean()), tuple(found.values())[:NEAREST]

    def _own_distances(self) -> NDArray[np.float64]:
        """(N,) the same mean distance of each slide of the cohort, to slides of other patients."""
        x, people = self._scaled(self.vectors), np.array(self.patients)
        square = (x**2).sum(axis=1)
        far = np.sqrt(np.maximum(square[:, None] + square - 2 * x @ x.T, 0))
        far[people[:, None] == people] = np.inf
        near = np.sort(far, axis=1)[:, :NEAREST]
        return np.where(np.isfinite(near).all(axis=1), near.mean(axis=1), np.inf)

    def save(self, folder: Path) -> None:
        """Write model.safetensors and config.json, whole or not at all.

        Args:
            folder: for both.

        Raises:
            OSError: the folder cannot be written.
        """
        with whole_folder(folder) as part:
            self.write(part)

    def write(self, folder: Path) -> None:
        """Write model.safetensors and config.json into an existing folder.

        Args:
            folder: for both.
        """
        arrays = {"weights": self.score.weights, "intercept": self.score.intercept, "calibration": self.calibration}
        arrays |= {"misfits": self.misfits, "vectors": self.vectors}
        config = {"format": FORMAT, "histossl": histossl.__version__, "target": self.target, "classes": self.names}
        config |= {"slides": self.slides, "patients": self.patients, "labels": self.labels, "encoder": self.encoder}
        config |= {"taught_by": self.score.taught_by, "about": dict(self.about)}
        save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> SavedProbe:
        """Read what `save` wrote; nothing in it is executed.

        Args:
            folder: of the probe.

        Returns:
            The probe.

        Raises:
            FileFormatError: a file is absent, damaged or of something else.
        """
        hint = "give the folder of one target in probe-model/, which `histossl probe STUDY` writes"
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if config.get("format") != FORMAT:
                raise FileFormatError(f"{folder}: is no saved probe", hint)
            arrays = load_file(folder / "model.safetensors")
            names, (d, count) = tuple(map(str, config["classes"])), arrays["weights"].shape
            listed = (tuple(map(str, config[key])) for key in ("slides", "patients", "labels"))
            slides, patients, labels = listed
            sizes = {len(arrays["vectors"]), len(slides), len(patients), len(labels)}
            if len(sizes) > 1 or arrays["vectors"].shape[1] != d or count != (1 if len(names) == 2 else len(names)):
                raise ValueError("its parts do not fit each other")
            spoken = names[1:] if len(names) == 2 else names
            score = LinearScore(spoken, arrays["weights"], arrays["intercept"], str(config["taught_by"]))
            rest = (arrays["calibration"], arrays["misfits"], arrays["vectors"], slides, patients, labels)
            return cls(str(config["target"]), names, score, *rest, str(config["encoder"]), config["about"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise FileFormatError(f"{folder}: no probe can be read ({str(error)[:200]})", hint) from error


def fit_saved(source: Source, labels: Labels, target: str, settings: ProbeSettings, encoder: str) -> SavedProbe:
    """Train the probe of one target for saving.

    Args:
        source: of the slide vectors; the first embedding is used.
        labels: of the target.
        target: a target with classes.
        settings: of the probe.
        encoder: fingerprint of the slide encoder.

    Returns:
        The probe.

    Raises:
        LabelError: the target cannot be probed, or is no target with classes.
    """
    task = make_task(target, source.ids, labels, settings)
    if task.names is None:
        raise LabelError(f"{target}: only probes of classes are saved", "name another with --probe.targets")
    values = next(iter(source.vectors.values()))[task.rows]
    held = task.folds[0] == 0
    taught = f"{int((~held).sum())} labelled slides of {len(np.unique(task.patients[~held]))} patients"
    score = fit_score(values[~held], task.truth[~held], task.names, settings, taught)
    drawn = _one_each(task.patients, np.flatnonzero(held), np.random.default_rng([settings.seed, 2]))
    logits, truth = score(values[drawn]), task.truth[drawn]
    misfits = 1 - _probabilities(logits)[np.arange(len(drawn)), truth]
    return SavedProbe(
        target,
        tuple(map(str, task.names)),
        score,
        _calibrated(logits, truth, len(task.names)),
        misfits,
        np.asarray(values, np.float32),
        tuple(map(str, task.slides)),
        tuple(map(str, task.patients)),
        tuple(map(str, task.names[task.truth])),
        encoder,
        {"settings": to_dict(settings), "calibrated_on": f"{len(drawn)} patients"},
    )


def _one_each(patients: NDArray, rows: NDArray, rng: np.random.Generator) -> NDArray[np.int64]:
    """One of the rows for each patient, at random: patients are what is exchangeable, not their slides."""
    rows = rng.permutation(rows)
    return np.sort(rows[np.unique(patients[rows], return_index=True)[1]])


def _calibrated(logits: NDArray, truth: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """(K, C + 1) logits to calibrated logits (Platt); the identity where a class is absent."""
    if len(np.unique(truth)) < classes:
        return np.column_stack([np.eye(logits.shape[1]), np.zeros(logits.shape[1])])
    fitted = LogisticRegression(max_iter=1000).fit(logits, truth)
    return np.column_stack([fitted.coef_, fitted.intercept_])


def _probabilities(logits: NDArray) -> NDArray[np.float64]:
    """(n, classes) from (n, C) logits; a single one is that of the second of two classes."""
    return softmax(np.column_stack([np.zeros(len(logits)), logits]) if logits.shape[1] == 1 else logits, axis=1)
