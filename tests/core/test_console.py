"""Names of strangers on the terminal and in tables."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.table import Table

from histossl.core import console, tables
from histossl.execution.shared_table import SharedTable

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202egnp\udce9 [red]b[/red] \\x1b ü"


@pytest.mark.parametrize("color", [False, True])
def test_what_a_terminal_would_obey_is_shown_instead(color, capsys):
    file = io.StringIO()
    shown = console.PrintableConsole(file=file, force_terminal=color, width=400)
    table = Table("name", box=None)
    table.add_row(console.escape(HOSTILE))
    shown.print(table)
    text = file.getvalue()
    assert "\x1b]" not in text
    assert "\x1b[2J" not in text
    assert not {"\x07", "\x9b", "\u202e", "\udce9"} & set(text)
    text.encode()
    assert "[red]b[/red]" in text
    console.say(HOSTILE)
    screen = capsys.readouterr().err
    assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e", "\udce9"} & set(screen)
    assert r"a\x1b]0;owned\x07\x1b[2J\x0d\x9b31m\u202egnp\xe9" in screen


@given(st.text(st.characters(codec=None)))
def test_every_text_can_be_encoded_and_is_one_line_of_printable_characters(text):
    found = console.printable(text)
    found.encode()
    assert all(sign.isprintable() or ord(sign) >= 0xA0 or sign in "\t\n" for sign in found)
    if text.isprintable():
        assert found == text


def test_status_and_inspect_print_no_escape_sequences(tmp_path, capsys):
    from histossl.cli.main import main
    from histossl.study.folder import Study

    study = Study(tmp_path)
    row = dict.fromkeys(study.columns, "") | {"slide_id": HOSTILE, "path": HOSTILE, "status": "failed"}
    study.write_slides([row | {"error": HOSTILE}, row | {"slide_id": "b", "path": "b", "status": HOSTILE}])
    study.claims.mkdir()
    (study.claims / "0.0001").write_text(
        '{"name": "\\u001b[2J", "host": "\\u001b[2J", "system": "x", "pid": 1, "born": 0}'
    )
    assert main(["status", str(tmp_path)]) == 0
    found = capsys.readouterr()
    assert "\x1b" not in found.out + found.err
    assert r"\x1b[2J" in found.out


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec=None, exclude_characters="\0")), min_size=1, max_size=4))
def test_rows_of_any_text_are_the_rows_that_are_read_back(tmp_path_factory, names):
    roll = SharedTable(tmp_path_factory.mktemp("t"), "t.csv", ("slide_id", "path"))
    rows = [{"slide_id": name, "path": str(k)} for k, name in enumerate(names)]
    try:
        "".join(names).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return  # surrogates that no file's name can hold
    roll.write_slides(rows)
    assert [{name: row[name] for name in ("slide_id", "path")} for row in roll.slides()] == rows
    assert tables.read_rows(roll.table) == rows
    # Also for a reader that knows no quotes around a lone carriage return.
    with roll.table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert len(list(csv.reader(file))) == len(rows) + 1


def test_a_carriage_return_is_quoted_and_all_else_is_as_before(tmp_path):
    file = io.StringIO()
    tables.writer(file).writerows([("a\rb,1", 2), ("c", 0.5), ('d"', "e\nf")])
    assert file.getvalue() == '"a\rb,1",2\nc,0.5\n"d""","e\nf"\n'
    import pandas as pd

    tables.write_frame(tmp_path / "f.csv", pd.DataFrame({"name": ["a\rx", "b"], "value": [0.5, 1]}))
    assert (tmp_path / "f.csv").read_bytes() == b'name,value\n"a\rx",0.500000\nb,1.000000\n'
