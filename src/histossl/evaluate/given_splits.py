"""The linear probe on published splits, scored as in their publications."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from histossl.core.errors import LabelError
from histossl.evaluate.labels import Labels
from histossl.evaluate.logistic import predict, prepare, solve
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.sources import Source
from histossl.evaluate.split_files import Split

STANDARDISED = "standardised"


def probe_splits(source: Source, labels: Labels, splits: Sequence[Split], settings: ProbeSettings) -> pd.DataFrame:
    """AUROC of a logistic regression on each split: train and val are for training, test is scored.

    Every embedding is scored twice: as it is, as in published figures, and standardised, as
    `histossl probe` does without splits. Slides without a label or a vector are left out.

    Args:
        source: the vectors.
        labels: of these slides.
        splits: from `read_splits`.
        settings: C, and whether classes are balanced.

    Returns:
        A row for each target, embedding and split: `target`, `embedding`, `split`, `train` and `test` (numbers of
        slides), `auroc`, of several classes the mean of one against the rest.

    Raises:
        LabelError: a split of which no slide is known, or with a class that is only on one side; names it.
    """
    row_of = {name: k for k, name in enumerate(source.ids)}
    splits = [split.named_as(source.ids) for split in splits]
    rows = []
    for target in labels.targets:
        column = labels.table[target].dropna()
        for split in splits:
            both = split.on("train", "val"), split.on("test")
            train, test = ([slide for slide in side if slide in column.index] for side in both)
            kinds = _classes(target, split, column.loc[train].to_numpy(str), column.loc[test].to_numpy(str))
            train_classes, test_classes = kinds[: len(train)], kinds[len(train) :]
            for name, values in source.vectors.items():
                x, z = (np.asarray(values, np.float64)[[row_of[slide] for slide in side]] for side in (train, test))
                for title, scaled in ((name, (x, z)), (f"{name}, {STANDARDISED}", _standardised(x, z))):
                    p = _fitted(*scaled, train_classes, settings)
                    found = {"train": len(train), "test": len(test), "auroc": _auroc(test_classes, p)}
                    rows.append({"target": target, "embedding": title, "split": split.name, **found})
    return pd.DataFrame(rows).sort_values(["target", "embedding"], kind="stable", ignore_index=True)


def _classes(target: str, split: Split, train: NDArray, test: NDArray) -> NDArray[np.int64]:
    """The class of each slide, those that train first."""
    names, kinds = np.unique(np.concatenate([train, test]), return_inverse=True)
    for side, found in (("train", train), ("test", test)):
        lacking = sorted(set(names) - set(found))
        if lacking or len(names) < 2:
            what = f"no slide of class {str(lacking[0])!r} to {side}" if lacking else "fewer than two classes"
            raise LabelError(f"{target}: split {split.name}: {what}", "are these the table and vectors of the split?")
    return kinds


def _standardised(x: NDArray, z: NDArray) -> tuple[NDArray, NDArray]:
    scaler, root = StandardScaler().fit(x), x.shape[1] ** 0.5
    return scaler.transform(x) / root, scaler.transform(z) / root


def _fitted(x: NDArray, z: NDArray, train_classes: NDArray[np.int64], settings: ProbeSettings) -> NDArray[np.float64]:
    # Centring changes no fit, since the intercept is free, and gives the solver an easier problem.
    middle = x.mean(axis=0)
    w, b, _ = solve(prepare(x - middle, train_classes, settings.balanced), settings.C)
    return predict(z - middle, w, b)


def _auroc(truth: NDArray[np.int64], p: NDArray[np.float64]) -> float:
    return float(roc_auc_score(truth, p[:, 1] if p.shape[1] == 2 else p, multi_class="ovr"))


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Summarise scores over splits.

    Args:
        found: one row per split, target and embedding: columns target, embedding, auroc, train and test (numbers of
            slides).

    Returns:
        One row per target and embedding: number of splits, median numbers of slides, mean AUROC and its standard
        deviation.
    """
    rows = []
    for _, part in found.groupby(["target", "embedding"], sort=False):
        target, name = part["target"].iloc[0], part["embedding"].iloc[0]
        sizes = {"splits": len(part), "train": int(part["train"].median()), "test": int(part["test"].median())}
        figures = {"auroc": part["auroc"].mean(), "sd": part["auroc"].std(ddof=0)}  # as numpy.std has it
        rows.append({"target": target, "embedding": name, **sizes, **figures})
    return pd.DataFrame(rows)
