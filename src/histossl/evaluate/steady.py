"""Weighs the directions of vectors by how well the slides of one patient agree on them; no label is used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PRIOR = 10.0  # deviations, alike in all directions, that those of a cohort are averaged with


@dataclass(frozen=True)
class Steady:
    """A symmetric linear map of vectors, the identity but for some directions, which it makes shorter.

    Attributes:
        directions: (d, k) float64, orthonormal.
        factors: (k,) float64 in (0, 1], what the part along each is multiplied by.
    """

    directions: NDArray[np.float64]
    factors: NDArray[np.float64]

    def __call__(self, values: NDArray) -> NDArray[np.float64]:
        """Map the rows of (n, d). A linear score of what comes out is that of `values` by the mapped weights."""
        x = np.asarray(values, np.float64)
        return x + ((x @ self.directions) * (self.factors - 1)) @ self.directions.T


def steady(values: NDArray, groups: NDArray[np.int64]) -> Steady:
    """Find the map after which the slides of one patient lie apart by as much in every direction.

    What differs between two slides of a patient, such as which piece of the tissue was cut, tells nothing of the
    patient. Speaker recognition calls the map within-class covariance normalisation (Hatch, Kajarekar and Stolcke,
    2006). Here the covariance is averaged with one alike in all directions, so that few patients with several slides
    change little.

    Args:
        values: (N, d) vectors of slides.
        groups: (N,) int, 0, 1, ...: the patient of each.

    Returns:
        The map; the identity where every patient has one slide.
    """
    x = np.asarray(values, np.float64)
    counts = np.bincount(groups)
    sums = np.zeros((len(counts), x.shape[1]))
    np.add.at(sums, groups, x)
    several = counts[groups] > 1
    apart = (x - (sums / np.maximum(counts, 1)[:, None])[groups])[several]
    if not apart.any():
        return Steady(np.zeros((x.shape[1], 0)), np.ones(0))
    gram = apart.T @ apart  # as many deviations as there are slides more than patients
    variances, directions = np.linalg.eigh(gram)
    kept = variances > 1e-10 * variances[-1]
    variances, directions = variances[kept], directions[:, kept]
    free = several.sum() - len(np.unique(groups[several]))
    usual = (variances**2).sum() / variances.sum() / free  # of one deviation, along a direction that has its share
    return Steady(directions, 1 / np.sqrt(1 + variances / (PRIOR * usual)))
