"""A wrong input costs a second: labels, encoder, device and slides are looked at before anything is made."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import read_h5ad

from histossl.cli.main import main
from histossl.core.embeddings import write_embeddings, write_labels
from histossl.evaluate.sources import read_source

GOOD = "slide_id,patient_id,grade\na,p,low\nb,q,high\n"


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        (None, [], "nosuch.csv: No such file"),
        ("name,grade\na,low\n", [], "no column slide_id among"),
        (GOOD, ["--probe.targets", "stage"], "no target 'stage'"),
        ("slide_id,grade\na,\nb,\n", [], "no label in 'grade'"),
        (GOOD, ["--encoder", "UNI"], "did you mean timm:hf-hub:MahmoodLab/UNI?"),
        (GOOD, ["--encoder", "nosuch/folder"], "no tile encoder at nosuch/folder"),
        (GOOD, ["--device", "nosuch"], "unknown device 'nosuch'"),
    ],
)
def test_wrong_inputs_make_no_study(tmp_path, capsys, text, flags, said):
    (tmp_path / "slides").mkdir()
    labels = tmp_path / "nosuch.csv"
    if text is not None:
        labels.write_text(text)
    out = tmp_path / "study"
    assert main(["run", str(tmp_path / "slides"), "--out", str(out), "--labels", str(labels), *flags]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_a_table_is_no_slide(tmp_path, capsys):
    (tmp_path / "labels.csv").write_text(GOOD)
    assert main(["run", str(tmp_path / "labels.csv"), "--out", str(tmp_path / "study")]) == 2
    assert "a table of labels goes to --labels" in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def vectors(tmp_path):
    rows = [
        {"slide_id": name, "path": "", "patient_id": known}
        for name, known in zip("abcd", ("p", "", "", ""), strict=True)
    ]
    values = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    path = tmp_path / "embeddings.h5ad"
    write_embeddings(path, rows, {"giga-ssl": values}, {}, "made")
    return path


def test_labels_go_into_the_table_of_vectors_and_may_be_corrected(vectors, tmp_path, capsys):
    labels = pd.DataFrame(
        {"grade": ["low", "high"], "age": ["50", None], "path": ["x", "y"]}, index=pd.Index(["a", "b"])
    )
    write_labels(vectors, {"b": "q", "a": "wrong", "c": "p"}, labels)
    obs = read_h5ad(vectors).obs
    assert list(obs["patient_id"]) == ["p", "q", "p", ""]
    assert list(obs["grade"].astype(object).where(obs["grade"].notna(), None)) == ["low", "high", None, None]
    assert obs["age"].iloc[0] == 50
    assert list(obs["label_path"].iloc[:2]) == ["x", "y"]
    found = read_source(vectors)
    assert found.patients == {"a": "p", "b": "q", "c": "p", "d": ""}
    assert found.lent == {"b", "c"}
    assert main(["search", str(vectors), "a"]) == 0
    said = capsys.readouterr()
    assert "the patient of 1 slides is unknown" in " ".join(said.err.split())
    assert "c" not in [line.split()[1] for line in said.out.splitlines()[1:]]  # of the same patient
    (tmp_path / "new.csv").write_text("slide_id,patient_id,label\na,p,1\nb,r,2\nc,r,1\n")
    assert main(["search", str(vectors), "a", "--labels", str(tmp_path / "new.csv")]) == 1  # no label for d
    assert "c" in [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]]
    before = read_h5ad(vectors)
    write_labels(vectors, {"b": "r"}, labels[["grade"]])
    after = read_h5ad(vectors)
    assert list(after.obs["patient_id"]) == ["p", "r", "", ""]
    assert "age" not in after.obs
    assert (after.X == before.X).all()
    assert after.uns["histossl"]["fingerprint"] == "made"


def test_a_search_says_that_no_patient_is_known(vectors, capsys):
    write_labels(vectors, {}, pd.DataFrame({"grade": ["low"]}, index=pd.Index(["a"])))
    write_embeddings(vectors, [{"slide_id": n, "path": "", "patient_id": ""} for n in "ab"], {"x": np.eye(2)}, {}, "m")
    assert main(["search", str(vectors), "a"]) == 0
    assert "no patient is known: each of these slides counts as its own patient" in " ".join(
        capsys.readouterr().err.split()
    )
