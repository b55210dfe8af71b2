"""Takes the site where a slide was made out of its vector, without labels, by the patients that train."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

REMEDIES = {"none": "as they are", "centre": "centred by site", "scale": "centred and scaled by site"}
SHRINK = 10.0  # slides of the cohort that a site's variance is averaged with


def remedied(values: NDArray, sites: NDArray, how: str, train: NDArray | None = None) -> NDArray[np.float32]:
    """Take the means, or means and deviations, of the sites out of vectors; no label is used.

    Means of all slides, those to be tested too, would leave a site in reverse: where they lie above the mean of their
    site, those that train lie below it.

    Args:
        values: (N, d) vectors.
        sites: (N,) the site of each slide.
        how: none; centre: every site gets the mean of the cohort; scale: and its deviations, as ComBat does, a site's
            variance being averaged with that of the cohort within sites, as if that were 10 slides more.
        train: the rows that means and deviations are of; None takes all. A site without such a row, a new one, is
            brought to the cohort by its own slides.

    Returns:
        (N, d) float32.
    """
    x = np.asarray(values, np.float64)
    if how == "none":
        return x.astype(np.float32)
    fitted = np.full(len(x), train is None)
    fitted[slice(0) if train is None else train] = True
    names, site = np.unique(sites, return_inverse=True)
    by = [np.flatnonzero(fitted & (site == k)) for k in range(len(names))]
    by = [rows if len(rows) else np.flatnonzero(site == k) for k, rows in enumerate(by)]
    rest = x - np.stack([x[rows].mean(axis=0) for rows in by])[site]
    if how == "scale":
        within, counts = (rest[fitted] ** 2).mean(axis=0), np.array([[len(rows)] for rows in by])
        own = np.stack([(rest[rows] ** 2).sum(axis=0) for rows in by])
        shrunk = (own + SHRINK * within) / (counts + SHRINK)
        rest *= np.sqrt(np.divide(within, shrunk, out=np.ones_like(shrunk), where=shrunk > 0))[site]
    return (rest + x[fitted].mean(axis=0)).astype(np.float32)
