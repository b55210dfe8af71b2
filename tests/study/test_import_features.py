"""Training from features that other tools made: every layout gives the same study; bad files are left out and named."""

from __future__ import annotations

import csv
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from histossl.cli.main import main
from histossl.core import fingerprints
from histossl.core.embeddings import read_embeddings
from histossl.core.errors import FileFormatError, SettingsError, StudyError
from histossl.execution.workers import SerialExecutor
from histossl.gigassl.slide_sources import SlideSource, plain_tiles
from histossl.study.folder import Study
from histossl.study.import_features import feature_files, import_features
from histossl.study.import_file import FeatureOrigin
from histossl.wsi import tile_files
from support.features import FAST, IJ, features, trident, write_h5


def clam(folder: Path, name: str, attributes: bool = False, pt: bool = False):
    about = {"patch_size": 256, "patch_level": 1, "downsample": np.array([2.0, 2.0])} if attributes else {}
    write_h5(folder / "h5_files" / f"{name}.h5", features(name), IJ[:, ::-1] * 512 + [300, 812], about, {})
    if pt:
        (folder / "pt_files").mkdir(exist_ok=True)
        torch.save(torch.from_numpy(features(name)), folder / "pt_files" / f"{name}.pt")


def stamp(folder: Path, name: str):
    top = {"unit": "um", "tile_size_um": 128.0, "tile_size_px": 224, "extractor": "x"}
    coords = (IJ[:, ::-1] * 128 + [75, 203]).astype(np.float32)
    write_h5(folder / f"{name}.h5", features(name).astype(np.float16), coords, {}, top, "feats")


def rows_of(study: Path) -> dict[str, dict[str, str]]:
    with (study / "slides.csv").open() as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def adopted(tmp_path: Path, folder: Path, name: str = "study", **more) -> tuple[int, Study]:
    study = Study(tmp_path / name)
    with study.lock():
        return import_features(study, FeatureOrigin(folder, **more), True, SerialExecutor()), study


@pytest.mark.parametrize("layout", ["trident", "clam", "clam-pt", "stamp", "stamp in µm"])
def test_every_layout_gives_the_same_map_of_tiles(tmp_path, layout):
    folder, more = tmp_path / "in", {}
    if layout == "trident":
        trident(folder, "a b")
    elif layout == "clam":
        clam(folder, "a b", attributes=True)
    elif layout == "clam-pt":
        clam(folder, "a b", pt=True)
        folder, more = folder / "pt_files", {"stride": 512.0}
    else:
        stamp(folder, "a b")
        more = {} if "µm" in layout else {"mpp": 0.25}
    failed, study = adopted(tmp_path, folder, **more)
    assert failed == 0
    values, positions = plain_tiles(study.features("a b"))
    np.testing.assert_allclose(values, features("a b"), atol=2e-3)
    np.testing.assert_array_equal(np.floor(positions) - np.floor(positions[0]), IJ)
    shown, places = SlideSource("a b", study.features("a b"), study.views("a b")).load()
    assert (shown.dtype, shown.shape) == (np.float16, (1, 40, 24))
    np.testing.assert_array_equal(places[0], positions)
    tiles = tile_files.read_tiles_of(study.features("a b"))
    um = "µm" in layout
    assert (tiles.stride, tiles.extent) == ((128, 128) if um else (512, 512))
    np.testing.assert_array_equal(tiles.xy[0], [75, 203] if um else [300, 812])
    assert rows_of(study.folder)["a b"]["mpp"] == ("0.25" if layout in ("trident", "stamp") else "")


def test_a_study_of_ours_is_a_folder_of_features_too(tmp_path, monkeypatch):
    trident(tmp_path / "in", "s", stride_level0=512.5, extent_level0=512.5)
    _, first = adopted(tmp_path, tmp_path / "in", "first")
    # Its features are links to those of another tool. Of a stranger's study they would lead to any file of the reader.
    row, _ = adopted(tmp_path, first.folder, "refused")
    assert row == 1
    monkeypatch.setenv("HISTOSSL_LINKS", str(tmp_path / "in"))
    _, second = adopted(tmp_path, first.folder, "second")
    np.testing.assert_array_equal(plain_tiles(second.features("s"))[0], features("s"))
    assert tile_files.read_tiles_of(second.features("s")).stride == 512.5


