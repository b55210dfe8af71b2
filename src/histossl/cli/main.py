"""`histossl COMMAND`: each command is a function; its flags are made from the function's signature and settings."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import re
import signal
import sys
import textwrap
import threading
import typing
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from histossl.cli.commands import ANSWERS, COMMANDS, EXAMPLES

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

ALL_FLAGS = "--help_all"
TROUBLES = "docs/troubleshooting.md"
SHORT = {"-o": "--out", "-m": "--model"}


def main(argv: list[str] | None = None) -> int:
    """The command line.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit code. 0: success. 1: some slides or labels were left out, each with its reason. 2: the command failed.
        130: stopped by Ctrl-C.
    """
    # Threads that spin long while they wait take the processor from those that they wait for, where others work, too.
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(overview())
        return 0
    if argv[0] == "--version":
        from histossl import __version__

        sys.stdout.write(f"histossl {__version__}\n")
        return 0
    name = " ".join(argv[:2]) if " ".join(argv[:2]) in COMMANDS else argv[0]
    if name in COMMANDS:
        words = argv[len(name.split()) :]
        if {"-h", "--help"} & set(words):
            sys.stdout.write(saved_help(name).read_text(encoding="utf-8"))
            return 0
        return call(name, words)
    if any(command.startswith(f"{name} ") for command in COMMANDS):  # a topic, such as `nuclei`
        if argv[1:] and argv[1] not in ("-h", "--help"):
            sys.stderr.write(f"histossl: no command {' '.join(argv[:2])!r}{_nearest(' '.join(argv[:2]), COMMANDS)}\n")
            return 2
        sys.stdout.write(overview(f"{name} "))
        return 0
    sys.stderr.write(f"histossl: no command {name!r}{_nearest(name, COMMANDS)}; `histossl --help` lists them\n")
    return 2


def overview(topic: str = "") -> str:
    """The text of `histossl --help`, or of the commands of one topic.

    Args:
        topic: what the names of the commands begin with.
    """
    commands = {name: about for name, (_, _, about) in COMMANDS.items() if name.startswith(topic)}
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {about}" for name, about in commands.items()]
    head = f"usage: histossl {topic}COMMAND ...\n\nLearning from histopathology slides without labels.\n\ncommands:\n"
    return head + "\n".join(lines) + "\n\n`histossl COMMAND --help` shows the flags of a command.\n"


def saved_help(name: str) -> Path:
    """The file of the text of `histossl NAME --help`, as `.ci/help_pages.py` writes it.

    To make the text takes seconds, since settings lie beside what computes with them.

    Args:
        name: one of COMMANDS.
    """
    return Path(__file__).parent / "help" / f"{name.replace(' ', '-')}.txt"


def made_help(name: str, flag: str = "--help") -> str:
    """Make the text of `histossl NAME --help` from the command's signature and settings.

    Args:
        name: one of COMMANDS.
        flag: or --help-all.

    Returns:
        The text, in lines of at most 100 characters where COLUMNS is 100.
    """
    module, function, _ = COMMANDS[name]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        parse(name, getattr(import_module(module), function), [flag])
    return text.getvalue()


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""


def call(name: str, argv: list[str]) -> int:
    """Parse the flags of one command and call it; errors that a user can cause are printed as one line.

    Args:
        name: one of COMMANDS.
        argv: its flags.

    Returns:
        The exit code, as of `main`.
    """
    from histossl.core import answers
    from histossl.core.console import begin_stage, say, set_quiet, signs_of_life
    from histossl.core.errors import HistosslError

    module, function, _ = COMMANDS[name]
    as_json = name in ANSWERS and "--json" in argv
    set_quiet("--quiet" in argv or as_json)
    answers.begin(as_json)
    argv = [word for word in argv if word != "--quiet" and not (as_json and word == "--json")]
    # Clusters send SIGTERM to a job that is over its time limit: handle it like Ctrl-C.
    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if ours else None
    try:
        command = getattr(import_module(module), function)
        arguments = parse(name, command, argv)
        with contextlib.nullcontext() if name == "view" else signs_of_life(name):  # a viewer waits for its reader
            code = int(command(**arguments) or 0)
        answers.finish()
        return code
    except HistosslError as error:
        say(f"ERROR {error}", "bold red")
        say(f"see {TROUBLES}#{error.anchor}", "red")
        return 2
    except OSError as error:
        # A full disk or a folder that cannot be written; bugs raise other exceptions and show a traceback.
        say(f"ERROR {error.strerror or error}: {error.filename or 'while writing'}", "bold red")
        say(f"see {TROUBLES}#disk", "red")
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command continues from here", "yellow")
        return 130
    finally:
        set_quiet(False)
        begin_stage("")
        answers.begin(False)
        if ours:
            signal.signal(signal.SIGTERM, before)


def parse(name: str, command: Callable[..., object], argv: list[str]) -> dict[str, object]:
    """The arguments of a command from its flags and, with --config, from a YAML file; an unknown key is an error.

    Parameters without default are positional, or required flags where the function takes them by keyword only.

    Args:
        name: one of COMMANDS, for the usage.
        command: its function.
        argv: its flags.

    Returns:
        Parameter -> value.

    Raises:
        SettingsError: a value or a file cannot be used.
    """
    from histossl.core.errors import SettingsError

    try:
        parser, words = built_parser(name, command, argv)
        found = parser.parse_args(words)
        values = parser.instantiate(found) if hasattr(parser, "instantiate") else parser.instantiate_classes(found)
    except (ValueError, TypeError) as error:
        raise SettingsError(str(error)) from error
    return {name: getattr(values, name) for name in inspect.signature(command).parameters}


def built_parser(name: str, command: Callable[..., object], argv: list[str]) -> tuple[ArgumentParser, list[str]]:
    """The parser of a command's flags, made from its signature, its settings and their docstrings.

    Args:
        name: one of COMMANDS, for the usage.
        command: its function.
        argv: its flags; --help-all and --preset change the parser.

    Returns:
        The parser, and the flags as it reads them.
    """
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    import docstring_parser
    import jsonargparse

    from histossl.core.errors import SettingsError

    class Parser(jsonargparse.ArgumentParser):
        def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
            text = _readable(self, super().format_help, stages, ALL_FLAGS in words)
            return text + _footer(name, [] if ALL_FLAGS in words else stages)

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise SettingsError(_short(message, self)) from ex

    words = [_underscored(SHORT.get(word, word)) for word in argv]
    _resolve_annotations(command)
    signature = inspect.signature(command).parameters.values()
    stages = [p.name.replace("_", "-") for p in signature if dataclasses.is_dataclass(p.annotation)]
    # jsonargparse would make required flags positional, and read lists from one word.
    flags = [p for p in signature if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    lists = [p for p in signature if p.default is p.empty and typing.get_origin(p.annotation) is list]
    about = docstring_parser.parse(command.__doc__ or "")
    helps = {p.arg_name: p.description for p in about.params}
    parser = Parser(prog=f"histossl {name}", description=about.short_description, usage=_usage(name, signature))
    parser.add_argument("--config", action="config", help="a YAML file of flags, such as `histossl config` writes")
    parser.add_argument(ALL_FLAGS, action="help", help="show the settings of every stage, too")
    for action in parser._actions:
        if "--print_config" in action.option_strings:
            action.help = argparse.SUPPRESS  # `histossl config` writes the same, and explains it
    for p in flags:
        parser.add_argument(f"--{p.name}", type=p.annotation, required=True, help=helps.get(p.name))
    for p in lists:
        parser.add_argument(p.name, type=typing.get_args(p.annotation)[0], nargs="+", help=helps.get(p.name))
    own: set[str | int] = {p.name for p in (*flags, *lists)}
    parser.add_function_arguments(command, as_positional=True, fail_untyped=True, skip=own)
    words = _bare_switches(parser, _lists_in_brackets(parser, words))
    if "pretrain" in {p.name for p in signature}:
        _take_preset(parser, words)
    return parser, words


def _resolve_annotations(command: Callable[..., object]) -> None:
    """Have the annotations of a command and of its settings be types instead of text.

    To read text, jsonargparse would import what a module imports for the type checker alone, torch among it.
    """
    todo: list[typing.Any] = [command]
    while todo:
        of = todo.pop()
        hints = typing.get_type_hints(of)
        written = (of.__init__ if isinstance(of, type) else of).__annotations__
        written.update({name: hints[name] for name in written if name in hints})
        todo += [kind for kind in hints.values() if dataclasses.is_dataclass(kind)]


def _take_preset(parser: ArgumentParser, words: list[str]) -> None:
    """Add --preset, and have the settings of the chosen one be the defaults of the parser's other flags."""
    from histossl.cli.presets import PRESETS
    from histossl.core.config import to_dict

    about = "settings chosen together, `paper` as published; other flags override them"
    parser.add_argument("--preset", choices=list(PRESETS), default="default", help=about)
    if not {"-h", "--help"} & set(words):
        groups = parser.groups or {}
        chosen = PRESETS[parser.parse_args(words).preset]
        parser.set_defaults({name: to_dict(value) for name, value in chosen.items() if name in groups})


