"""Files and folders that are whole or absent under their final names, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from histossl.core import safe_paths

JOURNAL = ".histossl-unfinished"
"""In a folder that runs share: a line for every unfinished file that was begun in it, its path as JSON."""

_LONGEST = 8192  # bytes of a line
_DEPTH = 3  # folders from an unfinished file up to that of its journal: STUDY/logs/pretrain
_PART = re.compile(r"\.([0-9a-f]{16})([0-9a-f]{16})\.part(\..{0,15})?", re.DOTALL)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write a file so that it is whole or absent under its final name, even after a crash.

    Args:
        path: the final name; its folder is created if missing, an existing file is replaced.

    Yields:
        A temporary path in the same folder, for the body to write and close. On a clean exit the file is fsynced and
        renamed to `path`; after an exception it is removed. Temporary names start with a dot and contain `.part`.
        In a folder that runs share it is announced in the folder's journal first.

    Raises:
        OSError: the disk is full or the folder is not writable; `path` is then as it was.
        StudyError: the journal is a link or no regular file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not derived from the name: a name of 255 bytes leaves no room for a suffix.
    part = path.parent / f"{_part_name()}{path.suffix[:16]}"
    _announce(part)
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
    _announce(part)
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
    """Remove what killed processes left half-written, and begin a new journal of what is unfinished.

    Looks in the folder, its subfolders, and those of `logs`. Deletes only entries whose names carry the mark of
    `whole` and stand in the folder's journal, never follows a link, and never looks into a linked folder.

    Args:
        folder: that this process alone holds.

    Raises:
        StudyError: the journal is a link or no regular file.
        OSError: the journal cannot be written.
    """
    found: dict[str, tuple[Path, str]] = {}
    for where in (folder, *_own_subfolders(folder), *_own_subfolders(folder / "logs")):
        with suppress(OSError), os.scandir(where) as entries:
            names = [entry.name for entry in entries if is_part(entry.name) and not entry.is_symlink()]
            found |= {_line(folder, where / name): (where, name) for name in names}
    left = False
    for line in _announced(folder, found):
        try:
            safe_paths.delete_in(*found[line])
        except OSError:
            left = True
    if not left:
        with safe_paths.open_in(folder, JOURNAL, "ab") as file:
            file.truncate(0)


def _announce(part: Path) -> None:
    """Write into the journal of the shared folder that an unfinished file lies in, if it does, that it is ours."""
    for folder in part.parents[:_DEPTH]:
        if os.path.lexists(folder / JOURNAL):
            with safe_paths.open_in(folder, JOURNAL, "ab") as file:
                # A full disk may have cut the last line short: an empty one does no harm.
                file.write(f"\n{_line(folder, part)}\n".encode())
            return


def _announced(folder: Path, lines: Collection[str]) -> set[str]:
    """Those lines that stand in the journal of a folder, which may be a stranger's, and of any size."""
    wanted, found = {line.encode() for line in lines}, set()
    if not wanted or not os.path.lexists(folder / JOURNAL):
        return set()
    with safe_paths.open_in(folder, JOURNAL, "rb") as file:
        while line := file.readline(_LONGEST):
            if line.rstrip(b"\n") in wanted:
                found.add(line.rstrip(b"\n").decode())
    return found


def _line(folder: Path, part: Path) -> str:
    return json.dumps(part.relative_to(folder).as_posix())


def is_part(name: str) -> bool:
    """Whether a name is one that `whole` or `whole_folder` gave to an unfinished file.

    Sixteen of its hex digits are a hash of the other sixteen, so that no file of a user is called so by accident.

    Args:
        name: without a folder.

    Returns:
        True for the name of an unfinished file or folder.
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
