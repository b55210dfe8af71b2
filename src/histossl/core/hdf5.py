"""HDF5 files of features: opened with errors that name the file, read and created in chunks of rows.

A file may come from a stranger. Nothing in it may lead to another file (external and soft links, external raw storage,
virtual data sets), and what it declares is compared with what it holds before memory is taken.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from h5py import h5o  # pyright: ignore[reportAttributeAccessIssue]  # its types do not name it
from numpy.typing import NDArray

from histossl.core import atomic, safe_paths, trial
from histossl.core.errors import FileFormatError, file_errors

if TYPE_CHECKING:
    from anndata import AnnData
    from typing_extensions import Buffer

ROWS_A_CHUNK = 256
AGAIN = "encode the slide anew"

LARGEST = 8 * 2**30
"""Bytes in memory that a data set may declare: a million tiles of 2,048 float32 numbers."""

_LARGEST_CHUNK = 2**30  # bytes: HDF5 reads a chunk as a whole
_SMALL = 64 * 2**20  # bytes up to which a data set may be as empty or as compressible as it likes
_MOST_PACKED = 200  # bytes in memory for one on disk, above that; features compress less than tenfold
_LONGEST_ATTRIBUTE = 2**20  # bytes
_MOST_ATTRIBUTES = 1000
_MOST_OBJECTS = 100_000
_DEEPEST = 32


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
    with open_h5(path) as file, file_errors(path, AGAIN):
        features = dataset_of(file, "features", path)[:]
    if features.ndim == 3 and len(features) == 1:
        features = features[0]
    if features.ndim != 2:
        raise FileFormatError(f"{path}: `features` has shape {features.shape}, not (tiles, dimension)")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise FileFormatError(f"{path}: {len(bad)} features are not finite, the first of tile {bad[0]}", "encode anew")
    return features.astype(np.float32, copy=False)


class _Disk(io.FileIO):
    """A file that takes all that is written, and remembers the first error of the system.

    HDF5 may not meet one: it would write again when the file is closed and when the process ends, print what went wrong
    each time, and crash.
    """

    error: OSError | None = None

    def write(self, data: Buffer) -> int:
        """Write all of the data, or nothing more after an error."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while len(rest) and self.error is None:
            try:
                rest = rest[super().write(rest) :]
            except OSError as error:
                self.error = error
        return size


@contextmanager
def new_h5(path: Path) -> Iterator[h5py.File]:
    """Write an HDF5 file that is whole or absent under its final name, see `atomic.whole`.

    Args:
        path: the final name.

    Yields:
        The open file.

    Raises:
        OSError: the disk is full or the folder is not writable, said when the file is closed.
        StudyError: the journal of the folder is a link or no regular file.
    """
    with atomic.whole(path) as part, _Disk(part, "w+b") as disk:
        try:
            with h5py.File(disk, "w") as file:
                yield file
        finally:
            if disk.error is not None:
                raise OSError(disk.error.errno, disk.error.strerror, str(path)) from disk.error


def write_h5ad(path: Path, data: AnnData) -> None:
    """Write an AnnData file as `AnnData.write_h5ad` does, whole or absent.

    Args:
        path: the final name.
        data: what to write; columns of text become categories.

    Raises:
        OSError: the disk is full or the folder is not writable.
    """
    from anndata.io import write_elem

    data.strings_to_categoricals()
    with new_h5(path) as file:
        write_elem(file, "/", data)


@contextmanager
def open_h5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; the file is closed at the end of the `with` block.

    Args:
        path: the file.

    Yields:
        The open file.

    Raises:
        FileFormatError: the file does not exist, is not HDF5, or hangs or kills its reader.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
            raise OSError("no regular file")
        if os.path.exists(path):
            trial.pass_trial(path)
        file = h5py.File(path, "r")
    except (OSError, ValueError, RuntimeError) as error:
        what = "is not a readable HDF5 file" if Path(path).exists() else "does not exist"
        raise FileFormatError(f"{path} {what}", AGAIN) from error
    with file:
        yield file


def dataset_of(file: h5py.File, name: str, path: Path, linked: bool = True) -> h5py.Dataset:
    """A data set of numbers that lies in the file, and that memory can hold.

    Args:
        file: open.
        name: of the data set, at the top of the file.
        path: of the file, for messages.
        linked: whether it may be a link to a data set in another HDF5 file, as `pretrain --out` makes it in a study;
            otherwise only to folders that HISTOSSL_LINKS allows.

    Raises:
        FileFormatError: there is none, it leads elsewhere, declares more than memory holds, or holds no numbers.
    """
    with file_errors(path, AGAIN):
        link = file.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            target = Path(path).parent / link.filename
            if not linked and not safe_paths.may_lead_to(target.resolve()):
                what = f"{path}: `{name}` is a link to {target}, which may be anybody's"
                raise FileFormatError(what, f"give that folder, or allow it: {safe_paths.LINKS}={target.parent}")
            _check_target(target, link, path)
        elif link is not None and not isinstance(link, h5py.HardLink):
            raise FileFormatError(f"{path}: `{name}` is a soft link", "give a file that holds the features itself")
        found = file[name] if link is not None else None
        if not isinstance(found, h5py.Dataset):
            there = ", ".join(list(file)[:10]) or "nothing"
            raise FileFormatError(f"{path}: no dataset `{name}`, only {there}")
        check_dataset(found, f"{path}: `{name}`")
    return found


