"""`histossl completion`: scripts that complete commands, and the flags of their saved help, without starting Python."""

from __future__ import annotations

import re
from typing import Literal

from histossl.cli.main import COMMANDS, saved_help
from histossl.core import console

_BASH = """_histossl() {
    local word=${COMP_WORDS[COMP_CWORD]} words
    COMPREPLY=()
    case "${COMP_WORDS[*]:1:COMP_CWORD-1} " in
%s    esac
    [[ $word == -* || $COMP_CWORD -eq 1 || $words != -* ]] && COMPREPLY=($(compgen -W "$words" -- "$word"))
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
    return sorted(
        set(re.findall(r"^  (?:-\w, )?(--[\w.-]+)", saved_help(name).read_text(encoding="utf-8"), re.MULTILINE))
    )


def _bash() -> str:
    cases = [(f'"{name} "*', _flags(name)) for name in COMMANDS]
    for topic in sorted({name.split()[0] for name in COMMANDS if " " in name}):
        second = [name.split()[1] for name in COMMANDS if name.startswith(f"{topic} ")]
        cases.append((f'"{topic} "', second))
    cases.append(('" "', list(dict.fromkeys(name.split()[0] for name in COMMANDS))))
    return _BASH % "".join(f'        {case}) words="{" ".join(words)}" ;;\n' for case, words in cases)


def _fish() -> str:
    lines = ["complete -c histossl -n __fish_use_subcommand -f"]
    for name, (_, _, text) in COMMANDS.items():
        about = text.replace("'", "\\'")
        first, _, second = name.partition(" ")
        lines.append(f"complete -c histossl -n __fish_use_subcommand -a {first} -d '{about if not second else first}'")
        seen = f"__fish_seen_subcommand_from {first}"
        if second:
            lines.append(f"complete -c histossl -n '{seen}' -a {second} -d '{about}'")
            seen += f"; and __fish_seen_subcommand_from {second}"
        lines += [f"complete -c histossl -n '{seen}' -l {flag[2:]}" for flag in _flags(name)]
    return "\n".join(lines) + "\n"
