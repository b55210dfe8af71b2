"""Takes the screenshots of the pages and README's picture anew, from the demonstration: `make pictures`.

    python .ci/pictures.py [STUDY]

The browser is the system's Chromium, without a window, at 1280 x 720. The study is that of `histossl demo`, whose
slides, labels and places are the same on every machine.
"""

from __future__ import annotations

import csv
import io
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageStat
from playwright.sync_api import Page, sync_playwright

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
NAMES = ("view-map.jpg", "view-label.jpg", "view-slide.jpg", "report.jpg")
PATIENCE = 300_000  # ms
WIDE, GAP = 1082, 20  # pixels of README's picture


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


def front(study: Path) -> None:
    """README's picture: two slides of the same kinds of tissue, scattered and clustered, and what the vectors know."""
    with (study / "cohort" / "labels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    scattered = next(row for row in rows if row["arrangement"] == "at random")
    alike = [row for row in rows if all(row[name] == scattered[name] for name in ("composition", "lesion"))]
    pictures = {row["slide_id"]: Image.open(study / "qc" / f"{row['slide_id']}.jpg").convert("RGB") for row in alike}
    colours = {name: ImageStat.Stat(one).mean for name, one in pictures.items()}
    first = scattered["slide_id"]
    clustered = [row["slide_id"] for row in alike if row["arrangement"] == "clustered"]
    second = min(clustered, key=lambda name: math.dist(colours[name], colours[first]))  # of the same laboratory
    slides = pictures[first], pictures[second]
    figure = Image.open(study / "probe-arrangement.png").convert("RGB")
    figure = figure.resize((WIDE, round(figure.height * WIDE / figure.width)), Image.Resampling.LANCZOS)
    wide, gap = (WIDE - GAP) // 2, GAP
    shown = [one.resize((wide, round(one.height * wide / one.width)), Image.Resampling.LANCZOS) for one in slides]
    high = max(one.height for one in shown)
    whole = Image.new("RGB", (WIDE, high + gap + figure.height), "white")
    for k, one in enumerate(shown):
        whole.paste(one, (k * (wide + gap), 0))
    whole.paste(figure, (0, high + gap))
    whole.save(PICTURES.parent / "demo.jpg", quality=85, optimize=True)


def main() -> None:
    """Take all of NAMES, and README's picture."""
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
    front(study)


if __name__ == "__main__":
    main()
