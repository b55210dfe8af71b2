"""Nuclei of many inputs: two runs share them, killed ones leave nothing undone, a cluster gives the same bytes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from histossl.cli import nuclei_commands
from histossl.cli.main import main
from histossl.core.atomic import JOURNAL
from histossl.execution.shared_table import SharedTable
from histossl.nuclei.segment import COLUMNS
from histossl.wsi.geometry import Region
from histossl.wsi.synth import SynthSettings, paint_region

COUNT = 5
SYNTH = SynthSettings(width=900, height=700, mpp=0.4, seed=3)
LEARNING = [
    "--self-training.steps=40",
    "--self-training.batch=6",
    "--self-training.crop=64",
    "--self-training.precision=float32",
]
FLAGS = ["--model=self", "--mpp-default=0.4", "--workers=1", "--device=cpu", "--running.tile=256", *LEARNING]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for k in range(COUNT):
        picture = paint_region(SYNTH, Region(90 * k, 60 * k, 300 + 20 * k, 280))
        Image.fromarray(picture).save(folder / f"{'=' * (k == 0)}i{k}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    return folder


def begin(images: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "histossl", "nuclei", "segment", str(images), "--out", str(out), *FLAGS, *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def files(out: Path) -> dict[str, bytes]:
    """All that a run leaves but its logs and what tells how long it took."""
    names = (".lock", ".learning", ".writing", "log.jsonl", "nuclei.csv", JOURNAL)
    left = {
        p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name not in names
    }
    left = {name: data for name, data in left.items() if not name.startswith(".model-training")}
    assert not [name for name in left if name.startswith(".")], "nothing half-done stays"
    return left


def rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "nuclei.csv").open(newline="", encoding="utf-8") as file:
        return {Path(row["path"]).name: row for row in csv.DictReader(file)}


def done(out: Path) -> Counter[str]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return Counter(line["slide_id"] for line in lines if line.get("stage") == "nuclei")


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("found") / "alone"
    assert main(["nuclei", "segment", str(images), "--out", str(out), *FLAGS]) == 1
    assert sum(int(row["nuclei"] or 0) for row in rows(out).values()) > 30
    return out


def test_two_runs_share_the_inputs_and_one_of_them_learns(images, alone, tmp_path):
    pair = [begin(images, tmp_path / "out") for _ in range(2)]
    screens = [run.communicate()[1] for run in pair]
    assert [run.returncode for run in pair] == [1, 1], screens
    assert sum("learned on 5 images" in screen for screen in screens) == 1
    assert files(tmp_path / "out") == files(alone)
    found = rows(tmp_path / "out")
    assert {name: row["nuclei"] for name, row in found.items()} == {n: r["nuclei"] for n, r in rows(alone).items()}
    assert Counter(row["status"] for row in found.values()) == {"done": COUNT, "failed": 1}
    assert found["=i0.png"]["file"] == "'=i0.png"
    shares = done(tmp_path / "out")
    assert all(shares.pop(name.removesuffix(".png")) == 1 for name, row in found.items() if row["status"] == "done")
    assert set(shares) == {"broken"}


def test_a_run_joins_others_that_segment_already(images, tmp_path):
    (tmp_path / "out").mkdir()
    with SharedTable(tmp_path / "out", "nuclei.csv", COLUMNS).share(print):
        ended = begin(images / "i1.png", tmp_path / "out")
        screen = ended.communicate(timeout=120)[1]
    assert ended.returncode == 0, screen
    assert "waiting" not in screen


def test_what_a_killed_run_was_at_another_ends(images, alone, tmp_path):
    first = begin(images, tmp_path / "out")
    while not (tmp_path / "out" / "log.jsonl").exists():
        time.sleep(0.01)
    second = begin(images, tmp_path / "out")
    os.kill(first.pid, signal.SIGKILL)
    assert second.wait() == 1
    first.communicate()
    second.communicate()
    assert files(tmp_path / "out") == files(alone)
    assert (
        main(["nuclei", "segment", str(images / "i1.png"), "--out", str(tmp_path / "out"), *FLAGS, "--model=prior"])
        == 0
    )
    assert len(rows(tmp_path / "out")) == COUNT + 1, "what other runs found stays in the table"


def test_what_stands_is_not_made_again_and_what_changed_is(images, tmp_path, capsys):
    image, out = tmp_path / "a.png", tmp_path / "out"
    image.write_bytes((images / "i1.png").read_bytes())
    command = ["nuclei", "segment", str(image), "--out", str(out), *FLAGS, "--model=prior"]
    assert [main(command), main(command)] == [0, 0]
    assert done(out) == {"a": 1}
    first = rows(out)["a.png"]["nuclei"]
    image.write_bytes((images / "i2.png").read_bytes())
    assert main(command) == 0
    assert done(out) == {"a": 2}
    assert rows(out)["a.png"]["nuclei"] != first
    assert main([*command, "--write.gzip=true"]) == 0
    assert (out / "a.geojson.gz").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.png").write_bytes(image.read_bytes())
    assert main([*command[:2], str(tmp_path / "b" / "a.png"), *command[3:]]) == 2
    assert "different folders" in capsys.readouterr().err
    image.unlink()  # the slides were moved
    assert main([*command[:2], str(tmp_path / "b" / "a.png"), *command[3:]]) == 0
    assert [row["path"] for row in rows(out).values()] == [str(tmp_path / "b" / "a.png")]


def test_an_input_that_is_changed_under_way_is_refused(images, tmp_path, monkeypatch):
    from histossl.nuclei import segment

    image = tmp_path / "a.png"
    image.write_bytes((images / "i1.png").read_bytes())
    real = segment.segment_rows

    def touched(*arguments):
        os.utime(image, ns=(1, 1))
        return real(*arguments)

    monkeypatch.setattr(segment, "segment_rows", touched)
    assert main(["nuclei", "segment", str(image), "--out", str(tmp_path / "out"), *FLAGS, "--model=prior"]) == 1
    assert "a.png: was changed while it was read" in rows(tmp_path / "out")["a.png"]["error"]
    assert not (tmp_path / "out" / "a.geojson").exists()


def test_a_cluster_finds_the_same_and_an_input_that_hangs_is_given_up(images, alone, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    from histossl.nuclei import tiled_inference as rows_of_tiles

    real = rows_of_tiles._kept

    def hangs(path: Path, *more: float):
        if path.name == "i3.png":
            threading.Event().wait()
        return real(path, *more)

    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, protocol="tcp", dashboard_address=None
    ) as local:
        place = f"--scheduler={local.scheduler_address}"
        out = tmp_path / "out"
        command = ["nuclei", "segment", str(images), "--out", str(out), *FLAGS, place, f"--model={alone / 'model'}"]
        assert main(command) == 1
        assert {k: v for k, v in files(alone).items() if not k.startswith("model")} == files(out)
        assert {n: r["nuclei"] for n, r in rows(out).items()} == {n: r["nuclei"] for n, r in rows(alone).items()}
        monkeypatch.setattr(rows_of_tiles, "_kept", hangs)
        command = [*command, "--timeout=20"]
        command[4] = str(tmp_path / "hung")
        assert main(command) == 1
    found = rows(tmp_path / "hung")
    assert "no answer in 20 s" in found["i3.png"]["error"]
    assert Counter(row["status"] for row in found.values()) == {"done": COUNT - 1, "failed": 2}


@pytest.mark.slow
def test_ctrl_c_lets_go_of_everything(images, alone, tmp_path):
    out = tmp_path / "out"
    run = begin(images, out, "--model=prior")
    while not (out / "log.jsonl").exists():
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    screen = run.communicate()[1]
    assert run.returncode == 130, screen
    assert not list(out.glob(".claims/*"))
    assert "the same command continues" in screen
    assert nuclei_commands.segment([images], out=out, model="prior", mpp_default=0.4, workers=1) == 1
    assert Counter(row["status"] for row in rows(out).values()) == {"done": COUNT, "failed": 1}
