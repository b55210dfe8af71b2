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
            brought to the cohort by its own slides. Slides of a site that this leaves one slide of stay as they are:
            its mean would be that slide.

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
    middle, counts = x[fitted].mean(axis=0), np.array([[len(rows)] for rows in by])
    rest = x - np.stack([x[rows].mean(axis=0) if len(rows) > 1 else middle for rows in by])[site]
    if how == "scale":
        moved = fitted & (counts[site, 0] > 1)
        within = (rest[moved] ** 2).mean(axis=0) if moved.any() else 0 * middle
        own = np.stack([(rest[rows] ** 2).sum(axis=0) for rows in by])
        shrunk = np.where(counts > 1, (own + SHRINK * within) / (counts + SHRINK), within)
        rest *= np.sqrt(np.divide(within, shrunk, out=np.ones_like(shrunk), where=shrunk > 0))[site]
    return (rest + middle).astype(np.float32)
