"""Whole commands that are killed, starved of disk or handles, or whose clock jumps: the same bytes in the end."""

from __future__ import annotations

import io
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histossl.cli.main import main
from histossl.core import atomic
from histossl.wsi.synth import SynthSettings, write_cohort, write_slide
from support import killing
from support.features import features, trident
from support.killing import child, digest, kill_at_random, same_files

ONE = ["--workers=1", "--device=cpu"]
FAST = [
    "--encoder=random",
    "--tile.px=32",
    "--tile.mpp=1.0",
    "--encode.views=2",
    "--encode.tiles=8",
    "--encode.batch=8",
]
BRIEF = ["--pretrain.epochs=2", "--probe.folds=2", "--probe.repeats=1", "--probe.bootstraps=100", "--probe.shots=2"]
NAMES = ("run", "pretrain", "segment", "predict")


@dataclass(frozen=True)
class Commands:
    """Every command with its inputs, made once, and what it makes of them when nobody disturbs it."""

    root: Path

    def of(self, name: str, out: Path) -> list[str]:
        """The words of a command that writes to `out`."""
        cohort, new = self.root / "cohort", str(self.root / "new")
        if name == "run":
            labels = ["--labels", str(cohort / "labels.csv")]
            return ["run", str(cohort / "slides"), "--out", str(out), *labels, *FAST, *BRIEF, *ONE]
        if name == "pretrain":
            return ["pretrain", str(self.study / "features"), "--out", str(out), "--pretrain.epochs=6", "--device=cpu"]
        if name == "segment":
            return ["nuclei", "segment", new, "-o", str(out), *ONE]
        return ["predict", str(self.study), new, "--out", str(out), *ONE]

    @property
    def study(self) -> Path:
        return self.wanted("run")

    def wanted(self, name: str) -> Path:
        """What a run that nobody disturbed has made; the folder is called as all others, since reports name it."""
        out = self.root / name / "out"
        if not out.exists():
            process = child(self.of(name, out))
            process.join()
            assert process.exitcode == 0
        return out


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Commands:
    root = tmp_path_factory.mktemp("commands")
    write_cohort(root / "cohort", slides=8, width=256, height=224, seed=1)
    labels = pd.read_csv(root / "cohort" / "labels.csv")
    labels[["slide_id", "patient_id", "composition"]].to_csv(root / "cohort" / "labels.csv", index=False)
    (root / "new").mkdir()
    for k in range(2):
        write_slide(root / "new" / f"n{k}.tiff", SynthSettings(width=256, height=224 + 32 * k, seed=50 + k))
    return Commands(root)


def ended(command: list[str], how: Callable[..., None] = killing.quietly) -> int:
    process = killing.server.Process(target=how, args=(command,))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def test_segment_is_killed_and_ends_with_the_same_bytes(commands, tmp_path):
    wanted, out = digest(commands.wanted("segment")), tmp_path / "out"
    kill_at_random(lambda: child(commands.of("segment", out)), out, wanted, kills=1, seed=3)


def test_checkpoints_of_a_training_that_was_killed_after_its_encoder_are_removed(commands, tmp_path):
    wanted, out = digest(commands.wanted("pretrain")), tmp_path / "out"
    shutil.copytree(commands.wanted("pretrain"), out)
    for name in ("best.pt", "checkpoint.pt"):
        (out / "logs" / "pretrain" / name).write_bytes(b"what a training goes on from")
    assert ended(commands.of("pretrain", out)) == 0
    same_files(digest(out), wanted)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_two_hundred_kills_of_each_command(commands, tmp_path, name, capsys):
    wanted, out = digest(commands.wanted(name)), tmp_path / "out"
    came = kill_at_random(lambda: child(commands.of(name, out)), out, wanted, kills=200, seed=4)
    with capsys.disabled():
        print(f" {name}: {came} studies came to their end", flush=True)  # noqa: T201 - the figure is the result
    assert came > 5


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB; called with a number of bytes it has no more room than that, with None it has plenty."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")

    def leave(room: int | None) -> None:
        (place / "ballast").unlink(missing_ok=True)
        size = "200m" if room is None else "2m"
        subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)
        if room is not None:
            free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
            (place / "ballast").write_bytes(bytes(max(0, free - room)))

    yield place, leave
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kind", ["trident", "clam-pt"])
def test_a_full_disk_is_said_and_the_process_ends_without_a_crash(small_disk, tmp_path, kind):
    disk, leave = small_disk
    trident(tmp_path / "from", "a", features("a", dim=2048))
    leave(2**18)
    words = ["features", "convert", str(tmp_path / "from"), "--out", str(disk / "to"), "--to", kind]
    found = subprocess.run([sys.executable, "-m", "histossl", *words], capture_output=True, text=True, check=False)
    assert found.returncode == 2, found.stderr
    assert "No space left on device" in found.stdout + found.stderr
    assert "Traceback" not in found.stderr
    assert not [path for path in disk.rglob("*") if path.is_file() and path.name != "ballast" and path.stat().st_size]


