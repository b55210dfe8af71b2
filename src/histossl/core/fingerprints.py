"""What made a file or a folder of ours: its fingerprint, in an attribute or in made.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import h5py

from histossl.core.errors import FileFormatError

if TYPE_CHECKING:
    pass


def fingerprint_of(path: Path) -> str | None:
    """What made a file or folder of ours, or None where it is absent or not readable as one."""
    try:
        if path.is_dir():
            return json.loads((path / "made.json").read_text())["fingerprint"]
        with h5py.File(path, "r") as file:
            return str(file.attrs["fingerprint"])
    except (OSError, KeyError, ValueError):
        return None


def write_made(folder: Path, fingerprint: str, **more: object) -> None:
    """Say in a folder what made it: `made.json`."""
    text = json.dumps({"fingerprint": fingerprint, **more}, indent=1, sort_keys=True, ensure_ascii=False, default=str)
    (folder / "made.json").write_text(text, encoding="utf-8")


def read_made(folder: Path) -> dict:
    """What `write_made` said.

    Raises:
        FileFormatError: absent or not JSON.
    """
    try:
        return json.loads((folder / "made.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(
            f"{folder}: made.json cannot be read ({error})", "remove the folder and run again"
        ) from error
