"""The sheet of a cohort: every slide once, the suspicious ones first."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from histossl.core.errors import StudyError
from histossl.study.folder import COLUMNS, Study
from histossl.study.qc_sheet import write_sheet

COLOURS = {"few": (20, 90, 200), "many": (20, 160, 60), "noted": (160, 60, 160), "failed": (200, 200, 20)}


@pytest.fixture
def study(tmp_path) -> Study:
    study = Study(tmp_path / "study")
    about = {"few": ("3", "inspected", ""), "many": ("300", "inspected", ""), "noted": ("500", "inspected", "odd"),
             "failed": ("", "failed", "")}  # fmt: skip
    rows = []
    for name, (tiles, status, note) in about.items():
        row = dict.fromkeys(COLUMNS, "") | {"slide_id": name, "path": f"/{name}.svs", "tiles": tiles, "status": status}
        error = "no tissue:\n" + "x" * 300 if status == "failed" else ""
        rows.append(row | {"note": note, "error": error, "mpp": "1", "width": "9000", "height": "8000"})
        study.qc(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (900, 800), COLOURS[name]).save(study.qc(name), "JPEG", quality=95)
    with study.writing():
        study.write_slides(rows)
    return study


def test_all_slides_are_on_it_and_the_suspicious_ones_first(study, tmp_path):
    assert write_sheet(study, tmp_path / "sheet.png") == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    half = np.array(sheet.shape[:2]) // 2
    places = [
        (half[0] // 2, half[1] // 2 + half[1] * k) if k < 2 else (half[0] * 3 // 2, half[1] // 2 + half[1] * (k - 2))
        for k in range(4)
    ]
    for name, (y, x) in zip(("failed", "noted", "few", "many"), places, strict=True):
        assert np.abs(sheet[y - 20, x] - COLOURS[name]).max() < 12, name


def test_a_slide_without_a_picture_keeps_its_place(study, tmp_path):
    write_sheet(study, tmp_path / "before.png")
    study.qc("failed").unlink()
    write_sheet(study, tmp_path / "after.png")
    before, after = (np.asarray(Image.open(tmp_path / name)) for name in ("before.png", "after.png"))
    changed = np.argwhere((before != after).any(2))
    assert (changed.max(0) < np.array(before.shape[:2]) // 2).all()


def test_a_study_without_slides_has_no_sheet(tmp_path):
    with pytest.raises(StudyError, match="no slides"):
        write_sheet(Study(tmp_path / "none"), tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
