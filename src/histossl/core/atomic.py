"""Files and folders that are whole or absent under their final names, whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from histossl.core import safe_paths
from histossl.core.errors import HistosslError

JOURNAL = ".histossl-unfinished"
"""In a folder that runs share: a line for every unfinished file that was begun in it, its path as JSON."""

_LONGEST = 8192  # bytes of a line
_DEPTH = 3  # folders from an unfinished file up to that of its journal: STUDY/logs/pretrain
_SYSTEM = re.compile(r"\b(?:errno =|os error) (\d{1,3})\b")
_ROOM = 2**16  # bytes; a disk with less than that is full
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
    except Exception as error:
        if told := _system_error(error, part):
            raise OSError(told, os.strerror(told), str(path)) from error
        raise
    finally:
        part.unlink(missing_ok=True)


def _system_error(error: Exception, part: Path) -> int | None:
    """The number of the system's error behind one of HDF5, PyTorch or safetensors, which raise their own kinds.

    A full disk must not look like a fault of the program. PyTorch says nothing of it, so the disk is looked at.
    """
    if isinstance(error, (OSError, HistosslError)):
        return None
    if told := _SYSTEM.search(str(error)):
        return int(told[1])
    full = isinstance(error, RuntimeError) and shutil.disk_usage(part.parent).free < _ROOM
    return errno.ENOSPC if full else None


@contextmanager
def whole_buffer(path: Path) -> Iterator[io.BytesIO]:
    """As `whole`, for pictures: where a disk takes a part of what Pillow writes, Pillow does not notice.

    Args:
        path: the final name.

    Yields:
        A buffer in memory, for the body to write; on a clean exit it becomes the file.

    Raises:
        OSError: the disk is full or the folder is not writable.
        StudyError: the journal is a link or no regular file.
    """
    buffer = io.BytesIO()
    yield buffer
    with whole(path) as part:
        part.write_bytes(buffer.getbuffer())


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
    except Exception as error:
        if told := _system_error(error, part):
            raise OSError(told, os.strerror(told), str(path)) from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written, and begin a new journal of what is unfinished.

    Deletes only what stands in the folder's journal under a name that carries the mark of `whole`, in the folder itself
    or its subfolders, never a link and never through one.

    Args:
        folder: that this process alone holds.

    Raises:
        StudyError: the journal is a link or no regular file.
        OSError: the journal cannot be written.
    """
    left = False
    for part in _announced(folder):
        try:
            safe_paths.delete_in(part.parent, part.name)
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


def _announced(folder: Path) -> Iterator[Path]:
    """What stands in the journal of a folder and exists; the journal may be a stranger's, and of any size."""
    if not os.path.lexists(folder / JOURNAL):
        return
    with safe_paths.open_in(folder, JOURNAL, "rb") as file:
        while line := file.readline(_LONGEST):
            names = _names(line)
            part = folder.joinpath(*names)
            own = all(safe_paths.is_own_folder(parent) for parent in part.parents[: len(names) - 1])
            if names and own and os.path.lexists(part) and not part.is_symlink():
                yield part


def _names(line: bytes) -> tuple[str, ...]:
    """The folders and the name of an unfinished file in a line of the journal; nothing where it is no such line."""
    try:
        path = json.loads(line)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(path, str) or "\0" in path:
        return ()
    names = tuple(path.split("/"))
    inside = len(names) <= _DEPTH and not {"", ".", ".."} & set(names) and not any(os.sep in name for name in names)
    return names if inside and is_part(names[-1]) else ()


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


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
