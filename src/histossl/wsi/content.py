"""What a slide's file holds, told from some of its bytes: the same wherever it lies and whatever it is called."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from histossl.core.errors import SlideError

_BLOCK, _BLOCKS = 2**15, 8
_CHOSEN = re.compile(r"(.*)#([0-9]+)", re.DOTALL)


def content_of(path: Path) -> str:
    """A fingerprint of a slide's file: its size, and a quarter of a megabyte in eight places from its head to its tail.

    Of a MIRAX slide, whose data lie in a folder beside it, also that folder's index.

    Raises:
        SlideError: it cannot be read.
    """
    path = chosen_picture(path)[0]
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(str(size).encode())
            for k in range(_BLOCKS):
                file.seek(max(0, size - _BLOCK) * k // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
        index = path.with_suffix("") / "Slidedat.ini"
        if path.suffix.lower() == ".mrxs" and index.is_file():
            digest.update(index.read_bytes())
    except OSError as error:
        raise SlideError(path, f"cannot be read ({error.strerror})", "check the path and its permissions") from error
    return digest.hexdigest()[:16]


def chosen_picture(path: Path) -> tuple[Path, int | None]:
    """The file that a slide's path means, and which of its pictures: `scan.tif#2` is the second of scan.tif."""
    found = _CHOSEN.fullmatch(str(path))
    if found is None or os.path.lexists(path):
        return path, None
    return Path(found[1]), int(found[2])
