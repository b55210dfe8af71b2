"""The folder of a study: its files, what is done, and what comes next."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from histossl import store
from histossl.config import differences, to_dict
from histossl.errors import StudyError

COLUMNS = ("slide_id", "path", "patient_id", "mpp", "width", "height", "tiles", "status", "error")

# A slide: text by column. Status is inspected, encoded or failed; users may edit mpp and patient_id.
Row = dict[str, str]


class Study:
    """Where everything of a study stands; makes the folder where there is none.

    Args:
        folder: of the study.

    Raises:
        StudyError: the folder cannot be made or is a file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"{folder}: cannot be made a study ({error.strerror})", "choose another --out") from error
        self.slides_csv = self.folder / "slides.csv"
        self.tile_encoder = self.folder / "tile-encoder"
        self.fourth_stage = self.folder / "fourth-stage.safetensors"
        self.slide_encoder = self.folder / "slide-encoder"
        self.embeddings = self.folder / "embeddings.h5ad"
        self.report = self.folder / "report.html"
        self.logs = self.folder / "logs"

    def qc(self, slide_id: str) -> Path:
        """The picture of a slide's tissue and tiles."""
        return self._of("qc", slide_id, ".jpg")

    def tiles(self, slide_id: str) -> Path:
        """The places of a slide's tiles."""
        return self._of("tiles", slide_id, ".h5")

    def features(self, slide_id: str) -> Path:
        """The features of all tiles of a slide."""
        return self._of("features", slide_id, ".h5")

    def views(self, slide_id: str) -> Path:
        """The folder of a slide's augmented views."""
        return self._of("views", slide_id, "")

    def _of(self, room: str, slide_id: str, suffix: str) -> Path:
        if not slide_id or "/" in slide_id or "\\" in slide_id or "\0" in slide_id or slide_id in (".", ".."):
            raise StudyError(f"{self.slides_csv}: {slide_id!r} cannot name a slide", "a slide_id is a file's name")
        return self.folder / room / f"{slide_id}{suffix}"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the study for this process; the hold ends with the process, however that ends.

        Raises:
            StudyError: another run holds it, or the folder cannot be written.
        """
        try:
            handle = open(self.folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - closed below, after the hold
        except OSError as error:
            raise StudyError(f"{self.folder}: cannot be written ({error.strerror})", "choose another --out") from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                handle.seek(0)
                holder = handle.read().strip() or "unknown"
                raise StudyError(
                    f"{self.folder}: another run is at work on it ({holder})", "wait for it to end"
                ) from error
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}")
            handle.flush()
            store.sweep(self.folder)
            yield
            handle.truncate(0)

    def settle(self, stage: str, settings: Any, product: Path) -> None:
        """Write down a stage's settings; refuse others than those that made what stands already.

        Args:
            stage: its name in settings.json.
            settings: a dictionary or a settings dataclass.
            product: the file or folder that the stage makes.

        Raises:
            StudyError: `product` stands and was made with other settings; the message names each of them.
        """
        resolved = settings if isinstance(settings, dict) else to_dict(settings)
        everything = self.settings()
        stands = any(product.iterdir()) if product.is_dir() else product.exists()
        if stands and stage in everything:
            changed = differences(everything[stage], resolved)
            if changed:
                way_out = f"use another --out, or remove {product} to make it anew"
                raise StudyError(f"{self.folder}: made with other settings ({stage}: {', '.join(changed)})", way_out)
        self.note(stage, resolved)

    def note(self, stage: str, settings: Any) -> None:
        """Write down a stage's settings, whatever they were before."""
        everything = self.settings()
        everything[stage] = settings if isinstance(settings, dict) else to_dict(settings)
        with store.whole(self.folder / "settings.json") as part:
            part.write_text(json.dumps(everything, indent=1, sort_keys=True, ensure_ascii=False), encoding="utf-8")

    def settings(self) -> dict[str, Any]:
        """The resolved settings of every stage that ran, by stage.

        Raises:
            StudyError: settings.json is damaged.
        """
        path = self.folder / "settings.json"
        if not path.exists():
            return {}
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StudyError(f"{path}: not JSON ({error})", "remove it") from error

    def slides(self) -> list[Row]:
        """The rows of slides.csv, in its order; none where there is no file yet.

        Raises:
            StudyError: not such a table.
        """
        if not self.slides_csv.exists():
            return []
        try:
            with self.slides_csv.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
                reader = csv.DictReader(file, restval="", strict=True)
                missing = {"slide_id", "path"} - set(reader.fieldnames or ())
                rows = [dict.fromkeys(COLUMNS, "") | row for row in reader]
        except (csv.Error, OSError) as error:
            raise StudyError(f"{self.slides_csv}: cannot be read ({error})", "mend or remove it") from error
        if missing or any(None in row for row in rows):
            what = f"lacks the column {', '.join(sorted(missing))}" if missing else "has rows longer than its header"
            raise StudyError(f"{self.slides_csv}: {what}", "separate by commas; mend or remove it")
        return rows

    def write_slides(self, rows: list[Row]) -> None:
        """Replace slides.csv, whole; columns that users added stay."""
        columns = dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)])
        with (
            store.whole(self.slides_csv) as part,
            part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def encoded(self) -> list[Row]:
        """The rows of slides whose features stand.

        Raises:
            StudyError: there is none.
        """
        found = [row for row in self.slides() if row["status"] == "encoded"]
        if not found:
            raise StudyError(f"{self.folder}: no encoded slide", "run `histossl encode` first, or see slides.csv")
        return found


def slide_names(paths: list[Path]) -> list[tuple[str, str]]:
    """(slide_id, complaint) of each path: its name without the suffix, and what is wrong where two share one."""
    # Some file systems hold names that differ by case alone to be the same.
    of_name: dict[str, list[Path]] = {}
    for path in paths:
        of_name.setdefault(path.stem.casefold(), []).append(path)
    found = []
    for path in paths:
        twin = next((other for other in of_name[path.stem.casefold()] if other != path), None)
        found.append((path.stem, f"{path} has the same name as {twin}; rename one of them" if twin else ""))
    return found
