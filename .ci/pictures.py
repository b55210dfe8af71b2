"""Takes the screenshots of the pages anew, from the demonstration: `make pictures`.

    python .ci/pictures.py [STUDY]

The browser is the system's Chromium, without a window, at 1280 x 720. The study is that of `histossl demo`, whose
slides, labels and places are the same on every machine.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
NAMES = ("view-map.jpg", "view-label.jpg", "view-slide.jpg", "report.jpg")
PATIENCE = 300_000  # ms


@contextmanager
def served(study: Path) -> Iterator[str]:
    """The address of `histossl view`."""
    command = [sys.executable, "-m", "histossl", "view", str(study)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        while "/\n" not in said:
            said += running.stderr.readline()  # type: ignore[union-attr]
        yield re.search(r"http://\S+/", said)[0]  # type: ignore[index]
    finally:
        running.terminate()
        running.wait()


def keep(page: Page, name: str) -> None:
    """Save what the page shows, once its pictures are there."""
    pending = "[...document.images].some((one) => one.checkVisibility() && one.loading !== 'lazy' && !one.complete)"
    first = "[...document.querySelectorAll('#list img')].slice(0, 4).some((one) => !one.naturalWidth)"
    for _ in range(600):
        if not page.evaluate(f"{pending} || {first}"):
            break
        page.wait_for_timeout(100)
    shown = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    shown.save(PICTURES / name, quality=82, optimize=True)


def atlas(page: Page, address: str) -> None:
    """The map, and the labels by hand; nothing is written."""
    page.goto(f"{address}#colour=composition")
    page.wait_for_selector("html[data-ready=atlas]")
    keep(page, "view-map.jpg")
    page.click("#label-box summary")
    page.fill("#label-column", "composition")
    page.click("#probe")
    page.wait_for_selector("#probed h3")
    keep(page, "view-label.jpg")


def slide(page: Page, address: str) -> None:
    """A slide with its tissue and tiles."""
    page.goto(f"{address}slides/1#show=tissue,tiles")
    page.wait_for_selector("html[data-ready=slide]")
    page.wait_for_load_state("networkidle")
    keep(page, "view-slide.jpg")


def main() -> None:
    """Take all of NAMES."""
    study = Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo")
    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.set_default_timeout(PATIENCE)
        with served(study) as address:
            atlas(page, address)
            slide(page, address)
        page.goto((study.resolve() / "report.html").as_uri())
        page.wait_for_load_state("networkidle")
        keep(page, "report.jpg")
        browser.close()


if __name__ == "__main__":
    main()
