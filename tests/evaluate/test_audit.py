"""Audits of splits: every format says the same, and what is planted is found and counted."""

import numpy as np
import pandas as pd
import pytest

from histossl.cli.main import main
from histossl.core.errors import LabelError
from histossl.evaluate.audit import audit_split, read_cohort_table, verdicts
from histossl.evaluate.split_files import read_splits

TABLE = """slide_id,patient_id,site,label
a,p1,x,0
b,p1,x,0
c,p2,y,1
d,p3,y,1
e,p4,z,0
"""
WIDE = "train,test\na,b\nc,e\nd,\n"
CLAM = ",train,val,test\n0,a,,b\n1,c,,e\n2,d,,\n"
BOOL = ",train,test\na,True,False\nc,True,False\nd,True,False\nb,False,True\ne,False,True\n"
LONG = "slide_id,split\na,train\nc,Train\nd,training\nb,test\ne,test\n"


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.csv").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("text", [WIDE, CLAM, BOOL, LONG])
def test_every_format_says_the_same(tmp_path, text):
    write(tmp_path, table=TABLE, split=text)
    (split,) = read_splits(tmp_path / "split.csv")
    assert set(split.on("train")) == {"a", "c", "d"}
    assert set(split.on("test")) == {"b", "e"}
    row = audit_split(
        split, read_cohort_table(tmp_path / "table.csv"), [("d", "e"), ("a", "b"), ("a", "c")], {"a", "e"}
    )
    assert (row["train"], row["val"], row["test"]) == (3, 0, 2)
    assert (row["slides_shared"], row["patients_shared"], row["test_leaked"]) == (0, 1, 0.5)
    assert (row["sites_shared"], row["sites"]) == (1, 2)
    assert row["twins_shared"] == 1  # d ~ e; a ~ b are of one patient, a ~ c of one side
    assert row["seen_in_pretraining"] == 1
    assert row["classes"] == "0 1/2, 1 2/0"


def test_folds_are_tested_one_by_one_and_files_of_a_folder_each(tmp_path):
    write(tmp_path, table=TABLE, folds="slide_id,fold\na,0\nb,0\nc,1\nd,1\ne,0\n")
    cohort = read_cohort_table(tmp_path / "table.csv")
    splits = read_splits(tmp_path / "folds.csv")
    assert [split.name for split in splits] == ["folds, fold 0", "folds, fold 1"]
    rows = [audit_split(split, cohort) for split in splits]
    assert [row["patients_shared"] for row in rows] == [0, 0]
    assert not any(line.startswith("LEAK") for line in verdicts(rows, cohort, True))
    (tmp_path / "s" / "50").mkdir(parents=True)
    write(tmp_path / "s" / "50", split_0=WIDE, split_1=LONG)
    assert [split.name for split in read_splits(tmp_path / "s")] == ["50/split_0", "50/split_1"]


def test_tcga_barcodes_name_patient_and_site(tmp_path):
    ids = ["TCGA-A2-A1FZ-01Z-00-DX1.0BAA", "TCGA-A2-A1FZ-01Z-00-DX2.9D22", "TCGA-BH-A0E7-01Z-00-DX1.788F", "own"]
    write(tmp_path, table="ID,label\n" + "".join(f"{name},{k % 2}\n" for k, name in enumerate(ids)))
    cohort = read_cohort_table(tmp_path / "table.csv")
    assert list(cohort.patients.values()) == ["TCGA-A2-A1FZ", "TCGA-A2-A1FZ", "TCGA-BH-A0E7", "own"]
    assert cohort.sites == {ids[0]: "A2", ids[1]: "A2", ids[2]: "BH"}
    assert cohort.named == "TCGA barcodes"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("train,test\na,b\nc,E\nzz,\n", r"'zz' \(row 4\)"),
        ("train,test\na,\nc,\n", "needs slides"),
        ("slides?,train,val,test\na,True,False,False\nb,False,False,True\n", "no column names the slides"),
        ("slide_id,split\na,train\nb,tset\n", "row 3: 'tset' is no side"),
        ("slide_id,split\na,tset\nb,x\nc,\nd,x\nE,train\n", "rows 2, 3, 4 and 1 more: 'tset', 'x', '' is no side"),
        ("slide_id,fold\na,0\nb,1.0\nc,\n", "no fold in row 4; write one"),
        ("slide_id,colour\na,1\n", "no split in slide_id, colour"),
    ],
)
def test_bad_splits_are_refused_with_their_rows(tmp_path, text, what):
    write(tmp_path, table=TABLE, split=text)
    with pytest.raises(LabelError, match=what):
        audit_split(read_splits(tmp_path / "split.csv")[0], read_cohort_table(tmp_path / "table.csv"))


def test_a_slide_on_both_sides_is_found(tmp_path):
    write(tmp_path, table=TABLE, split="train,test\na,a\nc,e\n")
    assert (
        audit_split(read_splits(tmp_path / "split.csv")[0], read_cohort_table(tmp_path / "table.csv"))["slides_shared"]
        == 1
    )


def test_the_command_counts_what_was_planted_and_exits_with_one(tmp_path, capsys):
    rng = np.random.default_rng(0)
    ids = [f"s{k:02d}" for k in range(40)]
    vectors = rng.normal(size=(40, 32))
    vectors[30] = vectors[2]
    pd.DataFrame(vectors).add_prefix("f").assign(slide_id=ids).to_csv(tmp_path / "v.csv", index=False)
    patients = [f"p{k}" for k in range(40)]
    cohort = pd.DataFrame({"slide_id": ids, "patient_id": patients, "label": np.arange(40) % 2})
    cohort.to_csv(tmp_path / "t.csv", index=False)
    pd.DataFrame({"slide_id": ids, "split": ["train"] * 25 + ["test"] * 15}).to_csv(tmp_path / "s.csv", index=False)
    flags = [str(tmp_path / "s.csv"), str(tmp_path / "t.csv")]
    assert main(["audit", *flags]) == 0
    assert "not looked for" in capsys.readouterr().err
    assert main(["audit", *flags, "--vectors", str(tmp_path / "v.csv"), "--out", str(tmp_path / "a.csv")]) == 1
    assert "LEAK in 1 of 1 splits near-duplicate" in capsys.readouterr().err
    row = pd.read_csv(tmp_path / "a.csv").iloc[0]
    assert (row["twins_shared"], row["patients_shared"], row["classes"]) == (1, 0, "0 13/7, 1 12/8")
