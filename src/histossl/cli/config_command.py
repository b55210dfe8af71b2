"""`histossl config`: the settings of a command as a YAML file, to change and to give back with --config."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from histossl.cli.commands import COMMANDS
from histossl.cli.main import built_parser
from histossl.core import atomic, console
from histossl.core.errors import SettingsError

_WIDTH = 99


def config(command: str, dump: Path | None = None) -> int:
    """All settings of a command as YAML, each with its meaning and its default: change some, and give it to --config.

    Args:
        command: such as run or nuclei-segment.
        dump: the file; without it the text is printed.
    """
    name = command.replace("-", " ")
    if name not in COMMANDS:
        raise SettingsError(f"no command {command!r}", "`histossl --help` lists them")
    text = "\n".join([f"# histossl {name} --config FILE", *settings_of(name)]) + "\n"
    if dump is None:
        console.answers.file.write(text)
        return 0
    if dump.exists():
        raise SettingsError(f"{dump}: stands already", "name another file, or remove it")
    with atomic.whole(dump) as part:
        part.write_text(text, encoding="utf-8")
    console.say(f"done: {dump}; next: histossl {name} ... --config {dump}", "green")
    return 0


def settings_of(name: str) -> Iterator[str]:
    """The settings of a command, without those that have no default, such as the slides.

    Args:
        name: one of COMMANDS.

    Yields:
        Lines of YAML.
    """
    module, function, _ = COMMANDS[name]
    parser, _ = built_parser(name, getattr(import_module(module), function), ["--help"])
    meanings = {action.dest: action.help for action in parser._actions if action.help}
    needed = {action.dest for action in parser._actions if action.required or not action.option_strings}
    values = parser.get_defaults().as_dict()
    yield from _lines({n: value for n, value in values.items() if n not in needed and n != "config"}, meanings, "")


def _lines(values: Mapping[str, Any], meanings: Mapping[str, str], above: str) -> Iterator[str]:
    indent = "  " * above.count(".")
    for name, value in values.items():
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _lines(value, meanings, f"{above}{name}.")
            continue
        text = meanings.get(f"{above}{name}", "").replace("%%", "%")
        yield from textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        yield f"{indent}{name}: {json.dumps(value, default=str)}"
