"""Reading tables of labels: what is kept, what is passed over aloud, what is refused and by which words."""

import re

import pytest

from histossl.core.errors import LabelError
from histossl.evaluate.labels import read_labels
from histossl.study.folder import COLUMNS

SLIDES = ["007", "b 1", "ü-3", "d.2", "e"]


@pytest.fixture
def table(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "labels.csv"
        path.write_bytes(text.encode(encoding))
        return path

    return write


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_ids_stay_text_whatever_the_file_looks_like(table, separator, encoding, ending):
    rows = ["slide_id,label,patient_id", "007,1,01", "b 1 ,0.0,1", "ü-3,1.0,01", "d.2,0,3", "e,1,1"]
    path = table(ending.join(rows).replace(",", separator), encoding)
    labels = read_labels(path, SLIDES)
    assert list(labels.table.index) == SLIDES
    assert list(labels.table["label"]) == ["1", "0", "1", "0", "1"]
    assert list(labels.table["patient_id"]) == ["01", "1", "01", "3", "1"]
    assert (labels.targets, labels.complaints) == (("label",), ())


def test_targets_are_label_or_all_other_columns_or_those_named(table):
    both = "slide_id,patient_id,label,grade\n007,p,a,1\nb 1,q,b,2\n"
    assert read_labels(table(both), SLIDES).targets == ("label",)
    assert read_labels(table(both), SLIDES, ["grade"]).targets == ("grade",)
    found = read_labels(table("ID,case_id,stage,grade\n007,p,a,1\nb 1,q,b,\n"), SLIDES)
    assert (found.targets, found.chosen) == (("stage", "grade"), False)
    assert found.table.loc["b 1", "grade"] is None
    assert found.table.loc["b 1", "patient_id"] == "q"
    with pytest.raises(LabelError, match=r"no target 'size'; it has 'label', 'grade'"):
        read_labels(table(both), SLIDES, ["size"])


def test_absent_and_unlabelled_slides_are_passed_over_aloud(table):
    path = table("slide_id,label\n007,a\nb 2,a\nb 1,b\n\nzzz,b\nü-3,NaN\n")
    labels = read_labels(path, SLIDES)
    assert list(labels.table.index) == ["007", "b 1"]
    absent, unlabelled = labels.complaints
    assert "2 labelled slides are absent (rows 3, 6): 'b 2', 'zzz'; nearest to 'b 2' is 'b 1'" in absent
    assert "no label for 3 of 5 slides: 'd.2', 'e', 'ü-3'" in unlabelled


def test_none_is_a_class_and_empty_is_not(table):
    labels = read_labels(table("slide_id,label\n007,None\nb 1,null\nü-3,\nd.2,N/A\ne,None\n"), SLIDES)
    assert dict(labels.table["label"]) == {"007": "None", "b 1": "null", "e": "None"}


def test_patients_come_from_the_table_then_from_elsewhere_then_the_slide(table):
    text = "slide_id,label,patient_id\n007,a,p\nb 1,b,\nü-3,a,\nd.2,b,q\n"
    labels = read_labels(table(text), SLIDES[:4], patients={"b 1": "r", "d.2": "q", "ü-3": ""})
    assert list(labels.table["patient_id"]) == ["p", "r", "ü-3", "q"]
    assert labels.complaints == (
        "labels.csv: no patient in row 4; each of these slides counts as its own patient: "
        "name it in each row, also where cells were merged",
    )
    with pytest.raises(LabelError, match=r"row 2: slide '007' is of patient 'p', in slides.csv of 'x'"):
        read_labels(table(text), SLIDES[:4], patients={"007": "x"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "file is empty"),
        ("slide_id,label\n", "no row below the header"),
        ("slide,\n", "no column of labels"),
        ("name,label\na,b\n", "no column slide_id among 'name', 'label'"),
        ("slide_id,label,label\n007,a,a\n", "column 'label' occurs twice"),
        ("slide_id,label\n007,a\nb 1,a,b\n", "row 3: not 2 cells"),
        ("slide_id,label\n007,a\n,b\n", "no slide_id in row 3"),
        ("slide_id,label\n007,a\nb 1,b\n007,a\n", r"named twice: '007' \(rows 2, 4\)"),
        ("slide_id,label\n007.svs,a\nB 1,b\ne,a\n", r"1 ids differ.*'007.svs' \(row 2; is it '007'\?\)"),
        ("slide_id,label\n007,1\nb 1,0\nü-3,x\n", r"mixes words and numbers: words in row 4: 'x'"),
        ("slide_id,label\n007,CLL\nb 1,cll\n", r"'CLL', 'cll' differ only by case \(row 3\)"),
        ("slide_id,label\n007,\nx,b\n", "none of its 2 slides has both"),
        ('slide_id,label\n007,"a\n', "row 2: unexpected end"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_rows(table, text, words):
    with pytest.raises(LabelError, match=words):
        read_labels(table(text), SLIDES)


def test_numbers_after_a_dot_are_no_extension(table):
    labels = read_labels(table("slide_id,label\nd.2,a\nd.1,b\n"), ["d.2", "other"])
    assert "'d.1'" in labels.complaints[0]


def test_other_encodings_and_missing_files_say_what_to_do(table, tmp_path):
    with pytest.raises(LabelError, match=r"workbook.*CSV UTF-8"):
        read_labels(table("PK\x03\x04", "cp1252"), SLIDES)
    with pytest.raises(LabelError, match="No such file"):
        read_labels(tmp_path / "none.csv", SLIDES)


SEVEN = [f"s{k}" for k in range(7)]


def labelled(table, cells, head="slide_id,label", slides=SEVEN):
    return read_labels(table("\n".join([head, *(f"{s},{c}" for s, c in zip(slides, cells, strict=True)), ""])), slides)


@pytest.mark.parametrize("missing", ["'--", "not reported", "[Not Available]", "#VALUE!", "#REF!", "?", "."])
def test_what_programs_write_for_no_label_is_no_class(table, missing):
    found = labelled(table, [missing, *"abbaab"])
    assert list(found.table.index) == SEVEN[1:]
    assert set(found.table["label"]) == {"a", "b"}
    assert found.complaints  # said, and the exit code is 1


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["unknown", "unknown", *"abaab"], "is 'unknown' a class (rows 2, 3)?"),
        (["-", *"abaaab"], "is '-' a class (row 2)?"),
        (["-1", *"010011"], "is -1 a value (row 2)?"),
        (["9", *"123123"], "is 9 a value (row 2)?"),
        (["-999", "0.1", "0.3", "-0.2", "0.4", "0.6", "-999"], "is -999 a value (rows 2, 8)?"),
        (["03. Apr", "3+4", "4+3", "3+4", "4+3", "3+4", "4+3"], "'03. Apr' (row 2) looks like a date"),
    ],
)
def test_labels_that_may_be_none_are_suspect(table, cells, words):
    (line,) = labelled(table, cells).suspicions
    assert words in line


