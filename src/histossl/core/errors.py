"""What can go wrong, typed: every message says what is wrong, where, and what to do about it."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class HistosslError(Exception):
    """The root of all errors that a user may meet; its text is one line fit for a terminal or slides.csv.

    Args:
        what: what is wrong, and where.
        hint: what to do about it; appended after a semicolon where given.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        self.what = " ".join(str(what).split())
        self.hint = " ".join(hint.split())
        super().__init__(f"{self.what}; {self.hint}" if self.hint else self.what)

    def __reduce__(self):
        return _rebuild, (type(self), dict(self.__dict__), self.args)


def _rebuild(kind: type[HistosslError], fields: dict, args: tuple) -> HistosslError:
    """Errors travel between processes whatever the signature of their constructor."""
    error = kind.__new__(kind)
    error.__dict__.update(fields)
    error.args = args
    return error


class SlideError(HistosslError):
    """A slide cannot be read, has no usable mpp, or gave no tissue. Fails that slide only."""

    def __init__(self, path: str | Path, what: str, hint: str = "") -> None:
        self.path = Path(path)
        super().__init__(f"{self.path.name}: {what}", hint)


class SettingsError(HistosslError):
    """A setting is out of its range, unknown, or contradicts another."""


class StudyError(HistosslError):
    """A study folder cannot be used as asked: other settings, another run at work, a missing stage."""


class FileFormatError(HistosslError):
    """A features, model, embeddings or image file does not hold what it should."""


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


class TrainingError(HistosslError):
    """Training cannot start or go on: too few slides, a loss that is not finite."""
