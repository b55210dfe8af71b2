"""Terminal output: two consoles (messages and results), one-line messages, progress bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False, soft_wrap=True)
answers = Console(highlight=False)  # results go to standard output, so that they can be piped without the messages


def say(text: str, style: str = "") -> None:
    """Print one line to standard error.

    Args:
        text: data, never markup: brackets are printed as they are.
        style: of rich, such as "yellow" or "bold red".
    """
    console.print(escape(text), style=style or None)


class Bar:
    """A progress bar that is shown now.

    Args:
        progress: rich's display.
        task: the bar's id in it.
    """

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, count: float) -> None:
        """Count more items as done.

        Args:
            count: items since the last call.
        """
        self._progress.advance(self._task, count)

    def say(self, text: str) -> None:
        """Show a short text to the right of the bar.

        Args:
            text: data, never markup; it replaces the text before.
        """
        self._progress.update(self._task, text=escape(text))


@contextmanager
def progress_bar(what: str, total: int | None, done: int = 0, shown: bool = True) -> Iterator[Bar]:
    """Show a bar with counts and the time left; it disappears at the end of the `with` block.

    Args:
        what: the work, in front of the bar.
        total: number of items; None where it is unknown.
        done: items that are already done.
        shown: False prints nothing.

    Yields:
        The bar, to count on.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        yield Bar(progress, progress.add_task(what, total=total, completed=done, text=""))
