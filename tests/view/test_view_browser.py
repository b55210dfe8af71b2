"""The viewer in a real browser: what is on the screen, by mouse, by keyboard, on a phone; its console stays clean."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from histossl.core.embeddings import write_embeddings
from histossl.study.folder import Study
from support.browsing import PATIENCE, browser, no_wider_than_the_screen, page_of, served, shot, until  # noqa: F401
from support.viewed import folder  # noqa: F401 - a fixture

KINDS = ("CLL", "FL", "MCL")


def drawn(page) -> dict[str, int]:
    return json.loads(page.locator("#overlay").get_attribute("data-drawn") or "{}")


def until_true(page, told) -> None:
    """Wait for what the events of a page bring about."""
    for _ in range(PATIENCE // 100):
        if told():
            return
        page.wait_for_timeout(100)
    raise AssertionError("never came true")


def until_drawn(page, layer: str) -> None:
    until(page, "layer => JSON.parse(document.getElementById('overlay').dataset.drawn || '{}')[layer] > 0", layer)


def test_from_the_map_to_a_slide_its_overlays_and_a_neighbour(browser, folder, tmp_path):
    with served(folder) as address, page_of(browser) as page:
        page.goto(address)
        page.wait_for_selector("html[data-ready=atlas]")
        assert page.title() == "study – histossl"
        assert page.locator("#list a").count() == 7
        until(page, "document.getElementById('points').dataset.drawn === '5'")
        assert page.locator("#legend").inner_text().split() == ["a", "3", "b", "2", "not", "known", "2"]
        assert page.locator("#list .bad").inner_text() == "is none"
        # text is shown, never read as a page
        page.select_option("#colour", "ward")
        assert "<b>0</b>" in page.locator("#legend").inner_text()
        page.fill("#filter", "slide-3")
        assert page.locator("#list a").count() == 1
        page.fill("#filter", "")
        # a lasso around all of the map holds the slides that have a vector
        box = page.locator("#points").bounding_box()
        page.click("#lasso")
        corners = [(4, 4), (box["width"] - 4, 4), (box["width"] - 4, box["height"] - 4), (4, box["height"] - 4), (4, 8)]
        page.mouse.move(box["x"] + 4, box["y"] + 4)
        page.mouse.down()
        for x, y in corners:
            page.mouse.move(box["x"] + x, box["y"] + y, steps=3)
        page.mouse.up()
        assert page.locator("#list-title").inner_text() == "5 chosen"
        page.click("#clear")
        # by keyboard, with the name spoken
        page.focus("#points")
        page.keyboard.press("ArrowRight")
        name = page.locator("#card b").inner_text()
        assert name in page.locator("#spoken").inner_text()
        until(page, "document.querySelector('#card img').naturalWidth > 0")
        shot(page, tmp_path, "atlas")
        page.keyboard.press("Enter")
        page.wait_for_selector("html[data-ready=slide]")
        assert page.locator("h1").inner_text() == name

        page.goto(f"{address}slides/0")
        page.wait_for_selector("html[data-ready=slide]")
        until(page, "document.querySelector('#scale span').textContent.includes('µm')")
        page.wait_for_load_state("networkidle")
        plain = shot(page, tmp_path, "slide")
        middle = plain[300:460, 300:600].reshape(-1, 3).mean(0)
        assert np.abs(middle - [200, 120, 170]).max() < 6  # the painted tissue
        for layer in ("tissue", "tiles"):
            page.check(f"#show-{layer}")
            until_drawn(page, layer)
        assert drawn(page)["tiles"] > 50
        page.check("#show-heat")
        until_drawn(page, "heat")
        assert np.abs(shot(page, tmp_path, "overlays") - plain).mean() > 2
        for layer in ("tissue", "tiles", "heat"):
            page.uncheck(f"#show-{layer}")
        until(page, "document.getElementById('overlay').dataset.drawn === '{}'")
        page.check("#show-nuclei")
        until(page, "document.getElementById('said').textContent.startsWith('300 nuclei')")
        before = page.locator("#scale span").inner_text()
        for _ in range(2):
            page.click("#in")
        until_drawn(page, "nuclei")
        until(page, "before => document.querySelector('#scale span').textContent !== before", before)
        shot(page, tmp_path, "nuclei")

        assert page.locator("#predictions caption").inner_text() == "kind: labelled a"
        first = page.locator("#neighbours a").first
        name = first.locator("b").evaluate("node => node.firstChild.textContent")
        first.click()
        until(page, "name => document.title.startsWith(name)", name)
        page.wait_for_selector("html[data-ready=slide]")
        page.click("#atlas")
        page.wait_for_selector("html[data-ready=atlas]")


@pytest.mark.parametrize(("scheme", "paper"), [("light", (252, 251, 250)), ("dark", (22, 21, 26))])
def test_on_a_phone_by_day_and_by_night(browser, folder, tmp_path, scheme, paper):
    with served(folder) as address, page_of(browser, (390, 844), scheme) as page:
        page.goto(address)
        page.wait_for_selector("html[data-ready=atlas]")
        assert no_wider_than_the_screen(page)
        assert tuple(shot(page, tmp_path, "atlas")[2, 2]) == paper
        page.locator("#list a").nth(1).click()
        page.wait_for_selector("html[data-ready=slide]")
        assert no_wider_than_the_screen(page)
        shot(page, tmp_path, "slide")
        for button in page.locator("button:visible, a:visible").all():
            assert (button.inner_text() or button.get_attribute("aria-label") or "").strip(), "a button without a name"


def test_a_tile_that_leaves_the_screen_is_not_waited_for_and_asked_for_anew_when_it_comes_back(browser, folder):
    corner = "/slides/0/tiles/10/0_0.jpg"
    held, gone = [], []
    with served(folder) as address, page_of(browser) as page:

        def hold(route) -> None:
            held.append(route)
            if len(held) > 1:
                route.continue_()

        page.route(f"**{corner}", hold)
        page.on("requestfailed", lambda request: gone.append(request.url))
        page.goto(f"{address}slides/0")
        page.wait_for_selector("html[data-ready=slide]")
        box = page.locator("#viewer").bounding_box()
        left, top = box["x"] + 0.25 * box["width"], box["y"] + 40  # of the slide's corner
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(left, top)
        for _ in range(8):
            page.mouse.wheel(0, -300)
            page.wait_for_timeout(50)
        until_true(page, lambda: held)
        assert gone == []

        def drag(way: int) -> None:
            for _ in range(8):
                page.mouse.move(*middle)
                page.mouse.down()
                page.mouse.move(middle[0] + 400 * way, middle[1] + 250 * way, steps=4)
                page.mouse.up()

        drag(-1)
        until_true(page, lambda: gone)
        assert [url for url in gone if not url.endswith(corner)] == []
        drag(1)
        until_true(page, lambda: len(held) == 2)


def test_names_and_labels_are_shown_as_text(browser, folder, tmp_path):
    """Anything of them that became an element would ask for a picture and be heard on the console."""
    hostile = "<img src=x onerror=alert(1)>&amp;\"'"
    real, study = Study(folder), Study(tmp_path / "study")
    rows = [row | {"slide_id": f"{hostile}{k}", "patient_id": hostile} for k, row in enumerate(real.slides()[:5])]
    study.write_slides([*rows, {"slide_id": f"{hostile}5", "path": "none.svs", "status": "failed", "error": hostile}])
    write_embeddings(study.embeddings, rows, {"giga-ssl": np.random.default_rng(0).normal(size=(5, 8))}, {}, "made")
    with (study.folder / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["target", "embedding", "slide_id", "patient_id", "truth", "predicted", f"p({hostile})"])
        writer.writerows([hostile, hostile, row["slide_id"], "", hostile, hostile, "0.5"] for row in rows)
    with served(study.folder) as address, page_of(browser) as page:
        page.goto(address)
        page.wait_for_selector("html[data-ready=atlas]")
        page.select_option("#colour", hostile)
        assert hostile in page.locator("#legend").inner_text()
        assert page.locator("#list b").first.inner_text().startswith(hostile)
        page.focus("#points")
        page.keyboard.press("ArrowRight")
        assert page.locator("#card b").inner_text().startswith(hostile)
        page.keyboard.press("Enter")
        page.wait_for_selector("html[data-ready=slide]")
        assert page.locator("h1").inner_text().startswith(hostile)
        assert hostile in page.locator("#predictions").inner_text()
        assert page.locator("[onerror]").count() == 0


def test_a_slide_that_cannot_be_read_says_so_on_its_page(browser, folder, tmp_path):
    with served(folder) as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{address}slides/6")
        page.wait_for_selector("html[data-ready=trouble]", timeout=PATIENCE)
        assert "zz-no-slide.svs" in page.locator("#trouble").inner_text()
        assert not page.locator("#overlays-box").is_visible()
        shot(page, tmp_path, "trouble")
        context.close()


def histossl(*words: object) -> None:
    """Run the program in a process of its own: Playwright's thread suffers no processes beside it."""
    subprocess.run([sys.executable, "-m", "histossl", *map(str, words)], check=True)


