"""`histossl status`: the progress of a study, its running processes, their speed, and the time left."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from histossl.core import answers
from histossl.execution.claims import Claim, Claims
from histossl.execution.journal import Line, caught_up, lines_since
from histossl.study.folder import existing_study

WINDOW = timedelta(minutes=10)  # the rate is measured over it
_MOST = 2**20  # bytes at the end of the log that are read
_SHOWN = 5  # failures that are listed


@dataclass(frozen=True)
class Status:
    """The progress of a study.

    Attributes:
        slides: number of slides by status; "new" are those that were not inspected yet.
        tiles: number of tiles of encoded slides, and of encoded and inspected slides.
        running: claims of live processes.
        rate: tiles per second that all runs together encoded in the last ten minutes.
        left: seconds until all known tiles are encoded at that rate; None where unknown.
        limit: the bottleneck, as the last run logged it.
        failures: errors of failed slides.
    """

    slides: Counter[str]
    tiles: tuple[int, int]
    running: list[Claim]
    rate: float
    left: float | None
    limit: str
    failures: list[str]


def status_of(folder: Path, now: datetime | None = None) -> Status:
    """Read the progress of a study, without a lock, so that running processes are not disturbed.

    Args:
        folder: folder of the study.
        now: the current time, with a time zone; None takes the clock.

    Returns:
        The progress.

    Raises:
        StudyError: the folder is not a study.
    """
    study = existing_study(folder)
    rows, _ = caught_up(study)
    slides: Counter[str] = Counter()
    tiles: Counter[str] = Counter()
    for row in rows:
        state = row["status"] or "new"
        slides[state] += 1
        tiles[state] += int(row["tiles"]) if row["tiles"].isdecimal() else 0
    running = [claim for claim in Claims(study.claims).all() if claim.alive]  # not entered, so nothing is written
    now = now or datetime.now(UTC)
    recent = lines_since(study, lambda line: "time" in line and _time(line) < now - WINDOW, _MOST)
    needed = {"time", "stage", "seconds", "tiles", "limit"}
    recent = [line for line in recent if needed <= set(line) and line["stage"] == "encode"]
    encoded = [line for line in recent if line["row"].get("status") == "encoded"]
    rate = 0.0
    if encoded:
        begun = min(_time(line) - timedelta(seconds=line["seconds"]) for line in encoded)
        span = min(WINDOW, now - begun).total_seconds()
        rate = sum(line["tiles"] for line in encoded) / max(span, 1.0)
    return Status(
        slides,
        (tiles["encoded"], tiles["encoded"] + tiles["inspected"]),
        running,
        rate,
        tiles["inspected"] / rate if rate and running else None,
        encoded[-1]["limit"] if encoded and running else "",
        [row["error"] for row in rows if row["status"] == "failed"],
    )


def _time(line: Line) -> datetime:
    return datetime.fromisoformat(line["time"])


def status(study: Path) -> int:
    """Show what is done, failed and left of a study, which runs work on it, their speed, and the time left.

    Args:
        study: the folder of the study; it may be in use, and its results are only read.

    Returns:
        0, the exit code.

    Raises:
        StudyError: the folder is not a study.
    """
    found = status_of(study)
    done, known = found.tiles
    owners: dict[str, list[str]] = {}
    for claim in found.running:
        who = f"process {claim.owner.pid} on {claim.owner.host}" if claim.owner else "a run that has just begun"
        owners.setdefault(who, []).append(claim.name)
    facts = {"slides": dict(found.slides), "tiles": {"encoded": done, "known": known}, "running": owners}
    facts |= {"tiles_per_second": found.rate, "seconds_left": found.left, "limit": found.limit}
    answers.give("status", facts | {"failures": found.failures}, _table(found, owners))
    return 0


def _table(found: Status, owners: dict[str, list[str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    done, known = found.tiles
    total = sum(found.slides.values())
    table.add_row("slides", f"{total:,}: " + ", ".join(f"{n:,} {state}" for state, n in sorted(found.slides.items())))
    table.add_row("tiles", f"{done:,} of {known:,} encoded")
    for who, names in sorted(owners.items()):
        table.add_row("running", escape(f"{who}: {', '.join(names)}"))
    if not owners:
        table.add_row("running", "no run works on slides now")
    if found.rate:
        table.add_row("rate", f"{found.rate:,.1f} tiles/s in the last ten minutes")
    if found.left is not None:
        table.add_row("left", f"about {timedelta(seconds=round(found.left))}")
    if found.limit:
        table.add_row("limit", found.limit)
    for error in found.failures[:_SHOWN]:
        table.add_row("failed", escape(error), style="red")
    if len(found.failures) > _SHOWN:
        table.add_row("", f"and {len(found.failures) - _SHOWN:,} more, see slides.csv")
    return table
