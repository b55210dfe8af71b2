"""What Giga-SSL's authors publish goes into the probe: arrays, dictionaries, tables, splits; scored as they score."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from histossl.cli.main import main
from histossl.core.errors import FileFormatError
from histossl.evaluate.sources import read_source

NAMES = [f"TCGA-{k // 2 % 9:02d}-{k // 2:04d}-01Z-00-DX{k % 2 + 1}" for k in range(60)]
RNG = np.random.default_rng(0)
CLASSES = np.array(["a", "b", "c"])[np.arange(60) // 2 % 3]
VECTORS = (RNG.normal(size=(60, 5)) * [1.5, 5, 1, 1, 1] + np.eye(5)[np.arange(60) // 2 % 3]).astype(np.float32)


@pytest.fixture
def published(tmp_path) -> Path:
    """The files as they lie in the authors' two repositories."""
    (tmp_path / "encoded").mkdir()
    np.save(tmp_path / "encoded" / "embeddings.npy", VECTORS)
    np.save(tmp_path / "encoded" / "ids.npy", np.array(NAMES))
    vectors = dict(zip(NAMES, VECTORS, strict=True)) | {"failed": None}
    np.save(tmp_path / "features_moco_scm.npy", vectors)  # type: ignore[arg-type]
    labels = pd.DataFrame({"ID": NAMES, "label": CLASSES})
    labels.to_csv(tmp_path / "table.csv")
    labels[labels["label"] != "c"].to_csv(tmp_path / "two.csv", index=False)
    (tmp_path / "splits").mkdir()
    for k in range(4):
        order = np.random.default_rng(k).permutation(NAMES)
        columns = {"train": pd.Series(order[:40]), "test": pd.Series([*order[40:], "absent"])}
        pd.DataFrame(columns).to_csv(tmp_path / "splits" / f"split_{k}.csv", index=False)
    return tmp_path


def as_published(folder: Path, kept: np.ndarray) -> list[float]:
    """AUROC on each split, by the recipe of the authors' README in scikit-learn."""
    scores = []
    for k in range(4):
        split = pd.read_csv(folder / "splits" / f"split_{k}.csv")
        train, test = (np.isin(NAMES, split[side].dropna()) & kept for side in ("train", "test"))
        model = LogisticRegression(C=10, max_iter=100_000, class_weight="balanced", tol=1e-8)
        p = model.fit(VECTORS[train], CLASSES[train]).predict_proba(VECTORS[test])
        scores.append(roc_auc_score(CLASSES[test], p[:, 1] if p.shape[1] == 2 else p, multi_class="ovr"))
    return scores


@pytest.mark.parametrize("table", ["table.csv", "two.csv"])
@pytest.mark.parametrize("vectors", ["encoded", "features_moco_scm.npy"])
def test_one_command_gives_the_published_figure(published, table, vectors, capsys):
    command = ["probe", str(published / vectors), "--labels", str(published / table), "--out", str(published / "out")]
    pickles = ["--pickles", "true"] if vectors.endswith(".npy") else []
    code = main([*command, *pickles, "--splits", str(published / "splits"), "--probe.targets", '["label"]'])
    assert code == 1  # the splits name slides without a vector; in two.csv a third of the slides has no label
    found = pd.read_csv(published / "out" / "splits.csv")
    name = "embeddings" if vectors == "encoded" else "features_moco_scm"
    plain = found[found["embedding"] == name]
    assert plain["split"].tolist() == [f"split_{k}" for k in range(4)]
    kept = CLASSES != "c" if table == "two.csv" else np.ones(60, bool)
    wanted = as_published(published, kept)
    np.testing.assert_allclose(plain["auroc"], wanted, atol=1e-6)
    shown = capsys.readouterr()
    assert f"{np.mean(wanted):.3f}" in shown.out
    assert f"{np.std(wanted):.3f}" in shown.out
    assert "LEFT OUT" in shown.err
    assert "LEAK" in shown.err  # both slides of a patient are dealt apart
    standardised = found[found["embedding"] == f"{name}, standardised"]["auroc"]
    assert not np.allclose(standardised, wanted)


def test_a_dictionary_is_read_only_where_it_is_asked_for(published, capsys):
    file = published / "features_moco_scm.npy"
    with pytest.raises(FileFormatError, match="--pickles true"):
        read_source(file)
    found = read_source(file, pickles=True)
    assert list(found.ids) == NAMES
    np.testing.assert_array_equal(found.vectors["features_moco_scm"], VECTORS)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


def test_a_dictionary_that_is_none_is_refused_and_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = {
        "bomb": ({"s": Bomb()}, "it wants to call posix.mkdir"),
        "list": ([Bomb.__name__, None], "holds a ndarray"),
        "ragged": ({"a": np.zeros(3), "b": np.zeros(4)}, "b has float64 of shape"),
        "words": ({"a": np.array(["x"])}, "a has <U1"),
    }
    for name, (content, complaint) in cases.items():
        np.save(f"{name}.npy", np.array(content, dtype=object), allow_pickle=True)
        with pytest.raises(FileFormatError, match=complaint):
            read_source(tmp_path / f"{name}.npy", pickles=True)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "ragged.npy").read_bytes()[:150])
    with pytest.raises(FileFormatError, match=r"cut\.npy"):
        read_source(tmp_path / "cut.npy", pickles=True)
    np.save("plain.npy", np.zeros(3))
    with pytest.raises(FileFormatError, match="not a dictionary"):
        read_source(tmp_path / "plain.npy", pickles=True)
    assert not (tmp_path / "bomb").exists()


def test_a_split_of_other_slides_is_named(published, capsys):
    (published / "splits" / "split_0.csv").write_text("train,test\nx,y\n")
    command = ["probe", str(published / "encoded"), "--labels", str(published / "two.csv"), "--out", str(published)]
    assert main([*command, "--splits", str(published / "splits")]) == 2
    assert "split_0" in capsys.readouterr().err
