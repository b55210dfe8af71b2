"""The main job from end to end on small painted slides, and everything that a folder of slides may hold against it."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from histossl.cli.main import main
from histossl.core import atomic
from histossl.core.atomic import JOURNAL
from histossl.core.embeddings import read_embeddings
from histossl.study.folder import Study
from histossl.wsi.synth import SynthSettings, write_cohort, write_slide

FAST = [
    *("--tile.px=64", "--tile.mpp=1.0", "--encode.views=2", "--encode.tiles=24", "--pretrain.epochs=3"),
    *("--probe.folds=2", "--probe.repeats=2", "--probe.bootstraps=100", "--workers=1", "--device=cpu"),
]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, slides=8, width=384, height=448, seed=3)
    return folder


@pytest.fixture(scope="module")
def study(cohort, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("studies") / "study"
    assert main(["run", str(cohort / "slides"), "--out", str(out), "--labels", str(cohort / "labels.csv"), *FAST]) == 0
    return out


def rows(study: Path) -> dict[str, dict[str, str]]:
    with (study / "slides.csv").open(newline="", encoding="utf-8") as file:
        return {Path(row["path"]).name: row for row in csv.DictReader(file)}


def digest(folder: Path) -> dict[str, str]:
    """Every file that must come out the same: all but logs, and in the report the times, which are the log's."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(_timeless(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and "tensorboard" not in path.parts
        and path.name not in (".lock", ".learning", ".writing", "log.jsonl", JOURNAL)
    }


