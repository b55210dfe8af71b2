"""Artefacts of a slide's tiles as layers over it, a kind each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histossl.wsi import tile_files
from histossl.wsi.artefacts import KINDS

PREFIX = "artefact: "
_SHOWN = 0.01  # share of a tile, from which on a kind is worth a layer


def artefact_layers(path: Path) -> list[tuple[str, int]]:
    """The kinds that a slide's tiles show.

    Args:
        path: the HDF5 file of its tiles or features.

    Returns:
        (name of the layer, index of the kind) of each kind that covers a hundredth of any tile, in order.

    Raises:
        FileFormatError: the file cannot be read.
    """
    scores = np.nan_to_num(tile_files.read_artefacts(path).scores)
    highest = scores.max(0, initial=0)
    return [(f"{PREFIX}{kind}", k) for k, kind in enumerate(KINDS) if highest[k] >= _SHOWN]


def artefact_scores(path: Path, kind: int) -> tuple[tile_files.Tiles, NDArray[np.float32]]:
    """The share of each tile that a kind covers.

    Args:
        path: the HDF5 file of the slide's tiles or features.
        kind: its index in `KINDS`.

    Returns:
        The tiles, and (N,) in [0, 1], 0 where it was not judged.

    Raises:
        FileFormatError: the file cannot be read.
    """
    return tile_files.read_tiles_of(path), np.nan_to_num(tile_files.read_artefacts(path).scores[:, kind])
