"""The command line helps: short help, a suggestion for a misspelt word, lists as people write them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from histossl.cli.completion import completion, made_flags, saved_flags
from histossl.cli.demo import demo
from histossl.cli.main import COMMANDS, TROUBLES, made_help, main, parse, saved_help
from histossl.cli.study_commands import run
from histossl.core.errors import HistosslError


def helped(capsys, *words: str) -> str:
    if "--help-all" in words:  # answered by the parser, which ends the process
        with pytest.raises(SystemExit) as end:
            main(list(words))
        assert end.value.code == 0
    else:
        assert main(list(words)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_saved_help_is_that_of_the_command(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert saved_help(name).read_text(encoding="utf-8") == made_help(name), "run .ci/help_pages.py"
    assert saved_flags(name).read_text(encoding="utf-8") == made_flags(name), "run .ci/help_pages.py"


def test_the_help_of_run_fits_a_screen_or_two_and_names_the_rest(capsys):
    short = helped(capsys, "run", "--help")
    assert short.count("\n") < 60
    assert "--labels" in short
    assert "--pretrain.epochs" not in short
    assert re.search(r"tile-encoder, encode, pretrain, embed, probe: --help-all", short)
    whole = helped(capsys, "run", "--help-all")
    assert "--pretrain.epochs" in whole
    assert "--tile-encoder.method" in whole


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
@pytest.mark.parametrize("command", ["run", "probe", "nuclei segment", "synth"])
def test_no_raw_types_in_the_help(capsys, command, flag):
    text = helped(capsys, *command.split(), flag)
    assert not re.search(r"type:|<class|tuple\[|\| null", text)


def test_a_topic_lists_its_commands(capsys):
    for words in (["nuclei"], ["nuclei", "--help"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert all(name in text for name in COMMANDS if name.startswith("nuclei "))
        assert "pretrain" not in text.replace("nuclei train", "")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["emcode"], "encode"),
        (["nuclei", "segmnt"], "nuclei segment"),
        (["run", "S", "--out=o", "--lables=x.csv"], "--labels"),
        (["run", "S", "--out=o", "--pretrain.epohcs=3"], "--pretrain.epochs"),
        (["inspect", "S", "--out=o", "--mpp_defalt=1"], "--mpp-default"),
    ],
)
def test_a_misspelt_word_is_answered_in_one_line(capsys, words, meant):
    assert main(words) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"did you mean {meant}?" in error
    assert len(error) < 120


@pytest.mark.parametrize("words", [["--probe.targets", "a,b"], ["--probe.targets=a,b"], ["--probe.targets=[a,b]"]])
def test_lists_may_be_written_with_commas(words):
    assert parse("run", run, ["S", "--out=o", *words])["probe"].targets == ("a", "b")


def test_a_list_of_one_number():
    assert parse("run", run, ["S", "--out=o", "--probe.shots", "10"])["probe"].shots == (10,)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_is_a_screen_with_an_example_that_is_understood(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = helped(capsys, *name.split(), "--help").splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    [example] = [line.removeprefix("example: histossl ") for line in lines if line.startswith("example: ")]
    module, function, _ = COMMANDS[name]
    parse(name, getattr(import_module(module), function), example.split()[len(name.split()) :])


OFFERED = [
    ("histossl ins", {"inspect"}),
    ("histossl nuclei s", {"segment", "score"}),
    ("histossl run SLIDES --lab", {"--labels"}),
    ("histossl run SLIDES --pretrain.epo", {"--pretrain.epochs"}),  # of --help-all
    ("histossl nuclei segment IMAGES --mo", {"--model"}),
    ("histossl completion z", {"zsh"}),
    ("histossl run SLI", set()),  # left to the names of files
]
# How a shell is asked for what it offers; bash's way is emulated in zsh as its own completion does.
ASKED = 'COMP_WORDS=({words}); COMP_CWORD={last}; _histossl; printf "%s\\n" "${{COMPREPLY[@]}}"'
ASKING = {
    "bash": ASKED,
    "zsh": f"emulate sh; setopt kshglob noshglob braceexpand; {ASKED}",
    "fish": "complete -C '{line}' | string split -f 1 \\t; true",
}


@pytest.mark.parametrize("shell", ASKING)
@pytest.mark.parametrize(("line", "offered"), OFFERED)
def test_shells_complete_commands_and_flags(capsys, tmp_path, shell, line, offered):
    if (program := shutil.which(shell)) is None:
        pytest.skip(f"no {shell}")
    completion(shell)
    words = " ".join(f"'{word}'" for word in line.split())
    script = capsys.readouterr().out + ASKING[shell].format(words=words, last=len(line.split()) - 1, line=line)
    flags = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    here = {"cwd": tmp_path, "env": {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}}
    found = subprocess.run([program, *flags, "-c", script], capture_output=True, text=True, check=True, **here)
    assert set(found.stdout.split()) == offered
    assert not found.stderr


def test_an_error_names_a_section_that_exists(capsys, tmp_path):
    kinds = [HistosslError, *HistosslError.__subclasses__()]
    page = (Path(__file__).parents[2] / TROUBLES).read_text(encoding="utf-8")
    anchors = {line[3:].strip().lower().replace(" ", "-") for line in page.splitlines() if line.startswith("## ")}
    assert {kind.anchor for kind in kinds} | {"disk"} <= anchors
    assert len({kind.anchor for kind in kinds}) == len(kinds), "each class has its section"
    assert main(["status", str(tmp_path / "none")]) == 2
    assert f"see {TROUBLES}#studies" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "inspect"])
def test_a_table_in_the_place_of_slides_makes_no_folder(capsys, tmp_path, command):
    table, out = tmp_path / "labels.csv", tmp_path / "study"
    table.write_text("slide_id,label\na,0\nb,1\n", encoding="utf-8")
    assert main([command, str(table), "--out", str(out)]) == 2
    assert "a table of labels goes to --labels" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "real"), [([], False), (["--real"], True), (["--real", "--out=x"], True), (["--real", "false"], False)]
)
def test_a_switch_needs_no_value(words, real):
    assert parse("demo", demo, words)["real"] is real


def test_the_help_of_every_command_loads_nothing_that_takes_time():
    """Then it is there in a tenth of a second, whatever the machine; a clock would say how busy that is."""
    code = (
        "import sys; from histossl.cli.main import COMMANDS, main\n"
        "for name in COMMANDS: main([*name.split(), '--help'])\n"
        "print(sorted({'torch', 'numpy', 'pandas', 'rich', 'jsonargparse'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
