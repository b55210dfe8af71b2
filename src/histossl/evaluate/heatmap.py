"""The exact share of every tile in a linear probe's score of a slide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import LabelError
from histossl.evaluate.labels import Labels
from histossl.evaluate.linear import LinearScore, fit_task
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.sources import Source
from histossl.evaluate.targets import make_task
from histossl.gigassl.embed import EmbedSettings, explain_slide
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.views import ViewSettings


def fit_scores(source: Source, labels: Labels, settings: ProbeSettings) -> dict[str, dict[str, LinearScore]]:
    """Fit the scores of all slides, each from training slides of other patients.

    The folds are those of the probe's first repeat. Slides without a label get the score of all labelled slides.

    Args:
        source: of the slide vectors; the first embedding is used.
        labels: of the targets.
        settings: of the probe.

    Returns:
        Target -> slide -> score.

    Raises:
        LabelError: a target cannot be probed, or has numbers instead of classes.
    """
    vectors = next(iter(source.vectors.values()))
    found = {}
    for target in labels.targets:
        task = make_task(target, source.ids, labels, settings)
        if task.kind == "numbers":
            raise LabelError(f"{target}: numbers have no classes to explain", "name another with --probe.targets")
        values = vectors[task.rows]
        everyone = fit_task(task, np.arange(len(values)), values, settings, "all labelled slides")
        scores = dict.fromkeys(source.ids, everyone)
        for fold in range(settings.folds):
            train = np.flatnonzero(task.folds[0] != fold)
            words = f"the labelled slides outside of fold {fold + 1}"
            score = fit_task(task, train, values, settings, words)
            scores |= dict.fromkeys(task.slides[task.folds[0] == fold], score)
        found[target] = scores
    return found


@dataclass(frozen=True)
class Heatmap:
    """A slide's logits and the share of each tile in them.

    Attributes:
        slide_id: the slide.
        names: the class of each logit.
        logits: (C,) float64.
        shares: (N, C) float64; each column sums to its logit.
        looked_at: (N,) float64, the weight of each tile in the slide's vector; sums to 1.
        vector: (d,) float32, of the slide.
    """

    slide_id: str
    names: tuple[str, ...]
    logits: NDArray[np.float64]
    shares: NDArray[np.float64]
    looked_at: NDArray[np.float64]
    vector: NDArray[np.float32]

    def scores(self) -> NDArray[np.float64]:
        """(N, C): the logits of a slide whose tiles all contribute as this one does; nan where `looked_at` is 0.

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
    """Compute the heatmaps of a slide; the views are drawn once for all targets.

    The intercept is divided among the tiles in proportion to `looked_at`. All arguments but the last are those with
    which `embed_slide` made the vector.

    Args:
        encoder: the slide encoder.
        features: (N, D) of the tiles.
        positions: (N, 2) (row, column) in tile units.
        view: how views are drawn.
        settings: of the embedding.
        slide_id: the slide, which seeds the views.
        scores: target -> the linear score of the slide.

    Returns:
        Target -> heatmap.
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
