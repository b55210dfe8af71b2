"""Files that operating systems and programs leave in folders: they are no slides, tables or features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_NAMES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "lost+found", "__macosx", "$recycle.bin")


def is_sidecar(name: str) -> bool:
    """Whether a file or folder belongs to the system: hidden (`.DS_Store`, `._a.svs`), Thumbs.db and the like.

    Args:
        name: the name without its folder.

    Returns:
        True for files and folders of the system.
    """
    return name.startswith((".", "~$")) or name.casefold() in _NAMES


def files_of(folder: Path, endings: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Split the files in a folder by their endings; files of the system are left out.

    Args:
        folder: the folder; subfolders are not searched.
        endings: endings in lower case, with the dot; files may have them in upper case.

    Returns:
        The files with one of these endings, and the other files, both sorted; both empty where there is no folder.
    """
    if not folder.is_dir():
        return [], []
    files = sorted(path for path in folder.iterdir() if not is_sidecar(path.name) and path.is_file())
    wanted = [path for path in files if path.suffix.lower() in endings]
    return wanted, [path for path in files if path.suffix.lower() not in endings]
