"""Reads .npy files of any origin: no header is believed that claims more than the file holds."""

from __future__ import annotations

from pathlib import Path
from tokenize import TokenError

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import FileFormatError, file_errors


def read_npy(path: Path, hint: str) -> NDArray:
    """Open an array, memory-mapped and read-only; nothing pickled is read.

    Args:
        path: of the .npy file.
        hint: what to do where it cannot be used.

    Returns:
        The array, of any shape and plain dtype.

    Raises:
        FileFormatError: the file is absent, damaged, no .npy, pickled, or shorter than its header says.
    """
    # Mapped, an array of a lying header fails; read, it would first get the memory that the header asks for.
    with file_errors(path, hint):
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (SyntaxError, TokenError) as error:  # numpy parses the header as Python's literals
            raise FileFormatError(f"{path}: damaged ({error})", hint) from error
    if not isinstance(found, np.ndarray):
        raise FileFormatError(f"{path}: an archive, not an array", hint)
    return found
