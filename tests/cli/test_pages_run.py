"""Every command of the pages runs, in a folder where what the pages name is there: small painted slides.

What needs a network, a cluster or somebody else's files is in LEFT with its reason, and only understood by the parser.
The tutorials are no collections of commands but go from top to bottom: test_examples.py runs them so.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import uvicorn
from PIL import Image

from cli.test_pages import PAGES, ROOT, commands
from histossl.cli.commands import COMMANDS
from histossl.cli.main import main

ALL = [*(path for path in PAGES if path.parent.name != "tutorials"), ROOT / "README.md"]
LEFT = {
    "hf:": "is fetched from Hugging Face; tests/core/test_hub.py has a server of its own",
    "--to OWNER/NAME": "is put on Hugging Face; tests/core/test_hub.py has a server of its own",
    "--scheduler": "needs a Dask cluster; tests/execution/test_cluster.py",
    "--slurm": "needs SLURM; tests/execution/test_cluster.py",
    "gigassl.pth": "the authors' checkpoint; tests/gigassl/test_published.py makes one",
    "TCGA_encoded_t5e1000": "the authors' vectors; tests/evaluate/test_given_splits.py",
    "features_moco_scm.npy": "the authors' vectors; tests/evaluate/test_given_splits.py",
    "/slides --out /out": "inside of a container",
    "--browser true": "opens a browser",
}
# What makes the commands of a page quick on tiny slides, where the page does not choose otherwise.
TRAINING = ["--pretrain.epochs=2", "--embed.views=2"]
TILES = ["--tile.px=64"]
ENCODING = ["--encode.views=2", "--encode.tiles=16", "--tile-encoder.joint.words.tiles=64"]
PROBING = ["--probe.repeats=1", "--probe.bootstraps=100", "--probe.folds=2"]
LEARNING = ["--self-training.steps=2"]
QUICK = {
    "run": [*TILES, *ENCODING, *TRAINING, *PROBING, "--workers=1", "--mpp-default=1"],
    "inspect": [*TILES, "--workers=1"],
    "encode": [*ENCODING, "--workers=1"],
    "encoder pretrain": [ENCODING[-1], "--workers=1"],
    "pretrain": TRAINING,
    "embed": ["--embed.views=2"],
    "probe": PROBING,
    "sites": PROBING,
    "heatmap": PROBING,
    "predict": ["--workers=1"],
    "nuclei train": LEARNING,
    "nuclei segment": [*LEARNING, "--adapting.steps=2", "--workers=1"],
}
# A line -> the one that its page has in mind to have run before.
BEFORE = {
    "--config run.yaml": "config run --dump run.yaml",
    "--probe.area tumour": "run SLIDES --out STUDY --areas AREAS --area.each",
    "encode NEW": "inspect NEW_SLIDES --out NEW",
    "embed NEW --weights": "encode NEW --encoder STUDY/tile-encoder",
    "NEW --out PREDICTED": "embed NEW --weights STUDY/slide-encoder",
    "predict MODEL": "export STUDY MODEL --what probe",
    "export STUDY MODEL": "probe STUDY --labels labels.csv --probe.targets grade",
    "predict STUDY": "probe STUDY --labels labels.csv --probe.targets grade",
    "NEW_B --out NEW_STUDY": "pretrain FEATURES_A FEATURES_B --out STUDY",
    "--areas NEW_AREAS": "run SLIDES --out STUDY --areas AREAS --labels labels.csv --probe.targets grade",
    "encode STUDY --areas": "inspect SLIDES --out STUDY",
    "encode study": "inspect lymphoma/slides --out study --mpp-default 0.5",
    "encode painted": "inspect cohort/slides --out painted",
}


# A part of a line -> a table, and the columns that its page has somebody write into it before.
WRITTEN = {
    "--probe.combine weight": ("labels.csv", {"weight": 1.5}),
    "--probe.combine stain=HE": ("labels.csv", {"stain": "HE"}),
    "--labels STUDY/slides.csv": ("STUDY/slides.csv", {"grade": ["low", "high"] * 6}),
}


def lines() -> list[tuple[str, str]]:
    """(page, command) in the order of the pages, each command once a page."""
    found = []
    for page in ALL:
        for line in commands(page.read_text(encoding="utf-8")):
            if not re.search(r"\||\.\.\.|COMMAND", line):
                found += [(page.stem, part.strip()) for part in re.split(r"&&|&$", line) if part.strip()]
    return list(dict.fromkeys((page, " ".join(re.sub(r"\[--.*?\]", "", line).split())) for page, line in found))


def words_of(line: str) -> list[str]:
    words = shlex.split(line, comments=True)[1:]
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    given = " ".join(words)
    return [*words, *(flag for flag in QUICK.get(name, []) if flag.partition("=")[0] not in given)]


def left(line: str) -> bool:
    return any(part in line for part in LEFT)


def test_each_reason_to_leave_a_command_out_is_needed():
    every = [line for _, line in lines()]
    for part in LEFT:
        assert any(part in line for line in every), part
    assert sum(not left(line) for line in every) > 80


def run(line: str) -> int:
    return main(words_of(line if line.startswith("histossl ") else f"histossl {line}"))


def paint(folder: Path) -> None:
    """Everything that the pages name: slides, tables, features, areas, arrays, truths."""
    assert run("synth cohort --slides 15 --width 384 --height 384 --seed 3 --truth true") == 0
    for name in ("SLIDES", "NEW_SLIDES", "TRUTH", "AREAS", "NEW_AREAS", "ARRAYS", "lymphoma/slides", "SPLITS"):
        (folder / name).mkdir(parents=True)
    grades, rows = ["low", "high"] * 6, []
    for k, slide in enumerate(sorted((folder / "cohort" / "slides").iterdir())):
        into = folder / ("SLIDES" if k < 12 else "NEW_SLIDES")
        shutil.copyfile(slide, into / f"slide-{k + 1}.tiff")
        corners = [
            [[0, 0], [190, 0], [190, 380], [0, 380], [0, 0]],
            [[192, 0], [380, 0], [380, 380], [192, 380], [192, 0]],
        ]
        shapes = [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"classification": {"name": name}},
            }
            for ring, name in zip(corners, ("tumour", "stroma"), strict=True)
        ]
        text = json.dumps({"type": "FeatureCollection", "features": shapes})
        (folder / ("AREAS" if k < 12 else "NEW_AREAS") / f"slide-{k + 1}.geojson").write_text(text)
        if k < 12:
            rows.append([f"slide-{k + 1}", f"p{k}", "ab"[k // 6], grades[k], 6.0 * (k + 1), 1 - k % 3 // 2])
            Image.fromarray(tifffile.imread(slide)[:256, :256]).save(
                folder / "lymphoma" / "slides" / f"slide-{k + 1}.png"
            )
    for truth in (folder / "cohort" / "truth").iterdir():
        number = int(re.search(r"\d+", truth.name)[0])
        if number <= 12:
            shutil.copyfile(truth, folder / "TRUTH" / re.sub(r"slide-\d+", f"slide-{number}", truth.name))
    table = pd.DataFrame(rows, columns=["slide_id", "patient_id", "site", "grade", "os_months", "os_event"])
    table.drop(columns=["os_months", "os_event"]).to_csv("labels.csv", index=False)
    table.drop(columns=["grade", "site"]).assign(followup=table.os_months, relapsed=table.os_event).to_csv(
        "clinic.csv", index=False
    )
    shutil.copyfile("labels.csv", "lymphoma/labels.csv")
    shutil.copyfile("labels.csv", "TABLE")
    half = [f"slide-{k}" for k in range(1, 13)]
    pd.DataFrame({"train": half[:6], "test": half[6:]}).to_csv("SPLITS/split-0.csv", index=False)
    tissue = tifffile.imread(folder / "SLIDES" / "slide-1.tiff")
    array = np.full((900, 1300, 3), 240, np.uint8)
    rows_, columns_ = np.mgrid[:300, :300]
    disc = (rows_ - 150) ** 2 + (columns_ - 150) ** 2 < 140**2
    for i in range(2):
        for j in range(3):
            array[60 + 400 * i : 360 + 400 * i, 60 + 400 * j : 360 + 400 * j][disc] = tissue[40:340, 40:340][disc]
    Image.fromarray(array).save(folder / "ARRAYS" / "array.png")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a finished study and what else the pages begin with; tests work in copies of it."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        paint(folder)
        assert run("run SLIDES --out STUDY --labels labels.csv --probe.targets grade") == 0
        for name in ("STUDY_A", "STUDY_B", "OTHER_STUDY"):
            shutil.copytree("STUDY", name)
        for name in ("FEATURES", "FEATURES_A", "FEATURES_B"):
            shutil.copytree("STUDY/features", name)
        shutil.copytree("STUDY/features", "trident_processed/20x_256px_0px_overlap/features_uni_v2")
        assert run("inspect NEW_SLIDES --out NEW") == run("encode NEW --encoder STUDY/tile-encoder") == 0
        for name in ("NEW_A", "NEW_B"):
            shutil.copytree("NEW/features", name)
        shutil.copyfile("STUDY/embeddings.h5ad", "A.h5ad")
        shutil.copyfile("STUDY/embeddings.h5ad", "B.h5ad")
        import histossl as hs

        vectors = hs.read_embeddings("STUDY")
        frame = pd.DataFrame(
            np.asarray(vectors.X), index=vectors.obs_names, columns=[f"v{k}" for k in range(vectors.n_vars)]
        )
        frame.rename_axis("slide_id").to_csv("vectors.csv")
        assert run("nuclei segment SLIDES --out FOUND --model prior") == 0
        shutil.copytree("SLIDES", "IMAGES")
        shutil.copytree("SLIDES", "IMAGES_OR_SLIDES")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", sorted({page for page, _ in lines()}))
def test_every_command_of_a_page_runs(world, tmp_path, monkeypatch, capsys, page):
    monkeypatch.setattr(uvicorn.Server, "run", lambda *given, **more: None)  # which would wait for a reader
    wrong = {}
    for k, line in enumerate(line for where, line in lines() if where == page and not left(line)):
        place = tmp_path / str(k)
        shutil.copytree(world, place)
        monkeypatch.chdir(place)
        line = re.sub(r"\bSLIDE\b", "slide-1", line)
        if line.startswith(("histossl nuclei segment", "histossl nuclei train")):  # four slides say as much as twelve
            for slide in (path for folder in ("SLIDES", "IMAGES_OR_SLIDES") for path in Path(folder).iterdir()):
                if int(slide.stem.partition("-")[2]) > 4:
                    slide.unlink()
        for part, (table, columns) in WRITTEN.items():
            if part in line:
                pd.read_csv(table, dtype=str).assign(**columns).to_csv(table, index=False)
        before = [first for part, first in BEFORE.items() if part in line]
        for first in [*([BEFORE["predict STUDY"]] if "MODEL" in line else []), *before, line]:
            _make_room(first)
            capsys.readouterr()
            if run(first):
                wrong[f"{line} ({first})"] = capsys.readouterr().err[-400:]
                break
        shutil.rmtree(place)
    assert not wrong


def _make_room(line: str) -> None:
    """Remove what a command will make; studies that a page calls otherwise are those of the world."""
    words = shlex.split(line, comments=True)
    made = (
        words[words.index("--out") + 1] if "--out" in words else words[words.index("-o") + 1] if "-o" in words else ""
    )
    if made and "sites" not in words and "probe" not in words and Path(made).exists():
        shutil.rmtree(made)
    for name in ("study", "painted"):
        if name in words and name != made and not Path(name).exists():
            shutil.copytree("STUDY", name)
