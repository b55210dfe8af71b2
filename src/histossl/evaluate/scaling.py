"""What every fit of the probe does first: scale the features, and fold the training patients to choose a penalty."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from sklearn.preprocessing import StandardScaler

from histossl.core.errors import LabelError
from histossl.evaluate.splits import grouped_folds

if TYPE_CHECKING:
    from histossl.evaluate.settings import ProbeSettings


def scaled(x: np.ndarray, x_test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standardise features by those that train, and divide by the root of their number.

    Args:
        x: (n, d) of the slides that train.
        x_test: (m, d) of the slides that are tested.

    Returns:
        Both, scaled.
    """
    scaler, root = StandardScaler().fit(x), x.shape[1] ** 0.5
    return scaler.transform(x) / root, scaler.transform(x_test) / root


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
