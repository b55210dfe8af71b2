"""The nuclei of a slide on disk while the slide is segmented; a run that was killed continues there."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from histossl.core import atomic
from histossl.core.config import fingerprint
from histossl.core.errors import FileFormatError
from histossl.nuclei.instances import Nuclei
from histossl.nuclei.stain_survey import SegmentSettings, StainSurvey


class Parts:
    """The nuclei of a slide on disk while it is worked on, a file a row of tiles; a run that was killed goes on.

    Args:
        folder: holds the files; its name should fingerprint all that makes them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, row: int) -> Path:
        """Of a row's file."""
        return self.folder / f"row-{row:05d}.npz"

    def done(self) -> int:
        """How many rows stand, from the first."""
        row = 0
        while self.path(row).exists():
            row += 1
        return row

    def add(self, row: int, nuclei: Nuclei) -> None:
        """Keep a row, whole or not at all."""
        with atomic.whole(self.path(row)) as part, part.open("wb") as file:
            np.savez(file, points=nuclei.points, start=nuclei.start, measures=nuclei.measures)

    def remove(self) -> None:
        """Once the outputs stand."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __iter__(self) -> Iterator[Nuclei]:
        for row in range(self.done()):
            try:
                with np.load(self.path(row), allow_pickle=False) as data:
                    yield Nuclei(data["points"], data["start"], data["measures"])
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise FileFormatError(f"{self.path(row)}: damaged ({error})", "remove it and start again") from error


def parts_key(known: StainSurvey, state: str, method_key: str, settings: SegmentSettings) -> str:
    """What the nuclei of a slide depend on: the file and its state, its mpp, the method, the settings."""
    return fingerprint(str(known.path), state, known.mpp, method_key, settings)
