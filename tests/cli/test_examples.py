"""The examples and the tutorials do what they say, on small painted slides."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from histossl.cli.main import main
from histossl.nuclei.metrics import score
from histossl.wsi.geometry import Region
from histossl.wsi.synth import SynthSettings, nuclei_in, paint_region, write_cohort

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))


def example(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_are_short():
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 80, path.name


def test_the_example_of_giga_ssl(tmp_path, capsys):
    write_cohort(tmp_path / "cohort", slides=8, width=384, height=448, seed=3)
    run = example("giga_ssl").main
    scores = run(tmp_path / "cohort" / "slides", tmp_path / "cohort" / "labels.csv", tmp_path / "study", epochs=2)
    assert set(scores) == {"composition", "lesion", "arrangement"}
    assert all(0 <= share <= 1 for share in scores.values())
    assert "8 slides of 4 patients" in capsys.readouterr().out
    assert (tmp_path / "study" / "report.html").exists()


def test_the_example_of_nuclei(tmp_path):
    pytest.importorskip("pyarrow")
    settings, region = SynthSettings(mpp=0.5, seed=1), Region(1000, 1000, 256, 256)
    labels = example("nuclei").main(paint_region(settings, region), 0.5, tmp_path / "found", steps=0)
    assert score(labels, nuclei_in(settings, region)[0]).dice > 0.5
    assert {path.suffix for path in (tmp_path / "found").iterdir()} == {".geojson", ".parquet", ".jpg"}


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_run_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in blocks} == {"sh", "python"}
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, f"{path.name}:python", "exec"), names)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[1] != "view":  # which would wait for a reader
                assert words[0] == "histossl"
                assert main(words[1:]) == 0, line
    shown = [value for value in names.values() if isinstance(value, np.ndarray)]
    assert shown, "the tutorial came to no result"