def test_a_picture_is_whole_or_the_disk_is_full(small_disk):
    """Of 24 such disks Pillow, when it writes a JPEG itself, takes 8 for large enough."""
    disk, leave = small_disk
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8))
    noise.save(packed := io.BytesIO(), "JPEG")
    for room in range(0, len(packed.getvalue()), 4096):
        leave(room)
        with pytest.raises(OSError, match="No space"), atomic.whole_buffer(disk / "x.jpg") as file:
            noise.save(file, "JPEG")
        assert [path.name for path in disk.iterdir()] == ["ballast"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_fills_at_any_write_ends_a_command_which_goes_on_with_room(commands, small_disk, name):
    wanted, (disk, leave) = commands.wanted(name), small_disk
    out, needed = disk / "out", sum(-(-path.stat().st_size // 4096) * 4096 for path in wanted.rglob("*"))
    failed = 0
    for part in range(0, 24):
        leave(min(needed * part // 20, 2**21))
        code = ended(commands.of(name, out))
        assert code in (0, 2), (part, code)  # 1 were a slide that is blamed, or a traceback
        assert not [path for path in disk.rglob("*") if ".part" in path.name]
        failed += code == 2
        if part % 2:  # what stands is kept: the next one fails at a later write
            leave(None)
            assert ended(commands.of(name, out)) == 0
            assert digest(out) == digest(wanted), part
            shutil.rmtree(out)
    assert failed > 5


def with_few_handles(command: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    killing.quietly(command)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_sixty_four_handles_are_enough_for_every_command(commands, tmp_path, name):
    wanted = commands.wanted(name)
    assert ended(commands.of(name, tmp_path / "out"), with_few_handles) == 0
    assert digest(tmp_path / "out") == digest(wanted)


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long jump(void) { return (random() % 400000) - 200000; }  // two days to and fro, at every look

int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, at);
    if (id == CLOCK_REALTIME) at->tv_sec += jump();
    return code;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    at->tv_sec = found.tv_sec;
    at->tv_usec = found.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *at) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (at) *at = found.tv_sec;
    return found.tv_sec;
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="needs a C compiler and its loader")
@pytest.mark.parametrize("name", NAMES)
def test_a_clock_that_jumps_changes_nothing(commands, tmp_path, name):
    wanted = commands.wanted(name)
    (tmp_path / "clock.c").write_text(CLOCK)
    library = tmp_path / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "clock.c", "-ldl"], check=True)
    asked = [sys.executable, "-c", "import time; print({int(time.time()) // 3600 for _ in range(9)})"]
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    told = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True).stdout
    assert told.count(",") > 3  # it does jump
    command = [sys.executable, "-m", "histossl", *commands.of(name, tmp_path / "out")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    assert digest(tmp_path / "out") == digest(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_room_that_cannot_be_written_is_said(commands, small_disk, capfd, name):
    disk, _ = small_disk
    out = disk / "out"
    out.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert main(commands.of(name, out)) == 2
    told = capfd.readouterr().err.replace("\n", " ")
    assert "cannot be written" in told or "Read-only" in told
    assert not list(out.iterdir())