@pytest.mark.parametrize(
    "cells", [["-", *"+-+-+-"], [*"1234567"], ["-15", "-9", "3", "9", "-20", "14", "7"], [*"none", *"abc"]]
)
def test_ordinary_labels_are_not_suspect(table, cells):
    assert not labelled(table, cells).suspicions


def test_words_for_nobody_are_no_patient_and_no_site(table):
    cells = ["unknown,?,a", "-,unknown,b", "None,A,a", "p,A,b", "p,a,b", "q,B,a", ",,a"]
    found = labelled(table, cells, "slide_id,patient_id,site,label")
    assert list(found.table["patient_id"]) == ["s0", "s1", "s2", "p", "p", "q", "s6"]
    assert found.sites == {"s2": "A", "s3": "A", "s4": "A", "s5": "B"}
    assert "no patient in rows 2, 3, 4 and 1 more" in found.complaints[0]


def test_the_row_numbers_of_pandas_are_no_patient_no_site_and_no_target(table):
    rows = [f"{k},{s},{'ab'[k % 2]},{k}" for k, s in enumerate(SEVEN)]
    for unnamed in ("", "Unnamed: 0"):
        found = read_labels(table("\n".join([f"{unnamed},slide_id,grade,fold", *rows])), SEVEN)
        assert found.targets == ("grade",)
        assert list(found.table["patient_id"]) == SEVEN
        assert not found.sites


@pytest.mark.parametrize(
    ("name", "slide"), [("/data/x/s-01.svs", "s-01"), ("C:\\x\\s-01.svs", "s-01"), ("7", "007"), ("s-1", "s-01")]
)
def test_folders_and_lost_zeros_ask_for_the_slide(table, name, slide):
    with pytest.raises(LabelError, match=re.escape(f"(row 2; is it {slide!r}?)")):
        read_labels(table(f"slide_id,label\n{name},a\nother,b\n"), [slide, "other"])


def test_a_slide_that_is_named_itself_is_not_asked_for(table):
    found = read_labels(table("slide_id,label\n007,a\n7,b\nother,b\n"), ["007", "other"])
    assert found.complaints == ("labels.csv: 1 labelled slides are absent (row 3): '7'",)


def test_no_column_of_slides_csv_is_a_target_unless_it_is_named(table):
    columns = [name for name in COLUMNS if name not in ("slide_id", "patient_id")]
    path = table(",".join(["slide_id", *columns, "grade"]) + "\n" + "\n".join(
        ",".join([f"s{k}", *(f"{name}{k}" for name in columns), "ab"[k % 2]]) for k in range(4)) + "\n")  # fmt: skip
    assert set(read_labels(path, [f"s{k}" for k in range(4)]).targets) == {"grade"}