def origin_of(path: Path, name: str) -> tuple[Path, str]:
    """Where a data set is stored, which may be a link to another file.

    Args:
        path: of the HDF5 file.
        name: of the data set or link in it.

    Returns:
        The absolute path of the file and the name in it.

    Raises:
        FileFormatError: the file cannot be read.
    """
    with open_h5(path) as file, file_errors(path, AGAIN):
        link = file.get(name, getlink=True)
    if isinstance(link, h5py.ExternalLink):
        return Path(os.path.abspath(Path(path).parent / link.filename)), str(link.path).lstrip("/")
    return Path(os.path.abspath(path)), name


def _check_target(target: Path, link: h5py.ExternalLink, path: Path) -> None:
    if not target.is_file():
        raise FileFormatError(f"{path}: its features are in {target}, which cannot be read", "put it back")
    with open_h5(target) as file:
        name = str(link.path).lstrip("/")
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise FileFormatError(f"{path}: its features are in {target}, which links elsewhere", "extract them anew")
        dataset_of(file, name, target)


def check_dataset(found: h5py.Dataset, label: str) -> None:
    """Refuse a data set whose values lie in other files, or that declares more than it can hold.

    Args:
        found: opened; its values are not read.
        label: names it in messages.

    Raises:
        FileFormatError: as above, or its values are no numbers.
    """
    if found.is_virtual or found.external:
        raise FileFormatError(f"{label} takes its values from other files", "give a file that holds them itself")
    if found.shape is None or found.dtype.kind not in "fiu":
        raise FileFormatError(f"{label} holds {found.dtype}, which are no numbers")
    check_size(found, label)


def check_size(found: h5py.Dataset, label: str) -> None:
    """Refuse a data set that would take more memory than `LARGEST`, or far more than it holds on disk.

    Args:
        found: the data set.
        label: its name for messages.

    Raises:
        FileFormatError: it, or one of its chunks, is too large; names the declared shape.
    """
    items = math.prod(found.shape or (0,))
    size, stored = items * max(4, found.dtype.itemsize), found.id.get_storage_size()
    if size > LARGEST:
        raise FileFormatError(f"{label} declares {found.shape}, {size / 2**30:,.1f} GiB", "no slide has as many")
    if size > _SMALL and size > stored * _MOST_PACKED:
        raise FileFormatError(f"{label} declares {found.shape} and holds {stored} bytes", "extract the slide anew")
    if found.chunks and math.prod(found.chunks) * found.dtype.itemsize > _LARGEST_CHUNK:
        raise FileFormatError(f"{label} has chunks of {found.chunks}", "write it in chunks of hundreds of rows")


def read_attributes(item: h5py.Dataset | h5py.Group, path: Path) -> dict[str, Any]:
    """The attributes of a data set or file that are numbers or text.

    Args:
        item: the data set, group or file.
        path: of the file, for messages.

    Returns:
        Values by name; None for large ones and other types.

    Raises:
        FileFormatError: they cannot be read.
    """
    found: dict[str, Any] = {}
    with file_errors(path, AGAIN):
        for name in list(item.attrs)[:_MOST_ATTRIBUTES]:
            found[name] = None
            about = item.attrs.get_id(name)
            text = about.dtype.kind == "S" or h5py.check_string_dtype(about.dtype) is not None
            if (text or about.dtype.kind in "fiub") and about.get_storage_size() <= _LONGEST_ATTRIBUTE:
                value = item.attrs[name]
                found[name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return found


def number(about: dict[str, Any], name: str, path: Path, positive: bool = False) -> float:
    """An attribute that must be one finite number.

    Args:
        about: attributes of `read_attributes`.
        name: of the attribute.
        path: of the file, for messages.
        positive: whether it must be above zero.

    Returns:
        The number.

    Raises:
        FileFormatError: it is absent or something else; names the file and the attribute.
    """
    try:
        [value] = np.ravel(about[name]).astype(np.float64)
    except (KeyError, ValueError, TypeError, OverflowError):
        value = math.nan
    if not math.isfinite(value) or (positive and value <= 0):
        what = f"{path}: its attribute {name} is {str(about.get(name))[:40]!r}"
        raise FileFormatError(what, f"it must be a {'positive ' if positive else ''}number; extract the slide anew")
    return float(value)


def check_tree(path: Path) -> None:
    """Refuse an HDF5 file in which anything leads to another file or in a circle, or declares more than it holds.

    Args:
        path: of the file.

    Raises:
        FileFormatError: the file cannot be read, or names what is refused.
    """
    with open_h5(path) as file, file_errors(path, AGAIN):
        seen: set[tuple[int, ...]] = set()
        todo: list[tuple[h5py.Group, int]] = [(file, 0)]
        while todo:
            group, depth = todo.pop()
            for name in group:
                label = f"{path}: {str(group.name).rstrip('/')}/{name}"[:300]
                if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                    raise FileFormatError(f"{label} is a link", "it must hold all that is in it itself")
                item = group[name]
                where = h5o.get_info(item.id).addr
                if where in seen or depth > _DEEPEST or len(seen) > _MOST_OBJECTS:
                    raise FileFormatError(f"{label} leads in a circle, or too deep", "write the file anew")
                seen.add(where)
                if isinstance(item, h5py.Group):
                    todo.append((item, depth + 1))
                elif isinstance(item, h5py.Dataset):
                    if item.is_virtual or item.external:
                        raise FileFormatError(f"{label} takes its values from other files", "write the file anew")
                    check_size(item, label)
