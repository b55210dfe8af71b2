"""What people do to tables of labels: each mistake ends as one line that names the rows, and nothing is written."""

import re

import numpy as np
import pandas as pd
import pytest

from histossl.cli.main import main

N = 24
ROWS = [f"s{k:02d},p{k // 2:02d},{'ab'[k // 2 % 2]}" for k in range(N)]  # s00 is row 2 of the file
QUICK = ["--probe.bootstraps", "100", "--probe.repeats", "1", "--probe.folds", "3", "--probe.shots", "[]"]


@pytest.fixture
def vectors(tmp_path):
    values = np.random.default_rng(0).normal(size=(N, 4))
    table = pd.DataFrame(values, columns=list("wxyz"))
    table.insert(0, "slide_id", [f"s{k:02d}" for k in range(N)])
    table.to_csv(tmp_path / "vectors.csv", index=False)
    return tmp_path / "vectors.csv"


def run(vectors, rows, *more, header="slide_id,patient_id,label"):
    labels = vectors.parent / "labels.csv"
    labels.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    out = vectors.parent / "out"
    code = main(["probe", str(vectors), "--labels", str(labels), "--out", str(out), *QUICK, *more])
    return code, out


def changed(edits):
    rows = list(ROWS)
    for k, text in edits.items():
        rows[k] = text
    return rows


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        pytest.param(
            [row[:-1] + "a" for row in ROWS],
            "label: all 24 slides are 'a'; a probe needs two classes or more",
            id="one class",
        ),
        pytest.param(
            [row[:-1] + ("b" if k < 4 else "a") for k, row in enumerate(ROWS)],
            r"label: 3 folds, but class 'b' has 2 patients \(rows 2, 3, 4 and 1 more\); --probe.folds 2",
            id="one class in a fold",
        ),
        pytest.param(
            changed({3: "s03,p01,7", 5: "s05,p02,8"}),
            "column 'label' mixes words and numbers: numbers in rows 5, 7",
            id="strings and numbers",
        ),
        pytest.param(
            [*ROWS, "s04,p02,a", "s07,p03,b"],
            r"slides named twice: 's04' \(rows 6, 26\), 's07' \(rows 9, 27\); keep one row a slide",
            id="duplicated ids",
        ),
        pytest.param(
            changed({4: "s04.svs,p02,a"}),
            r"differ from a slide by their extension: 's04.svs' \(row 6; is it 's04'\?\)",
            id="extension",
        ),
        pytest.param(
            changed({5: "s05,p02,b", 8: "s08,p04,b"}),
            r"2 patients have slides of different classes: 'p02' has 'a' in row 6 and 'b' in row 7; "
            r"'p04' has 'b' in row 10 and 'a' in row 11; correct them",
            id="contradicting patients",
        ),
        pytest.param(
            [row[:-1] + f"word {k}" for k, row in enumerate(ROWS)],
            "label: 3 folds|24 different values on 24 slides|different classes",
            id="free text",
        ),
    ],
)
def test_it_is_refused_by_rows_and_nothing_is_written(vectors, capsys, rows, words):
    code, out = run(vectors, rows)
    assert code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(words, said), said
    assert not out.exists()


def test_labels_that_are_empty_are_left_out_aloud(vectors, capsys):
    code, out = run(vectors, changed({3: "s03,p01,NaN", 6: "s06,p03,", 10: "s10,p05,n/a", 12: "s12,p06,NA"}))
    assert code == 1
    assert "LEFT OUT labels.csv: no label for 4 of 24 slides: 's03', 's06', 's10', 's12'" in " ".join(
        capsys.readouterr().err.split()
    )
    assert set(pd.read_csv(out / "probe.csv")["n_slides"]) == {20}


def test_labels_of_absent_slides_are_left_out_with_the_nearest_name(vectors, capsys):
    code, out = run(vectors, [*ROWS, "s0x,p99,a", "other,p98,b"])
    assert code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "2 labelled slides are absent (rows 26, 27): 's0x', 'other'; nearest to 's0x' is 's" in said
    assert set(pd.read_csv(out / "probe.csv")["n_slides"]) == {24}


def test_vectors_that_are_not_finite_name_the_slide(vectors, capsys):
    table = pd.read_csv(vectors)
    table.loc[7, "x"] = np.nan
    table.to_csv(vectors, index=False)
    assert run(vectors, ROWS)[0] == 2
    assert "of 1 slides is not finite: 's07'" in " ".join(capsys.readouterr().err.split())


def test_sites_that_nobody_knows_are_named(vectors, capsys):
    rows = [f"{row},{'' if k == 9 else 'xyz'[k // 2 % 3]}" for k, row in enumerate(ROWS)]
    code, _ = run(vectors, rows, "--probe.hold-out", "sites", header="slide_id,patient_id,label,site")
    assert code == 2
    assert "label: no site is known of 's09'; add a column site" in " ".join(capsys.readouterr().err.split())


def test_splits_that_name_absent_slides_name_the_rows(vectors, capsys):
    folder = vectors.parent
    (folder / "labels.csv").write_text("\n".join(["slide_id,patient_id,label", *ROWS]))
    (folder / "split.csv").write_text("train,test\ns00,s04\ns02,s88\nt01,s05\n")
    assert main(["audit", str(folder / "split.csv"), str(folder / "labels.csv")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"2 slides of the split are absent \(rows 4, 3\): 't01', 's88'; nearest to", said), said
