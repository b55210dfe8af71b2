"""What people's tables and names look like: read one way, said once, refused where they cannot be meant."""

from __future__ import annotations

import unicodedata

import numpy as np
import pandas as pd
import pytest

from histossl.cli.main import main
from histossl.core.errors import FileFormatError, LabelError
from histossl.core.names import Known, clashes, folded, spelling_notes, spellings, zero_suspicions
from histossl.core.tables import number, read_table
from histossl.evaluate.labels import read_labels
from histossl.evaluate.sources import read_source
from histossl.study.folder import Study

ROWS = [["slide_id", "label", "größe"], ["Müller-1", "a", "0.5"], ["plain", "b", "1.25"]]


def text_of(separator: str, comma: bool = False, end: str = "\n") -> str:
    rows = [[cell.replace(".", ",") if comma else cell for cell in row] for row in ROWS]
    return end.join(separator.join(row) for row in rows) + end


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(("separator", "comma"), [(",", False), (";", True), (";", False), ("\t", True)])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_table_is_read_alike_whoever_saved_it(tmp_path, encoding, separator, comma, end):
    (tmp_path / "t.csv").write_bytes(text_of(separator, comma, end).encode(encoding))
    found = read_table(tmp_path / "t.csv")
    assert found.columns == ROWS[0]
    assert [row["slide_id"] for row in found.rows.values()] == ["Müller-1", "plain"]
    assert [number(row["größe"]) for row in found.rows.values()] == [0.5, 1.25]
    assert bool(found.notes) == (encoding == "cp1252")


@pytest.mark.parametrize(
    ("encoding", "cells"),
    [
        ("gb18030", ["切片1,腺癌", "切片2,正常"]),
        ("gb18030", ["王-1,a", "李-2,b"]),
        ("big5", ["切片1,腺癌", "切片2,正常"]),
        ("cp932", ["スライド1,腺癌", "スライド2,正常"]),
        ("cp949", ["슬라이드1,선암", "슬라이드2,정상"]),
        ("cp1251", ["с1,аденокарцинома", "с2,норма"]),
        ("cp1253", ["s1,αδενοκαρκίνωμα", "s2,φυσιολογικό"]),
    ],
)
def test_an_encoding_that_cannot_be_told_is_refused(tmp_path, encoding, cells):
    (tmp_path / "t.csv").write_bytes("\n".join(["slide_id,label", *cells, ""]).encode(encoding))
    with pytest.raises(FileFormatError, match=r"t.csv: its encoding cannot be told: row 2 would read .*CSV UTF-8"):
        read_table(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes("\n".join(["slide_id,label", *cells, ""]).encode())
    assert [",".join(row.values()) for row in read_table(tmp_path / "t.csv").rows.values()] == cells


@pytest.mark.parametrize(
    "text", ["id;µm²\nMüller;3\n", "id,größe\nGRÖSSE,Präparat\n", "id,dx\nSeñora Núñez,épithélial\n", "id,–\na,5 °C\n"]
)
def test_western_tables_of_windows_are_read(tmp_path, text):
    (tmp_path / "t.csv").write_bytes(text.encode("cp1252"))
    found = read_table(tmp_path / "t.csv")
    assert found.notes
    assert set(text.splitlines()[1].replace(";", ",").split(",")) == set(next(iter(found.rows.values())).values())


def test_the_line_that_names_the_separator_is_none_of_the_table(tmp_path):
    (tmp_path / "t.csv").write_text("sep=;\nslide_id;label\na;1,5\nb;2\n")
    found = read_table(tmp_path / "t.csv")
    assert found.columns == ["slide_id", "label"]
    assert list(found.rows) == [3, 4]  # counted as in the file


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"PK\x03\x04rest", "workbook"),
        (b"\xd0\xcf\x11\xe0rest", "old Excel"),
        (b"PAR1rest", "Parquet"),
        (b"\x1f\x8brest", "gzipped"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"slide_id,Slide_ID\na,b\n", "occurs twice"),
        (b"", "is empty"),
        (b"a,b\n1,2,3\n1,2,3,4\n", "rows 2, 3: not 2 cells"),
        (b'a,b\n1,2\n3,"4\n5,6\n7,8\n', "row 3: .*close or remove the quote in this row"),
        (
            b'a,b\nx,"1,234"\ny,"2,500"\n',
            r"'1,234' \(rows 2, 3\) may be of thousands or decimal; write numbers without",
        ),
    ],
)
def test_what_is_no_table_says_what_it_is(tmp_path, data, words):
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(LabelError, match=words):
        read_table(tmp_path / "t.csv", LabelError)


def test_commas_are_decimal_where_another_cell_shows_it_or_semicolons_separate(tmp_path):
    for text in ('a,b\nx,"1,234"\ny,"2,5"\n', "a;b\nx;1,234\ny;2,500\n"):
        (tmp_path / "t.csv").write_text(text)
        assert [number(row["b"]) for row in read_table(tmp_path / "t.csv").rows.values()] == [1.234, 2.5]
    assert number("\N{MINUS SIGN}1.5") == -1.5  # as word processors and some journals write it