def gone_round(page, address: str) -> None:
    """Ask for the atlas and wait until it is there."""
    page.goto(address)
    page.wait_for_selector("html[data-ready=atlas]")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_slide_with_its_nuclei(browser, data_dir, tmp_path):
    slide, study = data_dir / "slides" / "CMU-1-Small-Region.svs", tmp_path / "study"
    histossl("inspect", slide, "--out", study, "--workers=1")
    histossl("nuclei", "segment", slide, "--out", study / "nuclei", "-m", "prior", "--workers=1")
    for scheme, size in (("light", (1280, 720)), ("dark", (390, 844))):
        with served(study) as address, page_of(browser, size, scheme) as page:
            gone_round(page, address)
            assert page.locator(".unless-map").is_visible()
            assert [one.is_visible() for one in page.locator(".of-map").all()] == [False, False]
            shot(page, tmp_path, f"atlas-{scheme}")
            page.locator("#list a").first.click()
            page.wait_for_selector("html[data-ready=slide]")
            for layer in ("tissue", "tiles", "nuclei"):
                page.check(f"#show-{layer}")
            until(page, "document.getElementById('said').textContent.includes('nuclei')")
            page.evaluate("scrollTo(0, 0)")
            page.wait_for_timeout(1000)
            shot(page, tmp_path, f"slide-{scheme}")
            for _ in range(3):
                page.click("#in")
            until_drawn(page, "nuclei")
            page.wait_for_timeout(1000)
            assert drawn(page)["nuclei"] > 200
            assert shot(page, tmp_path, f"nuclei-{scheme}").std() > 20
            assert no_wider_than_the_screen(page)


