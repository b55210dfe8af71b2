"""Scores of nuclei against ground truth: Dice, AJI, PQ, F1, precision, recall, with bootstrap intervals.

Labels are (H, W) integer arrays, 0 = background, every other value one nucleus; ids need not be consecutive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import LabelError


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one image; all in [0, 1], larger is better.

    An image without nuclei in truth and prediction scores 1 everywhere. Where only one of them has nuclei, all scores
    are 0, except that `precision` without any prediction and `recall` without any truth are 1: no pixel is wrong.

    Attributes:
        dice: 2|A ∩ B| / (|A| + |B|) of the foreground pixels.
        aji: aggregated Jaccard index (Kumar et al., 2017): every true nucleus takes the prediction of largest IoU;
            the area of predictions that no nucleus takes is added to the union.
        pq: panoptic quality (Kirillov et al., 2019): the sum of IoU over matches / (TP + FP/2 + FN/2),
            matched at IoU > 0.5.
        f1: detection F1 at IoU > 0.5, also known as DQ.
        precision: share of the predicted foreground pixels that are true.
        recall: share of the true foreground pixels that are predicted.
    """

    dice: float
    aji: float
    pq: float
    f1: float
    precision: float
    recall: float


METRICS = tuple(field.name for field in fields(Scores))


def score(prediction: NDArray, truth: NDArray) -> Scores:
    """Compare two label images.

    Args:
        prediction: (H, W) integers, 0 = background.
        truth: (H, W) integers, 0 = background.

    Returns:
        The scores of the image.

    Raises:
        LabelError: the shapes differ, or the arrays are not two-dimensional integers.
    """
    for name, labels in (("prediction", prediction), ("truth", truth)):
        if labels.ndim != 2 or labels.dtype.kind not in "iu":
            raise LabelError(
                f"{name}: labels must be (H, W) integers, got shape {labels.shape} of {labels.dtype}",
                "one integer per nucleus, 0 for background",
            )
    if prediction.shape != truth.shape:
        raise LabelError(f"the prediction is {prediction.shape} and the truth {truth.shape} (rows, columns)")
    overlap, n_truth, n_prediction = _overlaps(prediction, truth)
    area_t, area_p = overlap.sum(1)[1:], overlap.sum(0)[1:]
    inside = overlap[1:, 1:]
    tp, fp, fn = inside.sum(), overlap[0, 1:].sum(), overlap[1:, 0].sum()
    iou = inside / np.maximum(area_t[:, None] + area_p[None] - inside, 1)
    matched = iou > 0.5
    detections = n_truth + n_prediction
    both_empty = detections == 0
    return Scores(
        dice=1.0 if both_empty else float(2 * tp / (2 * tp + fp + fn)),
        aji=1.0 if both_empty else _aji(inside, iou, area_t, area_p),
        pq=1.0 if both_empty else float(2 * iou[matched].sum() / detections),
        f1=1.0 if both_empty else float(2 * matched.sum() / detections),
        precision=float(tp / (tp + fp)) if tp + fp else 1.0,
        recall=float(tp / (tp + fn)) if tp + fn else 1.0,
    )


def _overlaps(prediction: NDArray, truth: NDArray) -> tuple[NDArray[np.int64], int, int]:
    """(1 + nuclei in truth, 1 + nuclei in prediction) counts of shared pixels, row and column 0 for the background."""
    ids_t, t = np.unique(truth, return_inverse=True)
    ids_p, p = np.unique(prediction, return_inverse=True)
    # Row and column 0 are the background, also in an image without background.
    t, p = t.ravel() + (0 not in ids_t), p.ravel() + (0 not in ids_p)
    n_t, n_p = int(np.count_nonzero(ids_t)), int(np.count_nonzero(ids_p))
    pairs = t.astype(np.int64) * (n_p + 1) + p
    return np.bincount(pairs, minlength=(n_t + 1) * (n_p + 1)).reshape(n_t + 1, n_p + 1), n_t, n_p


def _aji(inside: NDArray, iou: NDArray, area_t: NDArray, area_p: NDArray) -> float:
    if not len(area_t) or not len(area_p):
        return 0.0
    best = iou.argmax(1)
    rows = np.arange(len(best))
    hit = iou[rows, best] > 0
    common = inside[rows[hit], best[hit]].sum()
    union = (area_t[hit] + area_p[best[hit]]).sum() - common + area_t[~hit].sum()
    unused = np.setdiff1d(np.arange(len(area_p)), best[hit])
    return float(common / (union + area_p[unused].sum()))


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over images and its bootstrap interval.

    Attributes:
        mean: the mean.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    mean: float
    low: float
    high: float


def summarise(
    scores: Sequence[Scores], rng: np.random.Generator, draws: int = 2000, level: float = 0.95
) -> dict[str, Interval]:
    """The mean of every metric over images, with percentile bootstrap intervals over images.

    Args:
        scores: scores of each image.
        rng: randomness of the bootstrap.
        draws: number of bootstrap samples.
        level: coverage of the intervals, in (0, 1).

    Returns:
        Metric -> mean and interval, in the order of METRICS.

    Raises:
        LabelError: there are no scores.
    """
    if not scores:
        raise LabelError("no image to score", "give at least one prediction with its ground truth")
    table = np.array([astuple(s) for s in scores])
    drawn = rng.integers(0, len(table), (draws, len(table)))
    means = np.stack([table[row].mean(0) for row in drawn])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    mean = table.mean(0)
    return {name: Interval(float(mean[k]), float(low[k]), float(high[k])) for k, name in enumerate(METRICS)}
