"""What a run shows: one console, lines that name a slide, progress bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False, soft_wrap=True)
answers = Console(highlight=False)  # what a command was asked for goes to standard output


def say(text: str, style: str = "") -> None:
    """One line to the terminal; `text` is data, never markup."""
    console.print(escape(text), style=style or None)


class Bar:
    """A progress bar at work."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, count: float) -> None:
        """Count `count` more as done."""
        self._progress.advance(self._task, count)

    def say(self, text: str) -> None:
        """Show a short text behind the bar."""
        self._progress.update(self._task, text=escape(text))


@contextmanager
def progress_bar(what: str, total: int | None, done: int = 0, shown: bool = True) -> Iterator[Bar]:
    """A bar with counts and the time left, which goes when the work is over."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        yield Bar(progress, progress.add_task(what, total=total, completed=done, text=""))
