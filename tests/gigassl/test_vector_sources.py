"""Vectors from other tools' files: the same numbers whatever they stand in, and refusals that say where and what."""

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

from histossl.cli.main import main
from histossl.core.errors import FileFormatError
from histossl.evaluate.labels import read_labels
from histossl.evaluate.sources import read_source

IDS = ["007", "TCGA-A2-0001.x", "ü 3"]
VALUES = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)


def trident(folder, rows=VALUES, ids=IDS):
    folder.mkdir()
    for name, row in zip(ids, rows, strict=True):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["features"] = row
    return folder


def giga(folder, ids=None):
    folder.mkdir()
    np.save(folder / "embeddings.npy", VALUES)
    np.save(folder / "ids.npy", np.array(IDS) if ids is None else ids)
    return folder


def table(path, **more):
    found = pd.DataFrame(VALUES, columns=[f"f{k}" for k in range(5)]).assign(slide_id=IDS, patient_id=["p", "p", ""])
    found = found.assign(**more)
    if path.suffix == ".csv":
        found.to_csv(path, index=False)
    else:
        found.to_parquet(path)
    return path


def scanpy(path):
    anndata.AnnData(VALUES, obs=pd.DataFrame({"case_id": ["p", "p", ""]}, index=IDS)).write_h5ad(path)
    return path


@pytest.mark.parametrize(
    "make",
    [
        lambda t: trident(t / "slide_features_titan"),
        lambda t: trident(t / "x", VALUES[:, None]),
        lambda t: giga(t / "giga"),
        lambda t: giga(t / "giga") / "embeddings.npy",
        lambda t: table(t / "v.csv"),
        lambda t: table(t / "v.parquet"),
        lambda t: scanpy(t / "v.h5ad"),
    ],
)
def test_the_same_vectors_come_out_of_every_kind_of_file(tmp_path, make):
    found = read_source(make(tmp_path))
    order = [found.ids.index(name) for name in IDS]
    (values,) = found.vectors.values()
    assert values.dtype == np.float32
    np.testing.assert_allclose(values[order], VALUES, rtol=1e-6)
    assert found.patients in ({}, {"007": "p", "TCGA-A2-0001.x": "p", "ü 3": ""})


def test_features_of_tiles_become_their_mean_and_deviation(tmp_path):
    rng = np.random.default_rng(1)
    tiles = [rng.normal(size=(1, n, 4)) for n in (7, 2, 30)]
    found = read_source(trident(tmp_path / "features_uni", tiles))
    k = found.ids.index("ü 3")
    np.testing.assert_allclose(found.vectors["mean pooling"][k], tiles[2][0].mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.vectors["mean and deviation"][k, 4:], tiles[2][0].std(0), rtol=1e-5)


def test_what_cannot_be_used_is_named(tmp_path):
    bad = VALUES.copy()
    bad[1, 2] = np.nan
    cases = {
        "is not there": tmp_path / "nothing.h5ad.gz",
        "no vectors of slides": tmp_path,
        "not finite: 'TCGA-A2-0001.x'": trident(tmp_path / "nan", bad),
        "numbers a vector": trident(tmp_path / "odd", [VALUES[0], VALUES[1], VALUES[2, :3]]),
        "'007' is there twice": giga(tmp_path / "twice", np.array(["007", "007", "b"])),
        "for 2 slides": giga(tmp_path / "short", np.array(["007", "b"])),
        "astype": giga(tmp_path / "pickled", np.array(IDS, dtype=object)),
    }
    (tmp_path / "cut.h5ad").write_bytes(b"\x89HDF\r\n")
    cases["not a readable HDF5 file"] = tmp_path / "cut.h5ad"
    for what, path in cases.items():
        with pytest.raises(FileFormatError, match=what):
            read_source(path)


