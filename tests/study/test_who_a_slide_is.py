"""A slide is known by its name and its content: moved, renamed, copied, linked, or beside what is none."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histossl.cli.main import main
from histossl.core.errors import StudyError
from histossl.study.folder import Study
from histossl.study.identity import merge
from histossl.study.pretrain_stage import sites_of
from histossl.wsi.content import content_of
from histossl.wsi.folders import look_for_slides

FLAGS = ["--tile.px", "64", "--workers", "1"]


def picture(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = np.full((256, 256, 3), 245, np.uint8)
    found[32:224, 32:224] = (226, 150, 190)
    for y, x in rng.integers(32, 216, (80, 2)):
        found[y : y + 8, x : x + 8] = (95, 60, 140)
    return found


def write(path: Path, seed: int = 0, mpp: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed)).save(path, dpi=(25400 / mpp,) * 2)
    return path


def inspect(slides: Path, out: Path) -> int:
    return main(["inspect", str(slides), "--out", str(out), *FLAGS])


def rows(out: Path) -> dict[str, dict[str, str]]:
    return {row["slide_id"]: row for row in Study(out).slides()}


def annotate(out: Path) -> None:
    """Write what a user writes: a patient, an mpp and a column of his own."""
    found = Study(out).slides()
    for k, row in enumerate(found):
        row |= {"patient_id": f"p{k // 2}", "mpp": "0.5", "stage": "I"}
    with (out / "slides.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(found[0]))
        table.writeheader()
        table.writerows(found)


def written(row: dict[str, str]) -> tuple[str, ...]:
    return row["patient_id"], row["mpp"], row["stage"]


@pytest.fixture
def study(tmp_path):
    for k in range(4):
        write(tmp_path / "disk1" / f"s{k}.png", k)
    assert inspect(tmp_path / "disk1", tmp_path / "st") == 0
    annotate(tmp_path / "st")
    return tmp_path / "st"


def test_what_users_wrote_follows_slides_that_moved(study, tmp_path, capsys):
    before = {name: written(row) for name, row in rows(study).items()}
    (tmp_path / "disk1").rename(tmp_path / "disk2")
    assert inspect(tmp_path / "disk2", study) == 0
    after = rows(study)
    assert {name: written(row) for name, row in after.items()} == before
    assert all(Path(row["path"]).parent.name == "disk2" for row in after.values())
    assert "4 slides were found again by content" in capsys.readouterr().err


def test_a_study_without_contents_knows_its_slides_by_their_names(study, tmp_path, capsys):
    found = Study(study).slides()
    Study(study).write_slides([{n: t for n, t in row.items() if n not in ("content", "note")} for row in found])
    (tmp_path / "disk1").rename(tmp_path / "disk2")
    assert inspect(tmp_path / "disk2", study) == 0
    assert [written(row) for row in rows(study).values()] == [written(row) for row in found]
    assert "by name" in capsys.readouterr().err


def test_a_renamed_slide_keeps_its_row_under_its_new_name(study, tmp_path, capsys):
    (tmp_path / "disk1" / "s1.png").rename(tmp_path / "disk1" / "renamed.png")
    assert inspect(tmp_path / "disk1", study) == 0
    assert written(rows(study)["renamed"]) == ("p0", "0.5", "I")
    assert "s1" not in rows(study)
    assert "s1 is called renamed now" in capsys.readouterr().err


def test_folders_add_up(study, tmp_path):
    write(tmp_path / "more" / "t0.png", 9)
    assert inspect(tmp_path / "more", study) == 0
    found = rows(study)
    assert set(found) == {"s0", "s1", "s2", "s3", "t0"}
    assert all(row["status"] == "inspected" for row in found.values())
    assert written(found["s3"]) == ("p1", "0.5", "I")


def test_a_slide_that_is_gone_keeps_its_row_and_no_advice_destroys_it(study, tmp_path, capsys):
    (tmp_path / "disk1" / "s2.png").unlink()
    assert inspect(tmp_path / "disk1", study) == 1
    row = rows(study)["s2"]
    assert row["status"] == "failed"
    assert "no longer there" in row["error"]
    assert "delete" not in row["error"]
    assert written(row) == ("p1", "0.5", "I")
    write(tmp_path / "elsewhere" / "s2.png", 2)
    assert inspect(tmp_path / "elsewhere", study) == 0
    assert written(rows(study)["s2"]) == ("p1", "0.5", "I")


def test_two_slides_of_one_name_are_told_apart_by_content(tmp_path, capsys):
    write(tmp_path / "s" / "a" / "x.png", 1)
    write(tmp_path / "s" / "b" / "x.png", 2)
    write(tmp_path / "s" / "b" / "y.png", 3)
    assert inspect(tmp_path / "s", tmp_path / "st") == 0
    found = rows(tmp_path / "st")
    expected = {f"x~{content_of(tmp_path / 's' / place / 'x.png')[:6]}" for place in "ab"}
    assert set(found) == expected | {"y"}
    assert all((tmp_path / "st" / "tiles" / f"{name}.h5").exists() for name in found)
    assert "different slides are called x" in capsys.readouterr().err
    assert inspect(tmp_path / "s", tmp_path / "st") == 0
    assert set(rows(tmp_path / "st")) == set(found)


def test_a_copy_is_read_once_and_said(study, tmp_path, capsys):
    shutil.copytree(tmp_path / "disk1", tmp_path / "copy")
    assert inspect(tmp_path / "copy", study) == 0
    assert set(rows(study)) == {"s0", "s1", "s2", "s3"}
    assert "is a copy of" in capsys.readouterr().err


def test_the_same_content_under_two_names_is_a_suspicion(tmp_path, capsys):
    write(tmp_path / "s" / "a.png", 1)
    write(tmp_path / "s" / "c.png", 2)
    shutil.copy(tmp_path / "s" / "a.png", tmp_path / "s" / "b.png")
    assert inspect(tmp_path / "s", tmp_path / "st") == 0
    assert "SUSPECT a and b hold the same" in capsys.readouterr().err


def test_links_are_followed_and_counted_once(tmp_path, capsys):
    write(tmp_path / "disk" / "a.png", 1)
    write(tmp_path / "s" / "b.png", 2)
    (tmp_path / "s" / "a.png").symlink_to(tmp_path / "disk" / "a.png")
    (tmp_path / "s" / "again.png").symlink_to(tmp_path / "s" / "b.png")
    assert inspect(tmp_path / "s", tmp_path / "st") == 0
    assert set(rows(tmp_path / "st")) == {"a", "b"}
    assert "again.png to b.png" in capsys.readouterr().err
    (tmp_path / "way").symlink_to(tmp_path / "s", target_is_directory=True)
    annotate(tmp_path / "st")
    assert inspect(tmp_path / "way", tmp_path / "st") == 0
    assert set(rows(tmp_path / "st")) == {"a", "b"}
    assert all(row["stage"] == "I" for row in rows(tmp_path / "st").values())


def test_a_slide_that_is_another_under_the_same_name_is_said(study, tmp_path):
    write(tmp_path / "disk1" / "s0.png", 77)
    assert inspect(tmp_path / "disk1", study) == 0
    assert "another one than when it was first inspected" in rows(study)["s0"]["note"]
    assert rows(study)["s1"]["note"] == ""


@pytest.mark.parametrize("place", ["study", "deep/er/study", ""])
def test_nothing_of_a_study_is_ever_a_slide(tmp_path, place):
    for k in range(2):
        write(tmp_path / "slides" / f"s{k}.png", k)
    out = tmp_path / "slides" / place
    for _ in range(2):
        assert inspect(tmp_path / "slides", out) == 0
        assert set(rows(out)) == {"s0", "s1"}
    other = tmp_path / "other"
    assert inspect(tmp_path / "slides", other) == 0
    assert set(rows(other)) == {"s0", "s1"}
    assert main(["inspect", str(out / "qc" / "s0.jpg"), "--out", str(out), *FLAGS]) == 2


def test_two_rows_of_one_file_that_differ_are_refused(study, tmp_path, capsys):
    text = (study / "slides.csv").read_text().splitlines()
    (study / "slides.csv").write_text("\n".join([*text, text[1].replace("p0", "p9")]) + "\n")
    assert inspect(tmp_path / "disk1", study) == 2
    assert "differ in patient_id" in capsys.readouterr().err


def test_merging_is_quick_and_reads_no_slide_that_is_known(tmp_path, monkeypatch):
    """A hundred thousand slides: nothing is compared with everything."""
    known = [{"slide_id": f"s{k}", "path": f"/x/s{k}.svs", "error": "", "content": ""} for k in range(20000)]
    monkeypatch.setattr("histossl.study.identity.content_of", lambda path: pytest.fail("read"))
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    paths = [Path(row["path"]) for row in known] + [Path(f"/y/t{k}.svs") for k in range(20000)]
    found = merge(known, paths, tmp_path)
    assert len(found.rows) == 40000


def test_every_file_that_could_be_meant_is_read_or_named(tmp_path, capsys):
    folder = tmp_path / "s"
    write(folder / "a.png", 1)
    for ending in ("bmp", "jp2", "webp"):
        Image.fromarray(picture(2)).save(folder / f"{ending}.{ending}")
    unread = ["x.vsi", "x2.isyntax", "x3.sdpc", "x4.zarr", "x5.zip", "x6.svs.part", "x7.heic"]
    for name in unread:
        (folder / name).write_bytes(b"x" * 64)
    Image.fromarray(picture(3)).save(folder / "noending", "PNG")
    for name in ("._a.png", ".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt", "table.xlsx"):
        (folder / name).write_bytes(b"x" * 64)
    found = look_for_slides(folder)
    assert [path.name for path in found.slides] == ["a.png", "bmp.bmp", "jp2.jp2", "webp.webp"]
    assert sorted(path.name for path in found.passed) == sorted([*unread, "noending"])
    assert found.others == {".txt": 1, ".xlsx": 1}
    assert main(["inspect", str(folder), "--out", str(tmp_path / "st"), *FLAGS, "--mpp-default", "1"]) == 1
    assert "passed over: 8 files" in capsys.readouterr().err
    table = rows(tmp_path / "st")
    assert {name for name, row in table.items() if row["status"] == "inspected"} == {"a", "bmp", "jp2", "webp"}
    assert "convert it" in table["x"]["error"]
    assert "unfinished copy" in table["x6.svs"]["error"]
    assert "rename it" in table["noending"]["error"]


def test_sidecars_are_nobodys_features(tmp_path):
    import h5py

    from histossl.evaluate.sources import read_source
    from histossl.study.import_features import feature_files

    folder, rng = tmp_path / "f", np.random.default_rng(0)
    folder.mkdir()
    for k in range(3):
        with h5py.File(folder / f"s{k}.h5", "w") as file:
            file["features"] = rng.normal(size=(5, 4)).astype(np.float32)
        (folder / f"._s{k}.h5").write_bytes(b"\0\5\x16\7")
    (folder / "Thumbs.db").write_bytes(b"x")
    assert read_source(folder).ids == ("s0", "s1", "s2")
    assert [path.name for path in feature_files(folder)] == ["s0.h5", "s1.h5", "s2.h5"]


def test_the_site_of_a_slide_is_a_column_or_its_barcode(tmp_path):
    (tmp_path / "slides.csv").write_text(
        "slide_id,path,status,Centre\nTCGA-A2-A1FZ-01Z,t,encoded,\nb,b,encoded,Lab 1\nc,c,failed,\nd,d,encoded,lab 1 \n"
    )
    study = Study(tmp_path)
    assert sites_of(study) == ["A2", "Lab 1", "Lab 1"]
    (tmp_path / "slides.csv").write_text("slide_id,path,status,site\na,a,encoded,x\nb,b,encoded,unknown\n")
    with pytest.raises(StudyError, match=r"no site is known of 'b'.*add a column site to slides.csv"):
        sites_of(study)
    (tmp_path / "slides.csv").write_text("slide_id,path,status\na,a,encoded\n")
    with pytest.raises(StudyError, match="no site is known of 'a'"):
        sites_of(study)