def _usage(name: str, signature: Iterable[inspect.Parameter]) -> str:
    """The usage of a command with its required arguments, such as `histossl run SLIDES --out OUT [flags]`."""
    words = [f"histossl {name}"]
    for p in signature:
        if p.default is p.empty:
            many = " [...]" if typing.get_origin(p.annotation) is list else ""
            flag = f"--{p.name.replace('_', '-')} " if p.kind is p.KEYWORD_ONLY else ""
            words.append(f"{flag}{p.name.upper()}{many}")
    return " ".join([*words, "[flags]"])


def _lists_in_brackets(parser: ArgumentParser, words: list[str]) -> list[str]:
    """`--probe.targets a,b` as `--probe.targets=[a,b]`, which is how the parser reads lists."""
    several = {
        option
        for action in parser._actions
        if typing.get_origin(getattr(action, "_typehint", None)) is tuple
        for option in action.option_strings
    }
    found: list[str] = []
    for word in words:
        flag, sign, value = word.partition("=")
        if found and found[-1] in several:
            flag, sign, value = found.pop(), "=", word
        if flag in several and sign and not value.startswith("["):
            value = f"[{value}]"
        found.append(flag + sign + value)
    return found


def _bare_switches(parser: ArgumentParser, words: list[str]) -> list[str]:
    """`--real` as `--real=true`, which is how the parser reads switches; `--real true` stays as it is."""
    switches = {
        option
        for action in parser._actions
        if getattr(action, "_typehint", None) is bool
        for option in action.option_strings
    }
    following = (*words[1:], "--")
    return [f"{w}=true" if w in switches and n.startswith("--") else w for w, n in zip(words, following, strict=False)]