def test_comments_before_the_header_are_skipped_and_said(tmp_path):
    head = "#Sample\tPatient\n#STRING\tSTRING\n#1\t1\n"  # as cBioPortal begins
    (tmp_path / "t.txt").write_text(head + "SLIDE_ID\tLABEL\ns1\ta\n#s2\tb\n")
    found = read_table(tmp_path / "t.txt")
    assert found.columns == ["SLIDE_ID", "LABEL"]
    assert found.rows == {5: {"SLIDE_ID": "s1", "LABEL": "a"}, 6: {"SLIDE_ID": "#s2", "LABEL": "b"}}
    assert found.notes == ("3 lines that begin with # before the header are comments, and were not read",)


@pytest.mark.parametrize(
    ("one", "other"),
    [("P01", "p01 "), ("1", "1.0"), ("Ä", "A\u0308"), ("a b", "a\u00a0 b"), ("x", "\ufeffx"), ("12", "12.00")],
)
def test_spellings_of_one_name_are_one(one, other):
    assert folded(one) == folded(other)
    assert Known([one]).get(other) == one


def test_names_that_differ_by_leading_zeros_are_suspect():
    (line,) = zero_suspicions("patients", ["007", "7", "P1", "P01", "1.05", "1.5", "10"])
    assert "'007' and '7', 'P1' and 'P01':" in line
    assert not zero_suspicions("patients", ["001", "010", "100", "a-1", "b-01"])


PAIRS = [("007", "7"), ("a.1", "a.2"), ("1.5", "1"), ("P1", "P01"), ("1.0.1", "1.1")]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_different_names_stay_different(one, other):
    assert folded(one) != folded(other)
    assert not clashes([one, other])


def test_spellings_prefer_what_no_spreadsheet_wrote_and_are_said_once():
    taken = spellings(["1.0", "1", "P1", "p1"])
    assert taken == {"1.0": "1", "1": "1", "P1": "P1", "p1": "P1"}
    (line,) = spelling_notes("patients", taken)
    assert "'1.0' as '1'" in line


def test_patients_in_two_spellings_are_one_and_folds_keep_them_together(tmp_path, capsys):
    """Two nearly equal slides a patient, noise otherwise: an AUROC far from one half is a leak."""
    rng = np.random.default_rng(0)
    ids, classes = [f"s{k:03d}" for k in range(60)], rng.integers(0, 2, 30)
    base = np.repeat(rng.normal(size=(30, 16)), 2, 0)
    vectors = pd.DataFrame(base + 0.05 * rng.normal(size=base.shape)).add_prefix("f").assign(slide_id=ids)
    vectors.to_csv(tmp_path / "v.csv", index=False)
    seen = {}
    for name, patient in {
        "one": lambda k: f"P{k // 2:02d}",
        "two": lambda k: f"{'Pp'[k % 2]}{k // 2:02d}",
        "floats": lambda k: f"{k // 2}{'' if k % 2 else '.0'}",
    }.items():
        rows = "".join(f"{i},{patient(k)},{'ab'[classes[k // 2]]}\n" for k, i in enumerate(ids))
        (tmp_path / f"{name}.csv").write_text("slide_id,patient_id,label\n" + rows)
        flags = ["--probe.bootstraps", "100", "--probe.repeats", "1", "--out", str(tmp_path / name)]
        assert main(["probe", str(tmp_path / "v.csv"), "--labels", str(tmp_path / f"{name}.csv"), *flags]) == 0
        seen[name] = capsys.readouterr().err
        table = pd.read_csv(tmp_path / name / "probe.csv")
        assert 0.3 < table["auroc"].iloc[-1] < 0.7, name
        assert "60 slides of 30 patients" in seen[name]
    assert "spelt in two ways" not in seen["one"]
    assert seen["two"].count("spelt in two ways") == 1
    assert "'0.0' as '0'" in seen["floats"]


def test_labels_find_slides_whose_accents_are_composed_otherwise(tmp_path):
    ids = [unicodedata.normalize("NFD", f"Müller-{k}") for k in range(3)]
    rows = "".join(f"{unicodedata.normalize('NFC', name)},x,{k}\n" for k, name in enumerate(ids))
    (tmp_path / "l.csv").write_text("slide_id,patient_id,label\n" + rows, encoding="utf-8")
    found = read_labels(tmp_path / "l.csv", ids)
    assert list(found.table.index) == ids
    assert any("look alike" in line for line in found.notes)
    assert not found.complaints


def test_slides_that_differ_by_spelling_alone_are_refused(tmp_path):
    pd.DataFrame({"slide_id": ["a", "A"], "f0": [1.0, 2.0], "f1": [0.5, 1.5]}).to_csv(tmp_path / "v.csv", index=False)
    with pytest.raises(FileFormatError, match="'a' and 'A'"):
        read_source(tmp_path / "v.csv")
    (tmp_path / "l.csv").write_text("slide_id,label\na,x\nA,y\n")
    with pytest.raises(LabelError, match=r"named twice: 'a' \(rows 2, 3\)"):
        read_labels(tmp_path / "l.csv", ["a"])


