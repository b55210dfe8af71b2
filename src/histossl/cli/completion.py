"""`histossl completion`: scripts that complete commands and flags without starting Python.

The flags of the short help are offered first; where none fits what was typed, those of --help-all.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from histossl.cli.main import COMMANDS, made_help, saved_help
from histossl.core import console

SHELLS = ("bash", "zsh", "fish")
_BASH = """_histossl() {
    local word=${COMP_WORDS[COMP_CWORD]} first more one
    COMPREPLY=()
    case "${COMP_WORDS[*]:1:$((COMP_CWORD-1))} " in
%s    esac
    [[ $word == -* || $COMP_CWORD -eq 1 || $first != -* ]] || return 0
    for one in $first; do [[ $one == "$word"* ]] && COMPREPLY+=("$one"); done
    [[ ${#COMPREPLY[@]} -gt 0 ]] && return 0
    for one in $more; do [[ $one == "$word"* ]] && COMPREPLY+=("$one"); done
    return 0
}
complete -o default -F _histossl histossl
"""


def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print a script that completes commands and flags.

    Args:
        shell: bash, zsh or fish. Bash: eval "$(histossl completion bash)" in ~/.bashrc; zsh: the same with zsh in
            ~/.zshrc; fish: histossl completion fish | source in config.fish.
    """
    script = _fish() if shell == "fish" else _bash()
    if shell == "zsh":
        script = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n" + script
    console.answers.file.write(script)


def _flags(name: str) -> list[str]:
    return _named(saved_help(name).read_text(encoding="utf-8"))


def saved_flags(name: str) -> Path:
    """The file of all flags of a command, those of `--help-all`, one a line, as `.ci/help_pages.py` writes it.

    Args:
        name: one of COMMANDS.
    """
    return saved_help(name).with_suffix(".flags")


def made_flags(name: str) -> str:
    """The flags that `histossl NAME --help-all` names, sorted, one a line.

    Args:
        name: one of COMMANDS.
    """
    return "\n".join(_named(made_help(name, "--help-all"))) + "\n"


def _named(text: str) -> list[str]:
    return sorted(set(re.findall(r"^  (?:-\w, )?(--[\w.-]+)", text, re.MULTILINE)))


def _all_flags(name: str) -> list[str]:
    return saved_flags(name).read_text(encoding="utf-8").split()


def _bash() -> str:
    cases = []
    for name in COMMANDS:
        if name != "completion":
            more = [flag for flag in _all_flags(name) if flag not in _flags(name)]
            cases.append((f'"{name} "*', _flags(name), more))
    cases.append(('"completion "', list(SHELLS), []))
    for topic in sorted({name.split()[0] for name in COMMANDS if " " in name}):
        second = [name.split()[1] for name in COMMANDS if name.startswith(f"{topic} ")]
        cases.append((f'"{topic} "', second, []))
    cases.append(('" "', list(dict.fromkeys(name.split()[0] for name in COMMANDS)), []))
    lines = (f'        {case}) first="{" ".join(words)}" more="{" ".join(more)}" ;;\n' for case, words, more in cases)
    return _BASH % "".join(lines)


def _fish() -> str:
    lines = ["complete -c histossl -n __fish_use_subcommand -f"]
    for name, (_, _, text) in COMMANDS.items():
        about = text.replace("'", "\\'")
        first, _, second = name.partition(" ")
        lines.append(f"complete -c histossl -n __fish_use_subcommand -a {first} -d '{about if not second else first}'")
        seen = f"__fish_seen_subcommand_from {first}"
        if second:
            others = " ".join(one.split()[1] for one in COMMANDS if one.startswith(f"{first} "))
            unset = f"{seen}; and not __fish_seen_subcommand_from {others}"
            lines.append(f"complete -c histossl -n '{unset}' -f -a {second} -d '{about}'")
            seen += f"; and __fish_seen_subcommand_from {second}"
        lines += [f"complete -c histossl -n '{seen}' -l {flag[2:]}" for flag in _all_flags(name)]
    lines.append(f"complete -c histossl -n '__fish_seen_subcommand_from completion' -f -a '{' '.join(SHELLS)}'")
    return "\n".join(lines) + "\n"
