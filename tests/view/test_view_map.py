"""The map of the slides in a real browser: thousands of slides, pictures, links, labels by hand, the skeleton."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histossl.core.embeddings import write_embeddings
from histossl.study.folder import Study
from support.browsing import browser, no_wider_than_the_screen, page_of, served, shot, until  # noqa: F401
from support.viewed import folder  # noqa: F401 - a fixture

MANY = 3000


def ready(page, address: str) -> None:
    page.goto(address)
    page.wait_for_selector("html[data-ready=atlas]")


def state(page, name: str) -> str:
    return page.locator("#points").get_attribute(f"data-{name}") or ""


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """A study of 3,000 slides, of which there are only the vectors: two clouds."""
    study, rng = Study(tmp_path_factory.mktemp("many") / "study"), np.random.default_rng(0)
    kind = np.arange(MANY) % 2
    vectors = rng.normal(size=(MANY, 8)) + 6 * kind[:, None]
    empty = dict.fromkeys(study.columns, "") | {"width": "9", "height": "9", "tiles": "1", "status": "encoded"}
    rows = [empty | {"slide_id": f"s{k}", "path": f"s{k}.svs", "cloud": "ab"[kind[k]]} for k in range(MANY)]
    study.write_slides(rows)
    write_embeddings(study.embeddings, rows, {"giga-ssl": vectors}, {}, "made")
    return study.folder


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    """A study whose table may be written."""
    for name in ("slides.csv", "embeddings.h5ad", "predictions.csv"):
        (tmp_path / "study").mkdir(exist_ok=True)
        shutil.copy(folder / name, tmp_path / "study")
    shutil.copytree(folder / "tiles", tmp_path / "study" / "tiles")
    return tmp_path / "study"


def test_thousands_are_a_shade_and_points_when_few(browser, many, tmp_path):
    with served(many) as address, page_of(browser) as page:
        ready(page, address)
        until(page, f"document.getElementById('points').dataset.drawn === '{MANY}'")
        assert state(page, "dense") == "1"
        assert "shade" in page.locator("#told").inner_text()
        assert page.locator("#legend").inner_text().split() == ["a", "1500", "b", "1500"]
        picture = shot(page, tmp_path, "dense")[100:700, :940]
        coloured = np.ptp(picture, axis=2) > 60
        left, right = np.flatnonzero(coloured.any(axis=0))[[0, -1]]
        assert coloured.mean() > 0.02
        assert right - left > 500  # both clouds
        page.locator("#legend button").first.click()
        until(page, "document.getElementById('points').dataset.dense === ''")
        assert page.locator("#count").inner_text() == f"{MANY // 2} of {MANY} slides"


def test_zoomed_points_are_pictures_of_the_slides(browser, folder, tmp_path):
    with served(folder) as address, page_of(browser) as page:
        ready(page, address)
        until(page, "document.getElementById('points').dataset.drawn === '5'")
        assert state(page, "pictures") == "0"
        page.focus("#points")
        page.keyboard.press("ArrowRight")
        name = page.locator("#card b").inner_text()
        slide = int(state(page, "under"))
        place = page.evaluate("() => { const c = document.getElementById('card').style; return [c.left, c.top]; }")
        x, y = (float(value.removesuffix("px")) for value in place)
        box = page.locator("#points").bounding_box()
        x, y = box["x"] + x - 16, box["y"] + (y + 206 if y > 0 and y + 206 > box["height"] / 2 else y - 16)
        page.mouse.move(x, y)
        for _ in range(8):
            page.mouse.wheel(0, -120)
            page.wait_for_timeout(30)
        until(page, "Number(document.getElementById('points').dataset.pictures) > 0")
        assert state(page, "under") in (str(slide), ""), name
        shown = shot(page, tmp_path, "pictures")[100:700, :940]
        pink = np.abs(shown - [200, 120, 170]).max(axis=2) < 30
        assert pink.sum() > 300


def test_a_link_finds_what_was_shown(browser, many, folder):
    with served(many) as address, page_of(browser) as page:
        ready(page, address)
        page.fill("#filter", "s1")
        page.locator("#legend button").nth(1).click()
        page.focus("#points")
        for _ in range(5):
            page.keyboard.press("+")
        until(page, "location.hash.includes('at=')")
        until(page, "location.hash.includes('class=b')")
        count, link, drawn = page.locator("#count").inner_text(), page.url, state(page, "drawn")
        with page_of(browser) as other:
            ready(other, link)
            assert other.locator("#count").inner_text() == count
            until(other, "drawn => document.getElementById('points').dataset.drawn === drawn", drawn)
            assert other.locator("#filter").input_value() == "s1"
            assert other.locator("#legend button[aria-pressed=true]").inner_text().split()[0] == "b"
    with served(folder) as address, page_of(browser) as page:
        ready(page, f"{address}#at=1e999,NaN,0&ring=a,b&map=none&colour=none&class=none&q=%E0%A4%A")
        assert page.locator("#list-title").inner_text() == "0 chosen"  # no slide is called so
        page.goto(f"{address}slides/0#at=200,300,2&show=tiles,heat&class=kind%3A%20b")
        page.wait_for_selector("html[data-ready=slide]")
        until(page, "JSON.parse(document.getElementById('overlay').dataset.drawn || '{}').tiles > 0")
        assert page.locator("#overlays select option:checked").inner_text().endswith("b")
        assert page.locator("#scale span").inner_text() == "50 µm"


def test_the_view_is_saved_as_a_picture(browser, many, folder):
    for study, path in ((many, ""), (folder, "slides/0")):
        with served(study) as address, page_of(browser) as page:
            page.goto(address + path)
            page.wait_for_selector("html[data-ready]")
            page.wait_for_load_state("networkidle")
            with page.expect_download() as saved:
                page.click("#picture")
            assert saved.value.suggested_filename == ("study-map.png" if not path else "slide-0.png")
            picture = np.asarray(Image.open(io.BytesIO(Path(saved.value.path()).read_bytes())).convert("RGB"))
            assert min(picture.shape[:2]) > 400
            assert (np.ptp(picture.astype(int), axis=2) > 60).mean() > 0.01


@pytest.mark.parametrize("path", ["", "slides/0"])
def test_until_it_is_ready_the_page_has_a_shape(browser, folder, tmp_path, path):
    held: list = []
    with served(folder) as address, page_of(browser) as page:
        page.route("**/cohort.json" if not path else "**/facts.json", lambda route: held.append(route))
        page.goto(address + path)
        while not held:
            page.wait_for_timeout(50)
        assert page.evaluate("document.documentElement.dataset.ready") is None
        waiting = shot(page, tmp_path, "waiting")
        stage = waiting[120:600, 100:900].reshape(-1, 3)
        assert len(np.unique(stage // 4, axis=0)) > 1, "a white field"
        if not path:
            assert page.locator("main").get_attribute("aria-busy") == "true"
            assert page.locator("#count").inner_text() == "Reading the study …"
        held[0].continue_()
        page.wait_for_selector("html[data-ready]")
        assert page.locator("main[aria-busy=true]").count() == 0


def test_slides_are_labelled_by_hand_asked_first_and_undone(browser, copied, tmp_path):
    study = Study(copied)
    before = study.table.read_bytes()
    with served(copied) as address, page_of(browser) as page:
        ready(page, address)
        page.click("#label-box summary")
        assert page.locator("#label-write").is_disabled()
        # by keyboard: from slide to slide, Space picks
        page.focus("#points")
        page.keyboard.press("ArrowRight")
        page.keyboard.press(" ")
        first = int(state(page, "under"))
        assert "1 in all" in page.locator("#spoken").inner_text()
        page.fill("#label-column", "grade")
        page.fill("#label-value", "high")
        page.click("#label-write")
        assert "into the column “grade” of slides.csv for 1 slide?" in page.locator("#ask-what").inner_text()
        assert page.evaluate("document.activeElement.id") == "ask-no"
        page.keyboard.press("Escape")
        assert study.table.read_bytes() == before, "asked, not answered"
        page.click("#label-write")
        page.click("#ask-yes")
        until(page, "document.getElementById('label-said').textContent.startsWith('Written for 1 slide')")
        assert [row.get("grade") for row in study.slides()] == ["high" if k == first else "" for k in range(7)]
        page.click("#clear")
        # the others by a class of the legend, which replaces
        page.select_option("#colour", "ward")
        page.locator("#legend button").first.click()
        chosen = int(page.locator("#list-title").inner_text().split()[0])
        page.fill("#label-value", "low")
        page.click("#label-write")
        if first % 2 == 0:
            assert "high (1)" in page.locator("#ask-old").inner_text()
        page.click("#ask-yes")
        until(page, f"document.getElementById('label-said').textContent.startsWith('Written for {chosen} slides')")
        assert page.locator("#colour").input_value() == "grade"
        shot(page, tmp_path, "labelled")
        page.click("#probe")
        until(page, "document.querySelector('#probed h3') !== null")
        labelled = {row["slide_id"] for row in study.slides() if row["grade"]}
        asked_for = page.locator("#probed li b").all_inner_texts()
        assert asked_for
        assert not labelled & {text.partition(". ")[2].split("\n")[0] for text in asked_for}
        shot(page, tmp_path, "probed")
        page.click("#undo")
        until(page, "document.getElementById('label-said').textContent.startsWith('Undone')")
        assert sum(row["grade"] == "high" for row in study.slides()) == 1
        assert sum(bool(row["grade"]) for row in study.slides()) == 1


def test_a_read_only_study_offers_no_labels(browser, copied):
    with served(copied, read_only=True) as address, page_of(browser, (390, 844), "dark") as page:
        ready(page, address)
        page.click("#label-box summary")
        assert page.locator("#label-closed").is_visible()
        assert not page.locator("#label-form").is_visible()
        assert no_wider_than_the_screen(page)
