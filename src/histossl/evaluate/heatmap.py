"""Where on a slide a linear probe's score comes from: the exact share of every tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

from histossl.core.errors import LabelError
from histossl.evaluate.labels import Labels
from histossl.evaluate.logistic import prepare, solve
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.sources import Source
from histossl.evaluate.targets import make_task
from histossl.gigassl.embed import EmbedSettings, explain_slide
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.views import ViewSettings


@dataclass(frozen=True)
class LinearScore:
    """A linear probe, written as what it is of a slide's vector: logits = vector @ weights + intercept.

    Attributes:
        names: what each logit speaks for: of two classes the second by name, against the first; of more, each.
        weights: (d, C) float64.
        intercept: (C,) float64.
        taught_by: in words, which slides it was trained on.
    """

    names: tuple[str, ...]
    weights: NDArray[np.float64]
    intercept: NDArray[np.float64]
    taught_by: str = ""

    def __call__(self, vectors: NDArray) -> NDArray[np.float64]:
        """Logits (N, C) of vectors (N, d)."""
        return np.asarray(vectors, np.float64) @ self.weights + self.intercept


def fit_score(
    vectors: NDArray, classes: NDArray[np.int64], names: NDArray, settings: ProbeSettings, taught_by: str = ""
) -> LinearScore:
    """The probe's logistic regression on vectors (n, d) of slides with classes (n,) 0, 1, ..., all of which occur."""
    scaler = StandardScaler().fit(np.asarray(vectors, np.float64))
    unit = scaler.scale_ * vectors.shape[1] ** 0.5
    w, b, _ = solve(prepare((vectors - scaler.mean_) / unit, classes, settings.balanced), settings.C)
    weights = w / unit[:, None]
    spoken = tuple(map(str, names[1:] if len(names) == 2 else names))
    return LinearScore(spoken, weights, b - scaler.mean_ @ weights, taught_by)


def fit_scores(source: Source, labels: Labels, settings: ProbeSettings) -> dict[str, dict[str, LinearScore]]:
    """Target -> slide -> the probe that judges it: taught by no slide of its patient, as in the probe's first repeat; a
    slide without a label is judged by one that all labelled slides taught.

    Raises:
        LabelError: a target that cannot be probed, or is a number rather than a class.
    """
    vectors = next(iter(source.vectors.values()))
    found = {}
    for target in labels.targets:
        task = make_task(target, source.ids, labels, settings)
        if task.names is None:
            raise LabelError(f"{target}: numbers have no classes to explain", "name another with --probe.targets")
        values = vectors[task.rows]
        everyone = fit_score(values, task.truth, task.names, settings, "all labelled slides")
        scores = dict.fromkeys(source.ids, everyone)
        for fold in range(settings.folds):
            train = task.folds[0] != fold
            words = f"the labelled slides outside of fold {fold + 1}"
            score = fit_score(values[train], task.truth[train], task.names, settings, words)
            scores |= dict.fromkeys(task.slides[~train], score)
        found[target] = scores
    return found


@dataclass(frozen=True)
class Heatmap:
    """A slide's logits and what each of its tiles gives to them.

    Attributes:
        slide_id: the slide.
        names: what each logit speaks for.
        logits: (C,) float64.
        shares: (N, C) float64; a column adds up to its logit.
        looked_at: (N,) float64, the part that each tile had in the slide's vector; adds up to 1.
        vector: (d,) float32, the slide's.
    """

    slide_id: str
    names: tuple[str, ...]
    logits: NDArray[np.float64]
    shares: NDArray[np.float64]
    looked_at: NDArray[np.float64]
    vector: NDArray[np.float32]

    def scores(self) -> NDArray[np.float64]:
        """(N, C): the logits of a slide of which all tiles gave what this one gives; nan for tiles not looked at.

        Their mean, weighted by `looked_at`, is the slide's logit.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.looked_at[:, None] > 0, self.shares / self.looked_at[:, None], np.nan)


def explain(
    encoder: SlideEncoder,
    features: NDArray[np.float32],
    positions: NDArray[np.float32],
    view: ViewSettings,
    settings: EmbedSettings,
    slide_id: str,
    scores: Mapping[str, LinearScore],
) -> dict[str, Heatmap]:
    """Target -> the heatmap of a slide; the views are drawn once for all targets.

    The intercept, with what an average slide would get, is handed out by how much each tile was looked at.

    Args:
        encoder, features, positions, view, settings, slide_id: as of `embed_slide`, with which the vector was made.
        scores: target -> the linear probe that judges the slide.
    """
    weights = np.concatenate([score.weights for score in scores.values()], axis=1)
    found = explain_slide(encoder, features, positions, view, settings, slide_id, weights)
    columns = np.split(found.shares, np.cumsum([len(score.names) for score in scores.values()])[:-1], axis=1)
    return {
        target: Heatmap(
            slide_id,
            score.names,
            score(found.vector),
            shares + found.looked_at[:, None] * score.intercept,
            found.looked_at,
            found.vector,
        )
        for (target, score), shares in zip(scores.items(), columns, strict=True)
    }