def _timeless(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name != "report.html":
        return data
    rest, count = re.subn(rb'<details open id="times">.*?</details>', b"", data, flags=re.DOTALL)
    assert count == 1
    return rest


def inspect(slides: Path, out: Path, *flags: str) -> int:
    return main(["inspect", str(slides), "--out", str(out), "--tile.px=64", "--workers=1", *flags])


def test_a_folder_of_slides_becomes_one_vector_a_slide(study):
    table = rows(study)
    assert len(table) == 8
    assert {row["status"] for row in table.values()} == {"encoded"}
    found = read_embeddings(study / "embeddings.h5ad")
    assert list(found.vectors) == ["giga-ssl", "mean pooling", "untrained encoder"]
    assert found.vectors["giga-ssl"].shape == (8, 64 + 128 + 2 * 4 * 64 + 2 * 4 * 64)
    np.testing.assert_allclose(np.linalg.norm(found.vectors["giga-ssl"], axis=1), 1, rtol=1e-5, atol=1e-6)
    for name in found.slides.index:
        with h5py.File(study / "features" / f"{name}.h5") as file:
            assert file["features"].shape == (int(table[f"{name}.tiff"]["tiles"]), 128)
            np.testing.assert_allclose(
                found.vectors["mean pooling"][list(found.slides.index).index(name)],
                file["features"][:].mean(0),
                rtol=1e-5,
                atol=1e-6,
            )
        views = np.load(study / "views" / name / "features.npy", mmap_mode="r")
        assert views.dtype == np.float16
        assert views.shape[0] == 2
        assert views.shape[2] == 128
        assert np.load(study / "views" / name / "coords.npy").dtype == np.int32
        assert Image.open(study / "qc" / f"{name}.jpg").size[0] > 100
    assert {"composition", "lesion", "arrangement"} <= set(
        (study / "probe.csv").read_text().replace("\n", ",").split(",")
    )
    page = (study / "report.html").read_text()
    assert "<html" in page
    times = page[page.index('id="times"') :]
    assert re.findall(r"<tr><td>(\w+)</td><td>[\d.]+ (?:s|min)</td></tr>", times[: times.index("</details>")]) == [
        *("inspect", "encode", "pretrain", "embed", "probe", "together")
    ]


def test_a_run_on_a_finished_study_changes_nothing(study, cohort):
    before = digest(study)
    stamp = (study / "embeddings.h5ad").stat().st_mtime_ns
    assert (
        main(["run", str(cohort / "slides"), "--out", str(study), "--labels", str(cohort / "labels.csv"), *FAST]) == 0
    )
    assert digest(study) == before
    assert (study / "embeddings.h5ad").stat().st_mtime_ns == stamp


def test_the_stages_one_by_one_give_the_same_bytes(study, cohort, tmp_path):
    out = tmp_path / "study"
    flags = {name: [f for f in FAST if f.startswith(f"--{name}.")] for name in ("tile", "encode", "pretrain", "probe")}
    assert main(["inspect", str(cohort / "slides"), "--out", str(out), "--workers=1", *flags["tile"]]) == 0
    assert main(["encode", str(out), "--workers=2", "--device=cpu", *flags["encode"]]) == 0
    assert main(["pretrain", str(out), "--device=cpu", *flags["pretrain"]]) == 0
    assert main(["embed", str(out), "--device=cpu"]) == 0
    assert main(["probe", str(out), "--labels", str(cohort / "labels.csv"), *flags["probe"]]) == 0
    assert main(["report", str(out)]) == 0
    assert digest(out) == digest(study)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(study, cohort, tmp_path):
    out = tmp_path / "study"
    command = [sys.executable, "-m", "histossl", "run", str(cohort / "slides"), "--out", str(out)]
    command += ["--labels", str(cohort / "labels.csv"), *FAST]
    landmarks = [out / "tiles", out / "features" / "slide-003.h5", out / "logs" / "pretrain" / "log.csv"]
    for landmark in landmarks:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        while not landmark.exists() and process.poll() is None:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for room in (out, out / "views", out / "logs" / "pretrain"):  # as a kill in the middle of writing leaves them
        (room / atomic._part_name()).mkdir()
        (room / f"{atomic._part_name()}.pt").write_bytes(b"half")
    assert main(command[3:]) == 0
    assert digest(out) == digest(study)


def test_two_runs_at_once_are_kept_apart(study, capsys):
    with Study(study).lock():
        process = subprocess.run(
            [sys.executable, "-m", "histossl", "report", str(study)], capture_output=True, text=True, check=False
        )
    assert process.returncode == 2
    assert f"another run is using it (process {os.getpid()}" in process.stderr


def test_other_settings_are_refused_and_named(study, cohort, capsys):
    before = digest(study)
    code = main(["run", str(cohort / "slides"), "--out", str(study), *FAST, "--tile.px=128"])
    assert code == 2
    assert "made with other settings (inspect: tile.px: 64 -> 128)" in capsys.readouterr().err
    assert main(["run", str(cohort / "slides"), "--out", str(study), *FAST, "--encode.augment.crop=0.7"]) == 2
    assert "encode: augment.crop: 0.5 -> 0.7" in capsys.readouterr().err
    assert main(["run", str(cohort / "slides"), "--out", str(study), *FAST, "--pretrain.epochs=9"]) == 2
    assert "pretrain: epochs: 3 -> 9" in capsys.readouterr().err
    assert digest(study) == before


HOSTILE = ["a slide.tiff", 'it\'s "quoted".tiff', "-dash.tiff", "切片 一.tiff", "=1+1.tiff"]
HOSTILE += ["<img src=x onerror=alert(1)>&.tiff"]


def hostile_folder(folder: Path) -> Path:
    folder.mkdir()
    good = SynthSettings(width=320, height=256)
    for k, name in enumerate(HOSTILE):
        write_slide(folder / name, SynthSettings(width=320, height=256, seed=k))
    write_slide(folder / "cut.tiff", good)
    data = (folder / "cut.tiff").read_bytes()
    (folder / "cut.tiff").write_bytes(data[: len(data) // 2])
    (folder / "text.svs").write_text("this is no slide")
    (folder / "empty.svs").write_bytes(b"")
    for name in ("one", "two"):
        write_slide(folder / name / "twin.tiff", good)
    pixels = np.full((256, 320, 3), 245, np.uint8)
    for name, mpp in (("white", 1.0), ("zero", 0.0), ("absurd", 1000.0), ("bare", None)):
        resolution = None if not mpp else (1e4 / mpp, 1e4 / mpp)
        tifffile.imwrite(
            folder / f"{name}.tif", pixels, photometric="rgb", tile=(128, 128), resolution=resolution,
            resolutionunit="CENTIMETER" if resolution else None,
        )  # fmt: skip
    (folder / "gone.svs").symlink_to(folder / "nowhere.svs")
    return folder


def test_bad_slides_cost_themselves_only(tmp_path, capsys):
    slides, out = hostile_folder(tmp_path / "sl ides"), tmp_path / "out"
    assert main(["run", str(slides), "--out", str(out), *FAST]) == 1
    table = rows(out)
    screen = capsys.readouterr().err
    assert "is a copy of" in screen
    for name in [*HOSTILE, "twin.tiff"]:
        assert table[name]["status"] == "encoded", table[name]
        assert (out / "features" / f"{Path(name).stem}.h5").exists()
    failed = {name: row["error"] for name, row in table.items() if row["status"] == "failed"}
    expected = {"cut.tiff": "cut", "text.svs": "no slide", "empty.svs": "empty.svs", "gone.svs": "gone.svs"}
    expected |= {"white.tif": "no tile of tissue"}
    expected |= {"zero.tif": "mpp", "absurd.tif": "mpp", "bare.tif": "mpp"}
    assert set(failed) == set(expected)
    for name, words in expected.items():
        assert words in failed[name], failed[name]
        assert "\n" not in failed[name]
        assert failed[name] in screen
        stem = Path(name).stem
        assert not (out / "features" / f"{stem}.h5").exists()
        assert not (out / "tiles" / f"{stem}.h5").exists()
    assert sum(row["status"] == "failed" for row in csv.DictReader((out / "slides.csv").open(encoding="utf-8"))) == 8
    assert not [path for path in out.rglob("*") if ".part" in path.name]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;" in page
    assert len(read_embeddings(out / "embeddings.h5ad").slides) == len(HOSTILE) + 1


def test_mpp_has_three_sources_and_a_range(tmp_path):
    slides, out = tmp_path / "slides", tmp_path / "out"
    slides.mkdir()
    write_slide(tmp_path / "s.tiff", SynthSettings(width=512, height=384, mpp=0.5))
    Image.fromarray(tifffile.imread(tmp_path / "s.tiff", level=0)).save(slides / "bare.png")
    assert inspect(slides, out) == 1
    assert "--mpp-default" in rows(out)["bare.png"]["error"]
    assert inspect(slides, out, "--mpp-default", "0.5") == 0
    assert rows(out)["bare.png"]["mpp"] == "0.5"
    tiles = int(rows(out)["bare.png"]["tiles"])
    table = (out / "slides.csv").read_text()
    (out / "slides.csv").write_text(table.replace(",0.5,", ",1.0,"))
    assert inspect(slides, out, "--mpp-default", "0.5") == 0  # the user's word outweighs the default
    assert rows(out)["bare.png"]["mpp"] == "1.0"
    assert int(rows(out)["bare.png"]["tiles"]) > 2 * tiles
    for wrong in ("0", "-1", "1000", "nan", "half"):
        (out / "slides.csv").write_text(table.replace(",0.5,", f",{wrong},"))
        assert inspect(slides, out) == 1, wrong
        assert wrong.strip("-") in rows(out)["bare.png"]["error"]
    for wrong in ("0", "-1", "1000"):
        assert inspect(slides, tmp_path / "other", f"--mpp-default={wrong}") != 0


def test_an_empty_or_absent_folder_is_an_error(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["run", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    assert "no slides" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "absent"), "--out", str(tmp_path / "out")]) == 2
    assert "absent" in capsys.readouterr().err
    assert main(["encode", str(tmp_path / "empty")]) == 2
    assert "not a study" in capsys.readouterr().err


def test_one_slide_may_stand_for_a_folder(cohort, tmp_path):
    assert inspect(cohort / "slides" / "slide-001.tiff", tmp_path / "out") == 0
    assert list(rows(tmp_path / "out")) == ["slide-001.tiff"]


def labels(path: Path, table: list[tuple[str, ...]]) -> str:
    path.write_text("\n".join(",".join(row) for row in [("slide_id", "patient_id", "label"), *table]))
    return str(path)


def test_bad_labels_cost_the_probe_only(study, tmp_path, capsys):
    out = tmp_path / "study"
    shutil.copytree(study, out)
    flags = [f for f in FAST if f.startswith("--probe")]
    names = [f"slide-{k:03d}" for k in range(1, 9)]
    good = [(n, f"p{k}", "ab"[k % 2]) for k, n in enumerate(names)]

    assert main(["probe", str(out), "--labels", labels(tmp_path / "l.csv", good), *flags]) == 0
    capsys.readouterr()
    assert main(["probe", str(out), "--labels", labels(tmp_path / "l.csv", [*good, ("ghost", "p", "a")]), *flags]) == 1
    assert "ghost" in capsys.readouterr().err
    assert main(["probe", str(out), "--labels", labels(tmp_path / "l.csv", good[:-1]), *flags]) == 1
    assert "slide-008" in capsys.readouterr().err
    before = (out / "probe.json").read_bytes()
    for table, words in (
        ([(n, f"p{k}", "a") for k, n in enumerate(names)], "class"),
        ([(n, f"p{k % 2}", "ab"[k % 2]) for k, n in enumerate(names)], "patient"),
        ([(f"other-{n}", "p", "a") for n in names], "none of its"),
    ):
        assert main(["probe", str(out), "--labels", labels(tmp_path / "l.csv", table), *flags]) == 2
        assert words in capsys.readouterr().err
    assert main(["probe", str(out), "--labels", str(tmp_path / "absent.csv")]) == 2
    assert (out / "probe.json").read_bytes() == before


@pytest.mark.slow
def test_bad_labels_in_a_run_still_leave_vectors_and_a_report(cohort, tmp_path):
    out = tmp_path / "study"
    bad = labels(tmp_path / "bad.csv", [("nobody", "p", "a")])
    assert main(["run", str(cohort / "slides"), "--out", str(out), "--labels", bad, *FAST]) == 2
    assert (out / "embeddings.h5ad").exists()
    assert (out / "report.html").exists()


def test_one_slide_alone_is_encoded_and_then_said_to_be_too_few(cohort, tmp_path, capsys):
    (tmp_path / "slides").mkdir()
    shutil.copy(cohort / "slides" / "slide-001.tiff", tmp_path / "slides")
    assert main(["run", str(tmp_path / "slides"), "--out", str(tmp_path / "out"), *FAST]) == 2
    assert "two or more" in capsys.readouterr().err
    assert rows(tmp_path / "out")["slide-001.tiff"]["status"] == "encoded"


def test_a_slide_that_comes_later_is_embedded_by_the_encoder_that_stands(study, cohort, tmp_path, capsys):
    slides, out = tmp_path / "slides", tmp_path / "out"
    shutil.copytree(cohort / "slides", slides)
    (slides / "slide-008.tiff").rename(tmp_path / "late.tiff")
    assert main(["run", str(slides), "--out", str(out), *FAST]) == 0
    weights = (out / "slide-encoder" / "model.safetensors").read_bytes()
    (tmp_path / "late.tiff").rename(slides / "late.tiff")
    (slides / "slide-001.tiff").unlink()
    assert main(["run", str(slides), "--out", str(out), *FAST]) == 1
    assert (out / "slide-encoder" / "model.safetensors").read_bytes() == weights
    assert "no longer there" in rows(out)["slide-001.tiff"]["error"]
    assert "late" in read_embeddings(out / "embeddings.h5ad").slides.index
    assert "trained without 1 of 7" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_half_written(cohort, tmp_path):
    """A limit on the size of files stands for the disk: writing fails in the middle of a slide's features."""
    out = tmp_path / "study"
    command = [sys.executable, "-m", "histossl", "run", str(cohort / "slides"), "--out", str(out), *FAST]

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = subprocess.run(command, preexec_fn=small_files, capture_output=True, text=True, check=False)
    assert process.returncode in (1, 2)
    assert "FAILED" in process.stderr or "ERROR" in process.stderr
    assert "Traceback" not in process.stderr
    assert not list(out.glob("features/*.h5"))
    assert not (out / "embeddings.h5ad").exists()
    assert not [path for path in out.rglob("*") if ".part" in path.name]
    assert main(command[3:]) == 0  # and with room it goes on


def test_help_is_quick_and_loads_no_torch():
    code = "import sys, histossl.cli.main as c; c.main(['--help']); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_unknown_commands_flags_and_values_are_refused(capsys):
    assert main(["fly"]) == 2
    assert main(["inspect", "x", "--out=y", "--tile.size=3"]) == 2
    assert "no flag --tile.size" in capsys.readouterr().err
    assert main(["inspect", "x", "--out=y", "--tile.overlap=300"]) == 2
    assert "overlap" in capsys.readouterr().err


def test_real_slides_of_every_kind(data_dir, tmp_path):
    out = tmp_path / "study"
    code = main(["run", str(data_dir / "slides"), "--out", str(out), "--mpp-default", "1.0", *FAST])
    assert code == 0
    table = rows(out)
    assert len(table) == 6
    assert all(row["status"] == "encoded" for row in table.values())
    assert float(table["CMU-1-Small-Region.svs"]["mpp"]) == pytest.approx(0.499)
    assert all(float(row["mpp"]) == pytest.approx(0.19448) for name, row in table.items() if name.startswith("monusac"))
