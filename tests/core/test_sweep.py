"""The sweep deletes only what we made, and never through a link."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from histossl.core import atomic
from histossl.core.atomic import JOURNAL, sweep, whole, whole_folder
from histossl.core.errors import StudyError
from histossl.study.folder import Study


def part_of(path: Path, folder: bool = False) -> Path:
    """What a killed process leaves."""
    left = []
    with pytest.raises(ZeroDivisionError), (whole_folder if folder else whole)(path) as part:
        left.append(part)
        raise ZeroDivisionError
    if folder:
        left[0].mkdir()
        (left[0] / "file").write_text("half")
    else:
        left[0].write_text("half")
    return left[0]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != JOURNAL}  # fmt: skip


def test_what_a_killed_process_left_goes_and_all_else_stays(tmp_path):
    users = [
        ".a.partition/mine", ".b.part", ".c.part.h5", "features/.d.part/mine", f".{'0' * 32}.part",
        f"views/.{hashlib.md5(b'x').hexdigest()}.part.npy", "logs/x/.e.part", ".part", "a.part",
    ]  # fmt: skip
    for name in users:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("the user's")
    before = everything(tmp_path)
    sweep(tmp_path)  # begins the journal
    for place in ("", "features", "logs/pretrain", "heatmaps/grade"):
        assert part_of(tmp_path / place / "x.h5").exists()
        assert part_of(tmp_path / place / "y", folder=True).is_dir()
    sweep(tmp_path)
    assert everything(tmp_path) == before
    assert (tmp_path / JOURNAL).read_bytes() == b""


def test_a_name_of_ours_that_is_in_no_journal_stays(tmp_path):
    """As a folder that was copied from another study into this one, or unpacked from an archive."""
    before = [part_of(tmp_path / "x.h5"), part_of(tmp_path / "features" / "y", folder=True)]
    sweep(tmp_path)
    assert all(path.exists() for path in before)
    late = part_of(tmp_path / "features" / "z.h5")
    sweep(tmp_path)
    assert all(path.exists() for path in before)
    assert not late.exists()


def test_a_journal_of_a_stranger_deletes_nothing_but_what_has_our_mark(tmp_path):
    home, study = tmp_path / "home", tmp_path / "study"
    mine = part_of(home / "x.h5")
    for name in ("features/a.h5", ".a.part", "slides.csv"):
        (study / name).parent.mkdir(parents=True, exist_ok=True)
        (study / name).write_text("the user's")
    before = everything(study)
    named = ["features/a.h5", ".a.part", "slides.csv", f"../home/{mine.name}", str(mine), "features", "", 7, ["x"]]
    named += [f"features/../../home/{mine.name}", f"./{mine.name}", f"a\\0/{mine.name}", f"features/a.h5/{mine.name}"]
    (study / JOURNAL).write_bytes(b"\n".join([*(json.dumps(name).encode() for name in named), b"\xff[", b"x" * 10**7]))
    sweep(study)
    assert everything(study) == before
    assert mine.exists()


def test_a_journal_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "file").write_text("the user's")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / JOURNAL).symlink_to(tmp_path / "file")
    for act in (Study, sweep, lambda study: part_of(study / "x")):
        with pytest.raises(StudyError, match="is a link to"):
            act(tmp_path / "study")
    assert (tmp_path / "file").read_text() == "the user's"


def test_what_is_not_deleted_stays_in_the_journal(tmp_path, monkeypatch):
    sweep(tmp_path)
    part = part_of(tmp_path / "x.h5")

    def refuse(*given: object) -> None:
        raise PermissionError(13, "no")

    with monkeypatch.context() as patched:
        patched.setattr(atomic.safe_paths, "delete_in", refuse)
        sweep(tmp_path)
    assert part.exists()
    sweep(tmp_path)
    assert not part.exists()


@pytest.mark.parametrize("place", ["features", "logs", "logs/x"])
def test_it_never_goes_through_a_link(tmp_path, place):
    home, study = tmp_path / "home", tmp_path / "study"
    home.mkdir()
    sweep(home)
    # Even files with our own mark.
    mine = part_of(home / "x.h5"), part_of(home / "sub" / "y", folder=True)
    (study / place).parent.mkdir(parents=True)
    (study / place).symlink_to(home)
    (study / mine[0].name).symlink_to(home)
    named = [f"{place}/{mine[0].name}", f"{place}/sub", mine[0].name]
    (study / JOURNAL).write_text("\n".join(map(json.dumps, named)))
    sweep(study)
    assert all(path.exists() for path in mine)
    assert (study / mine[0].name).is_symlink()


def test_a_folder_that_would_replace_a_link_is_not_written(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "file").write_text("the user's")
    (tmp_path / "views").symlink_to(home)
    with pytest.raises(OSError, match="symbolic link"), whole_folder(tmp_path / "views") as part:
        (part / "new").write_text("x")
    assert everything(home) == {"file": b"the user's"}


@pytest.mark.parametrize("room", ["features", "views", "logs", "qc", "tiles"])
def test_a_study_whose_room_is_a_link_deletes_nothing_there(tmp_path, room, capsys):
    from histossl.cli.main import main

    home, study = tmp_path / "home", tmp_path / "study"
    part = part_of(home / "x.h5")
    study.mkdir()
    (study / "slides.csv").write_text("slide_id,path\na,/a.svs\n")
    (study / room).symlink_to(home)
    for command in ("report", "status", "view", "encode"):
        assert main([command, str(study)]) == 2
        assert "HISTOSSL_LINKS" in capsys.readouterr().err
    assert part.exists()
    assert [path.name for path in home.iterdir()] == [part.name]


@pytest.mark.parametrize("hold", ["lock", "share"])
def test_what_a_killed_worker_left_goes_with_the_run(tmp_path, hold):
    study = Study(tmp_path)
    with getattr(study, hold)(print):
        left = part_of(tmp_path / "tiles" / "x.h5")
        assert left.exists()
    assert not left.exists()


def test_while_another_run_shares_the_folder_nothing_is_swept(tmp_path):
    with Study(tmp_path).share(print):
        with Study(tmp_path).share(print):
            left = part_of(tmp_path / "tiles" / "x.h5")
        assert left.exists()
    assert not left.exists()


def test_names_of_parts_are_told_from_others():
    assert all(atomic.is_part(atomic._part_name()) for _ in range(100))
