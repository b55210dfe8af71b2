"""Outputs of `nuclei segment` never replace an input, nor a file that no run has written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histossl.cli.main import main
from histossl.core.errors import SettingsError
from histossl.nuclei.outputs import inputs_beside, refuse_to_replace


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(180, 255, (64, 80, 3), np.uint8)).save(tmp_path / f"{name}.tif")
    return tmp_path


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("how", ["the folder", "by a link", "its files"])
def test_outputs_among_the_inputs_are_refused_before_anything_is_read(folder, tmp_path_factory, capsys, how):
    before, out, inputs = bytes_of(folder), folder, [folder]
    if how == "by a link":
        out = tmp_path_factory.mktemp("links") / "here"
        out.symlink_to(folder)
    if how == "its files":
        inputs = sorted(folder.glob("*.tif"))
    assert main(["nuclei", "segment", *map(str, inputs), "-o", str(out), "--model", "prior", "--mpp-default=0.5"]) == 2
    assert bytes_of(folder) == before
    assert "choose" in capsys.readouterr().err


def test_an_input_is_known_by_its_inode_whatever_its_name(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    os.link(folder / "a.tif", out / "b.tif")
    with pytest.raises(SettingsError, match="over the input"):
        refuse_to_replace(sorted(folder.glob("*.tif")), out, [{"slide_id": "b"}])


def test_a_file_that_no_run_has_written_stays(folder, tmp_path_factory, capsys):
    out = tmp_path_factory.mktemp("out")
    (out / "a.geojson").write_text("drawn by hand")
    flags = ["--model", "prior", "--mpp-default=0.5", "--workers=1"]
    assert main(["nuclei", "segment", str(folder), "-o", str(out), *flags]) == 2
    assert bytes_of(out) == {"a.geojson": b"drawn by hand"}
    assert "a.geojson: is there already" in capsys.readouterr().err.replace("\n", "")


def test_files_of_an_earlier_run_are_replaced_and_a_subfolder_is_no_input(folder):
    out = folder / "nuclei"
    out.mkdir()
    Image.new("RGB", (8, 8)).save(out / "a.tif")
    files = sorted(folder.rglob("*.tif"))
    assert inputs_beside(files, [folder], out) == [folder / "a.tif", folder / "b.tif"]
    assert inputs_beside(files, [folder, out / "a.tif"], out) == files  # named by the user
    refuse_to_replace([folder / "a.tif"], out, [{"slide_id": "a"}])
