"""Writes the text of every `histossl COMMAND --help` to src/histossl/cli/help, from where it is shown at once.

    python .ci/help_pages.py

A test says when a text is no longer that of its command.
"""

from __future__ import annotations

import os

from histossl.cli.completion import made_flags, saved_flags
from histossl.cli.main import COMMANDS, made_help, saved_help


def main() -> None:
    """Write one text a command."""
    os.environ["COLUMNS"] = "100"
    for name in COMMANDS:
        saved_help(name).parent.mkdir(exist_ok=True)
        saved_help(name).write_text(made_help(name), encoding="utf-8")
        saved_flags(name).write_text(made_flags(name), encoding="utf-8")


if __name__ == "__main__":
    main()
