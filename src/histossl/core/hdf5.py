"""HDF5 files of features: opened with errors that name the file, read and created in chunks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import FileFormatError

if TYPE_CHECKING:
    pass

ROWS_A_CHUNK = 256


def chunk_shape(rows: int, columns: int) -> tuple[int, int] | None:
    """The shape of the chunks of a dataset of features.

    Args:
        rows: number of rows of the dataset.
        columns: number of columns of the dataset.

    Returns:
        (rows, columns) of a chunk; None for an empty dataset, which HDF5 cannot store in chunks.
    """
    return (min(rows, ROWS_A_CHUNK), columns) if rows else None


def create_features(file: h5py.File, rows: int, dim: int) -> h5py.Dataset:
    """Create the `features` dataset in chunks of hundreds of rows, to be filled in slices.

    Args:
        file: an HDF5 file, open for writing.
        rows: number of tiles.
        dim: length of a feature vector.

    Returns:
        The dataset, (rows, dim) float32.
    """
    return file.create_dataset("features", (rows, dim), "float32", chunks=chunk_shape(rows, dim))


def read_features(path: Path) -> NDArray[np.float32]:
    """Read all features of a slide.

    Args:
        path: the HDF5 file; its `features` are (N, D) or (1, N, D).

    Returns:
        (N, D) float32.

    Raises:
        FileFormatError: the file is absent or truncated, or the features have another shape or are not finite.
    """
    with open_h5(path) as file:
        features = dataset_of(file, "features", path)[:]
    if features.ndim == 3 and len(features) == 1:
        features = features[0]
    if features.ndim != 2:
        raise FileFormatError(f"{path}: `features` has shape {features.shape}, not (tiles, dimension)")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise FileFormatError(f"{path}: {len(bad)} features are not finite, the first of tile {bad[0]}", "encode anew")
    return features.astype(np.float32, copy=False)


@contextmanager
def open_h5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; the file is closed at the end of the `with` block.

    Args:
        path: the file.

    Yields:
        The open file.

    Raises:
        FileFormatError: the file does not exist, or is not HDF5.
    """
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        what = "is not a readable HDF5 file" if Path(path).exists() else "does not exist"
        raise FileFormatError(f"{path} {what}", "encode the slide anew") from error
    with file:
        yield file


def dataset_of(file: h5py.File, name: str, path: Path) -> h5py.Dataset:
    """Find a dataset in an open file.

    Args:
        file: the open file.
        name: name of the dataset.
        path: path of the file, for the errors.

    Returns:
        The dataset.

    Raises:
        FileFormatError: there is no such dataset, or it is a link to a file that cannot be read.
    """
    try:
        found = file.get(name)
        link = file.get(name, getlink=True)
    except OSError as error:
        raise FileFormatError(f"{path}: `{name}` cannot be read ({error})", "encode the slide anew") from error
    if found is None and isinstance(link, h5py.ExternalLink):
        raise FileFormatError(f"{path}: its features are in {link.filename}, which cannot be read", "put it back")
    if not isinstance(found, h5py.Dataset):
        raise FileFormatError(f"{path}: no dataset `{name}`, only {', '.join(sorted(file)) or 'nothing'}")
    return found
