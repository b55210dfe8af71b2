"""Settings of the linear probe and of its rivals, and the result of a probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from histossl.evaluate.settings import ProbeSettings

from collections.abc import Callable

import numpy as np
import pandas as pd

from histossl.core.errors import SettingsError

# (rows that train (n,), their truth (n,), rows to test (m,), seed) -> (m, classes) probabilities where the truth is
# int, of which every class is among those that train, and (m, 1) numbers where it is float. Rows are of the embeddings.
Rival = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class ProbeSettings:
    """How the linear probe is trained and scored.

    Args:
        targets: columns of the label table to predict; empty takes `label`, or all columns where there is none.
        time: the column of the time of a survival target, from the start to the event or to the last contact; empty
            finds pairs such as os_months and os_event by their names.
        event: the column that says whether the event happened: 1 or 0, or yes or no in words.
        horizons: times at which survival is asked for; empty takes the quartiles of the times of the events.
        task: auto takes a column of more than 20 different numbers (or on more than half of the slides) as numbers, all
            else as classes; classes and numbers say it. Numbers are predicted by ridge regression.
        area: where slides have a vector for each of several areas, the one that counts; empty takes all.
        unit: what a row is: slide, or patient: the vectors of a patient's slides are combined, with one label.
        combine: how a patient's slides are combined: mean; tiles: in proportion to their numbers of tiles; a COLUMN of
            the labels: by these weights, of which 0 leaves a slide out; COLUMN=VALUE: those slides alone.
        steady: of survival of patients: directions in which the slides of one patient lie apart count less, by as much
            as they do; it takes no label, and changes nothing where every patient has one slide.
        hold_out: patients, or sites: whole sites and with them whole patients are tested by models that saw neither.
        site_remedy: none; centre: subtract each site's mean from its vectors, which takes no label; scale: and scale
            their deviations to the cohort's; fitted on the training patients of each fold.
        folds: folds of the cross-validation; every class needs at least as many patients.
        repeats: how often the patients are distributed over the folds.
        scale: whole: features keep their proportions, and all share one scale; columns: each has variance 1, for
            vectors whose numbers have different units.
        C: inverse strength of the L2 penalty.
        choose_C: values of C to choose among for every fit, by 3 folds of the training patients; empty takes C.
        balanced: weight the classes by the inverse of their frequency. Where they are uneven, probabilities are then
            not shares, which the figures of calibration tell.
        alphas: penalties of ridge regression, and of Cox's, to choose among for every fit, by 3 folds of the training
            patients.
        shots: numbers of labelled slides for the curve of few labels; those that a fold cannot give are left out.
        shots_of: slides, or patients: then `shots` counts patients, all slides of whom are labelled.
        bootstraps: resamples of the patients behind each interval.
        rivals: further methods on the same labels and folds: knn, mean, deviation, max; parts, a penalty for each part
            of the vectors by inner folds, a minute; and trained on the labels, which takes minutes: attention, sparse,
            finetune.
        parts: parts of the vectors that are also judged by themselves: stage, mean, prototypes, or all.
        mixed_patients: allow slides of one patient to have different classes, as tumour and normal have.
        seed: of the folds, the shots and the resamples.
    """

    targets: tuple[str, ...] = ()
    time: str = ""
    event: str = ""
    horizons: tuple[float, ...] = ()
    task: str = "auto"
    area: str = ""
    unit: str = "slide"
    combine: str = "mean"
    steady: bool = True
    hold_out: str = "patients"
    site_remedy: str = "none"
    folds: int = 5
    repeats: int = 5
    scale: str = "whole"
    C: float = 10.0
    choose_C: tuple[float, ...] = ()
    balanced: bool = True
    alphas: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
    shots: tuple[int, ...] = (25, 50, 100)
    shots_of: str = "slides"
    bootstraps: int = 1000
    rivals: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    mixed_patients: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {"folds": (self.folds, 2), "repeats": (self.repeats, 1), "bootstraps": (self.bootstraps, 100)}
        for name, (value, least) in limits.items():
            if value < least:
                raise SettingsError(f"probe.{name} is {value}", f"it must be {least} or more")
        if not all(C > 0 for C in (self.C, *self.choose_C)):
            raise SettingsError(f"probe.C is {self.C}, choose_C {self.choose_C}", "it must be positive")
        if not self.alphas or not all(alpha > 0 for alpha in self.alphas):
            raise SettingsError(f"probe.alphas is {self.alphas}", "give one or more, all positive")
        words = {"task": ("auto", "classes", "numbers"), "hold_out": ("patients", "sites")}
        words |= {"shots_of": ("slides", "patients"), "unit": ("slide", "patient")}
        words |= {"site_remedy": ("none", "centre", "scale"), "scale": ("whole", "columns")}
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise SettingsError(f"probe.{name} is {getattr(self, name)!r}", f"it must be {' or '.join(known)}")
        if not all(time > 0 for time in self.horizons):
            raise SettingsError(f"probe.horizons is {self.horizons}", "each must be positive")
        if any(n < 2 for n in self.shots):
            raise SettingsError(f"probe.shots is {self.shots}", "each must be 2 or more")
        if unknown := [name for name in self.rivals if name not in METHODS]:
            raise SettingsError(f"probe.rivals: no {unknown[0]!r}", f"there are {', '.join(METHODS)}")
        if self.unit == "patient" and {"sparse", "finetune"} & set(self.rivals):
            what = "probe.rivals: sparse and finetune see one map of tiles, and a patient has one for each slide"
            raise SettingsError(what, "leave them out, or --probe.unit slide")
        if self.unit == "patient" and self.mixed_patients:
            raise SettingsError("probe.unit is patient, with mixed_patients", "a patient then has one label")

    @property
    def outcome(self) -> tuple[str, str]:
        """The columns of time and event, as `read_labels` takes them."""
        return self.time, self.event

    @property
    def weighing(self) -> str:
        """The column of the labels that weighs or chooses a patient's slides; "" where there is none."""
        own = self.unit == "patient" and self.combine not in ("mean", "tiles")
        return self.combine.partition("=")[0] if own else ""


