"""What goes wrong at night, done to real processes: two runs at once, kill -9, Ctrl-C, full disks, slides replaced."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from histossl.cli.main import main
from histossl.core import fingerprints
from histossl.study.folder import Study
from histossl.study.status import status_of
from histossl.wsi.synth import SynthSettings, write_slide
from support import killing
from support.killing import digest, kill_at_random

SLIDES = 4
FLAGS = ["--tile.px=32", "--tile.mpp=1.0", "--workers=1"]
ENCODE = ["--encode.views=2", "--encode.tiles=8", "--encode.batch=8", "--device=cpu", "--workers=1"]


def both(slides: Path, out: Path) -> list[list[str]]:
    """Two stages as `run` does them."""
    return [["inspect", str(slides), "--out", str(out), *FLAGS], ["encode", str(out), *ENCODE]]


def child(slides: Path, out: Path):
    return killing.child(*both(slides, out))


def lines(study: Path) -> list[dict]:
    found = [json.loads(line) for line in (study / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in found if line.get("stage") in ("inspect", "encode")]


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for k in range(SLIDES):
        write_slide(folder / f"s{k}.tiff", SynthSettings(width=256, height=224 + 32 * k, seed=k))
    return folder


@pytest.fixture(scope="module")
def undisturbed(slides, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("studies") / "study"
    process = child(slides, out)
    process.join()
    assert process.exitcode == 0
    return out


def test_two_runs_share_the_slides(slides, undisturbed, tmp_path):
    out = tmp_path / "study"
    pair = [child(slides, out) for _ in range(2)]
    for process in pair:
        process.join()
        assert process.exitcode == 0
    assert digest(out) == digest(undisturbed)
    done = Counter((line["stage"], line["slide_id"]) for line in lines(out))
    assert done == Counter((stage, f"s{k}") for stage in ("inspect", "encode") for k in range(SLIDES))
    assert all(line["seconds"] >= 0 and line["tiles"] > 0 and line["row"]["made"] for line in lines(out))


def test_killed_at_random_moments_a_study_ends_with_the_same_bytes(slides, undisturbed, tmp_path):
    out = tmp_path / "study"
    kill_at_random(lambda: child(slides, out), out, digest(undisturbed), kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_two_hundred_times_a_study_ends_with_the_same_bytes(slides, undisturbed, tmp_path):
    out = tmp_path / "study"
    assert kill_at_random(lambda: child(slides, out), out, digest(undisturbed), kills=200, seed=2) > 5


def test_a_run_that_was_killed_leaves_its_slides_to_another_that_goes_on(slides, undisturbed, tmp_path):
    out = tmp_path / "study"
    first = child(slides, out)
    while not (out / "log.jsonl").exists():
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGSTOP)  # it holds the study, and its claims
    second = child(slides, out)
    second.join(1)
    os.kill(first.pid, signal.SIGKILL)
    second.join()
    first.join()
    assert second.exitcode == 0
    assert digest(out) == digest(undisturbed)


def heed_ctrl_c() -> None:
    """A shell starts what runs in its background with Ctrl-C ignored, and so would the tests' children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_cleanly_before_the_work_is_done(tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    for k in range(24):  # so many that the run still works when it hears
        write_slide(many / f"s{k}.tiff", SynthSettings(width=256, height=256, seed=k))

    def inspect(out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "histossl", "inspect", str(many), "--out", str(out), *FLAGS]
        how = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
        return subprocess.Popen(command, **how, start_new_session=True, preexec_fn=heed_ctrl_c)

    out, undisturbed = tmp_path / "study", tmp_path / "undisturbed"
    process = inspect(out)
    while not ((out / "log.jsonl").exists() and lines(out)):
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all processes get it
    _, screen = process.communicate()
    assert process.returncode == 130, screen
    assert "Traceback" not in screen
    assert "stopped; the same command continues from here" in screen
    assert not list(out.glob(".claims/*"))
    assert not [path for path in out.rglob("*") if ".part" in path.name]
    done = {line["slide_id"] for line in lines(out)}
    assert 0 < len(done) < 24
    assert {row["status"] for row in Study(out).slides() if row["slide_id"] in done} == {"inspected"}
    for study in (out, undisturbed):
        process = inspect(study)
        process.communicate()
        assert process.returncode == 0
    assert digest(out) == digest(undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 100 kB; how to make it larger or read-only."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("only root may mount a small disk")
    yield place, lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_the_run_and_with_room_it_goes_on(slides, undisturbed, small_disk, capfd):
    disk, remount = small_disk
    out = disk / "study"
    (disk / "ballast").write_bytes(bytes(40_000))
    assert main(["inspect", str(slides), "--out", str(out), *FLAGS]) == 2
    screen = capfd.readouterr().err
    assert "ERROR" in screen
    assert "No space left" in screen
    assert not [path for path in out.rglob("*") if ".part" in path.name]
    assert not [row for row in Study(out).slides() if row["status"] == "failed"]  # no slide is to blame
    remount("size=50m")
    (disk / "ballast").unlink()
    process = child(slides, out)
    process.join()
    assert digest(out) == digest(undisturbed)
    remount("ro")
    assert main(["inspect", str(slides), "--out", str(out), *FLAGS]) == 2
    assert "cannot be written" in capfd.readouterr().err
    assert status_of(out).slides == Counter(encoded=SLIDES)


def with_few_handles(*commands: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    killing.quietly(*commands)


def test_sixty_four_file_handles_are_enough(slides, undisturbed, tmp_path):
    process = killing.server.Process(target=with_few_handles, args=both(slides, tmp_path / "study"))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert digest(tmp_path / "study") == digest(undisturbed)


def test_of_two_runs_of_different_settings_one_is_refused(slides, undisturbed, tmp_path):
    """The features that stand are all of the one that came first; two that begin at once had mixed them."""
    out = tmp_path / "study"
    inspect, encode = both(slides, out)
    others = [killing.child(inspect, command) for command in (encode, [*encode, "--encode.views=1"])]
    for process in others:
        process.join()
    assert sorted(process.exitcode for process in others) == [0, 2]
    views = {len(np.load(path, mmap_mode="r")) for path in out.glob("views/*/features.npy")}
    assert len(views) == 1
    assert status_of(out).slides == Counter(encoded=SLIDES)


def test_a_slide_that_changes_or_vanishes_is_not_encoded_with_the_tiles_of_another(slides, tmp_path, capsys):
    own, out = tmp_path / "slides", tmp_path / "study"
    shutil.copytree(slides, own)
    assert main(["inspect", str(own), "--out", str(out), *FLAGS]) == 0
    os.utime(own / "s1.tiff")
    (own / "s2.tiff").unlink()
    process = killing.server.Process(target=killing.quietly, args=both(own, out))  # inspects anew
    assert main(["encode", str(out), *ENCODE]) == 1
    rows = {row["slide_id"]: row for row in Study(out).slides()}
    assert {name: row["status"] for name, row in rows.items()} == {
        "s0": "encoded", "s1": "failed", "s2": "failed", "s3": "encoded",
    }  # fmt: skip
    assert "s1.tiff: has changed since it was inspected" in rows["s1"]["error"]
    assert "s2.tiff: cannot be read (No such file" in rows["s2"]["error"]
    assert sorted(path.name for path in (out / "features").iterdir()) == ["s0.h5", "s3.h5"]
    process.start()
    process.join()
    rows = {row["slide_id"]: row for row in Study(out).slides()}
    assert rows["s1"]["status"] == "encoded"
    assert "no longer there" in rows["s2"]["error"]
    assert fingerprints.fingerprint_of(out / "features" / "s1.h5") == rows["s1"]["made"]
