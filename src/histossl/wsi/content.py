"""A fingerprint of the content of a slide's file, independent of its folder and its name."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from histossl.core.errors import SlideError
from histossl.wsi.zarr_reader import zarr_content, zarr_metadata

_BLOCK, _BLOCKS = 2**15, 8
_CHOSEN = re.compile(r"(.*)#([0-9]+)", re.DOTALL)


def content_of(path: Path) -> str:
    """A fingerprint of a slide's file: its size, and eight blocks spread over it, 256 KiB in all.

    For a MIRAX slide, whose data are in a folder beside it, the index in that folder is included; of OME-Zarr, a
    folder, it is of the metadata and of chunks of the smallest level.

    Args:
        path: the slide, with or without the number of a picture.

    Returns:
        16 hexadecimal digits, independent of the file's name and folder.

    Raises:
        SlideError: the file cannot be read.
    """
    path = chosen_picture(path)[0]
    try:
        if zarr_metadata(path) is not None:
            return zarr_content(path).hex()[:16]
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
    """Split a slide's path into its file and the number of a picture: `scan.tif#2` is the second picture of scan.tif.

    Args:
        path: the path as it is written.

    Returns:
        The file, and the number of the picture or None. A file whose own name ends in such a number is taken as it is.
    """
    found = _CHOSEN.fullmatch(str(path))
    if found is None or os.path.lexists(path):
        return path, None
    return Path(found[1]), int(found[2])