@dataclass(frozen=True)
class ProbeResult:
    """The result of `probe`.

    Every figure but a difference is followed by its 95 % interval, `NAME_low` and `NAME_high`, that of the first by
    `low` and `high`; all are means over the repeats.

    Attributes:
        table: of targets with classes, one row for each target, number of labels and method, in that order; where the
            site of every slide is known and patients are held out, the last row of a target is the first embedding with
            whole sites held out (`summary.NEW_SITES` ends its name), where that is possible. `target`,
            `n_labelled` (text: a number, or "all" of the training folds), `embedding`, `auroc`; `difference`: how far
            the first embedding is ahead of this one, its interval resampled as a pair (empty for the first itself);
            `balanced_accuracy`; `average_precision` within folds and `f1`, of two classes those of the second by name,
            of several the mean; `brier`, the mean over slides of the squared errors of the probabilities, summed over
            the classes, in [0, 2]; `ece`, the expected calibration error: mean distance, over tenths of the
            probability, between what was predicted and what came true, of several classes the mean; `n_slides`,
            `n_patients`, `n_classes`, `repeats`.
        numbers: the same of targets with numbers: in the place of `auroc` `spearman`, of what remains when the mean of
            each fold's predictions is taken away, then `difference`, `r2` (1 where all is predicted, 0 where the mean
            does as well) and `mae`, in the target's unit.
        survival: the same of survival targets: `c_index` (Harrell's, within folds), `difference`; `uno_c`, the same
            weighted by the inverse probability of having been followed so long; `auroc`, cumulative and dynamic, the
            mean over the horizons, and `auroc@TIME` at each; `unit` of the time, "" where no column says it; `ibs`, the
            integrated Brier score, in [0, 1], lower is better, which the row of Kaplan and Meier, who know no vector,
            is to be compared with.
        predictions: out-of-fold predictions with all labels, one row for each target, method and slide: `target`,
            `embedding`, `slide_id`, `patient_id`, `truth`, `predicted` and `p(CLASS)`, the probability of each class;
            of survival, `predicted` is the rank of the risk in its fold, in [0, 1], and `s(TIME)` the probability of
            no event until then; means over the repeats.
        audit: one line per target: classes, patients and sites on both sides, near-duplicate slides.
        complaints: one line each for what was left out.
        settings: the settings of the probe.
    """

    table: pd.DataFrame
    numbers: pd.DataFrame
    survival: pd.DataFrame
    predictions: pd.DataFrame
    audit: tuple[str, ...]
    complaints: tuple[str, ...]
    settings: ProbeSettings

    def __repr__(self) -> str:
        from histossl.evaluate.summary import in_words

        return in_words(self.table, self.numbers, self.survival)

    def _repr_html_(self) -> str:
        return self.summary().to_html(na_rep="")

    def summary(self) -> pd.DataFrame:
        """The main score of every method with its 95 % interval, as text; rows: target and number of labels.

        The score is AUROC of classes, Spearman's correlation of numbers, and Harrell's C of survival.
        """
        from histossl.evaluate.summary import summary_of

        return summary_of(self.table, self.numbers, self.survival)


NEIGHBOURS = 10


@dataclass(frozen=True)
class Recipe:
    """How a network is trained on labelled slides.

    Attributes:
        steps: number of optimiser steps.
        batch: slides per step.
        tiles: tiles of a slide in a step, drawn at random; a test uses all.
        kept: tiles of a slide that are held in memory, drawn once where there are more.
        rate: highest learning rate of AdamW.
        weight_decay: decoupled weight decay.
        dropout: probability of dropout before the last layer.
        dim: length of the slide's vector before the last layer.
    """

    steps: int = 150
    batch: int = 16
    tiles: int = 256
    kept: int = 4096
    rate: float = 5e-4
    weight_decay: float = 1e-2
    dropout: float = 0.25
    dim: int = 128


# Each with its text in the method section; `histossl.evaluate.rivals` makes them.
METHODS = {
    "knn": f"Nearest neighbours: the {NEIGHBOURS} nearest labelled slides by the cosine of standardised features, "
    "weighted by the inverse of the distance.",
    "parts": "Parts weighed: the same regression, each part of the vectors multiplied by 0, .3, 1 or 3, one part after "
    "the other by the loss in 3 folds of the training patients.",
    "mean": "Mean pooling: the same regression on the mean of the tiles' features.",
    "deviation": "Mean and deviation: the same regression on mean and standard deviation of the tiles' features.",
    "max": "Max pooling: the same regression on the maximum of the tiles' features.",
    "attention": "Attention MIL: gated attention over tiles.",
    "sparse": "SparseConvMIL: sparse convolutions on the map of tiles, trained end to end.",
    "finetune": "Fine-tuned encoder: the pretrained slide encoder, all of it trained on.",
}


TRAINED = {"attention": "attention MIL", "sparse": "SparseConvMIL", "finetune": "fine-tuned encoder"}
