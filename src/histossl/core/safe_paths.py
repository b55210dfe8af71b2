"""Files of a folder that somebody else may have made: opened by name inside it, never through a link.

A study or an output folder may come from a stranger, so each of its entries is input. Control files (locks, the log,
claims) and whatever is deleted are reached relative to a handle of the folder and must be regular files or folders.
Rooms of products (`features`, `views`, ...) may be links to another disk if the user says so outside the study: the
environment variable HISTOSSL_LINKS lists the folders that links may lead to.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from histossl.core.errors import StudyError

LINKS = "HISTOSSL_LINKS"

# Windows has neither; there a link is looked for just before the file is opened.
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_RELATIVE = bool(_NO_FOLLOW) and os.open in os.supports_dir_fd
_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_MODES = {"r": os.O_RDONLY, "a": os.O_RDWR | os.O_CREAT | os.O_APPEND, "x": os.O_WRONLY | os.O_CREAT | os.O_EXCL}


def link_refused(path: Path) -> tuple[str, str]:
    """The message about an entry that is a link.

    Args:
        path: of the link.

    Returns:
        What is wrong and what to do, as errors take them.
    """
    try:
        where = os.readlink(path)
    except OSError:
        where = "another file"
    return f"{path}: is a link to {where}, and histossl follows none there", "replace it by a file or folder of its own"


@contextmanager
def _handle(folder: Path) -> Iterator[int | None]:
    """A descriptor of a folder for `dir_fd`, or None where the system has no such calls."""
    if not _RELATIVE:
        yield None
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_in(folder: Path, name: str, mode: str) -> IO:
    """Open a regular file that lies in a folder itself, not through a link.

    Args:
        folder: may itself be reached through links, since the user named it.
        name: of the file, without separators.
        mode: "r" or "rb"; "a", "ab" or "a+" make the file where there is none; "x" must make it. Text is UTF-8.

    Raises:
        StudyError: it is a link, has a second name (a hard link) and is to be written, or is no regular file.
        OSError: as `open`.
    """
    if not name or name in (".", "..") or "/" in name or os.sep in name:
        raise ValueError(f"not the name of a file: {name!r}")
    path = folder / name
    if not _NO_FOLLOW and path.is_symlink():
        raise StudyError(*link_refused(path))
    with _handle(folder) as at:
        flags = _MODES[mode[0]] | _FLAGS | _NO_FOLLOW
        try:
            descriptor = os.open(path if at is None else name, flags, 0o666, dir_fd=at)
        except OSError:
            if path.is_symlink():  # ELOOP, and by other numbers on other systems
                raise StudyError(*link_refused(path)) from None
            if path.is_dir():
                raise StudyError(f"{path}: is a folder, not a file", "remove it") from None
            raise
    try:
        _check(os.fstat(descriptor), path, writing=mode[0] != "r")
        mode = mode.replace("x", "w")
        if "b" in mode:
            return open(descriptor, mode)
        encoding = "utf-8-sig" if mode[0] == "r" else "utf-8"  # tables of spreadsheets begin with a mark
        return open(descriptor, mode, encoding=encoding, errors="surrogateescape", newline="")
    except BaseException:
        os.close(descriptor)
        raise


def _check(found: os.stat_result, path: Path, writing: bool) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise StudyError(f"{path}: is no regular file", "remove it")
    if writing and found.st_nlink > 1:
        raise StudyError(f"{path}: is a hard link: what is written would change another file, too", "copy the folder")


def is_own_folder(path: Path) -> bool:
    """Whether a path is a folder itself, not a link to one.

    Args:
        path: any path.

    Returns:
        False also where nothing exists or can be seen.
    """
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def delete_in(folder: Path, name: str) -> None:
    """Delete a file, a link (not its target) or a folder with all that is in it, relative to its folder.

    Args:
        folder: of the entry.
        name: of the entry, without a folder.

    Raises:
        OSError: as `os.unlink` and `shutil.rmtree`; a link to a folder is never entered.
    """
    with _handle(folder) as at:
        where = folder / name if at is None else name
        if stat.S_ISDIR(os.stat(where, dir_fd=at, follow_symlinks=False).st_mode):
            shutil.rmtree(where, dir_fd=at)
        else:
            os.unlink(where, dir_fd=at)


def allowed_links() -> list[Path]:
    """The folders that HISTOSSL_LINKS names, as a list that the system's path separator parts."""
    return [Path(text).resolve() for text in os.environ.get(LINKS, "").split(os.pathsep) if text]


def may_lead_to(target: Path) -> bool:
    """Whether the user allows links to a target.

    Args:
        target: resolved path.

    Returns:
        True for a folder of `allowed_links` and all that is in it.
    """
    return any(target == folder or folder in target.parents for folder in allowed_links())


def refuse_links(folder: Path, names: Iterable[str], rooms: frozenset[str] = frozenset()) -> list[str]:
    """Refuse entries of a folder that are links which the user has not allowed.

    Args:
        folder: of a study, or of nuclei.
        names: of entries that are never links.
        rooms: names of folders that may be links to folders that HISTOSSL_LINKS allows.

    Returns:
        One line for each link that is followed.

    Raises:
        StudyError: a link that is not allowed; the message names it and where it leads.
    """
    notes = []
    for name in (*names, *sorted(rooms)):
        path = folder / name
        if not path.is_symlink():
            continue
        target = path.resolve()
        if name not in rooms:
            raise StudyError(*link_refused(path))
        if not (target.is_dir() and may_lead_to(target)):
            raise StudyError(link_refused(path)[0], f"if you made it on purpose: {LINKS}={target} histossl ...")
        notes.append(f"{path} is a link to {target}, as {LINKS} allows")
    return notes
