"""Files that systems and programs leave beside those of people: they are nobody's slide, table or features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_NAMES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "lost+found", "__macosx", "$recycle.bin")


def is_sidecar(name: str) -> bool:
    """Whether a file or folder is a system's, by its name: hidden (`.DS_Store`, `._a.svs`), Thumbs.db and its like."""
    return name.startswith((".", "~$")) or name.casefold() in _NAMES


def files_of(folder: Path, endings: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """The files in a folder with one of these endings, in upper or lower case, and the other ones, both sorted.

    Sidecars are in neither.
    """
    if not folder.is_dir():
        return [], []
    files = sorted(path for path in folder.iterdir() if not is_sidecar(path.name) and path.is_file())
    wanted = [path for path in files if path.suffix.lower() in endings]
    return wanted, [path for path in files if path.suffix.lower() not in endings]
