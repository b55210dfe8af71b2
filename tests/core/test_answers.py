"""Answers of commands: whole tables, JSON for scripts, quiet runs, signs of life where there is no terminal."""

from __future__ import annotations

import io
import json
import math
import time

import pytest

from histossl.cli.main import main
from histossl.core import answers, console
from histossl.execution.failures import report_failures

ROWS = [
    {"slide": "a", "score": 0.5, "a rather long header": "x", "reason": "long " * 30, "last": 1},
    {"slide": "b [red]", "score": math.nan, "a rather long header": "y", "reason": "", "last": 20},
]


@pytest.fixture
def screen(monkeypatch):
    """A terminal of some width, or a pipe."""

    def made(width: int | None) -> io.StringIO:
        file = io.StringIO()
        shown = console.PrintableConsole(file=file, force_terminal=width is not None, width=width, color_system=None)
        monkeypatch.setattr(answers, "answers", shown)
        return file

    return made


def test_a_pipe_gets_every_column_on_one_line_a_row(screen):
    file = screen(None)
    answers.give_rows("t", ROWS)
    lines = file.getvalue().splitlines()
    assert len(lines) == 3
    assert all(name in lines[0] for name in ROWS[0])
    assert "long " * 29 in lines[1]
    assert "b [red]" in lines[2]


def test_a_narrow_terminal_gets_whole_headers_and_the_names_of_the_others(screen):
    file = screen(50)
    answers.give_rows("t", ROWS)
    head, *_, last = file.getvalue().splitlines()
    assert "a rather long header" in head
    assert "…" not in file.getvalue()
    assert max(map(len, file.getvalue().splitlines()[:-1])) <= 50
    assert "not shown for want of room: reason, last" in " ".join(file.getvalue().split())
    assert last


def test_json_is_one_object_without_what_json_does_not_know(capsys):
    answers.begin(True)
    answers.give_rows("t", ROWS)
    answers.give("more", {"n": math.inf, "k": (1, 2)}, "for people")
    answers.finish()
    found = json.loads(capsys.readouterr().out)
    assert found["t"][1] == {**ROWS[1], "score": None}
    assert found["more"] == {"n": None, "k": [1, 2]}
    answers.finish()
    assert capsys.readouterr().out == ""


def test_doctor_speaks_json(capsys, tmp_path):
    code = main(["doctor", "--study", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] is (code == 0)
    assert {"what", "state", "text"} == set(found["findings"][0])


def test_without_a_terminal_there_is_a_line_from_time_to_time(capsys, monkeypatch):
    monkeypatch.setattr(console, "BEAT", 0.01)
    with console.progress_bar("tiles", 400, 100) as bar:
        bar.advance(20)
        bar.say("[bold]name")
        deadline = time.monotonic() + 20
        while "tiles: 120 of 400 (30 %)" not in (said := capsys.readouterr().err) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "left, [bold]name" in said


def test_work_without_a_bar_shows_signs_of_life_and_only_then(capsys, monkeypatch):
    monkeypatch.setattr(console, "BEAT", 0.05)
    console.begin_stage("2/6 encode")
    with console.signs_of_life("run"):
        deadline = time.monotonic() + 20
        while "2/6 encode: at work for 0:00:0" not in capsys.readouterr().err and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.monotonic() < deadline
        console._drawing.set()  # a terminal shows a bar
        capsys.readouterr()
        time.sleep(0.3)
        assert capsys.readouterr().err.count("at work") <= 1  # one may have been on its way
        console._drawing.clear()
    console.begin_stage("")
    capsys.readouterr()
    time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_progress_tells_its_stage_and_the_speed_of_the_last_minutes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    console.begin_stage("2/6 encode")
    bar = console.Bar("tiles", 10_000)
    console.begin_stage("")
    for rate in (1, 10):  # slow for twenty minutes, then ten times as fast
        for _ in range(120):
            now[0] += 10
            bar.advance(10 * rate)
    assert bar.line().startswith("2/6 encode, tiles: 13,200 of 10,000")
    assert ", 10.0/s, " in bar.line()


def test_items_that_take_longer_than_the_window_have_a_rate(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    bar = console.Bar("slides", 10)
    for _ in range(4):
        now[0] += 600
        bar.advance(1)
    assert "600 s each, 1:00:00 left" in bar.line()


def test_quiet_leaves_warnings_and_errors(capsys):
    console.set_quiet(True)
    try:
        console.say("done", "green")
        console.say("plain")
        console.say("careful", "yellow")
        console.say("ERROR", "bold red")
    finally:
        console.set_quiet(False)
    assert capsys.readouterr().err.split() == ["careful", "ERROR"]


def test_many_failures_of_one_kind_are_one_line(capsys):
    rows = [{"slide_id": f"s{k}", "status": "failed", "error": f"s{k}.tif: carries no mpp; give it"} for k in range(12)]
    rows += [{"slide_id": "x", "status": "failed", "error": "x.tif: damaged"}, {"status": "encoded", "error": ""}]
    assert report_failures(rows) == 13
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0] == "FAILED 12 slides: carries no mpp; give it (s0, s1, s2 and 9 more)"
    assert lines[1] == "FAILED x.tif: damaged"
