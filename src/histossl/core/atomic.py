"""What stands on disk: whole or absent, fingerprinted, and read as other tools write it."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write a file so that it is whole or absent under its final name, whatever happens in between.

    Yields a temporary path beside it for the body to write and close; on a clean exit it is fsynced and renamed over
    `path`, on an exception it is removed. Temporary names start with a dot and carry `.part`.

    Raises:
        OSError: the disk is full or the folder is not writable; `path` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not derived from the name: a name of 255 bytes leaves no room for a suffix.
    part = path.parent / f".{uuid.uuid4().hex}.part{path.suffix[:16]}"
    try:
        yield part
        _fsync(part)
        os.replace(part, path)
        _fsync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """As `whole`, for a folder of files: yields a temporary folder that becomes `path` on a clean exit."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{uuid.uuid4().hex}.part"
    part.mkdir()
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                _fsync(file)
        if path.exists():
            shutil.rmtree(path)
        os.replace(part, path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written; only for who holds the folder alone."""
    # By name of the rooms: to search them all would enter a folder for every slide.
    for where in (".*.part*", "*/.*.part*", "logs/*/.*.part*"):
        for part in folder.glob(where):
            shutil.rmtree(part) if part.is_dir() else part.unlink()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
