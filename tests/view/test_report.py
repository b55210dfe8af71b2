"""The report: whole, self-contained, safe with hostile names, small, and true to what it was given."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histossl.evaluate.labels import Labels
from histossl.evaluate.probe import probe, write_probe
from histossl.evaluate.settings import ProbeSettings
from histossl.view.report.charts import curve, slide_map, small_picture
from histossl.view.report.maps import POINTS, THUMBNAILS, slide_maps
from histossl.view.report.page import PICTURES, ROWS, ReportInput, write_report
from histossl.view.report.sheets import Picture, Sheet, heatmaps_sheet, hits_sheet, nuclei_sheet

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)> & {{ 7 * 7 }} $\\frac{1}{"
VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Tags, their attributes, the text outside of style, and whether every tag is closed in turn."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.open, self.text, self.broken = [], [], [], "", []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.broken.append(tag)

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def table_of(names, **more):
    return pd.DataFrame({"slide_id": names, "patient_id": "", "tiles": "5", "status": "encoded", "error": ""} | more)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study with a bit of everything, all of whose names are hostile."""
    folder = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    ids = [f"{HOSTILE}{k}" for k in range(30)]
    vectors = rng.normal(size=(30, 8))
    table = pd.DataFrame({"patient_id": ids, HOSTILE: [f"{HOSTILE}{k % 2}" for k in range(30)]}, index=pd.Index(ids))
    settings = ProbeSettings(bootstraps=100, repeats=1, shots=(8,))
    result = probe({"giga-ssl": vectors, "mean pooling": vectors[:, :3]}, ids, Labels(table, (HOSTILE,)), settings)
    write_probe(result, folder)
    content = pd.read_json(folder / "probe.json", typ="series").to_dict()
    Image.new("RGB", (700, 300), "purple").save(folder / "qc.png")
    slides = pd.concat([table_of(ids), table_of(["bad" + HOSTILE], status="failed", error=HOSTILE)], ignore_index=True)
    log = pd.DataFrame(
        {"step": [10, 20, 30], "loss": [3.0, 2.0, 1.25], "spread": [0.2, np.nan, 0.5], HOSTILE: [1, 2, 3]}
    )
    return ReportInput(
        title=HOSTILE,
        slides=slides,
        qc={ids[0]: folder / "qc.png", ids[1]: folder / "absent.png"},
        training=log,
        vectors=vectors,
        ids=ids,
        labels=table,
        probe=content,
        slide_bytes=412_000_000_000,
        settings={"probe": {"folds": 5}, HOSTILE: HOSTILE},
        versions={"histossl": HOSTILE},
        durations={HOSTILE: 61.0},
        sheets=[Sheet(HOSTILE, HOSTILE, [Picture(folder / "qc.png", HOSTILE, HOSTILE), Picture(folder / "no", "no")])],
    )


@pytest.fixture
def page(study, tmp_path):
    write_report(tmp_path / "report.html", study)
    return Page(tmp_path / "report.html")


def test_the_page_opens_with_a_picture(page):
    assert page.source.index("<img ") < page.source.index("<h1>")
    assert page.tags.count("image") == 1


def test_names_are_shown_and_never_run(page):
    assert "script" not in page.tags
    assert page.tags.count("img") == 3  # one of them on the first screen
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) > 40
    assert (page.open, page.broken) == ([], [])


def test_the_page_loads_nothing(page):
    outside = page.source.replace(HOSTILE, "")
    assert not re.search(r"https?://|url\((?!#)|@import|javascript:", outside)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith(("data:", "#")) for value in links)
    assert any("default-src 'none'" in (value or "") for name, value in page.attributes if name == "content")
    known = {value for name, value in page.attributes if name == "id"}
    assert {value[1:] for value in links if value.startswith("#")} <= known


def test_the_figures_are_those_given(page, study):
    text = " ".join(page.text.split())
    best = next(row for row in study.probe["table"] if row["n_labelled"] == "all")
    assert f"{best['auroc']:.2f}".removeprefix("0") in text
    assert "412 GB" in text
    assert "of slides became 960 bytes of vectors" in text
    assert re.search(r"slides\s*31\s*of them failed\s*1\s*tiles on tissue\s*150\b", text)
    assert "1.25" in text
    assert "0.5" in text
    assert "probe.folds" in text
    assert study.probe["method"] in text
    assert page.tags.count("use") >= 30


