"""The viewer in a real browser: what is on the screen, by mouse, by keyboard, on a phone; its console stays clean."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from PIL import Image

from histossl.cli import main
from histossl.study import Study
from histossl.view.app import Viewer
from histossl.view.commands import _listen
from viewed import TOKEN, folder  # noqa: F401 - a fixture

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no chromium (apt-get install chromium)", allow_module_level=True)
FLAGS = "no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update disable-sync"
PATIENCE = 60_000  # ms


@contextmanager
def served(study: Path):
    """The address of a viewer that answers from a thread."""
    viewer = Viewer(Study(study), study / "nuclei")
    listening = _listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(viewer.guarded(TOKEN), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/{TOKEN}/"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS.split()])
        yield chromium
        chromium.close()


@contextmanager
def page_of(browser, size=(1280, 720), scheme="light"):
    """A page whose console must stay clean."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page, said = context.new_page(), []
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if "//127.0.0.1:" not in request.url else None)
    yield page
    assert [text for text in said if not text.startswith(("blob:", "data:"))] == []
    context.close()


def shot(page, tmp_path: Path, name: str) -> np.ndarray:
    """A screenshot, kept, as (h, w, 3) int."""
    page.screenshot(path=tmp_path / f"{name}.png")
    return np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)


def drawn(page) -> dict[str, int]:
    return json.loads(page.locator("#overlay").get_attribute("data-drawn") or "{}")


def until(page, true: str, arg: object = None) -> None:
    """Wait for a JavaScript expression; Playwright's own way evaluates text in the page, which the policy forbids."""
    for _ in range(PATIENCE // 100):
        if page.evaluate(true, arg):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"never came true: {true}")


def until_drawn(page, layer: str) -> None:
    until(page, "layer => JSON.parse(document.getElementById('overlay').dataset.drawn || '{}')[layer] > 0", layer)


def no_wider_than_the_screen(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


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


@pytest.mark.slow
def test_a_real_slide_with_its_nuclei(browser, data_dir, tmp_path):
    slide, study = data_dir / "slides" / "CMU-1-Small-Region.svs", tmp_path / "study"
    assert main(["inspect", str(slide), "--out", str(study), "--workers=1"]) == 0
    assert main(["nuclei", "segment", str(slide), "--out", str(study / "nuclei"), "-m", "prior", "--workers=1"]) == 0
    with served(study) as address, page_of(browser) as page:
        page.goto(address)
        page.wait_for_selector("html[data-ready=atlas]")
        assert page.locator(".unless-map").is_visible()
        page.locator("#list a").first.click()
        page.wait_for_selector("html[data-ready=slide]")
        for layer in ("tissue", "tiles", "nuclei"):
            page.check(f"#show-{layer}")
        for _ in range(3):
            page.click("#in")
        until_drawn(page, "nuclei")
        assert drawn(page)["nuclei"] > 300
        picture = shot(page, tmp_path, "nuclei")
        assert picture.std() > 20
