"""Ridge regression for all strengths of the penalty at once, with a single eigendecomposition."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh


def ridge(
    x: NDArray[np.float64], y: NDArray[np.float64], alphas: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Minimise |y − x w − b|² + α |w|², as scikit-learn's Ridge does.

    Args:
        x: (n, d) features.
        y: (n,) targets.
        alphas: (A,) positive strengths of the penalty.

    Returns:
        The weights w (d, A) and the intercepts b (A,), float64.
    """
    middle, mean = x.mean(axis=0), y.mean()
    x, y = x - middle, y - mean
    few = len(x) < x.shape[1]  # then the (n, n) matrix of products is the smaller one, and has the same solution
    spread, axes = eigh(x @ x.T if few else x.T @ x, overwrite_a=True, check_finite=False)
    along = axes.T @ (y if few else x.T @ y)
    # Rounding makes eigenvalues that should be zero slightly negative.
    w = axes @ (along[:, None] / (np.maximum(spread, 0)[:, None] + alphas))
    w = x.T @ w if few else w
    return w, mean - middle @ w
