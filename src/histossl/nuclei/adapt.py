"""Adapts a trained model to new slides.

A short training begins at its weights. A judgement that needs no label discards the result where it does not help.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from histossl.core.errors import SettingsError
from histossl.nuclei.instances import label_instances
from histossl.nuclei.pseudo_labels import MPP, sure_nuclei
from histossl.nuclei.self_training import Sample, SelfTraining, learn
from histossl.nuclei.settings import AdaptSettings, SelfTrainingSettings
from histossl.nuclei.strata import found_nuclei

_VIEWS = ((1.0, 0.9, 1.1), (1.15, 1.1, 0.95), (0.85, 0.9, 0.95))  # factors on the optical density of each channel


@dataclass(frozen=True)
class Judgement:
    """How well a model does on unlabelled fields; larger is better.

    Attributes:
        sure: share of the tree's sure nuclei that it finds at IoU > 0.5.
        steady: share of its nuclei that it finds again at IoU > 0.5 when the stain is a little different.
        nuclei: how many it finds.
    """

    sure: float
    steady: float
    nuclei: int

    @property
    def mean(self) -> float:
        """The mean of both shares."""
        return (self.sure + self.steady) / 2


@dataclass(frozen=True)
class Adaptation:
    """The result of adapting a model.

    Attributes:
        model: the adapted one, or the one that it began with, if that is better.
        helped: which of the two.
        before: the judgement of the model that it began with, on fields that were not learned from.
        after: the judgement of the adapted one.
    """

    model: SelfTraining
    helped: bool
    before: Judgement
    after: Judgement


def adapt(
    samples: Sequence[Sample],
    teacher: SelfTraining,
    settings: AdaptSettings,
    logs: Path,
    device: str = "auto",
) -> Adaptation:
    """Train a model further on the pseudo-labels of new slides; keep the better of the two models.

    After the training the confidence is moved so that as much of the fields is nucleus as the teacher said: training on
    hematoxylin alone finds more everywhere, much of it wrong.

    Args:
        samples: fields and stains, one sample per slide.
        teacher: the model to begin with.
        settings: settings of the adaptation.
        logs: folder for the log and the checkpoint, as of `learn`.
        device: auto, cpu or cuda.

    Returns:
        The better model, and the judgements of both.

    Raises:
        TrainingError: no field shows a single sure nucleus.
        SettingsError: the teacher is of no kind that can be adapted.
    """
    if not isinstance(teacher, SelfTraining):
        raise SettingsError("this model cannot be adapted", "take general, or one that `nuclei train` wrote")
    training, held = _parted(samples, settings.held)
    how = replace(teacher.settings, steps=settings.steps, rate=settings.rate, seed=settings.seed)
    trained = learn(training, how, logs, device, begin=teacher)
    model = of_same_area(trained, teacher, samples)
    before, after = judge(teacher, held, how), judge(model, held, how)
    helped = after.mean > before.mean + settings.margin and min(after.sure, after.steady) > 0
    return Adaptation(model if helped else teacher, helped, before, after)


def _parted(samples: Sequence[Sample], held: int) -> tuple[list[Sample], list[Sample]]:
    """Separate every `held`-th field, or halves of fields where there are fewer, for the judgement.

    Fields of a slide stay one sample, for thresholds are the slide's.
    """
    if sum(len(sample.fields) for sample in samples) < held:
        parts = [[np.array_split(field, 2, axis=1) for field in sample.fields] for sample in samples]
        lots = [
            [Sample([half[k] for half in halves], sample.stains) for halves, sample in zip(parts, samples, strict=True)]
            for k in range(2)
        ]
        return lots[0], lots[1]
    training, judged, count = [], [], 0
    for sample in samples:
        apart = [(count + k) % held == held - 1 for k in range(len(sample.fields))]
        count += len(apart)
        for lot, wanted in ((training, False), (judged, True)):
            fields = [field for field, a in zip(sample.fields, apart, strict=True) if a == wanted]
            if fields:
                lot.append(Sample(fields, sample.stains))
    return training, judged


def of_same_area(model: SelfTraining, teacher: SelfTraining, samples: Sequence[Sample]) -> SelfTraining:
    """Move the confidence of a model so that it calls as much of some fields nucleus as another model does.

    Args:
        model: the model; its network's last bias is changed.
        teacher: the model whose area is kept.
        samples: fields and stains of slides, (h, w, 3) uint8 RGB at MPP µm per pixel.

    Returns:
        The model, on its device.
    """
    wanted, found = (_logits(one, samples) for one in (teacher, model))
    network = model.network
    with torch.no_grad():
        assert network.head.bias is not None
        network.head.bias[0] -= float(np.quantile(found, 1 - (wanted > 0).mean()))
    return SelfTraining(model.settings, network, str(model.device))


def _logits(model: SelfTraining, samples: Sequence[Sample]) -> NDArray[np.float32]:
    """The logits of the confidence in every fourth pixel of all fields."""
    found = [model.confidence(field, one.stains)[0, ::2, ::2].ravel() for one in samples for field in one.fields]
    sure = np.concatenate(found).clip(1e-6, 1 - 1e-6)
    return np.log(sure / (1 - sure))


def judge(model: SelfTraining, samples: Sequence[Sample], settings: SelfTrainingSettings) -> Judgement:
    """Judge a model on unlabelled fields: are sure nuclei found, and are nuclei found again in another stain?

    Args:
        model: the model to judge.
        samples: fields and stains of slides, (h, w, 3) uint8 RGB at MPP µm per pixel.
        settings: settings of the training; their pseudo-labels are the sure nuclei.

    Returns:
        The share of sure nuclei that are found, the share of found nuclei that are found again after the stain is
        changed (both at IoU > 0.5), and the number of nuclei found.
    """
    found_sure, again, nuclei, known = 0, 0, 0, 0
    for sample in samples:
        sure = sure_nuclei(sample.fields, sample.stains, MPP, settings.pseudo_labels, most=None)
        head = model.prepare(sample.fields, sample.stains, sure)
        for field, labelled in zip(sample.fields, sure.labels, strict=True):
            found = label_instances(model.confidence(field, sample.stains, head), MPP)
            told = found_nuclei(found, labelled.labels, MPP)
            known, found_sure = known + len(told.iou), found_sure + int((told.iou > 0.5).sum())
            for factors in _VIEWS:
                other = label_instances(model.confidence(_restained(field, factors), sample.stains, head), MPP)
                same = found_nuclei(other, found, MPP)
                nuclei, again = nuclei + len(same.iou), again + int((same.iou > 0.5).sum())
    return Judgement(found_sure / max(known, 1), again / max(nuclei, 1), nuclei // len(_VIEWS))


def _restained(rgb: NDArray[np.uint8], factors: tuple[float, float, float]) -> NDArray[np.uint8]:
    """The picture with the optical density of each channel multiplied."""
    light = (rgb.astype(np.float32) + 1) / 256
    return np.clip(np.rint(light ** np.asarray(factors, np.float32) * 256 - 1), 0, 255).astype(np.uint8)
