"""Nuclei of a slide on disk while the slide is segmented, so that a killed run can continue."""

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
    """The nuclei of a slide while it is segmented: one file per row of tiles. Iterating reads them in order.

    Args:
        folder: folder of the files; its name should contain `parts_key`, so that only equal settings reuse them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, row: int) -> Path:
        """The file of a row of tiles.

        Args:
            row: index of the row, from 0.

        Returns:
            Its path.
        """
        return self.folder / f"row-{row:05d}.npz"

    def done(self) -> int:
        """The number of rows on disk, counted from the first without a gap."""
        row = 0
        while self.path(row).exists():
            row += 1
        return row

    def add(self, row: int, nuclei: Nuclei) -> None:
        """Write a row, whole or absent.

        Args:
            row: index of the row, from 0.
            nuclei: its nuclei.

        Raises:
            OSError: the file cannot be written.
        """
        with atomic.whole(self.path(row)) as part, part.open("wb") as file:
            np.savez(file, points=nuclei.points, start=nuclei.start, measures=nuclei.measures)

    def remove(self) -> None:
        """Remove the folder; call it once the outputs are written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __iter__(self) -> Iterator[Nuclei]:
        for row in range(self.done()):
            try:
                with np.load(self.path(row), allow_pickle=False) as data:
                    yield Nuclei(data["points"], data["start"], data["measures"])
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise FileFormatError(f"{self.path(row)}: damaged ({error})", "remove it and start again") from error


def parts_key(known: StainSurvey, state: str, method_key: str, settings: SegmentSettings, areas: str = "") -> str:
    """A fingerprint of everything that the nuclei of a slide depend on.

    Args:
        known: the slide's path, its mpp and that of its tiles.
        state: state of the slide's file, see `slide_state`.
        method_key: fingerprint of the method and its weights.
        settings: settings of the segmentation.
        areas: fingerprint of the user's areas, or "".

    Returns:
        The fingerprint.
    """
    about = str(known.path), state, known.mpp, known.tile_mpp, method_key, settings
    return fingerprint(*about, *([areas] if areas else []))
