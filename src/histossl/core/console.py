"""What a run shows: one console, lines that name a slide, progress bars.

Names of files, columns and hosts are data of strangers: whatever reaches the terminal passes `printable`.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

# Control characters but tab and line feed; marks that turn the direction of text; separators of lines; surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Text that a terminal shows and does not obey: other characters become escapes such as \x1b.

    Args:
        text: any text; bytes of a file's name that are not UTF-8 are shown as \xNN.

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
        """As of `Console`, with what `printable` makes of the text.

        Args:
            text: to render.
            **more: as of `Console.render_str`.

        Returns:
            The rendered text.
        """
        return super().render_str(printable(text), **more)  # before it is laid out: escapes are longer

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As of `Console`; also text that was rendered before passes `printable`.

        Args:
            renderable: to render.
            options: of the console, by default its own.

        Yields:
            Segments; control codes of the console itself stay as they are.
        """
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


console = PrintableConsole(stderr=True, highlight=False, soft_wrap=True)
answers = PrintableConsole(highlight=False)  # what a command was asked for goes to standard output

BEAT = 30.0  # seconds between two lines of progress where no terminal shows a bar
RECENT, _LEAST = 90.0, 3  # the rate is that of the last so many seconds, or of so many marks where items take longer
_quiet = threading.Event()
_drawing = threading.Event()  # while a terminal shows a bar
_stage, _stage_began, _last_said = "", 0.0, 0.0


def set_quiet(quiet: bool) -> None:
    """Choose whether only warnings and errors are printed.

    Args:
        quiet: True leaves out progress and lines of success.
    """
    _quiet.set() if quiet else _quiet.clear()


def say(text: str, style: str = "") -> None:
    """Print one line to the terminal.

    Args:
        text: data, never markup; line feeds are shown as escapes.
        style: of rich, for example `red`; lines without a style and green ones are left out where it is quiet.
    """
    global _last_said
    if _quiet.is_set() and style in ("", "green"):
        return
    _last_said = time.monotonic()
    console.print(escape(printable(text).replace("\n", "\\n")), style=style or None)


def begin_stage(name: str, text: str = "") -> None:
    """Say that a stage of a run begins; progress names it until the next one.

    Args:
        name: such as "2/6 encode"; "" after the last one says nothing.
        text: what it works on.
    """
    global _stage, _stage_began
    _stage, _stage_began = name, time.monotonic()
    if name:
        say(f"{name:<13} {text}".rstrip())


class Bar:
    """The progress of a piece of work: a bar on a terminal, else a line every half minute.

    Args:
        what: the work.
        total: number of items; None where it is unknown.
        done: items that are already done.
    """

    def __init__(self, what: str, total: int | None, done: int = 0) -> None:
        self._what = f"{_stage}, {what}" if _stage else what
        self._total, self._done, self._begun, self._text = total, float(done), done, ""
        self._marks = deque([(time.monotonic(), self._done)])
        self._shown: tuple[Progress, TaskID] | None = None

    def show_in(self, progress: Progress) -> None:
        """Show the bar on a terminal.

        Args:
            progress: rich's display.
        """
        task = progress.add_task(escape(printable(self._what)), total=self._total, completed=self._begun, text="")
        self._shown = progress, task

    def advance(self, count: float) -> None:
        """Count more items as done.

        Args:
            count: items since the last call.
        """
        self._done += count
        now = time.monotonic()
        if now - self._marks[-1][0] >= 1:
            self._marks.append((now, self._done))
            while len(self._marks) > _LEAST and now - self._marks[1][0] > RECENT:
                self._marks.popleft()
        if self._shown:
            self._shown[0].advance(self._shown[1], count)

    def say(self, text: str) -> None:
        """Show a short text behind the bar.

        Args:
            text: data, never markup.
        """
        self._text = text
        if self._shown:
            self._shown[0].update(self._shown[1], text=escape(printable(text)))

    def line(self) -> str:
        """The progress as one line, such as `tiles: 120 of 400 (30 %), 4.0/s, 0:01:10 left`."""
        then, done = self._marks[0]
        passed = time.monotonic() - then
        rate = (self._done - done) / passed if passed > 0 else 0.0
        words = [f"{self._what}: {self._done:,.0f}"]
        if self._total:
            words[0] += f" of {self._total:,} ({self._done / self._total:.0%})".replace("%", " %")
        if rate:
            words.append(_rate(rate))
        if rate and self._total:
            words.append(f"{timedelta(seconds=round(max(0.0, self._total - self._done) / rate))} left")
        return ", ".join([*words, *([self._text] if self._text else [])])


def _rate(rate: float) -> str:
    return f"{rate:,.1f}/s" if rate >= 0.1 else f"{1 / rate:,.0f} s each"


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task.speed) if task.speed else "")


@contextmanager
def progress_bar(what: str, total: int | None, done: int = 0, shown: bool = True) -> Iterator[Bar]:
    """Show the progress of the `with` block: a bar that disappears at its end, or lines where there is no terminal.

    Args:
        what: the work, in front of the bar.
        total: number of items; None where it is unknown.
        done: items that are already done.
        shown: False prints nothing.

    Yields:
        The bar, to count on.
    """
    bar = Bar(what, total, done)
    if not shown or _quiet.is_set():
        yield bar
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        _drawing.set()
        try:
            with Progress(*columns, console=console, transient=True) as progress:
                bar.show_in(progress)
                yield bar
        finally:
            _drawing.clear()
    else:
        with _beating(bar):
            yield bar


def _beating(bar: Bar) -> AbstractContextManager[None]:
    """A line of progress every half minute, also while one item takes long."""
    return _repeated(BEAT, lambda: say(bar.line()))


def signs_of_life(command: str) -> AbstractContextManager[None]:
    """A line after each half minute in which nothing else was said and no bar is shown.

    Args:
        command: its name, where no stage has begun.
    """
    begun = time.monotonic()

    def beat() -> None:
        now = time.monotonic()
        since = max(begun, _stage_began) if _stage else begun
        if not _drawing.is_set() and now - max(since, _last_said) >= BEAT:
            say(f"{_stage or command}: at work for {timedelta(seconds=round(now - since))}")

    return _repeated(BEAT / 10, beat)


@contextmanager
def _repeated(pause: float, beat: Callable[[], None]) -> Iterator[None]:
    """Call a function again and again while the `with` block runs."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(pause):
            beat()

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
