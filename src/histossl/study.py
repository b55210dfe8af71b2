"""The folder of a study: its files, what is done, and what comes next."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from histossl import store
from histossl.claims import Claims
from histossl.config import differences, to_dict
from histossl.errors import StudyError

COLUMNS = ("slide_id", "path", "patient_id", "mpp", "width", "height", "tiles", "status", "error", "made")

# A slide: text by column. Status is inspected, encoded or failed; users may edit mpp and patient_id. `made` is the
# fingerprint of what stands.
Row = dict[str, str]


class Study:
    """Where everything of a study stands; makes the folder where there is none.

    Args:
        folder: of the study.

    Raises:
        StudyError: the folder cannot be made or is a file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(os.path.abspath(folder))  # it travels to workers on other machines
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
        self.log = self.folder / "log.jsonl"
        self.claims = self.folder / ".claims"

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
    def lock(self, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold the study for this process alone; the hold ends with the process, however that ends.

        Args:
            waiting: called with who holds it, before it is waited for; None does not wait.

        Raises:
            StudyError: another run holds it, or the folder cannot be written.
        """
        with self._lock_file() as handle:
            if not _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                handle.seek(0)
                holder = handle.read().strip() or "unknown"
                if waiting is None:
                    raise StudyError(f"{self.folder}: another run is at work on it ({holder})", "wait for it to end")
                waiting(holder)
                _flock(handle, fcntl.LOCK_EX)
            self._clear_up()
            with _signed(handle):
                yield

    @contextmanager
    def share(self, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold the study together with other runs that share it; who wants it alone waits for them, and they for him.

        Args:
            waiting: called with who holds it alone, before he is waited for.

        Raises:
            StudyError: the folder cannot be written.
        """
        with self._lock_file() as handle:
            if _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                self._clear_up()
                _flock(handle, fcntl.LOCK_SH)
            elif not _flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB):
                handle.seek(0)
                waiting(handle.read().strip() or "unknown")
                _flock(handle, fcntl.LOCK_SH)
            with _signed(handle):
                yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """For moments: what is read and written in the block, no other run writes meanwhile."""
        with (self.folder / ".writing").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _lock_file(self) -> IO[str]:
        try:
            return open(self.folder / ".lock", "a+", encoding="utf-8")
        except OSError as error:
            raise StudyError(f"{self.folder}: cannot be written ({error.strerror})", "choose another --out") from error

    def _clear_up(self) -> None:
        # Where the disk's locks do not reach other machines, their claims do.
        with Claims(self.claims) as claims:
            if not any(claim.alive for claim in claims.all()):
                store.sweep(self.folder)

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
        if everything.get(stage) == resolved:
            return
        stands = any(product.iterdir()) if product.is_dir() else product.exists()
        if stands and stage in everything:
            changed = differences(everything[stage], resolved)
            if changed:
                way_out = f"use another --out, or remove {product} to make it anew"
                raise StudyError(f"{self.folder}: made with other settings ({stage}: {', '.join(changed)})", way_out)
        self.note(stage, resolved)

    def note(self, stage: str, settings: Any) -> None:
        """Write down a stage's settings, whatever they were before."""
        with self.writing(), store.whole(self.folder / "settings.json") as part:
            everything = self.settings()
            everything[stage] = settings if isinstance(settings, dict) else to_dict(settings)
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
                reader = csv.reader(file, strict=True)
                header = next(reader, [])
                missing = {"slide_id", "path"} - set(header)
                cells = [row for row in reader if row]
        except (csv.Error, OSError) as error:
            raise StudyError(f"{self.slides_csv}: cannot be read ({error})", "mend or remove it") from error
        if missing or any(len(row) > len(header) for row in cells):
            what = f"lacks the column {', '.join(sorted(missing))}" if missing else "has rows longer than its header"
            raise StudyError(f"{self.slides_csv}: {what}", "separate by commas; mend or remove it")
        empty = dict.fromkeys((*COLUMNS, *header), "")
        return [empty | dict(zip(header, map(store.text_of, row), strict=False)) for row in cells]

    def write_slides(self, rows: list[Row]) -> None:
        """Replace slides.csv, whole; columns that users added stay."""
        columns = dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)])
        with (
            store.whole(self.slides_csv) as part,
            part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: store.cell(text) for name, text in row.items()} for row in rows)

    def encoded(self) -> list[Row]:
        """The rows of slides whose features stand.

        Raises:
            StudyError: there is none.
        """
        found = [row for row in self.slides() if row["status"] == "encoded"]
        if not found:
            raise StudyError(f"{self.folder}: no encoded slide", "run `histossl encode` first, or see slides.csv")
        return found


def _flock(handle: IO[str], how: int) -> bool:
    """Whether a lock could be had; False where others have it."""
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StudyError(f"{handle.name}: its disk has no locks ({error.strerror})", "choose another --out") from error
    return True


@contextmanager
def _signed(handle: IO[str]) -> Iterator[None]:
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}")
    handle.flush()
    yield
    handle.truncate(0)


def existing_study(folder: Path) -> Study:
    """The study in a folder.

    Raises:
        StudyError: there is none.
    """
    if not (folder / "slides.csv").exists():
        hint = "run `histossl inspect SLIDES --out` first; for a folder of features name the study: --out"
        raise StudyError(f"{folder}: not a study, it has no slides.csv", hint)
    return Study(folder)


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