def _readable(parser: ArgumentParser, whole: Callable[[], str], stages: list[str], everything: bool) -> str:
    """The help of a command: its own flags, or with `everything` the settings of every stage; without raw types."""
    hidden = [group for group in parser._action_groups if _of_stage(group, parser)]
    if not everything:
        for action in (action for group in hidden for action in group._group_actions):
            action.help = argparse.SUPPRESS
        parser._action_groups = [group for group in parser._action_groups if group not in hidden]
    for action in (one for one in parser._actions if one.option_strings and one.metavar is None):
        if kind := _kind(action):
            action.metavar = kind[0]
    about = (parser.description or "").strip()
    text = whole().replace(f"\n{about.rstrip('.')}:\n", "\narguments:\n")
    text = text.replace(f"\n{about}\n", "\n" + textwrap.fill(about, 99) + "\n")
    text = text.replace("Path to a configuration file.", "a YAML file of these settings")
    text = re.sub(r"--[\w.]+", lambda flag: flag[0].replace("_", "-"), text)
    inside = r"(?:[^()]|\([^()]*\))*?"
    text = re.sub(rf"\s+\(type:{inside}default:\s+(?:null|\(\))?\)", "", text)
    text = re.sub(rf"\((required,\s+)?type:{inside}(?:,\s+(default:{inside}))?\)(?=\n)", r"(\1\2)", text)
    text = re.sub(r" \(default:(\n\s+)", r"\1(default: ", text)  # in one piece
    return re.sub(r"\(required,\s+\)", "(required)", text)


