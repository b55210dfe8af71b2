"""Pseudo-labels that a trained network and the component tree of hematoxylin give together.

Objects that both find are sure, objects that only one of them finds are doubtful, unless the network is very sure.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histossl.nuclei.instances import InstanceSettings, label_instances
from histossl.nuclei.pseudo_labels import MPP, PseudoLabel
from histossl.nuclei.settings import AgreementSettings


def agreed(
    labelled: PseudoLabel, confidence: NDArray[np.float32], settings: AgreementSettings = AgreementSettings()
) -> PseudoLabel:
    """Combine the pseudo-labels of a field with the output of a network.

    Args:
        labelled: the pseudo-labels of the tree alone.
        confidence: (2, H, W) float32 in [0, 1], confidence and depth by the network.
        settings: thresholds and weights.

    Returns:
        Pseudo-labels. Objects that both find keep the network's outline, which is smoother; the quality of those
        that it alone finds is such that they weigh `alone`.
    """
    found = label_instances(confidence, MPP, InstanceSettings(threshold=settings.threshold))
    count, known = int(found.max(initial=0)), len(labelled.quality)
    trust = _means(confidence[0], found, count)
    table = np.bincount((labelled.labels.astype(np.int64) * (count + 1) + found).ravel(), minlength=known * (count + 1))
    shared = table.reshape(known, count + 1)
    union = shared.sum(1)[:, None] + shared.sum(0)[None] - shared
    iou = shared / np.maximum(union, 1)
    iou[0], iou[:, 0] = 0, 0
    partner = iou.argmax(0)
    both = iou.max(0) > 0.5
    quality = np.where(both, np.maximum(labelled.quality[partner], 1), settings.alone * 1.5)
    kept = both | (trust >= settings.sure)
    kept[0] = False
    names = (np.cumsum(kept) * kept).astype(np.int32)
    labels = names[found]
    labels, more = _tree_alone(labelled, labels, confidence[0], iou, settings)
    nucleus = labels > 0
    seen = (confidence[0] >= settings.background) | labelled.doubtful | (labelled.labels > 0)
    return replace(
        labelled,
        labels=labels,
        quality=np.concatenate([np.zeros(1, np.float32), quality[kept].astype(np.float32), more]),
        doubtful=np.zeros_like(nucleus),
        faint=seen & ~nucleus,
    )


def _tree_alone(
    labelled: PseudoLabel,
    labels: NDArray[np.int32],
    confidence: NDArray[np.float32],
    iou: NDArray[np.float64],
    settings: AgreementSettings,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """With the tree's sure objects that the network sees differently: those where it finds no nucleus."""
    known = len(labelled.quality)
    free = np.bincount(labelled.labels[labels == 0], minlength=known) / np.maximum(
        np.bincount(labelled.labels.ravel(), minlength=known), 1
    )
    kept = (iou.max(1) <= 0.5) & (free > 0.9) & (_means(confidence, labelled.labels, known - 1) >= settings.doubted)
    kept[0] = False
    names = np.where(kept, np.cumsum(kept) + labels.max(initial=0), 0).astype(np.int32)
    return np.where(labels == 0, names[labelled.labels], labels), labelled.quality[kept]


def _means(values: NDArray, labels: NDArray[np.int32], count: int) -> NDArray[np.float64]:
    """(count + 1) the mean of `values` in each label; 0 where there is none."""
    return np.nan_to_num(np.asarray(ndimage.mean(values, labels, np.arange(count + 1)), np.float64))