def test_the_same_study_gives_the_same_bytes(study, tmp_path):
    for name in ("a", "b"):
        write_report(tmp_path / name, study)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_is_not_there_is_left_out(tmp_path):
    write_report(tmp_path / "r.html", ReportInput("bare", table_of(["a"])))
    page = Page(tmp_path / "r.html")
    for heading in ("What failed", "What the vectors are worth", "Map of the slides", "Training", "Tissue and tiles"):
        assert heading not in page.text
    assert "1 slides were inspected" in " ".join(page.text.split())
    write_report(tmp_path / "r.html", ReportInput("none", pd.DataFrame({"slide_id": []}), training=pd.DataFrame()))
    assert not Page(tmp_path / "r.html").broken


def test_names_that_are_not_unicode_do_not_stop_the_page(tmp_path):
    write_report(tmp_path / "r.html", ReportInput("t", table_of(["caf\udce9"], status="failed", error="x: y")))
    assert "caf?" in Page(tmp_path / "r.html").text


def test_a_large_cohort_stays_a_small_page(tmp_path):
    n = 10_000
    rng = np.random.default_rng(0)
    ids = [f"slide-{k:05d}" for k in range(n)]
    labels = pd.DataFrame({"label": rng.integers(12, size=n).astype(str)}, index=pd.Index(ids))
    Image.fromarray(rng.integers(0, 255, (900, 2048, 3), np.uint8)).save(tmp_path / "qc.jpg")
    slides = table_of(ids)
    slides.loc[5000:5299, ["status", "error"]] = ["failed", "name: no tissue; look at it"]
    steps = np.arange(20_000)
    context = ReportInput(
        title="large",
        slides=slides,
        qc={name: tmp_path / "qc.jpg" for name in ids},  # noqa: C420 - whose values pyright cannot tell
        training=pd.DataFrame({"step": steps, "loss": rng.normal(size=len(steps))}),
        vectors=rng.normal(size=(n, 16)),
        ids=ids,
        labels=labels,
    )
    write_report(tmp_path / "r.html", context)
    page = Page(tmp_path / "r.html")
    assert len(page.source) < 2_500_000
    assert page.tags.count("img") == 2 + PICTURES
    drawn = page.tags.count("image")  # pictures on the map, where they do not cover each other
    assert 10 < drawn <= THUMBNAILS
    assert page.source.count("<title>slide-") == POINTS + drawn
    assert "Quality control left out no tile." in page.text
    assert f"and {300 - ROWS} more in slides.csv" in page.text
    assert "300 × no tissue; look at it" in page.text
    assert "4 others" in page.text  # twelve classes, eight colours


def test_five_hundred_slides_with_everything_stay_under_fifteen_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    ids = [f"slide-{k:03d}" for k in range(500)]
    Image.fromarray(rng.integers(0, 255, (1200, 1200, 3), np.uint8)).save(tmp_path / "noise.jpg")  # the worst to pack
    for folder, ending in (("heatmaps/a", ".png"), ("heatmaps/b", ".png"), ("nuclei", "-overlay.jpg")):
        (tmp_path / folder).mkdir(parents=True)
        for name in ids[:40]:
            (tmp_path / folder / f"{name}{ending}").symlink_to(tmp_path / "noise.jpg")
    (tmp_path / "nuclei" / "nuclei.csv").write_text("file,nuclei\nslide-000.svs,123\n")
    vectors = rng.normal(size=(500, 64))
    qc = dict.fromkeys(ids, tmp_path / "noise.jpg")
    sheets = hits_sheet(vectors, ids, {}, qc), heatmaps_sheet(tmp_path), nuclei_sheet(tmp_path)
    assert all(sheets)
    labels = pd.DataFrame({f"target {k}": rng.integers(5, size=500).astype(str) for k in range(6)}, index=pd.Index(ids))
    context = ReportInput("large", table_of(ids), qc, None, vectors, ids, labels, sheets=sheets)
    write_report(tmp_path / "r.html", context)
    page = Page(tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 15_000_000
    assert page.tags.count("img") == 2 + PICTURES + 4 * 5 + 8 + 8
    assert "123 nuclei" in page.text


def test_what_is_alike_is_shown_beside_what_was_asked_for():
    vectors = np.array([[1.0, 0], [0.9, 0.1], [-1, 0.3], [0, -1]])
    pictures = {name: "x" for name in "abcd"}  # noqa: C420
    sheet = hits_sheet(vectors, list("abcd"), {"a": "p", "b": "p"}, pictures)
    assert [picture.caption for picture in sheet.pictures[:3]] == ["a", "d", "c"]  # b is of the same patient
    assert [picture.note for picture in sheet.pictures].count("query") == 4
    assert hits_sheet(vectors[:2], ["a", "b"], {}, {}) is None


def test_the_map_keeps_distances_in_proportion_and_inside():
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(50, 2)) * [3, 1]
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0][:2]
    xy, height, share = slide_map(plane @ turn + 7)
    assert share == pytest.approx(1)
    assert (xy >= 13.9).all()
    assert (xy <= [626.1, height - 13.9]).all()
    before = np.linalg.norm(plane[:, None] - plane[None], axis=-1)
    after = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
    ratio = after[before > 0] / before[before > 0]
    assert np.ptp(ratio) < 1e-6 * ratio.mean()
    for flat in (np.ones((4, 3)), rng.normal(size=(4, 1))):
        assert np.isfinite(slide_map(flat)[0]).all()


