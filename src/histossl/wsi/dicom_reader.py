"""Reads DICOM by wsidicom where it is installed: also encodings that OpenSlide refuses, such as HTJ2K and JPEG XL."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histossl.wsi.content import chosen_picture
from histossl.wsi.geometry import Size
from histossl.wsi.raster import FILE_ERRORS, Level, Refused, describe_error, on_white

_HEAD = 65536  # bytes in which a file names its series
_SERIES = re.compile(rb"\x20\x00\x0e\x00UI.\x00([0-9.]+)", re.DOTALL)


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does.

    Args:
        path: the file.

    Returns:
        True for DICOM.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as handle:
        return handle.read(132)[128:] == b"DICM"


def dicom_series(path: Path) -> bytes:
    """The unique id of a DICOM file's series.

    Args:
        path: the file.

    Returns:
        The id; b"" where it has none, or cannot be read.
    """
    try:
        with path.open("rb") as handle:
            head = handle.read(_HEAD)
    except OSError:
        return b""
    match = _SERIES.search(head)
    return match[1] if match else b""


class DicomReader:
    """wsidicom: DICOM, of which each level is a file."""

    vendor = "dicom"

    def __init__(self, path: Path) -> None:
        path, number = chosen_picture(path)
        if number is not None or not path.is_file() or not is_dicom(path):
            raise Refused
        try:
            from wsidicom import WsiDicom, errors
        except ImportError as error:
            raise Refused("pip install 'histossl[dicom]' reads more kinds of DICOM") from error
        from pydicom.errors import InvalidDicomError

        kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
        self._errors = (InvalidDicomError, *kinds)  # they have no class in common
        series = dicom_series(path)
        files = sorted(file for file in path.parent.iterdir() if file.is_file() and dicom_series(file) == series)
        try:
            self._slide: Any = WsiDicom.open(files if series else [path])
            levels = {level.level: level for level in reversed(list(self._slide.pyramids[0]))}  # by powers of two
        except (*self._errors, *FILE_ERRORS) as error:
            raise Refused(describe_error(error)) from error
        self._numbers = sorted(levels)
        sizes = [Size(levels[k].size.width, levels[k].size.height) for k in self._numbers]
        self.levels = tuple(Level(size, sizes[0].width / size.width) for size in sizes)
        spacing = levels[0].mpp
        self.properties = {"openslide.mpp-x": repr(spacing.width), "openslide.mpp-y": repr(spacing.height)}
        for optics in self._slide.pyramids[0].metadata.optical_paths:
            if optics.objective and optics.objective.objective_power:
                self.properties["openslide.objective-power"] = repr(optics.objective.objective_power)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], float, float]:
        """Read a rectangle, see `Reader.read`.

        Args:
            level: index of the level.
            x: left edge in pixels of the level.
            y: top edge in pixels of the level.
            width: width in pixels of the level.
            height: height in pixels of the level.

        Returns:
            (height, width, 3) uint8 RGB, x and y.
        """
        try:
            picture = self._slide.read_region((x, y), self._numbers[level], (width, height))
        except self._errors as error:
            raise OSError(describe_error(error)) from error
        return on_white(np.asarray(picture)), float(x), float(y)

    def close(self) -> None:
        """Close the files."""
        self._slide.close()
