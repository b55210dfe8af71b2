"""Translates errors for Python: the flag `--probe.folds 3` of a command is the argument `folds=3`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from histossl.core.errors import HistosslError

P = ParamSpec("P")
R = TypeVar("R")

# A flag; with its value where that is a number, true or false, or the last word of the hint.
_FLAG = re.compile(r"--(?:(?P<of>[\w-]+)\.)*(?P<name>[a-z][\w-]*)(?: (?P<value>\d[\d.]*|true\b|false\b|[a-z]+$))?")
_COMMAND = re.compile(r"`histossl (?P<name>[a-z-]+)[^`]*`")
_FUNCTIONS = {"inspect": "encode"}  # commands with another name in Python


def as_arguments(text: str) -> str:
    """Replace flags and commands in an error text by Python arguments and functions.

    Args:
        text: the text, such as "set --probe.folds 3".

    Returns:
        The text, such as "set folds=3".
    """
    text = _FLAG.sub(_argument, text)
    return _COMMAND.sub(lambda m: f"histossl.{_FUNCTIONS.get(m['name'], m['name'])}", text)


def _argument(flag: re.Match[str]) -> str:
    name, value, of = flag["name"].replace("-", "_"), flag["value"], flag["of"]
    if value is not None:
        known = {"true": "True", "false": "False"}
        name += f"={known.get(value, value if value[0].isdigit() else repr(value))}"
    return f"tile=TileSpec({name if value else f'{name}=...'})" if of == "tile" else name


def names_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function so that its errors name Python arguments, not flags of the command line.

    Args:
        function: a public function that raises errors of `histossl.errors`.

    Returns:
        The wrapped function. It raises the same errors with other texts.
    """

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except HistosslError as error:
            error.what, error.hint = as_arguments(error.what), as_arguments(error.hint)
            error.args = (f"{error.what}; {error.hint}" if error.hint else error.what,)
            raise

    return inner
