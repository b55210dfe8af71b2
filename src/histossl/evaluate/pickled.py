"""Reads dictionaries of vectors that numpy saved as pickles, without executing anything in them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import FileFormatError

# Modules moved from numpy.core to numpy._core; a file names those of the numpy that wrote it.
CORE = "numpy._core" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "numpy.core"
MAKERS = {("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer")}


def read_pickled_vectors(path: Path) -> dict[str, NDArray[np.float32]]:
    """Read a `.npy` file that holds a pickled dictionary of vectors, without executing anything in it.

    Args:
        path: the file.

    Returns:
        Slide -> vector (d,) float32; slides without a vector (None) are left out.

    Raises:
        FileFormatError: the file is of another kind or damaged, or its pickle needs more than arrays, text and numbers.
    """
    try:
        with path.open("rb") as file:
            form = np.lib.format
            read_header = form.read_array_header_1_0 if form.read_magic(file) == (1, 0) else form.read_array_header_2_0
            dtype = read_header(file)[2]
            content = _ArraysOnly(file).load() if dtype.hasobject else None
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise FileFormatError(f"{path}: not a dictionary that numpy saved ({error})") from error
    except pickle.UnpicklingError as error:
        raise FileFormatError(f"{path}: {error}", "it is not opened: pickles can do whatever they like") from error
    content = content.item() if isinstance(content, np.ndarray) and content.size == 1 else content
    if not isinstance(content, dict):
        raise FileFormatError(f"{path}: holds a {type(content).__name__}, not a dictionary of vectors")
    found = {str(name): np.asarray(value) for name, value in content.items() if value is not None}
    for name, value in found.items():
        if value.ndim != 1 or value.dtype.kind not in "fiu" or value.shape != next(iter(found.values())).shape:
            raise FileFormatError(
                f"{path}: {name} has {value.dtype} of shape {value.shape}, not a vector as others have"
            )
    return {name: value.astype(np.float32) for name, value in found.items()}


class _ArraysOnly(pickle.Unpickler):
    """Refuses every class and function but those that numpy's arrays are made of."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        package, _, last = module.rpartition(".")
        if package in ("numpy.core", "numpy._core") and (last, name) in MAKERS:
            return super().find_class(f"{CORE}.{last}", name)
        if (module, name) == ("_codecs", "encode"):  # protocol 2 writes bytes in this way
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}")