def test_from_a_folder_of_features_to_vectors_a_probe_and_a_report(tmp_path, capsys):
    folder, study = tmp_path / "in", tmp_path / "study"
    for k in range(8):
        trident(folder, f"s{k}")
    command = ["pretrain", str(folder), "--out", str(study), *FAST]
    assert main(command) == 0
    made = (study / "embeddings.h5ad").read_bytes()
    found = read_embeddings(study / "embeddings.h5ad")
    assert list(found.slides.index) == [f"s{k}" for k in range(8)]
    assert found.vectors["giga-ssl"].shape == (8, 8 + 24)
    assert found.slides["mpp"].tolist() == [0.25] * 8
    assert main(command) == 0  # again: all of it stands
    assert (study / "embeddings.h5ad").read_bytes() == made
    (tmp_path / "l.csv").write_text("slide_id,label\n" + "".join(f"s{k},{k % 2}\n" for k in range(8)))
    flags = ["--labels", str(tmp_path / "l.csv"), "--probe.folds=2", "--probe.bootstraps=100", "--probe.repeats=1"]
    assert main(["probe", str(study), *flags]) == 0
    assert main(["report", str(study)]) == 0
    assert "s7" in (study / "report.html").read_text()
    assert main([*command, "--stride", "256"]) == 2
    assert "stride: None -> 256" in capsys.readouterr().err


