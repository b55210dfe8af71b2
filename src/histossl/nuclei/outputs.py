"""What `nuclei segment` may write where: never over an input, never over a file that it did not write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from histossl.core.errors import SettingsError
from histossl.core.tables import Row

ENDINGS = (".geojson", ".geojson.gz", ".parquet", ".zarr", ".tif", "-overlay.jpg")
"""Of the files of an input, behind its name without suffix."""


def inputs_beside(files: Sequence[Path], given: Sequence[Path], out: Path) -> list[Path]:
    """The inputs without what lies in the folder of outputs, as an earlier run left it there.

    Args:
        files: all images and slides that were found.
        given: what the user named: files, or folders that were searched.
        out: the folder of outputs, which need not be there.

    Raises:
        SettingsError: `out` is one of the folders that are searched for inputs.
    """
    folders = [path for path in given if path.is_dir()]
    for folder in folders:
        if out.exists() and os.path.samefile(folder, out):
            what = f"{out}: holds the inputs, and what is found would be written among them"
            raise SettingsError(what, f"choose a folder of its own, such as {out / 'nuclei'}")
    place = out.resolve()
    named = {path.absolute() for path in given if not path.is_dir()}
    return [file for file in files if file.absolute() in named or place not in file.resolve().parents]


def refuse_to_replace(files: Iterable[Path], out: Path, known: Sequence[Row]) -> None:
    """Refuse outputs that would replace an input, or a file that no run of ours has written.

    Args:
        files: the inputs.
        out: the folder of outputs.
        known: the rows of nuclei.csv: files of slides in it are ours.

    Raises:
        SettingsError: names the file; nothing was read or written.
    """
    files = list(files)
    inputs = {(stat.st_dev, stat.st_ino): file for file in files if (stat := _stat(file)) is not None}
    ours = {row["slide_id"] for row in known}
    for file in files:
        for ending in ENDINGS:
            path = out / (file.stem + ending)
            stat = _stat(path)
            if stat is None:
                continue
            if (stat.st_dev, stat.st_ino) in inputs:
                what = f"{path}: what is found would be written over the input {inputs[stat.st_dev, stat.st_ino]}"
                raise SettingsError(what, "choose another folder: --out")
            if file.stem not in ours:
                what = f"{path}: is there already, and nuclei.csv does not say that it is of an earlier run"
                raise SettingsError(what, "move it away, or choose another folder: --out")


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
