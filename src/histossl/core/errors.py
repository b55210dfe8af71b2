"""The typed errors: every message says what is wrong, where, and what to do about it."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class HistosslError(Exception):
    """The base class of all errors that a user can cause; its text is one line for the terminal or slides.csv.

    Attributes:
        anchor: the section of docs/troubleshooting.md on errors of the class.

    Args:
        what: what is wrong, and where.
        hint: what to do about it; appended after a semicolon.
    """

    anchor = "what-to-send-with-a-question"

    def __init__(self, what: str, hint: str = "") -> None:
        self.what = " ".join(str(what).split())
        self.hint = " ".join(hint.split())
        super().__init__(f"{self.what}; {self.hint}" if self.hint else self.what)

    def __reduce__(self):
        return _rebuild, (type(self), dict(self.__dict__), self.args)


def _rebuild(kind: type[HistosslError], fields: dict, args: tuple) -> HistosslError:
    # Pickle would call the class with `args`, which fails for constructors with other arguments; worker processes
    # send their errors pickled.
    error = kind.__new__(kind)
    error.__dict__.update(fields)
    error.args = args
    return error


class SlideError(HistosslError):
    """A slide cannot be read, has no usable mpp, or has no tissue; the run goes on with the other slides.

    Args:
        path: of the slide; the message starts with its file name.
        what: what is wrong.
        hint: what to do about it.
    """

    anchor = "slides"

    def __init__(self, path: str | Path, what: str, hint: str = "") -> None:
        self.path = Path(path)
        super().__init__(f"{self.path.name}: {what}", hint)


class SettingsError(HistosslError):
    """A setting is out of its range, unknown, or contradicts another."""

    anchor = "settings"


class StudyError(HistosslError):
    """A study folder cannot be used: it has other settings, another run holds it, or a stage is missing."""

    anchor = "studies"


class FileFormatError(HistosslError):
    """A features, model, embeddings or image file is damaged or of another format."""

    anchor = "models-and-files"


# What libraries raise over damaged or odd files. A bug of ours may be among them; it is then named with the file.
READ_ERRORS = (
    OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError,
    MemoryError, csv.Error,
)  # fmt: skip


@contextmanager
def file_errors(path: str | Path, hint: str) -> Iterator[None]:
    """Whatever a library raises in the block over a file that somebody else may have written is an error of that file.

    Args:
        path: of the file.
        hint: what to do about it.

    Raises:
        FileFormatError: names the file; typed errors of ours pass as they are.
    """
    try:
        yield
    except READ_ERRORS as error:
        raise FileFormatError(f"{path}: cannot be used ({type(error).__name__}: {str(error)[:200]})", hint) from error


class LabelError(HistosslError):
    """A table of labels does not fit the slides or the task."""

    anchor = "labels"


class TrainingError(HistosslError):
    """Training cannot start or continue: too few slides, or a loss that is not finite."""

    anchor = "training"
