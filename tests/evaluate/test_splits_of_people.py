"""Splits that name slides in other spellings, or slides that nobody knows: as labels that do."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from histossl.cli.main import main
from histossl.evaluate.columns import check_against_label
from histossl.evaluate.split_files import known_slides, read_splits

IDS = [f"s{k:03d}" for k in range(40)]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    pd.DataFrame(rng.normal(size=(40, 8))).add_prefix("f").assign(slide_id=IDS).to_csv(tmp_path / "v.csv", index=False)
    rows = "".join(f"{name},p{k},{'ab'[k % 2]}\n" for k, name in enumerate(IDS))
    (tmp_path / "t.csv").write_text("slide_id,patient_id,label\n" + rows)
    return tmp_path


def split(folder, extra: str = "", change=str) -> str:
    rows = "".join(f"{change(a)},{b}\n" for a, b in zip(IDS[:20], IDS[20:], strict=True))
    (folder / "s.csv").write_text("train,test\n" + rows + extra)
    return str(folder / "s.csv")


def test_unknown_slides_are_left_out_with_their_rows(folder, capsys):
    path = split(folder, "zzz,qqq\n")
    assert main(["audit", path, str(folder / "t.csv")]) == 1
    said = capsys.readouterr().err
    assert "2 slides of the split are absent (rows 22, 22): 'zzz', 'qqq'" in said
    flags = ["--labels", str(folder / "t.csv"), "--splits", path, "--out", str(folder / "o")]
    assert main(["probe", str(folder / "v.csv"), *flags]) == 1
    assert "'zzz', 'qqq'" in capsys.readouterr().err
    assert len(pd.read_csv(folder / "o" / "splits.csv")) == 2


def test_a_split_of_another_spelling_is_the_same_split(folder, capsys):
    known, lost = known_slides(read_splits(folder / split(folder, change=str.upper)), set(IDS))
    assert not lost
    assert known[0].on("train") == IDS[:20]
    assert main(["audit", split(folder, f",{IDS[0].upper()}\n"), str(folder / "t.csv")]) == 1
    assert "slides are on both sides" in capsys.readouterr().err


def test_suspicions_stand_at_the_end_of_an_audit(folder, capsys):
    rows = "".join(f"{n},p{k},{'xy'[k >= 20]},{'ab'[k >= 20]},{'0.25' if k else '0.5'}\n" for k, n in enumerate(IDS))
    (folder / "t.csv").write_text("slide_id,patient_id,site,label,mpp\n" + rows)
    assert main(["audit", split(folder), str(folder / "t.csv")]) == 0
    said = capsys.readouterr().err
    assert "SUSPECT all 20 slides of label 'a' are of one site, 'x'" in said
    assert "SUSPECT labels of label follow the order of the rows" in said
    assert "SUSPECT mpp jumps" in said


def test_different_numbers_are_no_label_of_themselves():
    rng = np.random.default_rng(0)
    truth, noise = rng.normal(size=40), rng.normal(size=(40, 3))
    assert check_against_label("v", list("abc"), noise, truth, "t", False) == []
