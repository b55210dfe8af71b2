"""A rival of the probe: one weight a part of the vector, and so one penalty a group, chosen by inner folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    model, who = _Weighed(np.array(parts), settings), np.array(patients)

    def method(train: NDArray, truth: NDArray, test: NDArray, seed: int) -> NDArray[np.float64]:
        if truth.ndim == 2:
            raise SettingsError("probe.rivals: parts weighs classes and numbers, not survival", "leave parts out")
        others = np.delete(np.arange(len(values)), test)
        rows = values if sites is None else remedied(values, sites, settings.site_remedy, others)
        weights = model.chosen(rows[train], truth, who[train])
        return model.predicted(rows[train], truth, who[train], rows[test], weights)

    return "parts weighed", method


@dataclass(frozen=True)
class _Weighed:
    """The regression on vectors whose parts (d,) are multiplied by weights."""

    parts: NDArray[np.str_]
    settings: ProbeSettings

    def predicted(
        self, x: NDArray, y: NDArray, patients: NDArray, x_test: NDArray, weights: Mapping[str, float]
    ) -> NDArray[np.float64]:
        """(m, classes) probabilities, or (m, 1) numbers."""
        each = np.array([weights[str(name)] for name in self.parts])
        mean, unit = units(x, self.settings)
        x, x_test = (x - mean) / unit * each, (x_test - mean) / unit * each
        if y.dtype.kind == "f":
            w, b = fit_ridge(x, y, patients, self.settings)
            return x_test @ w + b
        w, b, _ = solve(prepare(x, y, self.settings.balanced), self.settings.C)
        return predict(x_test, w, b)

    def chosen(self, x: NDArray, y: NDArray, patients: NDArray) -> dict[str, float]:
        """A weight a part."""
        weights = {str(name): 1.0 for name in dict.fromkeys(self.parts)}
        strata = y if y.dtype.kind != "f" else np.argsort(np.argsort(y)) * 3 // len(y)
        folds = inner_folds(strata, patients, self.settings)
        if folds is None:
            return weights
        least = self._loss(x, y, patients, folds, weights)
        for name in list(weights):
            tried = {f: self._loss(x, y, patients, folds, weights | {name: f}) for f in FACTORS}
            factor = min(tried, key=tried.__getitem__)
            something_is_left = factor or any(weights[other] for other in weights if other != name)
            if tried[factor] < least and something_is_left:
                least, weights[name] = tried[factor], factor
        return weights

    def _loss(self, x: NDArray, y: NDArray, patients: NDArray, folds: NDArray, weights: Mapping[str, float]) -> float:
        """Summed over the slides of all folds, each predicted by a model of the others."""
        total = 0.0
        for fold in range(3):
            held = folds == fold
            found = self.predicted(x[~held], y[~held], patients[~held], x[held], weights)
            if y.dtype.kind == "f":
                total += float(((found[:, 0] - y[held]) ** 2).sum())
            else:
                right = np.maximum(found[np.arange(len(found)), y[held]], 1e-12)
                total -= float((np.log(right) / np.bincount(y)[y[held]]).sum())
        return total
