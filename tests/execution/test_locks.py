"""Locks of a folder, with fcntl and without; imports where a system has neither fcntl nor resource."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from histossl.core.errors import StudyError
from histossl.execution.locks import FolderLock
from histossl.execution.shared_table import SharedTable
from histossl.study.folder import Study

# psutil's part for Linux needs resource; its part for Windows does not.
HIDDEN = "import sys, psutil; sys.modules['fcntl'] = None; sys.modules['resource'] = None\n"


def run(code: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check, timeout=120)


def test_everything_imports_without_fcntl_and_resource():
    code = HIDDEN + (
        "import importlib\n"
        "from histossl.cli.main import COMMANDS, main\n"
        "for module, function, _ in COMMANDS.values():\n"
        "    getattr(importlib.import_module(module), function)\n"
        "sys.exit(main(['--help']))\n"
    )
    assert "nuclei segment" in run(code).stdout


def test_doctor_says_what_is_lost_without_them():
    code = HIDDEN + "from histossl.cli import doctor\nprint(*(f.text for f in doctor.system()), sep='\\n')"
    told = run(code).stdout
    assert "no fcntl" in told
    assert "no limit of memory" in told


TWO = """
import sys, threading
from pathlib import Path
from histossl.execution.locks import FolderLock
folder = Path(sys.argv[1])
with FolderLock(folder, ".lock") as one, FolderLock(folder, ".lock") as two:
    assert one.shared(wait=False) and two.shared(wait=False)
    assert not two.exclusive(wait=False)
    one_again = one.shared(wait=False)
    assert one_again
with FolderLock(folder, ".lock") as one, FolderLock(folder, ".lock") as two:
    assert one.exclusive(wait=False)
    assert not two.shared(wait=False) and not two.exclusive(wait=False)
    one.shared()
    assert two.shared(wait=False)
with FolderLock(folder, ".lock") as one:
    assert one.exclusive(wait=False)
print("held")
"""


@pytest.mark.parametrize("hidden", ["", HIDDEN])
def test_shared_holds_go_together_and_exclude_an_exclusive_one(tmp_path, hidden):
    assert run(hidden + TWO, tmp_path).stdout == "held\n"


COUNT = """
import sys
from pathlib import Path
from histossl.execution.locks import exclusive_lock
counter = Path(sys.argv[1]) / "count"
for _ in range(40):
    with exclusive_lock(Path(sys.argv[1]), ".writing"):
        counter.write_text(str(int(counter.read_text()) + 1))
"""


@pytest.mark.parametrize("hidden", ["", HIDDEN])
def test_no_two_processes_are_in_the_block_at_once(tmp_path, hidden):
    (tmp_path / "count").write_text("0")
    crew = [subprocess.Popen([sys.executable, "-c", hidden + COUNT, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(120) for process in crew] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "120"


HOLD = """
import sys, time
from pathlib import Path
from histossl.execution.locks import FolderLock
with FolderLock(Path(sys.argv[1]), ".lock") as lock:
    lock.exclusive()
    (Path(sys.argv[1]) / "held").touch()
    time.sleep(100)
"""


@pytest.mark.parametrize("hidden", ["", HIDDEN])
def test_a_lock_ends_with_its_process_however_that_ends(tmp_path, hidden):
    process = subprocess.Popen([sys.executable, "-c", hidden + HOLD, str(tmp_path)])
    while not (tmp_path / "held").exists():
        assert process.poll() is None
        time.sleep(0.02)
    check = (
        hidden
        + HOLD.split("with")[0]
        + ("with FolderLock(Path(sys.argv[1]), '.lock') as lock: print(lock.exclusive(wait=False))")
    )
    assert run(check, tmp_path).stdout == "False\n"
    process.kill()
    process.wait()
    assert run(check, tmp_path).stdout == "True\n"


def test_the_first_that_leaves_a_shared_lock_leaves_the_names_of_the_others(tmp_path):
    def holders() -> str:
        with FolderLock(tmp_path, ".lock") as lock:
            assert not lock.exclusive(wait=False)
            return lock.holders()

    other = (
        "import sys\nfrom histossl.execution.shared_table import SharedTable\n"
        "with SharedTable(sys.argv[1], 't.csv', ()).share(print): pass"
    )
    with SharedTable(tmp_path, "t.csv", ()).share(print):
        before = holders()
        assert f"process {os.getpid()} on" in before
        run(other, tmp_path)
        assert holders() == before
    assert (tmp_path / ".lock").read_text() == ""


def test_names_of_killed_holders_go_with_the_next_that_has_it_alone(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on a machine that is gone\n")
    with Study(tmp_path).share(print):
        assert "gone" not in (tmp_path / ".lock").read_text()


def test_status_writes_nothing(tmp_path):
    from histossl.study.status import status_of

    study = Study(tmp_path)
    study.write_slides([dict.fromkeys(study.columns, "") | {"slide_id": "a", "path": "/a.svs"}])
    claims = tmp_path / ".claims"
    claims.mkdir()
    (claims / "0123.0001").write_text("{}")
    before = {str(p): p.lstat() for p in (tmp_path, *tmp_path.rglob("*"))}
    status_of(tmp_path)
    assert {str(p): p.lstat() for p in (tmp_path, *tmp_path.rglob("*"))} == before


@pytest.mark.parametrize("name", [".lock", ".writing", "log.jsonl", ".claims", ".learning", "slides.csv"])
def test_a_study_whose_own_files_are_links_is_refused_and_nothing_outside_changes(tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("the user's")
    study = tmp_path / "study"
    study.mkdir()
    (study / name).symlink_to(outside if name == ".claims" else outside / "file")
    with pytest.raises(StudyError, match="is a link to"):
        Study(study)
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "the user's"


@pytest.mark.parametrize("name", [".lock", ".writing", "log.jsonl"])
@pytest.mark.parametrize("what", ["hard link", "pipe", "folder", "late link"])
def test_locks_and_logs_are_regular_files_of_their_own(tmp_path, name, what):
    from histossl.execution.journal import append

    outside = tmp_path / "file"
    outside.write_text("the user's")
    (tmp_path / "study").mkdir()
    path, roll = tmp_path / "study" / name, None
    if what == "late link":  # made after the study was opened
        roll = SharedTable(tmp_path / "study", "t.csv", ())
        path.symlink_to(outside)
    elif what == "hard link":
        os.link(outside, path)
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    roll = roll or SharedTable(tmp_path / "study", "t.csv", ())
    with pytest.raises(StudyError), roll.lock():
        append(roll, "a line\n")
    assert outside.read_text() == "the user's"


def test_a_room_may_be_a_link_where_the_user_says_so_outside_of_the_study(tmp_path, monkeypatch):
    disk: Path = tmp_path / "disk" / "features"
    disk.mkdir(parents=True)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "features").symlink_to(disk)
    with pytest.raises(StudyError, match="HISTOSSL_LINKS="):
        Study(tmp_path / "study")
    monkeypatch.setenv("HISTOSSL_LINKS", os.pathsep.join(["/nowhere", str(tmp_path / "disk")]))
    assert Study(tmp_path / "study").linked == [
        f"{tmp_path / 'study' / 'features'} is a link to {disk}, as HISTOSSL_LINKS allows"
    ]
