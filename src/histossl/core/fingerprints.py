"""The fingerprint of the settings and inputs that made a file or folder: in an HDF5 attribute or in made.json."""

from __future__ import annotations

import json
from pathlib import Path

import h5py

from histossl.core.errors import FileFormatError


def fingerprint_of(path: Path) -> str | None:
    """Read the fingerprint of a file or folder.

    Args:
        path: of an HDF5 file, or of a folder with made.json.

    Returns:
        The fingerprint; None where the path does not exist or has no readable fingerprint.
    """
    try:
        if path.is_dir():
            return json.loads((path / "made.json").read_text())["fingerprint"]
        with h5py.File(path, "r") as file:
            return str(file.attrs["fingerprint"])
    except (OSError, KeyError, ValueError):
        return None


def write_made(folder: Path, fingerprint: str, **more: object) -> None:
    """Write `made.json`, which records what made a folder.

    Args:
        folder: an existing folder.
        fingerprint: of the settings and inputs.
        more: further entries; values that JSON does not know are written as text.
    """
    text = json.dumps({"fingerprint": fingerprint, **more}, indent=1, sort_keys=True, ensure_ascii=False, default=str)
    (folder / "made.json").write_text(text, encoding="utf-8")


def read_made(folder: Path) -> dict:
    """Read what `write_made` wrote.

    Args:
        folder: with made.json.

    Returns:
        All entries, `fingerprint` among them.

    Raises:
        FileFormatError: made.json is missing or not JSON.
    """
    try:
        return json.loads((folder / "made.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(
            f"{folder}: made.json cannot be read ({error})", "remove the folder and run again"
        ) from error
