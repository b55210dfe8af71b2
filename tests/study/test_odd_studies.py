"""Studies with odd files in them: every command ends with a reason, none with a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import uvicorn

from histossl.cli.main import main
from support.viewed import folder  # noqa: F401 - a fixture


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(study: Path) -> None:
        path = study / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


HEAD = "slide_id,path,mpp,tiles,status\n"
DEEP = "[" * 200_000
LONG = "x" * 200_000
PROBE = {"table": [], "numbers": [], "audit": [], "complaints": [], "method": ""}
ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "predictions without target": (text("predictions.csv", "slide_id,truth\nslide-0,a\n"), "predictions.csv"),
    "predictions without slides": (text("predictions.csv", "target,truth\nkind,a\n"), "predictions.csv"),
    "a field of 200 kB in predictions": (text("predictions.csv", f"slide_id,target\nslide-0,{LONG}\n"), "predictions"),
    "a NUL in predictions": (text("predictions.csv", b"slide_id,target\nslide-0,\0\n"), ""),
    "a list of settings": (text("settings.json", "[]"), "settings.json"),
    "settings of a list": (text("settings.json", '{"inspect": [1]}'), "settings.json"),
    "deep settings": (text("settings.json", DEEP), "settings.json"),
    "settings not UTF-8": (text("settings.json", b'{"a": "\xff\xfe"}'), "settings.json"),
    "a broken probe": (text("probe.json", "{"), "probe.json"),
    "a probe of a list": (text("probe.json", "[1, 2]"), "probe.json"),
    "a probe without a table": (text("probe.json", "{}"), "probe.json"),
    "a probe with odd rows": (text("probe.json", json.dumps(PROBE | {"table": [{"target": 1}]})), "probe.json"),
    "a probe with text for numbers": (text("probe.json", json.dumps(PROBE | {"table": [dict.fromkeys(
        ("target", "embedding", "n_labelled", "n_classes", "auroc", "balanced_accuracy", "low", "high",
         "difference_low", "difference_high"), "x")]})), "probe.json"),
    "a deep probe": (text("probe.json", DEEP), "probe.json"),
    "a field of 200 kB in slides": (text("slides.csv", f"{HEAD}a,{LONG},1,1,new\n"), "slides.csv"),
    "slides without ids": (text("slides.csv", "path\n/a.svs\n"), "slides.csv"),
    "slides with odd numbers": (
        text("slides.csv", f"{HEAD}a,/a.svs,many,-1e9,encoded\nb,/b.svs,nan,²,inspected\n"), ""),
    "empty slides": (text("slides.csv", ""), "slides.csv"),
    "vectors that are none": (text("embeddings.h5ad", b"\x89HDF\r\n\x1a\nnothing"), "embeddings.h5ad"),
    "a training log of text": (text("logs/pretrain/log.csv", b"\xff\xfe\0\0"), "log.csv"),
    "a log of other things": (text("log.jsonl", '[1]\n{"time": 1, "stage": [], "seconds": "x"}\n{"row": 3}\n'
        '{"time": "x", "stage": "encode", "row": {"status": "encoded"}}\n{"row": {"a": 1}, "path": []}\n'), ""),
    "deep lines in the log": (text("log.jsonl", DEEP + "\n"), ""),
    "claims of other things": (text(".claims/0.0001", '{"name": 1, "host": [], "pid": "x"}'), ""),
    "deep nuclei": (text("nuclei/slide-0.geojson", DEEP), ""),
    "a table of nuclei that is none": (text("nuclei/nuclei.csv", f"file\n{LONG}\n"), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_commands_say_what_is_wrong(folder, tmp_path, monkeypatch, capsys, name):  # noqa: F811
    monkeypatch.setattr(uvicorn.Server, "run", lambda *given, **more: None)
    study = tmp_path / "study"
    shutil.copytree(folder, study)
    change, blamed = ODD[name]
    change(study)
    told, failed = "", []
    for command in ("status", "view", "report", "embed", "encode"):
        flags = ["--encoder=random", "--device=cpu", "--workers=1"] if command == "encode" else []
        code = main([command, str(study), *flags, *(["--device=cpu"] if command == "embed" else [])])
        assert code in (0, 1, 2)
        screen = capsys.readouterr()
        failed += [command] if code == 2 else []
        told += screen.err.replace("\n", "")
    assert blamed in told
    if blamed:
        assert failed


def test_encode_of_a_study_without_settings_says_what_to_run(tmp_path, capsys):
    (tmp_path / "slides.csv").write_text(f"{HEAD}a,/a.svs,0.5,10,inspected\n")
    assert main(["encode", str(tmp_path), "--encoder=random", "--device=cpu", "--workers=1"]) == 2
    assert "run `histossl inspect SLIDES --out`" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("content", [
    DEEP, "{", '{"features": [1]}', '{"features": [{"geometry": {"type": "Polygon"}}]}',
    '{"features": [{"geometry": {"type": "Polygon", "coordinates": "x"}}]}', "7"])  # fmt: skip
def test_score_says_which_geojson_is_none(tmp_path, capsys, content):
    (tmp_path / "a.geojson").write_text(content)
    assert main(["nuclei", "score", str(tmp_path / "a.geojson"), str(tmp_path / "a.geojson")]) == 2
    assert "a.geojson" in capsys.readouterr().err


@pytest.mark.parametrize("vectors", ["circle", "external"])
def test_probe_of_odd_vectors_names_the_file(folder, tmp_path, capsys, vectors):  # noqa: F811
    import h5py

    shutil.copytree(folder, tmp_path / "study")
    with h5py.File(tmp_path / "study" / "embeddings.h5ad", "a") as file:
        link = h5py.ExternalLink("/etc/passwd", "/") if vectors == "external" else h5py.SoftLink("/uns/circle")
        file["uns/circle"] = link
    labels = tmp_path / "labels.csv"
    labels.write_text("slide_id,label\n" + "".join(f"slide-{k},{k % 2}\n" for k in range(5)))
    assert main(["probe", str(tmp_path / "study"), "--labels", str(labels)]) == 2
    assert "embeddings.h5ad" in capsys.readouterr().err.replace("\n", "")
