"""New slides from the raw file: embedded as the study was, judged by its probe; the page of the how-to does what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import histossl
from histossl.cli.main import main
from histossl.core.embeddings import read_embeddings
from histossl.encoders.patch_kmeans import PatchKMeans
from histossl.encoders.tile_encoder import load_encoder, save_encoder
from histossl.nuclei.segmenter import NucleiSegmenter
from histossl.study.export_model import export_model
from histossl.wsi.synth import write_cohort

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "apply.md"
SMALL = ["--tile.px=64", "--pretrain.epochs=2", "--pretrain.encoder.dim=8", "--pretrain.encoder.prototypes=0"]
SMALL += ["--probe.folds=2", "--probe.repeats=1", "--probe.targets=lesion", "--probe.bootstraps=100"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """STUDY and NEW_SLIDES, the slides of the study under other names."""
    folder = tmp_path_factory.mktemp("new")
    write_cohort(folder / "cohort", slides=8, width=384, height=448, seed=3)
    slides, labels = folder / "cohort" / "slides", folder / "cohort" / "labels.csv"
    (folder / "labels.csv").write_bytes(labels.read_bytes())
    run = ["run", str(slides), "--out", str(folder / "STUDY"), "--labels", str(labels), "--encoder=random"]
    assert main([*run, "--workers=1", "--device=cpu", *SMALL]) == 0
    (folder / "NEW_SLIDES").mkdir()
    for path in sorted(slides.iterdir())[:3]:
        (folder / "NEW_SLIDES" / f"new-{path.name}").write_bytes(path.read_bytes())
    return folder


def test_raw_slides_get_the_vectors_of_the_study_and_a_page(place, tmp_path, capsys):
    out = tmp_path / "NEW"
    words = ["predict", str(place / "STUDY"), str(place / "NEW_SLIDES"), "--out", str(out), "--workers=1"]
    assert main([*words, "--device=cpu"]) == 0
    assert "Not a diagnosis" in capsys.readouterr().err
    one, other = (read_embeddings(path / "embeddings.h5ad") for path in (place / "STUDY", out))
    known = one.vectors["mean pooling"][:3]
    np.testing.assert_allclose(other.vectors["mean pooling"], known, atol=1e-5)
    table = pd.read_csv(out / "predicted.csv")
    assert table["slide_id"].tolist() == list(other.slides.index)
    np.testing.assert_allclose(table["p(absent)"] + table["p(present)"], 1, atol=1e-5)
    page = (out / "predicted.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == 3
    assert "Not a diagnosis" in page
    assert all(name in page for name in table["slide_id"])
    assert not re.search(r"<script|https?://(?!www.w3.org)", page)


def test_vectors_of_another_encoder_and_other_folders_are_refused(place, tmp_path, capsys):
    other = tmp_path / "other"
    words = ["run", str(place / "cohort" / "slides"), "--out", str(other), "--encoder=random", "--workers=1"]
    assert main([*words, "--device=cpu", *SMALL, "--pretrain.seed=5"]) == 0
    assert main(["predict", str(place / "STUDY"), str(other), "--out", str(tmp_path / "x")]) == 2
    assert "another slide encoder" in " ".join(capsys.readouterr().err.split())
    assert main(["predict", str(other), str(place / "NEW_SLIDES"), "--out", str(tmp_path / "x")]) == 2
    assert "no probe is kept here" in " ".join(capsys.readouterr().err.split())
    assert main(["predict", str(place / "STUDY"), str(other), "--out", str(other)]) == 2


def test_an_exported_probe_says_the_same_and_has_a_card(place, tmp_path):
    model = tmp_path / "model"
    assert main(["export", str(place / "STUDY"), str(model), "--what", "probe"]) == 0
    assert main(["export", str(place / "STUDY"), str(model), "--what", "probe"]) == 2  # it holds something
    for name in ("STUDY", str(model)):
        words = ["predict", str(place / name), str(place / "STUDY"), "--out", str(tmp_path / f"of-{Path(name).name}")]
        assert main([*words, "--device=cpu"]) == 0
    texts = [(tmp_path / f"of-{name}" / "predicted.csv").read_bytes() for name in ("STUDY", "model")]
    assert texts[0] == texts[1]
    card = (model / "README.md").read_text(encoding="utf-8")
    assert "| lesion | giga-ssl | auroc |" in card
    assert card.count("model.safetensors") == 2
    assert "8 slides. probe/ holds names, patients, labels" in card
    assert main(["export", str(place / "STUDY"), str(tmp_path / "t"), "--what", "tile-encoder"]) == 2


def test_an_exported_slide_encoder_is_taken_by_path(place, tmp_path):
    assert main(["export", str(place / "STUDY"), str(tmp_path / "s"), "--what", "slide-encoder"]) == 0
    out = ["embed", str(place / "STUDY" / "features"), "--out", str(tmp_path / "again")]
    assert main([*out, "--weights", str(tmp_path / "s"), "--device=cpu"]) == 0
    one, other = (read_embeddings(path / "embeddings.h5ad") for path in (place / "STUDY", tmp_path / "again"))
    np.testing.assert_allclose(one.vectors["giga-ssl"], other.vectors["giga-ssl"], atol=1e-5)


def test_an_exported_tile_encoder_and_exported_nuclei_are_read_back(tmp_path):
    study, tiles = tmp_path / "study", torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    words = PatchKMeans(4)
    for buffer in words.buffers():
        buffer.normal_(generator=torch.Generator().manual_seed(1))
    save_encoder(words, study / "tile-encoder", {"tile": {"px": 64, "mpp": 1.0}})
    export_model(study, "tile-encoder", tmp_path / "t")
    one, other = (load_encoder(str(folder)) for folder in (study / "tile-encoder", tmp_path / "t"))
    np.testing.assert_array_equal(one(tiles), other(tiles))
    general = Path(histossl.__file__).parent / "nuclei" / "general"
    export_model(general, "nuclei", tmp_path / "n")
    picture = (255 * tiles[0].permute(1, 2, 0).numpy()).astype(np.uint8)
    one, other = (NucleiSegmenter.load(folder, device="cpu") for folder in (general, tmp_path / "n"))
    np.testing.assert_array_equal(one.confidence(picture, 0.5), other.confidence(picture, 0.5))


def test_the_commands_of_the_page_run_from_top_to_bottom(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    more = {"probe": SMALL[4:], "inspect": ["--tile.px=64", "--workers=1"], "encode": ["--encode.views=0"]}
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            words = [w.replace("STUDY/tile-encoder", "random") for w in shlex.split(line, comments=True)[1:]]
            words = [str(tmp_path / w) if w in ("PREDICTED", "MODEL") else w for w in words]
            if words:
                assert main([*words, *more.get(words[0], [])]) == 0, line
