"""Files and folders that are whole or absent under their final names, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from histossl.core import safe_paths

_PART = re.compile(r"\.([0-9a-f]{16})([0-9a-f]{16})\.part(\..{0,15})?", re.DOTALL)


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
    # Not derived from the name: a name of 255 bytes leaves no room for a suffix.
    part = path.parent / f"{_part_name()}{path.suffix[:16]}"
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
    part = path.parent / _part_name()
    part.mkdir()
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                _fsync(file)
        if path.exists() or path.is_symlink():
            shutil.rmtree(path)  # which refuses a link
        os.replace(part, path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove the unfinished files that killed processes left; only for the process that holds the folder alone.

    The folder, its subfolders, and those of `logs` are searched. Only entries whose names have the mark of `whole` are
    deleted; links are not followed, and linked folders are not entered.

    Args:
        folder: the folder of a study.
    """
    for where in (folder, *_own_subfolders(folder), *_own_subfolders(folder / "logs")):
        with suppress(OSError), os.scandir(where) as entries:
            found = [entry.name for entry in entries if is_part(entry.name) and not entry.is_symlink()]
            for name in found:
                safe_paths.delete_in(where, name)


def is_part(name: str) -> bool:
    """Whether a name is one that `whole` or `whole_folder` gave to an unfinished file.

    Sixteen of its hex digits are a hash of the other sixteen, so that no file of a user has such a name by accident.

    Args:
        name: the name without its folder.

    Returns:
        True for an unfinished file or folder.
    """
    found = _PART.fullmatch(name)
    return found is not None and found[2] == _mark(found[1])


def _part_name() -> str:
    chance = secrets.token_hex(8)
    return f".{chance}{_mark(chance)}.part"


def _mark(chance: str) -> str:
    return hashlib.sha256(b"histossl part " + chance.encode()).hexdigest()[:16]


def _own_subfolders(folder: Path) -> list[Path]:
    if not safe_paths.is_own_folder(folder):
        return []
    with os.scandir(folder) as entries:
        return [folder / entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