BAD = {
    "nan": (lambda f: trident(f, "bad", np.where(np.arange(24) == 3, np.nan, features("bad"))), "40 features are not"),
    "infinite in float32": (lambda f: trident(f, "bad", features("bad").astype(np.float64) * 1e300), "not finite"),
    "no tiles": (lambda f: trident(f, "bad", np.zeros((0, 24), np.float32), np.zeros((0, 2))), "holds no tiles"),
    "another encoder": (lambda f: trident(f, "bad", features("bad", 32)), "features of 32 numbers among others of 24"),
    "a place too few": (lambda f: trident(f, "bad", xy=IJ[:39] * 512), "40 features but 39 coords"),
    "no unit": (lambda f: trident(f, "bad", patch_size_level0=None), "lie 512 apart; give --stride"),
    "coords of a level": (lambda f: trident(f, "bad", xy=IJ * 128), "should lie 512 apart and lie 128 apart"),
    "a stride too small": (lambda f: trident(f, "bad", patch_size_level0=128), "no two lie nearer than 512"),
    "outside": (lambda f: trident(f, "bad", level0_width=3000), "outside of the slide of 3000 x 7000"),
    "far below zero": (lambda f: trident(f, "bad", xy=IJ * 512 - 5000), "outside of the slide"),
    "one place": (lambda f: trident(f, "bad", xy=IJ * 0), "all 40 tiles have the same coordinates"),
    "one feature": (lambda f: trident(f, "bad", features("bad") * 0), "the features of all 40 tiles are the same"),
    "text": (lambda f: trident(f, "bad", np.full((40, 24), b"x")), "no numbers"),
    "coords not finite": (
        lambda f: write_h5(f / "bad.h5", features("bad"), IJ * np.nan, {"patch_size_level0": 512}, {}),
        "coords of float64 are no numbers, or not finite",
    ),
    "four dimensions": (lambda f: trident(f, "bad", np.zeros((2, 40, 24))), "shape (2, 40, 24)"),
    "cut short": (lambda f: (f / "bad.h5").write_bytes(b"\x89HDF\r\n\x1a\n1234"), "not a readable HDF5 file"),
    "a tensor": (lambda f: torch.save(torch.ones(4, 24), f / "bad.pt"), "no coordinates"),
    "no features": (lambda f: write_h5(f / "bad.h5", np.ones(3), None, {}, {}, "x"), "coords and features are needed"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_left_out_and_named_and_the_others_go_on(tmp_path, what):
    write, complaint = BAD[what]
    for name in ("one", "two"):
        trident(tmp_path / "in", name)
    write(tmp_path / "in")
    failed, study = adopted(tmp_path, tmp_path / "in")
    rows = rows_of(study.folder)
    assert failed == 1
    assert {name: row["status"] for name, row in rows.items()} == {"bad": "failed", "one": "encoded", "two": "encoded"}
    assert complaint in rows["bad"]["error"]
    assert "bad" in rows["bad"]["error"]


ODD = {
    "(1, N, D)": lambda f: trident(f, "odd", features("odd")[None]),
    "float16": lambda f: trident(f, "odd", features("odd").astype(np.float16)),
    "float64": lambda f: trident(f, "odd", features("odd").astype(np.float64)),
    "twice": lambda f: trident(f, "odd", xy=np.where(np.arange(40)[:, None] < 2, 512, IJ[:, ::-1] * 512)),
    "over the edge": lambda f: trident(f, "odd", xy=IJ[:, ::-1] * 512 - 100),
}


@pytest.mark.parametrize("what", ODD)
def test_what_is_odd_but_clear_is_taken(tmp_path, what):
    trident(tmp_path / "in", "one")
    ODD[what](tmp_path / "in")
    failed, study = adopted(tmp_path, tmp_path / "in")
    assert failed == 0
    values, positions = plain_tiles(study.features("odd"))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, features("odd"), atol=4e-3)
    assert positions.shape == (40, 2)


def test_large_features_are_not_squeezed_into_16_bits(tmp_path):
    trident(tmp_path / "in", "large", features("large") * 1e6)
    _, study = adopted(tmp_path, tmp_path / "in")
    shown, _ = SlideSource("large", study.features("large"), study.views("large")).load()
    np.testing.assert_array_equal(shown[0], features("large") * np.float32(1e6))


def test_what_users_wrote_stays_and_what_changed_is_read_anew(tmp_path):
    for name in ("a", "b"):
        stamp(tmp_path / "in", name)
    _, study = adopted(tmp_path, tmp_path / "in")
    before = {name: fingerprints.fingerprint_of(study.features(name)) for name in "ab"}
    rows = study.slides()
    rows[0] |= {"mpp": "0.25", "patient_id": "p"}
    study.write_slides(rows)
    _, study = adopted(tmp_path, tmp_path / "in")
    assert study.slides()[0]["patient_id"] == "p"
    assert tile_files.read_tiles_of(study.features("a")).stride == 512
    assert fingerprints.fingerprint_of(study.features("a")) != before["a"]
    assert fingerprints.fingerprint_of(study.features("b")) == before["b"]
    (tmp_path / "in" / "b.h5").unlink()
    failed, study = adopted(tmp_path, tmp_path / "in")
    assert failed == 1
    assert "no longer there" in rows_of(study.folder)["b"]["error"]
    (tmp_path / "in" / "a.h5").rename(tmp_path / "gone.h5")
    with pytest.raises(FileFormatError, match=r"in/a\.h5, which cannot be read; put it back"):
        plain_tiles(study.features("a"))


def test_the_user_s_stride_overrides_the_file_s_but_not_the_data(tmp_path):
    trident(tmp_path / "in", "s", patch_size_level0=128)
    assert adopted(tmp_path, tmp_path / "in", stride=512.0)[0] == 0
    assert adopted(tmp_path, tmp_path / "in", "other", stride=2048.0)[0] == 1


def test_tensors_without_places_train_an_encoder_that_asks_for_none(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / "in").mkdir(exist_ok=True)
        torch.save(torch.from_numpy(features(name)), tmp_path / "in" / f"{name}.pt")
    command = ["pretrain", str(tmp_path / "in"), "--out", str(tmp_path / "study"), *FAST]
    assert main(command) == 2  # no slide is left
    assert main([*command, "--pretrain.encoder.arch", "attention", "--pretrain.view.windows=0"]) == 0
    assert len(read_embeddings(tmp_path / "study" / "embeddings.h5ad").slides) == 3


def test_what_cannot_be_trained_on_is_said(tmp_path, capsys):
    trident(tmp_path / "one", "a")
    out = ["--out", str(tmp_path / "s"), *FAST]
    assert main(["pretrain", str(tmp_path / "one"), *out]) == 2
    assert "two or more" in capsys.readouterr().err
    assert main(["pretrain", str(tmp_path / "one"), *FAST]) == 2
    assert "--out" in capsys.readouterr().err
    with pytest.raises(StudyError, match=r"no \.h5 or \.pt"):
        feature_files(tmp_path)
    with pytest.raises(SettingsError, match="--mpp"):
        FeatureOrigin(tmp_path, mpp=-1)
    trident(tmp_path / "one", "b", features("b", 32))
    with pytest.raises(FileFormatError, match="two encoders"):
        adopted(tmp_path, tmp_path / "one", "t")
    study = Study(tmp_path / "slides")
    (study.folder / "settings.json").write_text(json.dumps({"inspect": {}}))
    with pytest.raises(StudyError, match="made from slides"):
        import_features(study, FeatureOrigin(tmp_path / "one"), True, SerialExecutor())


def test_a_bad_file_costs_the_exit_code_and_nothing_else(tmp_path, capsys):
    for k in range(3):
        trident(tmp_path / "in", f"s{k}")
    (tmp_path / "in" / "bad.h5").write_text("no")
    assert main(["pretrain", str(tmp_path / "in"), "--out", str(tmp_path / "s"), *FAST]) == 1
    assert "bad.h5" in capsys.readouterr().err
    assert len(read_embeddings(tmp_path / "s" / "embeddings.h5ad").slides) == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_is_no_fault_of_a_file(tmp_path, monkeypatch, number):
    def full(job: object) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.h5").touch()
    monkeypatch.setattr("histossl.study.import_features.import_file", full)
    with pytest.raises(OSError, match=os.strerror(number)):
        adopted(tmp_path, tmp_path / "one")
    assert not Study(tmp_path / "study").slides()
