"""`histossl COMMAND`: each command is a function; its flags are made from the function's signature and settings."""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
import threading
import typing
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# Command -> (module, function, one line of help). Modules are imported when their command is called.
COMMANDS = {
    "run": ("histossl.cli.study_commands", "run", "slides in; vectors, a probe and a report out: all stages in order"),
    "inspect": ("histossl.cli.study_commands", "inspect", "a table of the slides and what is wrong with them"),
    "encoder pretrain": (
        "histossl.cli.encoder_commands",
        "pretrain_encoder",
        "train a tile encoder, without labels",
    ),
    "encode": ("histossl.cli.study_commands", "encode_command", "tiles to features and augmented views"),
    "features convert": ("histossl.core.interchange", "convert", "features to and from TRIDENT, CLAM and STAMP"),
    "pretrain": ("histossl.cli.study_commands", "pretrain_command", "train the slide encoder, without labels"),
    "embed": ("histossl.cli.study_commands", "embed_command", "one vector a slide: embeddings.h5ad"),
    "probe": (
        "histossl.cli.evaluate_commands",
        "probe_vectors",
        "a linear classifier on the vectors, beside its rivals",
    ),
    "heatmap": ("histossl.cli.study_commands", "heatmap", "every tile's exact share of a probe's score, for QuPath"),
    "search": (
        "histossl.cli.evaluate_commands",
        "search",
        "the slides most like one slide, and how often they share labels",
    ),
    "audit": (
        "histossl.cli.evaluate_commands",
        "audit",
        "what a split has on both of its sides: patients, sites, duplicates",
    ),
    "status": ("histossl.study.status", "status", "what is done, who is at work, how fast, how long it will take"),
    "report": ("histossl.cli.study_commands", "report", "one self-contained page of all that was found"),
    "view": ("histossl.cli.view_command", "view", "look at the cohort, its slides and what was found, in a browser"),
    "nuclei train": ("histossl.cli.nuclei_commands", "train", "learn nuclei from images or slides, without labels"),
    "nuclei segment": ("histossl.cli.nuclei_commands", "segment", "find the nuclei of images and slides, for QuPath"),
    "nuclei score": ("histossl.cli.nuclei_commands", "score", "Dice, AJI, PQ against ground truth"),
    "synth": ("histossl.wsi.synth", "synth", "paint slides with known truth"),
    "demo": ("histossl.cli.demo", "demo", "painted slides through the whole program, in minutes"),
    "doctor": ("histossl.cli.doctor", "doctor", "what is installed, what is missing, GPU, disk, memory"),
}
SHORT = {"-o": "--out", "-m": "--model"}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code.

    0: all went well. 1: some slides or labels were left out, each with its reason. 2: nothing could be done as asked.
    130: stopped by Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(overview())
        return 0
    if argv[0] == "--version":
        from histossl import __version__

        sys.stdout.write(f"histossl {__version__}\n")
        return 0
    name = " ".join(argv[:2]) if " ".join(argv[:2]) in COMMANDS else argv[0]
    if name not in COMMANDS:
        sys.stderr.write(f"histossl: no command {name!r}; `histossl --help` lists them\n")
        return 2
    return call(name, argv[len(name.split()) :])


def overview() -> str:
    """The text of `histossl --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {help_line}" for name, (_, _, help_line) in COMMANDS.items()]
    head = "usage: histossl COMMAND ...\n\nLearning from histopathology slides without labels.\n\ncommands:\n"
    return head + "\n".join(lines) + "\n\n`histossl COMMAND --help` shows the flags of one.\n"


def call(name: str, argv: list[str]) -> int:
    """Parse the flags of one command and call it; errors that a user may meet end as one line."""
    from histossl.core.console import say
    from histossl.core.errors import HistosslError

    module, function, _ = COMMANDS[name]
    # So ends a cluster's job that is over its time: as by Ctrl-C.
    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if ours else None
    try:
        command = getattr(import_module(module), function)
        arguments = parse(name, command, argv)
        return int(command(**arguments) or 0)
    except HistosslError as error:
        say(f"ERROR {error}", "bold red")
        return 2
    except OSError as error:
        # A full disk or a folder that cannot be written; a bug would be another exception.
        say(f"ERROR {error.strerror or error}: {error.filename or 'while writing'}", "bold red")
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command goes on where it was", "yellow")
        return 130
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


def parse(name: str, command: Callable[..., object], argv: list[str]) -> dict[str, object]:
    """The arguments of `command` from its flags and, with --config, from a YAML file; an unknown key is an error.

    Parameters without default are positional, or required flags where the function takes them by keyword only.
    """
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    import docstring_parser
    import jsonargparse

    from histossl.core.errors import SettingsError

    class Parser(jsonargparse.ArgumentParser):
        def format_help(self) -> str:
            return _with_dashes(super().format_help())

        def format_usage(self) -> str:
            return _with_dashes(super().format_usage())

    signature = inspect.signature(command, eval_str=True).parameters.values()
    # What jsonargparse would take otherwise: required flags as positional, lists as one word.
    flags = [p for p in signature if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    lists = [p for p in signature if p.default is p.empty and typing.get_origin(p.annotation) is list]
    about = docstring_parser.parse(command.__doc__ or "")
    helps = {p.arg_name: p.description for p in about.params}
    try:
        parser = Parser(prog=f"histossl {name}", description=about.short_description)
        parser.add_argument("--config", action="config", help="a YAML file of flags")
        for p in flags:
            parser.add_argument(f"--{p.name}", type=p.annotation, required=True, help=helps.get(p.name))
        for p in lists:
            kind = typing.get_args(p.annotation)[0]
            parser.add_argument(p.name, type=kind, nargs="+", help=helps.get(p.name))
        own: set[str | int] = {p.name for p in (*flags, *lists)}
        parser.add_function_arguments(command, as_positional=True, fail_untyped=True, skip=own)
        words = [_underscored(SHORT.get(word, word)) for word in argv]
        if "pretrain" in {p.name for p in signature}:
            _take_preset(parser, words)
        found = parser.parse_args(words)
        values = parser.instantiate(found) if hasattr(parser, "instantiate") else parser.instantiate_classes(found)
    except (ValueError, TypeError) as error:
        raise SettingsError(str(error)) from error
    return {p.name: getattr(values, p.name) for p in signature}


def _take_preset(parser: ArgumentParser, words: list[str]) -> None:
    """Add --preset, and have the settings of the chosen one be the defaults of the parser's other flags."""
    from histossl.cli.presets import PRESETS
    from histossl.core.config import to_dict

    about = "settings chosen together, `paper` as published; what else is given counts more"
    parser.add_argument("--preset", choices=list(PRESETS), default="default", help=about)
    if not {"-h", "--help"} & set(words):
        groups = parser.groups or {}
        chosen = PRESETS[parser.parse_args(words).preset]
        parser.set_defaults({name: to_dict(value) for name, value in chosen.items() if name in groups})


def _with_dashes(text: str) -> str:
    return re.sub(r"--[\w.]+", lambda flag: flag[0].replace("_", "-"), text)


def _underscored(word: str) -> str:
    """--mpp-default=1 as --mpp_default=1: both spellings are understood."""
    flag, sign, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + sign + value if flag.startswith("--") else word