def table_of_noise(n: int = 60, d: int = 16) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    found = pd.DataFrame(rng.normal(size=(n, d))).add_prefix("f")
    found.insert(0, "slide_id", [f"s{k:03d}" for k in range(n)])
    return found


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Unnamed: 0", range(60)),
        ("", range(60)),
        ("index", range(60)),
        ("n", range(100, 160)),
        ("falling", range(60, 0, -1)),
        ("same", [3.0] * 60),
        ("age", np.random.default_rng(1).integers(20, 80, 60)),
        ("grade", [k // 30 for k in range(60)]),
    ],
)
def test_columns_that_are_no_vector_are_left_out_by_name(tmp_path, name, values):
    table = table_of_noise()
    table[name] = list(values)
    table.to_csv(tmp_path / "v.csv", index=False)
    found = read_source(tmp_path / "v.csv")
    assert found.vectors["v"].shape == (60, 16)
    assert any((name or "without a name") in line for line in found.notes)


def test_two_sets_of_numbered_columns_ask_which_is_the_vector(tmp_path):
    table = table_of_noise()
    table["g0"], table["g1"] = table["f0"] * 2, table["f1"] * 2
    table.to_csv(tmp_path / "v.csv", index=False)
    with pytest.raises(FileFormatError, match="--columns"):
        read_source(tmp_path / "v.csv")
    assert read_source(tmp_path / "v.csv", columns=("g",)).vectors["v"].shape == (60, 2)
    assert read_source(tmp_path / "v.csv", columns=("f", "g")).vectors["v"].shape == (60, 18)
    assert read_source(tmp_path / "v.csv", columns=("f0", "g1")).vectors["v"].shape == (60, 2)


@pytest.mark.parametrize("made", ["equal", "ranked"])
def test_a_column_that_is_the_label_is_refused(tmp_path, capsys, made):
    rng = np.random.default_rng(0)
    label = rng.permutation(np.repeat([0, 1], 30))
    table = table_of_noise()
    table["f16"] = label if made == "equal" else label + rng.random(60) * 0.5
    table.to_csv(tmp_path / "v.csv", index=False)
    (tmp_path / "l.csv").write_text("slide_id,label\n" + "".join(f"s{k:03d},{'ab'[c]}\n" for k, c in enumerate(label)))
    flags = ["--labels", str(tmp_path / "l.csv"), "--out", str(tmp_path / "o"), "--probe.bootstraps", "100"]
    assert main(["probe", str(tmp_path / "v.csv"), *flags]) == 2
    assert "'f16'" in capsys.readouterr().err
    assert not (tmp_path / "o" / "probe.csv").exists()


def test_row_numbers_among_arrays_are_refused(tmp_path):
    values = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    values[:, 2] = np.arange(20)
    np.save(tmp_path / "embeddings.npy", values)
    np.save(tmp_path / "ids.npy", np.array([f"s{k}" for k in range(20)]))
    with pytest.raises(FileFormatError, match=r"number 2 .* counts the rows"):
        read_source(tmp_path)


def test_slides_csv_is_read_as_a_spreadsheet_saved_it(tmp_path):
    study = Study(tmp_path / "st")
    row = {"slide_id": "Müller", "path": "/disk/Müller.svs", "mpp": "0,25", "patient_id": "p1", "stage": "I"}
    for encoding, separator in (("cp1252", ";"), ("utf-16", "\t"), ("utf-8-sig", ";")):
        text = separator.join(row) + "\r\n" + separator.join(row.values()) + "\r\n"
        study.table.write_bytes(text.encode(encoding))
        (found,) = study.slides()
        assert (found["slide_id"], found["path"], found["mpp"]) == ("Müller", "/disk/Müller.svs", "0.25")
        assert found["stage"] == "I"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slide_id,f0,f1\na,1,2\nb,x,3\nc,2,[1]\n", r"column 'f0' holds no number in row 3: 'x', and 'f1' too"),
        ("slide_id,v\na,[1 2]\nb,[2 3]\n", r"column 'v' holds no number in rows 2, 3: '\[1 2\]'.*one number a cell"),
        ("slide_id,f0,f1\na,1,2\nb,#VALUE!,3\n", "not finite: 'b'"),
        ("slide_id,f0,f1\na,1,2\nb,1e300,3\n", "not finite: 'b'"),
        ("slide_id,f0,f1\na,1,2\nb,1,3\na,2,2\n", r"slides named twice: 'a' \(rows 2, 4\)"),
    ],
)
def test_vectors_that_are_no_numbers_name_their_rows(tmp_path, text, words, recwarn):
    (tmp_path / "v.csv").write_text(text)
    with pytest.raises(FileFormatError, match=words):
        read_source(tmp_path / "v.csv")
    assert not recwarn.list