@pytest.fixture(scope="module")
def lymphoma(data_dir, tmp_path_factory) -> Path:
    """A study of 36 fields of real lymphoma, four of each of nine patients, with a probe, heatmaps and nuclei."""
    source, folder = data_dir / "cohort" / "lymphoma", tmp_path_factory.mktemp("lymphoma")
    with (source / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["slide_id"])
    of = {kind: list(dict.fromkeys(row["patient_id"] for row in rows if row["label"] == kind))[:3] for kind in KINDS}
    of_patient = [[row for row in rows if row["patient_id"] == one][:4] for kind in KINDS for one in of[kind]]
    chosen = [row for four in of_patient for row in four]
    (folder / "slides").mkdir()
    for row in chosen:
        name = f"{row['slide_id']}.jpg"
        (folder / "slides" / name).symlink_to((source / "slides" / name).resolve())
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(chosen[0]))
        writer.writeheader()
        writer.writerows(chosen)
    study, labels = folder / "lymphoma", folder / "labels.csv"
    small = "--mpp-default=0.5 --tile.px=105 --tile.mpp=0.5 --encode.views=4 --encode.tiles=32 --pretrain.epochs=10"
    probe = ["--probe.shots=[]", "--probe.folds=3"]
    histossl("run", folder / "slides", "--out", study, "--labels", labels, *small.split(), *probe, "--workers=1")
    some = [row["slide_id"] for row in chosen[::12]]
    histossl("heatmap", study, "--labels", labels, f"--slides={json.dumps(some)}", *probe)
    (folder / "some").mkdir()
    for name in some:
        (folder / "some" / f"{name}.jpg").symlink_to((folder / "slides" / f"{name}.jpg").resolve())
    found = study / "nuclei"
    histossl("nuclei", "segment", folder / "some", "--out", found, "-m", "prior", "--mpp-default=0.5", "--workers=1")
    histossl("report", study)
    return study


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_real_lymphoma_from_the_map_to_a_slide_its_overlays_and_a_neighbour(browser, lymphoma, tmp_path):
    name = sorted(path.stem for path in (lymphoma / "nuclei").glob("*.geojson"))[0]
    with served(lymphoma) as address, page_of(browser) as page:
        gone_round(page, address)
        until(page, "document.getElementById('points').dataset.drawn === '36'")
        assert page.locator("#legend").inner_text().split() == ["CLL", "12", "FL", "12", "MCL", "12"]
        page.locator("#points").hover(position={"x": 300, "y": 200})
        shot(page, tmp_path, "atlas")
        page.fill("#filter", name)
        page.locator("#list a").first.click()
        page.wait_for_selector("html[data-ready=slide]")
        for layer in ("tissue", "tiles", "heat", "nuclei"):
            page.check(f"#show-{layer}")
            until_drawn(page, layer) if layer != "nuclei" else None
        for _ in range(2):
            page.click("#in")
        until_drawn(page, "nuclei")
        page.wait_for_timeout(1000)
        assert shot(page, tmp_path, "overlays").std() > 20
        assert page.locator("#predictions caption").inner_text().startswith("label: labelled")
        first = page.locator("#neighbours a").first
        named = first.locator("b").evaluate("node => node.firstChild.textContent")
        first.click()
        until(page, "name => document.title.startsWith(name)", named)
        page.wait_for_selector("html[data-ready=slide]")
        patient = lambda slide: slide.rpartition("_")[0]  # noqa: E731
        assert patient(named) != patient(name)
        shot(page, tmp_path, "neighbour")
    with served(lymphoma) as address, page_of(browser, (390, 844), "dark") as page:
        gone_round(page, address)
        shot(page, tmp_path, "atlas-phone")
        page.goto(f"{address}slides/0")
        page.wait_for_selector("html[data-ready=slide]")
        page.wait_for_load_state("networkidle")
        shot(page, tmp_path, "slide-phone")
        assert no_wider_than_the_screen(page)
    with page_of(browser) as page:
        page.goto((lymphoma / "report.html").as_uri())
        for title in ("What the vectors are worth", "Similar slides", "What the classifier looked at", "Nuclei"):
            assert page.get_by_role("heading", name=title, exact=True).is_visible()
        page.screenshot(path=tmp_path / "report.png", full_page=True)
