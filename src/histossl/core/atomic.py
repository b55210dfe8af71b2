"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write a file so that it is whole or absent under its final name, even after a crash.

    Args:
        path: the final name; its folder is created if missing, an existing file is replaced.

    Yields:
        A temporary path in the same folder, for the body to write and close. On a clean exit the file is fsynced and
        renamed to `path`; after an exception it is removed. Temporary names start with a dot and contain `.part`.

    Raises:
        OSError: the disk is full or the folder is not writable; `path` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not derived from the name of `path`: a name of 255 bytes has no space for a suffix.
    part = path.parent / f".{uuid.uuid4().hex}.part{path.suffix[:16]}"
    try:
        yield part
        _fsync(part)
        os.replace(part, path)
        _fsync(path.parent)  # a rename survives a power failure only once the folder is on disk
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """As `whole`, for a folder of files.

    Args:
        path: the final name; an existing folder is replaced.

    Yields:
        A temporary folder in the same parent, renamed to `path` on a clean exit and removed after an exception.

    Raises:
        OSError: the disk is full or the parent folder is not writable.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{uuid.uuid4().hex}.part"
    part.mkdir()
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                _fsync(file)
        if path.exists():  # a rename cannot replace a folder that has files
            shutil.rmtree(path)
        os.replace(part, path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed processes left; call it only while nothing else writes into the folder.

    Args:
        folder: of a study.
    """
    # The levels are listed, because a recursive search would enter one folder per slide.
    for where in (".*.part*", "*/.*.part*", "logs/*/.*.part*"):
        for part in folder.glob(where):
            shutil.rmtree(part) if part.is_dir() else part.unlink()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
