"""The pages: every command on them is understood, every page is in the menu, every question has a page."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from histossl.cli.main import COMMANDS, parse

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
KINDS = ("", "sh")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
MOST = 30  # words in a sentence


def commands(text: str) -> list[str]:
    """Commands of ours in blocks of a page, without comments, prompts and what the shell does around them."""
    blocks = [
        block for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if kind in KINDS
    ]
    blocks += [line.strip() for line in re.findall(r"^ {4,}histossl (?:.*\\\n)*.*", text, re.MULTILINE)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [found[0] for line in lines if (found := re.search(r"\b(?<!-m )histossl [a-z].*", line))]


def understood(line: str) -> None:
    words = shlex.split(re.sub(r"\[--.*?\]|--config \S+", "", line), comments=True)[1:]  # the file is not here
    words = words[: min(words.index(end) if end in words else len(words) for end in ("&", "&&"))]
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    module, function, _ = COMMANDS[name]
    words = [word for word in words[len(name.split()) :] if word not in ("--json", "--quiet")]
    parse(name, getattr(import_module(module), function), words)


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=lambda path: path.stem)
def test_every_command_of_a_page_is_understood(path):
    for line in commands(path.read_text(encoding="utf-8")):
        if not re.search(r"\||\.\.\.|COMMAND", line):  # patterns, not commands
            understood(line)


def test_commands_are_found():
    assert sum(len(commands(path.read_text(encoding="utf-8"))) for path in PAGES) > 60


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = re.findall(r": (\S+\.md)$", menu, re.MULTILINE)
    assert sorted(listed) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in PAGES)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_each_of_twenty_questions_has_a_page():
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    questions = re.split(r"^\*\*", text, flags=re.MULTILINE)[1:]
    assert len(questions) >= 20
    assert sum(bool(LINK.search(question)) for question in questions) >= 20


def test_the_models_named_are_those_that_the_encoder_knows():
    from histossl.encoders.model_names import MPP, known_as

    text = (ROOT / "docs" / "foundation-models.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| [") and "`--encoder" in line]
    assert len(rows) >= 6
    for line in rows:
        name = re.search(r"--encoder (\S+)", line)[1]
        full = name.removeprefix("hf:").removeprefix("timm:hf-hub:")
        assert known_as(full.rpartition("/")[2]) == name
        assert f"--tile.mpp {MPP[full]:g}" in line


def test_the_sites_settings_are_yaml():
    assert "site_name" in yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def test_every_screenshot_is_taken_by_the_target_that_takes_them():
    script = (ROOT / ".ci" / "pictures.py").read_text(encoding="utf-8")
    taken = set(re.findall(r'"([\w-]+\.jpg)"', re.search(r"^NAMES = .*$", script, re.MULTILINE)[0]))
    assert {path.name for path in (ROOT / "docs" / "pictures").iterdir()} == taken
    shown = {name for path in PAGES for name in re.findall(r"pictures/([\w-]+\.jpg)", path.read_text(encoding="utf-8"))}
    assert shown == taken
    assert all(script.count(f'"{name}"') == 2 for name in taken), "named, and kept"
    assert '"demo.jpg"' in script  # README's picture


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=lambda path: path.stem)
def test_every_make_target_and_script_of_a_page_exists(path):
    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= targets
    for script in re.findall(r"python ((?:benchmarks|examples|\.ci)/[\w/]+\.py)", text):
        assert (ROOT / script).exists(), script


def sentences(text: str) -> list[str]:
    """Sentences of a page's paragraphs, items and cells of tables; a piece of code counts as one word."""
    text = re.sub(r"^```.*?^```|^ {4,}.*$|<!--.*?-->", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`]+`", "code", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)).replace("*", "")
    pieces = re.split(r"\n\s*\n|\n(?=\s*(?:[-|#<¹²³]|\d+\. |\!\[))|\|", text)
    return [one for piece in pieces for one in re.split(r"(?<=[.!?])[)\"]?\s+(?=[A-Z0-9(\"]|code)", piece)]


def test_sentences_end_where_they_end():
    text = "One. Two `a. B` (three). Four\n- five\n- six; seven\n\n| eight | nine. Ten |\n\n    no code. None"
    found = [" ".join(one.split()) for one in sentences(text)]
    assert [one for one in found if one] == [
        "One.", "Two code (three).", "Four", "- five", "- six; seven", "eight", "nine.", "Ten"
    ]  # fmt: skip


@pytest.mark.parametrize("path", [*PAGES, *ROOT.glob("*.md")], ids=lambda path: path.stem)
def test_sentences_are_short_enough_to_be_read_aloud(path):
    long = [
        f"{count} words: {' '.join(one.split())}"
        for one in sentences(path.read_text(encoding="utf-8"))
        if (count := len(re.findall(r"\S*\w\S*", one))) > MOST
    ]
    assert not long
