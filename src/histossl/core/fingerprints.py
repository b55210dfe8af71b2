"""The fingerprint of the settings and inputs that made a file or folder: in an HDF5 attribute or in made.json."""

from __future__ import annotations

import json
from pathlib import Path

from histossl.core.errors import FileFormatError
from histossl.core.hdf5 import open_h5, read_attributes

_LONGEST = 2**26  # characters of a made.json


def fingerprint_of(path: Path) -> str | None:
    """Read the fingerprint of a file or folder.

    Args:
        path: of an HDF5 file, or of a folder with made.json.

    Returns:
        The fingerprint; None where the path does not exist or has no readable fingerprint.
    """
    try:
        if path.is_dir():
            return read_made(path)["fingerprint"]
        with open_h5(path) as file:
            return read_attributes(file, path)["fingerprint"]
    except (FileFormatError, KeyError):
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
        FileFormatError: absent or not a JSON object.
    """
    try:
        with (folder / "made.json").open(encoding="utf-8") as file:
            found = json.loads(file.read(_LONGEST))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        what = f"{folder}: made.json cannot be read ({error})"
        raise FileFormatError(what, "remove the folder and run again") from error
    return found
