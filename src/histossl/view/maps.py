"""Coordinates of slides on a map: principal components, t-SNE or UMAP."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from histossl.view.report.charts import slide_map

_LEAST = 3  # vectors, below which there is no map


def map_names(count: int) -> dict[str, str]:
    """The maps that can be drawn.

    Args:
        count: number of vectors, V.

    Returns:
        Name of each map -> its title on the page; UMAP only where umap-learn is installed.
    """
    if count < _LEAST:
        return {}
    return (
        {"pca": "Principal components"}
        | ({"tsne": "Neighbourhoods (t-SNE)"} if count >= 2 * _LEAST else {})
        | ({"umap": "Neighbourhoods (UMAP)"} if count >= 4 * _LEAST and find_spec("umap") else {})
    )


def slide_places(name: str, vectors: NDArray[np.float32]) -> tuple[NDArray, str]:
    """Coordinates of slides on a map; the same vectors give the same map.

    Args:
        name: one of `map_names`.
        vectors: (V, d) finite.

    Returns:
        (V, 2) x to the right and y down, and a sentence about what the map shows.
    """
    if name == "pca":
        xy, _, share = slide_map(vectors)
        return xy, f"The first two principal components: {share:.0%} of the variance."
    from histossl.evaluate.search import directions

    note = "Near slides have similar features (cosine, standardised); large distances have no meaning."
    if name == "umap":
        from umap import UMAP  # type: ignore[import-not-found]

        neighbours = min(15, len(vectors) - 1)
        return np.asarray(UMAP(n_neighbors=neighbours, metric="cosine", random_state=0).fit_transform(vectors)), note
    from sklearn.manifold import TSNE

    rows = directions(vectors)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0, n_jobs=1).fit_transform(rows), note
