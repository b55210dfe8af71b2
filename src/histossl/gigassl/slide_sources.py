"""Where the features of slides come from when the slide encoder learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histossl.core import fingerprints, hdf5
from histossl.core.errors import FileFormatError
from histossl.core.npy import read_npy
from histossl.wsi import tile_files
from histossl.wsi.geometry import tile_units

MANY = 2000  # slides, at most, whose vectors tell the scale of their parts
SAMPLE = 100_000  # tiles, about: statistics of a cohort are taken of so many


@dataclass(frozen=True)
class SlideSource:
    """Where the tiles of one slide come from.

    Attributes:
        slide_id: for messages.
        features: the HDF5 file of its features.
        views: the folder of its augmented views; where it does not stand, the plain features serve as the one view.
    """

    slide_id: str
    features: Path
    views: Path

    def dim(self) -> int:
        """The length of a feature, from the headers of the files alone.

        Raises:
            FileFormatError: absent or damaged.
        """
        if not self.views.is_dir():
            with hdf5.open_h5(self.features) as file:
                return int(hdf5.dataset_of(file, "features", self.features).shape[-1])
        return self._views()[0].shape[2]

    def load(self) -> tuple[NDArray, NDArray[np.float32]]:
        """(K, n, D) features, memory-mapped where they can be, and (K, n, 2) positions in tile units.

        Raises:
            FileFormatError: absent or damaged.
        """
        if not self.views.is_dir():
            features, positions = plain_tiles(self.features)
            return features[None], positions[None]
        features, coords = self._views()
        stride = fingerprints.read_made(self.views)["stride_level0"]
        return features, tile_units(coords.reshape(-1, 2), stride).reshape(coords.shape)

    def plain(self, views: NDArray) -> NDArray | None:
        """The same tiles as in the views, un-augmented; memory-mapped.

        Args:
            views: (K, n, D), the features of `load`.

        Returns:
            (K, n, D) floating; None where none are kept.

        Raises:
            FileFormatError: damaged, or not of the shape of the views.
        """
        path, hint = self.views / "plain.npy", f"remove {self.views} and encode again"
        if not path.exists():
            return None
        found = read_npy(path, hint)
        if found.shape != views.shape or found.dtype.kind != "f":
            raise FileFormatError(f"{path}: {found.shape} of {found.dtype} beside views of {views.shape}", hint)
        return found

    def _views(self) -> tuple[NDArray, NDArray]:
        """(K, n, D) floating features and (K, n, 2) integer coords, memory-mapped."""
        hint = f"remove {self.views} and encode again"
        features, coords = (read_npy(self.views / f"{name}.npy", hint) for name in ("features", "coords"))
        shapes = features.ndim == 3 and coords.shape == (*features.shape[:2], 2)
        if not shapes or features.dtype.kind != "f" or coords.dtype.kind not in "iu":
            what = f"{self.views}: {features.shape} features of {features.dtype}, {coords.shape} coords of "
            raise FileFormatError(f"{what}{coords.dtype}", hint)
        return features, coords


def plain_tiles(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """All tiles of a slide, un-augmented.

    Args:
        path: the HDF5 file of the slide's features.

    Returns:
        Features (N, D) and positions (N, 2) in tile units, float32.

    Raises:
        FileFormatError: the file is damaged, or features and coordinates do not match.
    """
    tiles, features = tile_files.read_tiles_of(path), hdf5.read_features(path)
    if len(tiles.xy) != len(features):
        raise FileFormatError(f"{path}: {len(features)} features but {len(tiles.xy)} coords", "encode the slide anew")
    return features, tile_units(tiles.xy, tiles.stride)


def sample_slides(sources: Sequence[SlideSource], seed: int) -> Iterator[tuple[Tensor, NDArray[np.float32]]]:
    """Whole slides in random order, un-augmented, for statistics of the cohort.

    Args:
        sources: the slides.
        seed: of the order.

    Yields:
        Features (n, D) float32 and positions (n, 2) in tile units: the first slide whatever its size, then others up
        to `SAMPLE` tiles in all.

    Raises:
        FileFormatError: as `plain_tiles`.
    """
    total = 0
    for k in np.random.default_rng([seed, len(sources)]).permutation(len(sources)):
        features, positions = plain_tiles(sources[k].features)
        total += len(features)
        if total > SAMPLE and total > len(features):
            return
        yield torch.from_numpy(features).float(), positions


def some_slides(
    sources: Sequence[SlideSource], seed: int
) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
    """Slides in random order, un-augmented, `MANY` at most.

    Args:
        sources: the slides.
        seed: of the order.

    Yields:
        Name, features (N, D) float32 and positions (N, 2) in tile units.

    Raises:
        FileFormatError: as `plain_tiles`.
    """
    for k in np.random.default_rng([seed, len(sources), 1]).permutation(len(sources))[:MANY]:
        features, positions = plain_tiles(sources[k].features)
        yield sources[k].slide_id, np.asarray(features, np.float32), positions
