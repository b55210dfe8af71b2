"""A rival of the probe: one weight a part of the vector, and so one penalty a group, chosen by inner folds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import SettingsError
from histossl.evaluate.linear import fit_ridge
from histossl.evaluate.logistic import predict, prepare, solve
from histossl.evaluate.scaling import inner_folds, units
from histossl.evaluate.settings import ProbeSettings, Rival
from histossl.evaluate.site_remedies import remedied

FACTORS = (0.0, 0.3, 3.0)
"""What a part may be multiplied by instead of 1; its features' penalty is divided by the square of that."""


def weighed_parts(
    values: NDArray,
    parts: Sequence[str],
    patients: Sequence[str],
    settings: ProbeSettings,
    sites: NDArray | None = None,
) -> tuple[str, Rival]:
    """The probe with a weight for each part of the vectors.

    One part after the other gets the factor of `FACTORS`, or 1, that leaves the least loss in 3 folds of the training
    patients: cross-entropy of classes, squared error of numbers. All stay 1 where the patients are too few for folds.

    Args:
        values: (N, d), a row a slide.
        parts: (d,) name of the part of each number.
        patients: (N,) patient of each slide.
        settings: of the probe.
        sites: (N,) the site of each slide, for `settings.site_remedy`, fitted on all slides but those that are tested.

    Returns:
        What the method is called after the vectors' name, and the method.

    Raises:
        SettingsError: the vectors name no parts; by the method, for survival.
    """
    if not parts:
        raise SettingsError("probe.rivals: the vectors name no parts to weigh", "embed the study again")
    at, who = np.array(parts), np.array(patients)
    names = list(dict.fromkeys(parts))

    def weighed(x: NDArray, y: NDArray, of: NDArray, x_test: NDArray, weights: dict[str, float]) -> NDArray:
        each = np.array([weights[name] for name in at])
        mean, unit = units(x, settings)
        x, x_test = (x - mean) / unit * each, (x_test - mean) / unit * each
        if y.dtype.kind == "f":
            w, b = fit_ridge(x, y, of, settings)
            return x_test @ w + b
        w, b, _ = solve(prepare(x, y, settings.balanced), settings.C)
        return predict(x_test, w, b)

    def loss(rows: NDArray, train: NDArray, truth: NDArray, folds: NDArray, weights: dict[str, float]) -> float:
        total = 0.0
        for fold in range(3):
            inside, held = train[folds != fold], train[folds == fold]
            y, y_held = truth[folds != fold], truth[folds == fold]
            found = weighed(rows[inside], y, who[inside], rows[held], weights)
            if y.dtype.kind == "f":
                total += float(((found[:, 0] - y_held) ** 2).sum())
            else:
                right = np.maximum(found[np.arange(len(held)), y_held], 1e-12)
                total -= float((np.log(right) / np.bincount(truth)[y_held]).sum())
        return total

    def method(train: NDArray, truth: NDArray, test: NDArray, seed: int) -> NDArray[np.float64]:
        if truth.ndim == 2:
            raise SettingsError("probe.rivals: parts weighs classes and numbers, not survival", "leave parts out")
        others = np.delete(np.arange(len(values)), test)
        rows = values if sites is None else remedied(values, sites, settings.site_remedy, others)
        strata = truth if truth.dtype.kind != "f" else np.argsort(np.argsort(truth)) * 3 // len(truth)
        folds = inner_folds(strata, who[train], settings)
        weights = dict.fromkeys(names, 1.0)
        if folds is not None:
            best = loss(rows, train, truth, folds, weights)
            for name in names:
                tried = {factor: loss(rows, train, truth, folds, weights | {name: factor}) for factor in FACTORS}
                factor = min(tried, key=tried.__getitem__)
                if tried[factor] < best and (factor or any(weights[n] for n in names if n != name)):
                    best, weights = tried[factor], weights | {name: factor}
        return weighed(rows[train], truth, who[train], rows[test], weights)

    return "parts weighed", method
