"""The viewer in the system's Chromium: a server in a thread, pages whose console must stay clean, screenshots."""

from __future__ import annotations

import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from PIL import Image

from histossl.cli.view_command import _listen
from histossl.study.folder import Study
from histossl.view.app import Viewer
from support.viewed import TOKEN

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no chromium (apt-get install chromium)", allow_module_level=True)
FLAGS = "no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update disable-sync"
PATIENCE = 60_000  # ms


@contextmanager
def served(study: Path, **more):
    """The address of a viewer that answers from a thread."""
    viewer = Viewer(Study(study), study / "nuclei", **more)
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
    page.on(
        "request",
        lambda request: (
            said.append(request.url) if request.url.startswith("http") and "//127.0.0.1:" not in request.url else None
        ),
    )
    yield page
    assert [text for text in said if not text.startswith(("blob:", "data:"))] == []
    context.close()


def shot(page, tmp_path: Path, name: str) -> np.ndarray:
    """A screenshot, kept, as (h, w, 3) int."""
    page.screenshot(path=tmp_path / f"{name}.png")
    return np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)


def until(page, true: str, arg: object = None) -> None:
    """Wait for a JavaScript expression; Playwright's own way evaluates text in the page, which the policy forbids."""
    for _ in range(PATIENCE // 100):
        if page.evaluate(true, arg):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"never came true: {true}")


def no_wider_than_the_screen(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")
