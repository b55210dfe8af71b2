"""What every fit of the probe does first: scale the features, and fold the training patients to choose a penalty."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from histossl.core.errors import LabelError
from histossl.evaluate.splits import grouped_folds

if TYPE_CHECKING:
    from histossl.evaluate.settings import ProbeSettings


def units(x: np.ndarray, settings: ProbeSettings) -> tuple[np.ndarray, np.ndarray]:
    """What every feature is diminished and divided by, so that rows have a mean square length of 1.

    Features of one vector have proportions: its parts have shares of it, principal axes their variances. One scale for
    all of them keeps these; a scale for each gives a part of many numbers more weight than one of few.

    Args:
        x: (n, d) of the slides that train.
        settings: `scale`.

    Returns:
        Means (d,) and units (d,), float64; the unit is 1 where nothing varies.
    """
    x = np.asarray(x, np.float64)
    mean, variances = x.mean(0), x.var(0)
    if settings.scale == "whole":
        variances = np.full_like(variances, variances.mean())
    # What differs by rounding alone does not vary.
    varies = variances > (1e-7 * np.abs(x).max(0, initial=0)) ** 2
    return mean, np.where(varies, np.sqrt(variances * x.shape[1]), 1.0)


def scaled(x: np.ndarray, x_test: np.ndarray, settings: ProbeSettings) -> tuple[np.ndarray, np.ndarray]:
    """Centre and scale features by those that train.

    Args:
        x: (n, d) of the slides that train.
        x_test: (m, d) of the slides that are tested.
        settings: `scale`.

    Returns:
        Both, scaled.
    """
    mean, unit = units(x, settings)
    return (x - mean) / unit, (x_test - mean) / unit


def inner_folds(strata: np.ndarray, patients: np.ndarray, settings: ProbeSettings) -> np.ndarray | None:
    """Three folds of the training patients.

    Args:
        strata: (n,) int, what the folds are balanced by.
        patients: (n,) patient of each slide.
        settings: the seed.

    Returns:
        (n,) int, None where the patients are too few.
    """
    try:
        return grouped_folds(strata, patients, 3, 1, settings.seed, mixed_patients=True)[0]
    except LabelError:
        return None
