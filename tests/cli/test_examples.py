"""The examples and the tutorials do what they say, on small painted slides."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from histossl.cli.main import main
from histossl.nuclei.metrics import score
from histossl.wsi.geometry import Region
from histossl.wsi.synth import SynthSettings, nuclei_in, write_cohort, write_slide

ROOT = Path(__file__).parents[2]
TUTORIALS = [ROOT / "docs" / "tutorials" / name for name in ("giga-ssl.md", "nuclei.md")]  # the third is a notebook


def example(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_are_short():
    for path in (ROOT / "examples").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 40, path.name
        assert len(re.findall(r"^(?:import|from) ", text, re.MULTILINE)) <= 3, path.name


def test_the_example_of_giga_ssl(tmp_path, capsys):
    write_cohort(tmp_path / "cohort", slides=8, width=384, height=448, seed=3)
    run = example("giga_ssl").main
    result = run(tmp_path / "cohort" / "slides", tmp_path / "cohort" / "labels.csv", epochs=2)
    assert set(result.table["target"]) == {"composition", "lesion", "arrangement"}
    assert result.table["auroc"].between(0, 1).all()
    assert "(8 slides, 4 patients)" in capsys.readouterr().out


def test_the_example_of_nuclei(tmp_path, capsys):
    write_slide(tmp_path / "slide.tiff", settings := SynthSettings(width=256, height=288, mpp=0.5, seed=1))
    labels, size = example("nuclei").main(tmp_path / "slide.tiff", tmp_path, steps=0)
    assert size.shape == labels.shape == (288, 256)
    assert score(labels, nuclei_in(settings, Region(0, 0, 256, 288))[0]).dice > 0.5
    assert {path.name for path in tmp_path.iterdir()} == {"slide.tiff", "nuclei.geojson", "nuclei.png"}
    assert capsys.readouterr().out.startswith(f"Nuclei({labels.max()} outlines, median area ")


@pytest.fixture(scope="module")
def notebook_page():
    spec = importlib.util.spec_from_file_location("notebook_page", ROOT / ".ci" / "notebook_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kinds(outputs: list[dict]) -> list[list[str]]:
    """Of each output the kinds of data that it has."""
    return [sorted(output.get("data", {"stream": ""})) for output in outputs]


def test_the_notebook_runs_and_shows_what_it_holds(notebook_page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plt.close("all")  # figures that other tests left open are not the notebook's
    notebook = notebook_page.read()
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    found = notebook_page.run(notebook)
    for cell, outputs in zip(cells, found, strict=True):
        assert kinds(outputs) == kinds(cell["outputs"]), "run .ci/notebook_page.py"
    drawn = [output for outputs in found for output in outputs if "image/jpeg" in output.get("data", {})]
    assert len(drawn) == 3


def test_the_page_of_the_notebook_is_that_of_the_notebook(notebook_page):
    text, pictures = notebook_page.page(notebook_page.read())
    assert notebook_page.PAGE.read_text(encoding="utf-8") == text, "run .ci/notebook_page.py --page"
    assert {path.name for path in notebook_page.PAGE.parent.glob("notebook-*")} == set(pictures)
    assert all((notebook_page.PAGE.parent / name).read_bytes() == data for name, data in pictures.items())


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


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """As it stands, but for smaller tiles and a shorter training."""
    monkeypatch.chdir(tmp_path)
    write_cohort(tmp_path / "cohort", slides=20, width=384, height=448, seed=3)
    shutil.copytree("cohort/slides", "SLIDES")
    shutil.copyfile("cohort/slides/slide-001.tiff", "SLIDES/a.svs")
    shutil.copyfile("cohort/labels.csv", "labels.csv")
    [text] = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for written, quick in (("px=224", "px=64"), ("pretrain(features)", "pretrain(features, epochs=2)")):
        assert text.count(written) == 1
        text = text.replace(written, quick)
    assert len(text.splitlines()) <= 12
    exec(compile(text, "README.md", "exec"), {})
    assert "of this method" in capsys.readouterr().out