def test_curves_and_pictures_stay_small(tmp_path):
    long = curve(list(range(100_000)), list(np.sin(np.arange(100_000) / 9000)))
    assert len(long) < 20_000
    assert "var(--accent)" in long
    Image.new("RGBA", (3000, 500), (255, 0, 0, 128)).save(tmp_path / "wide.png")
    uri = small_picture(tmp_path / "wide.png", 320)
    assert uri.startswith("data:image/jpeg;base64,")
    assert len(uri) < 5000


def test_of_a_large_picture_the_part_is_shown_in_which_there_is_something(tmp_path):
    glass = np.full((900, 1300, 3), 240, np.uint8)
    glass[500:800, 100:400] = np.random.default_rng(0).integers(0, 255, (300, 300, 3))
    Image.fromarray(glass).save(tmp_path / "a.png")
    data = base64.b64decode(small_picture(tmp_path / "a.png", 400, part=True).partition(",")[2])
    shown = np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(float)
    assert shown.shape == (400, 400)
    assert shown.std() > 40
    Image.fromarray(glass[:100, :150]).save(tmp_path / "a.png")
    data = base64.b64decode(small_picture(tmp_path / "a.png", 400, part=True).partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (150, 100)


def test_the_first_screen_says_what_not_to_believe(tmp_path):
    ids = [f"s{k}" for k in range(24)]
    vectors = np.random.default_rng(0).normal(size=(24, 4))
    table = pd.DataFrame({"patient_id": ids, "grade": ["low", "high"] * 12}, index=pd.Index(ids))
    chosen = ProbeSettings(bootstraps=100, repeats=1, shots=())
    found = probe({"giga-ssl": vectors, "mean pooling": vectors}, ids, Labels(table, ("grade",)), chosen)
    content = {"table": found.table.to_dict("records"), "method": "Logistic regression."}
    content["table"][0] |= dict.fromkeys(("difference", "difference_low", "difference_high"))
    settings = {"inspect": {"tile": {"px": 64, "mpp": 1.0, "min_tissue": 0.5}}, "encode": {"views": 4, "tiles": 9}}
    write_report(
        tmp_path / "r.html",
        ReportInput("t", table_of(ids), probe=content, settings=settings, versions={"histossl": "1.2"}, painted=True),
    )
    text = " ".join(Page(tmp_path / "r.html").text.split())
    assert "The slides are painted by this program" in text
    assert "There are 24 labelled patients: read the intervals" in text
    assert "grade: this method is not surely better than mean pooling." in text
    assert "24 of 24 slides have fewer than 10 tiles" in text
    assert "Slides were processed with histossl 1.2." in text
    assert "tiles of 64 x 64 pixels at 1.0 µm per pixel, of which at least 50 % were tissue" in text
    assert "Lazard T" in text


def test_maps_are_coloured_by_classes_not_by_times_or_measures():
    ids = [f"s{k}" for k in range(12)]
    columns = {"os": [f"{k}.5+" for k in range(12)], "stage": list("1122" * 3), "age": [str(k) for k in range(12)]}
    labels = pd.DataFrame(columns, index=ids)
    slides = [{"slide_id": name, "patient_id": f"p{k // 2}"} for k, name in enumerate(ids)]
    vectors = np.random.default_rng(0).normal(size=(12, 4))

    def names(table: pd.DataFrame) -> list[str]:
        return [one["name"] for one in slide_maps(vectors, ids, table, slides, {})["maps"]]

    assert names(labels) == ["stage"]
    assert names(labels[["os", "age"]]) == names(labels[[]]) != ["os", "age"]  # as where there are no targets