def test_a_table_of_vectors_is_probed_from_the_command_line(tmp_path, capsys):
    rng = np.random.default_rng(2)
    classes = np.arange(60) % 2
    vectors = pd.DataFrame(rng.normal(size=(60, 4)) + 3 * classes[:, None]).add_prefix("f")
    vectors.assign(slide_id=[f"s{k}" for k in range(60)]).to_csv(tmp_path / "v.csv", index=False)
    pd.DataFrame({"slide_id": [f"s{k}" for k in range(60)], "label": classes}).to_csv(tmp_path / "l.csv", index=False)
    flags = ["--labels", str(tmp_path / "l.csv"), "--probe.bootstraps=100", "--probe.repeats=1"]
    assert main(["probe", str(tmp_path / "v.csv"), *flags]) == 2
    assert "--out FOLDER" in capsys.readouterr().err
    assert main(["probe", str(tmp_path / "v.csv"), "--out", str(tmp_path / "out"), *flags]) == 0
    found = pd.read_csv(tmp_path / "out" / "probe.csv")
    assert found["auroc"].iloc[-1] > 0.99
    assert "v" in capsys.readouterr().out


def test_two_files_of_vectors_are_compared_as_a_pair(tmp_path, capsys):
    rng = np.random.default_rng(3)
    ids, classes = [f"s{k:02d}" for k in range(40)], np.arange(40) % 2
    good = pd.DataFrame({"slide_id": ids, "a": classes + 0.3 * rng.normal(size=40), "b": rng.normal(size=40)})
    poor = pd.DataFrame({"slide_id": ids, "a": rng.normal(size=40)}).sample(frac=1, random_state=0)
    good.to_csv(tmp_path / "good.csv", index=False)
    poor.to_csv(tmp_path / "poor.csv", index=False)
    pd.DataFrame({"slide_id": ids, "label": classes}).to_csv(tmp_path / "labels.csv", index=False)

    def run(other, *more):
        flags = ["--labels", str(tmp_path / "labels.csv"), "--against", str(tmp_path / other), *more]
        return main(["probe", str(tmp_path / "good.csv"), *flags])

    quick = ["--probe.repeats", "1", "--probe.bootstraps", "100", "--probe.shots", "[]", "--out", str(tmp_path / "out")]
    assert run("poor.csv", *quick) == 0
    found = pd.read_csv(tmp_path / "out" / "probe.csv").set_index("embedding")
    assert list(found.index) == ["good", "poor"]
    assert found.loc["poor", "difference_low"] > 0.2
    poor.replace("s07", "s7").to_csv(tmp_path / "other.csv", index=False)
    assert run("other.csv", *quick) == 2
    assert "1 slides only in the first, ['s07'], 1 only in the second, ['s7']" in " ".join(
        capsys.readouterr().err.split()
    )
    assert run("poor.csv") == 2
    assert "name a folder: --out FOLDER" in " ".join(capsys.readouterr().err.split())


def test_a_tcga_barcode_tells_patient_and_site(tmp_path):
    ids = [
        f"TCGA-{site}-{patient}-01Z-00-DX{k}" for site in ("A2", "BH") for patient in ("A1FZ", "A0E7") for k in (1, 2)
    ]
    (tmp_path / "labels.csv").write_text("slide_id,label\n" + "".join(f"{name},x\n" for name in ids))
    labels = read_labels(tmp_path / "labels.csv", ids)
    assert labels.table["patient_id"].nunique() == 4
    assert labels.table.loc[ids[0], "patient_id"] == "TCGA-A2-A1FZ"
    assert set(labels.sites.values()) == {"A2", "BH"}
    rows = "".join(f"{name},x,hospital {k % 3}\n" for k, name in enumerate(ids))
    (tmp_path / "labels.csv").write_text("slide_id,label,Center\n" + rows)
    labels = read_labels(tmp_path / "labels.csv", ids)
    assert (set(labels.sites.values()), labels.targets) == ({"hospital 0", "hospital 1", "hospital 2"}, ("label",))