def _footer(name: str, stages: list[str]) -> str:
    """What stands under the flags: an example, and where the rest is."""
    lines = [f"example: {EXAMPLES[name]}"]
    if stages:
        rest = f"Settings of {', '.join(stages)}: --help-all shows them, `histossl config` writes them as YAML."
        lines += textwrap.wrap(rest, 99)
    lines.append("--quiet prints warnings and errors only" + ("; --json answers scripts." if name in ANSWERS else "."))
    return "\n" + "\n".join(lines) + "\n"


def _of_stage(group: argparse._ArgumentGroup, parser: ArgumentParser) -> bool:
    names = {name.partition(".")[0] for name in parser.groups or {}}
    return any("." in action.dest or action.dest in names for action in group._group_actions)


_KINDS = {
    int: ("INTEGER", "a whole number"),
    float: ("NUMBER", "a number"),
    str: ("TEXT", "text"),
    Path: ("PATH", "a path"),
}
_KINDS |= {bool: ("true|false", "true or false")}


def _kind(action: argparse.Action) -> tuple[str, str] | None:
    """What a flag takes, as its help and as an error calls it; None for what has no plain name."""
    hint = getattr(action, "_typehint", None) or action.type
    inside = [one for one in typing.get_args(hint) if one is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(inside), "one of " + ", ".join(inside)
    if typing.get_origin(hint) is tuple:
        known = _KINDS.get(inside[0])
        return known and (f"{known[0]},...", f"{known[1]}, or several with commas between them")
    return _KINDS.get(inside[0] if inside else hint)


def _short(message: str, parser: ArgumentParser) -> str:
    """An error message of the parser in one plain line, with the flag that was probably meant."""
    line = " ".join(message.split())
    options = [option.replace("_", "-") for action in parser._actions for option in action.option_strings]
    if unknown := re.search(r"(?:[Uu]nrecognized arguments|Key \"?|does not accept|not accepted).*?(--[\w.-]+)", line):
        return f"no flag {unknown[1]}{_nearest(unknown[1].replace('_', '-'), options)}"
    if more := re.match(r"[Uu]nrecognized arguments: (.*)", line):
        return f"{more[1]!r} is one argument too many; a name with spaces needs quotes, a flag begins with --"
    if without := re.match(r"argument (--[\w.]+): expected one argument", line):
        return f"{without[1].replace('_', '-')} needs a value"
    found = {action.dest: action for action in parser._actions}
    if lacking := re.match(r"the following arguments are required: (.*)", line):
        names = [name for name in lacking[1].split(", ") if name in found]
        return "missing: " + ", ".join((found[name].option_strings or [name.upper()])[-1] for name in names)
    key, value = re.match(r'Parser key "([\w.]+)": (.*)', line), re.search(r"(?:Given|Got) value: (.*)$", line)
    if key is None:
        return line
    action = found.get(key[1])
    flag = f"--{key[1].replace('_', '-')}" if action is None or action.option_strings else key[1].upper()
    kind = None if action is None else _kind(action)
    if value is None:
        return f"{flag}: {key[2]}"
    return f"{flag} is {value[1]!r}" + (f"; it must be {kind[1]}" if kind else ", and so cannot be read")


def _underscored(word: str) -> str:
    """--mpp-default=1 as --mpp_default=1: both spellings are understood."""
    flag, sign, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + sign + value if flag.startswith("--") else word
