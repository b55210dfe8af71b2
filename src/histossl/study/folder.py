"""The folder of a study: its files and its state."""

from __future__ import annotations

import html
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from histossl.core import atomic, safe_paths, tables
from histossl.core.config import differences, to_dict
from histossl.core.errors import StudyError
from histossl.core.tables import Row
from histossl.execution.shared_table import SharedTable

ROOMS = frozenset(
    {"areas", "features", "heatmaps", "logs", "nuclei", "probe", "qc", "slide-encoder", "tile-encoder"}
    | {"tiles", "views"}
)
"""Folders of a study that may be links, to folders which HISTOSSL_LINKS allows."""

COLUMNS = (
    "slide_id", "path", "patient_id", "mpp", "width", "height", "tiles", "status", "error", "made", "note", "content",
    "artefacts", "area", "stains",
)  # fmt: skip


_SHOWN = 10  # rows of a study that a notebook shows


class Study(SharedTable):
    """The paths of all files of a study; makes the folder where there is none.

    Columns of slides.csv: `status` is inspected, encoded or failed; users may edit `mpp` and `patient_id`; `made` is
    the fingerprint of the products, `note` is for readers of the file, `content` is the fingerprint of the slide's
    file, which identifies a slide that was moved, `artefacts` the mean share of each kind in its tiles and how many
    were left out, `area` the area of the slide that the row is of where each has its own, `stains` the estimated stain
    vectors.

    Args:
        folder: of the study.

    Raises:
        StudyError: the folder cannot be made or is a file.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, "slides.csv", COLUMNS, ROOMS)
        self.areas = self.folder / "areas"
        self.tile_encoder = self.folder / "tile-encoder"
        self.fourth_stage = self.folder / "fourth-stage.safetensors"
        self.slide_encoder = self.folder / "slide-encoder"
        self.embeddings = self.folder / "embeddings.h5ad"
        self.probe = self.folder / "probe"
        self.report = self.folder / "report.html"
        self.logs = self.folder / "logs"

    @property
    def sources(self) -> list[Study]:
        """One study for each source (tile encoder or magnification); empty where the study has no sources."""
        numbers = [
            int(path.name[7:])
            for path in self.folder.glob("source-*")
            if path.name[7:].isascii() and path.name[7:].isdigit() and safe_paths.is_own_folder(path)
        ]
        return [self.source(number) for number in sorted(numbers)]

    def source(self, number: int) -> Study:
        """The study of one of several sources; its folder is made where there is none.

        Args:
            number: 1, 2, ...

        Returns:
            The study in source-<number>/.
        """
        return Study(self.folder / f"source-{number}")

    def __repr__(self) -> str:
        return f"Study({str(self.folder)!r}, {self._told()})"

    def _repr_html_(self) -> str:
        """HTML for notebooks: the counts, and the first rows of slides.csv."""
        rows = self.slides()
        shown = ("slide_id", "patient_id", "mpp", "width", "height", "tiles", "status", "error")
        head = "".join(f"<th>{name}</th>" for name in shown)
        cells = ("".join(f"<td>{html.escape(row.get(name, ''))}</td>" for name in shown) for row in rows[:_SHOWN])
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        more = f"<p>and {len(rows) - _SHOWN} more</p>" if len(rows) > _SHOWN else ""
        title = f"<p><b>{html.escape(str(self.folder))}</b>: {html.escape(self._told())}</p>"
        return f"{title}<table><tr>{head}</tr>{body}</table>{more}" if rows else title

    def _told(self) -> str:
        """The number of slides in each state, and the products that exist."""
        counts = Counter(row["status"] for row in self.slides())
        known = ", ".join(f"{count} {status or 'not inspected'}" for status, count in counts.items())
        products = (self.tile_encoder, self.slide_encoder, self.embeddings, self.report)
        there = ", ".join(path.name for path in products if path.exists())
        return f"{counts.total()} slides{f': {known}' if known else ''}{f'; {there}' if there else ''}"

    def qc(self, slide_id: str) -> Path:
        """The path of the picture of a slide's tissue and tiles.

        Args:
            slide_id: the slide.

        Returns:
            The path in qc/.
        """
        return self._of("qc", slide_id, ".jpg")

    def area_mask(self, slide_id: str) -> Path:
        """The path of the picture of a slide's areas and of the tissue inside, where areas were given.

        Args:
            slide_id: the slide.

        Returns:
            The path in areas/.
        """
        return self._of("areas", slide_id, ".png")

    def tiles(self, slide_id: str) -> Path:
        """The path of the coordinates of a slide's tiles.

        Args:
            slide_id: the slide.

        Returns:
            The path in tiles/.
        """
        return self._of("tiles", slide_id, ".h5")

    def features(self, slide_id: str) -> Path:
        """The path of the features of all tiles of a slide.

        Args:
            slide_id: the slide.

        Returns:
            The path in features/.
        """
        return self._of("features", slide_id, ".h5")

    def views(self, slide_id: str) -> Path:
        """The folder of a slide's augmented views.

        Args:
            slide_id: the slide.

        Returns:
            The path in views/.
        """
        return self._of("views", slide_id, "")

    def _of(self, subfolder: str, slide_id: str, suffix: str) -> Path:
        if not slide_id or "/" in slide_id or "\\" in slide_id or "\0" in slide_id or slide_id in (".", ".."):
            raise StudyError(f"{self.table}: {slide_id!r} cannot name a slide", "a slide_id is a file's name")
        return self.folder / subfolder / f"{slide_id}{suffix}"

    def settle(self, stage: str, settings: Any, product: Path) -> None:
        """Write down a stage's settings; refuse others than those that made the existing files.

        Args:
            stage: its name in settings.json.
            settings: a dictionary or a settings dataclass.
            product: the file or folder that the stage makes.

        Raises:
            StudyError: `product` exists and was made with other settings, or another run is about to make it with
                others; the message names each of them.
        """
        resolved = settings if isinstance(settings, dict) else to_dict(settings)
        with self.writing():  # of two runs that begin at once, one sees what the other has written down
            everything = self.settings()
            if everything.get(stage) == resolved:
                return
            changed = differences(everything[stage], resolved) if stage in everything else []
            if changed:
                exists = any(product.iterdir()) if product.is_dir() else product.exists()
                known = f"({stage}: {', '.join(changed)})"
                if exists:
                    way_out = f"use another --out, or remove {product} to make it anew"
                    raise StudyError(f"{self.folder}: made with other settings {known}", way_out)
                if others := self.others():
                    what = f"{self.folder}: another run is using it with other settings {known}: {others}"
                    raise StudyError(what, "wait for it to end, or use another --out")
            self._write_settings(everything | {stage: resolved})

    def note(self, stage: str, settings: Any) -> None:
        """Write the settings of a stage to settings.json, in place of earlier ones.

        Args:
            stage: name of the stage.
            settings: a dataclass of settings, or a dict.
        """
        with self.writing():
            resolved = settings if isinstance(settings, dict) else to_dict(settings)
            self._write_settings(self.settings() | {stage: resolved})

    def _write_settings(self, everything: dict[str, Any]) -> None:
        with atomic.whole(self.folder / "settings.json") as part:
            part.write_text(json.dumps(everything, indent=1, sort_keys=True, ensure_ascii=False), encoding="utf-8")

    def settings(self) -> dict[str, Any]:
        """The resolved settings of every stage that ran, by stage.

        Raises:
            StudyError: settings.json is damaged.
        """
        path = self.folder / "settings.json"
        if not os.path.lexists(path):
            return {}
        try:
            with safe_paths.open_in(self.folder, path.name, "r") as file:
                found = json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise StudyError(f"{path}: not JSON ({error})", "remove it") from error
        if not (isinstance(found, dict) and all(isinstance(one, dict) for one in found.values())):
            raise StudyError(f"{path}: not settings by stage", "remove it")
        return found

    def patients(self) -> dict[str, str]:
        """Slide id -> patient, as slides.csv has it, else the labels of the last probe; unknown ones are left out."""
        path = self.folder / "predictions.csv"
        rows = tables.read_rows(path) if path.exists() else []
        known = {row["slide_id"]: row.get("patient_id") or "" for row in rows if "slide_id" in row}
        # The probe uses the slide as its patient where none is known.
        known = {slide: patient for slide, patient in known.items() if patient != slide}
        known |= {row["slide_id"]: patient for row in self.slides() if (patient := row["patient_id"].strip())}
        return {slide: patient for slide, patient in known.items() if patient}

    def encoded(self) -> list[Row]:
        """The rows of slides whose features exist.

        Raises:
            StudyError: there is none.
        """
        found = [row for row in self.slides() if row["status"] == "encoded"]
        if not found:
            raise StudyError(f"{self.folder}: no encoded slide", "run `histossl encode` first, or see slides.csv")
        return found


def existing_study(folder: Path) -> Study:
    """The study in a folder.

    Args:
        folder: the folder.

    Returns:
        The study.

    Raises:
        StudyError: the folder is not a study.
    """
    if not (folder / "slides.csv").exists():
        hint = "run `histossl inspect SLIDES --out` first; for a folder of features name the study: --out"
        raise StudyError(f"{folder}: not a study, it has no slides.csv", hint)
    return Study(folder)


def slide_names(paths: list[Path]) -> list[tuple[str, str]]:
    """Name slides after their files, without the suffix.

    Args:
        paths: the files.

    Returns:
        (slide_id, complaint) of each file; the complaint is "" unless two files share a name.
    """
    # Some file systems ignore case in names.
    of_name: dict[str, list[Path]] = {}
    for path in paths:
        of_name.setdefault(path.stem.casefold(), []).append(path)
    found = []
    for path in paths:
        twin = next((other for other in of_name[path.stem.casefold()] if other != path), None)
        found.append((path.stem, f"{path} has the same name as {twin}; rename one of them" if twin else ""))
    return found
