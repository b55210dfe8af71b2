"""What a run shows: one console, lines that name a slide, progress bars.

Names of files, columns and hosts are data of strangers: whatever reaches the terminal passes `printable`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

# Control characters but tab and line feed; marks that turn the direction of text; separators of lines; surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Text that a terminal shows and does not interpret: other characters become escapes such as \x1b.

    Bytes of a file's name that are not UTF-8 are shown as \xNN.

    Args:
        text: any text.

    Returns:
        The text with escapes.
    """
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps such a byte
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


class PrintableConsole(Console):
    """A console whose text passes `printable`, wherever in a table or a bar it comes from."""

    def render_str(self, text: str, **more: Any) -> Text:
        """`Console.render_str` of the printable text.

        Args:
            text: any text.
            **more: as of `Console.render_str`.

        Returns:
            The text as rich renders it.
        """
        return super().render_str(printable(text), **more)  # before it is laid out: escapes are longer

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """`Console.render`, whose segments pass `printable` too, since some text was laid out before.

        Args:
            renderable: as of `Console.render`.
            options: as of `Console.render`.

        Yields:
            The segments.
        """
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


console = PrintableConsole(stderr=True, highlight=False, soft_wrap=True)
answers = PrintableConsole(highlight=False)  # what a command was asked for goes to standard output


def say(text: str, style: str = "") -> None:
    """Print one line.

    Args:
        text: data, never markup; line breaks are shown as escapes.
        style: a style of rich, such as "yellow" or "bold red".
    """
    console.print(escape(printable(text).replace("\n", "\\n")), style=style or None)


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
        self._progress.update(self._task, text=escape(printable(text)))


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
        yield Bar(progress, progress.add_task(escape(printable(what)), total=total, completed=done, text=""))
