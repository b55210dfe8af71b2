"""Files of strangers, made from small files of our own: readers, a corpus of what each reads, and changes to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from histossl.core import trial
from histossl.core.embeddings import read_embeddings
from histossl.core.errors import HistosslError
from histossl.core.interchange import read_tile_features
from histossl.core.npy import read_npy
from histossl.core.tables import read_rows
from histossl.evaluate.labels import read_labels
from histossl.evaluate.sources import read_source
from histossl.evaluate.split_files import read_splits
from histossl.nuclei.geojson import read_outlined
from histossl.wsi.safe_xml import ome_images

trial.SECONDS = 5.0  # for a file that hangs HDF5; every changed file would cost a minute

CORPUS = Path(__file__).parents[1] / "data" / "fuzz"
"""Files are named KIND-WHAT.ENDING; the kind names the reader."""

READERS: dict[str, Callable[[Path], object]] = {
    "array": lambda path: read_npy(path, "make it anew").shape,
    "features": lambda path: read_tile_features(path, in_um=True),
    "labels": lambda path: read_labels(path, ["a", "b", "c", "d"]),
    "nuclei": lambda path: read_outlined(path).nuclei(),
    "rows": read_rows,
    "splits": read_splits,
    "vectors": read_source,
    "whole": read_embeddings,
    "xml": lambda path: ome_images(path.read_text("utf-8", "replace")),
}

# What breaks readers of text and of numbers.
TOKENS = [
    b"\0", b'"', b"'", b",", b";", b"\r", b"\n\n", b"\xff\xfe", b"\xef\xbb\xbf", b"=", b"NaN", b"-1e999", b"-1", b"[", b"{",
    b"}", b"null", b"[[[[[[[[", b"1" * 5000, b"\xc2\xb2", b"\x7f\xff\xff\xff", b"\xff" * 8, b"\0" * 8, b"../", b"<!DOCTYPE a>",
    b"&lt;", b"true", b"0x1", b"1_0",
]  # fmt: skip
Edit = tuple[str, float, bytes]
WAYS = ("cut", "drop", "insert", "over", "repeat")


def changed(data: bytes, edits: Iterable[Edit]) -> bytes:
    """Data after some changes, each at a place in [0, 1) of it."""
    for way, place, token in edits:
        at = int(place * len(data))
        if way == "cut":
            data = data[:at]
        elif way == "drop":
            data = data[:at] + data[at + len(token) :]
        elif way == "insert":
            data = data[:at] + token + data[at:]
        elif way == "over":
            data = data[:at] + token + data[at + len(token) :]
        else:
            data = data[:at] + data[at : at + 64] * 8 + data[at:]
    return data


def tried(name: str, data: bytes, folder: Path) -> str:
    """Read data as the file of the corpus with this name is read: "read", or "refused" by an error of ours.

    Raises:
        Exception: the reader raised something else, which a user would see as a traceback.
    """
    path = folder / name
    path.write_bytes(data)
    try:
        with np.errstate(all="ignore"):
            READERS[name.partition("-")[0]](path)
    except HistosslError:
        return "refused"
    return "read"
