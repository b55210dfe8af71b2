"""embeddings.h5ad: the vectors of all slides in one file, as scanpy and every AnnData tool reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histossl.core import atomic
from histossl.core.errors import READ_ERRORS, FileFormatError
from histossl.core.hdf5 import check_tree
from histossl.core.tables import Row

NUMBERS = {"mpp": "float64", "width": "int64", "height": "int64", "tiles": "int64"}


@dataclass(frozen=True)
class Embeddings:
    """Vectors of slides.

    Attributes:
        slides: one row a slide, index slide_id, the columns of slides.csv.
        vectors: name -> (N, d) float32; the first is the slide vectors themselves (X), the others are baselines.
        settings: of every stage that made them.
        fingerprint: of all that made them.
    """

    slides: pd.DataFrame
    vectors: dict[str, NDArray[np.float32]]
    settings: dict[str, Any]
    fingerprint: str


def write_embeddings(
    path: Path, slides: Sequence[Row], vectors: Mapping[str, NDArray], settings: dict[str, Any], made: str
) -> None:
    """Write an AnnData file: X = the first of `vectors`, obsm = the others, obs = `slides`, uns = settings."""
    from anndata import AnnData

    obs = pd.DataFrame(slides).set_index("slide_id").drop(columns=["status", "error", "made"], errors="ignore")
    obs = obs.replace({"mpp": {"": "nan"}})  # features may come without
    obs = obs.astype({name: kind for name, kind in NUMBERS.items() if name in obs})
    names = list(vectors)
    baselines: dict[str, Any] = {n.replace(" ", "_"): np.asarray(vectors[n], np.float32) for n in names[1:]}
    data = AnnData(
        X=np.asarray(vectors[names[0]], np.float32),
        obs=obs,
        obsm=baselines,
        uns={
            "histossl": {
                "name": names[0],
                "settings": json.dumps(settings, sort_keys=True, ensure_ascii=False),
                "fingerprint": made,
            }
        },
    )
    with atomic.whole(path) as part:
        data.write_h5ad(part)


def read_embeddings(path: Path) -> Embeddings:
    """Read what `write_embeddings` wrote.

    Raises:
        FileFormatError: absent, truncated, not such a file, or one that leads to other files or in a circle.
    """
    from anndata import read_h5ad

    hint = "run `histossl embed` first"
    check_tree(path)
    try:
        data = read_h5ad(path)
        about = data.uns["histossl"]
        vectors = {str(about["name"]): np.asarray(data.X)}
        vectors |= {str(name).replace("_", " "): np.asarray(values) for name, values in data.obsm.items()}
        return Embeddings(pd.DataFrame(data.obs), vectors, json.loads(about["settings"]), str(about["fingerprint"]))
    except READ_ERRORS as error:
        raise FileFormatError(f"{path}: not a file of slide vectors ({str(error)[:200]})", hint) from error
