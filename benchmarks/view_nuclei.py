"""Half a million nuclei in the viewer: how soon they show, what a request takes, how smoothly a slide moves under them.

    python benchmarks/view_nuclei.py [--nuclei 500000] [--blocks 8] [--form geojson|parquet]

A slide of BLOCKS x BLOCKS copies of one painted block of 4,096 px, and crooked outlines of 24 points strewn over it;
both are written once, into out/. The browser is the system's Chromium, without a window and a GPU, at 1280 x 720.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from playwright.sync_api import Page, sync_playwright

from histossl.nuclei.export import write_geojson, write_parquet
from histossl.nuclei.instances import MEASURES, Nuclei
from histossl.study.folder import COLUMNS, Study
from histossl.wsi.geometry import Size
from nuclei_size import BLOCK, MPP, write

POINTS, RADIUS = 24, 3.5  # of an outline; µm


def strewn(count: int, size: Size) -> Nuclei:
    """Crooked outlines, evenly over a slide."""
    rng = np.random.default_rng(0)
    middle = rng.uniform(50, [size.width - 50, size.height - 50], (count, 2))
    angle = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    radius = RADIUS / MPP * (1 + 0.25 * rng.standard_normal((count, 1)) * np.sin(2 * angle)).clip(0.5, 1.5)
    points = middle[:, None] + radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    measures = np.zeros((count, len(MEASURES)), np.float32)
    measures[:, :2] = middle
    return Nuclei(points.reshape(-1, 2).astype(np.float32), np.arange(count + 1) * POINTS, measures)


def parts(nuclei: Nuclei, each: int = 5000):
    """A few thousand at once, as `segment` hands them over."""
    for first in range(0, len(nuclei), each):
        keep = np.zeros(len(nuclei), bool)
        keep[first : first + each] = True
        yield nuclei.chosen(keep)


def study_of(folder: Path, count: int, blocks: int, form: str) -> Study:
    """A study of one slide, with its nuclei."""
    slide, study = folder / f"nuclei-{blocks}.tiff", Study(folder / f"view-{blocks}-{count}-{form}")
    if not slide.exists():
        write(slide, blocks)
    study.write_slides([dict.fromkeys(COLUMNS, "") | {"slide_id": "large", "path": str(slide), "mpp": str(MPP)}])
    found = study.folder / "nuclei" / f"large.{form}"
    if not found.exists():
        found.parent.mkdir(exist_ok=True)
        {"geojson": write_geojson, "parquet": write_parquet}[form](
            found, parts(strewn(count, Size(blocks * BLOCK, blocks * BLOCK))), MPP
        )
    return study


@contextmanager
def served(study: Study) -> Iterator[tuple[str, psutil.Process]]:
    """The address of `histossl view`, and its process."""
    command = [sys.executable, "-m", "histossl", "view", str(study.folder)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        said = ""
        while "/\n" not in said:
            said += running.stderr.readline()
        yield re.search(r"http://\S+/", said)[0], psutil.Process(running.pid)
    finally:
        running.terminate()
        running.wait()


def until(page: Page, true: str) -> float:
    """Seconds until a JavaScript expression is true."""
    start = time.monotonic()
    while not page.evaluate(true):
        page.wait_for_timeout(10)
    return time.monotonic() - start


def frames(page: Page, what: str = "#viewer") -> str:
    """The milliseconds between frames while the slide, or another element, is dragged to and fro."""
    box = page.locator(what).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.evaluate("""() => {
        const gaps = window.gaps = []; let last = performance.now();
        const again = () => requestAnimationFrame(now => {
            gaps.push(now - last); last = now;
            if (window.gaps === gaps) again();
        });
        again();
    }""")
    page.mouse.move(x, y)
    page.mouse.down()
    for k in range(120):
        page.mouse.move(x + 150 * np.sin(k / 8), y + 80 * np.sin(k / 11))
    page.mouse.up()
    gaps = page.evaluate("() => { const all = gaps.slice(2); gaps = null; return all; }")
    return f"a frame {np.median(gaps):.0f} ms, 95 % of them {np.percentile(gaps, 95):.0f} ms at most"


def settled(page: Page) -> tuple[int, float]:
    """How many outlines are drawn when no more come, and the seconds until then."""
    start = last = time.monotonic()
    drawn = 0
    while time.monotonic() < last + 1.5:
        now = json.loads(page.evaluate("document.getElementById('overlay').dataset.drawn"))["nuclei"]
        if now != drawn:
            drawn, last = now, time.monotonic()
        page.wait_for_timeout(20)
    return drawn, last - start


def asked(address: str) -> tuple[float, int]:
    """Milliseconds and bytes of an answer."""
    start = time.perf_counter()
    with urllib.request.urlopen(address) as answer:
        data = answer.read()
    return 1e3 * (time.perf_counter() - start), len(data)


def main() -> None:
    """Print a line a figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nuclei", type=int, default=500_000)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--form", choices=("geojson", "parquet"), default="geojson")
    options = parser.parse_args()
    folder = Path("out/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    study = study_of(folder, options.nuclei, options.blocks, options.form)
    flags = ["--no-sandbox", "--disable-gpu"]
    with served(study) as (address, server), sync_playwright() as running:
        memory = lambda: server.memory_info().rss / 2**20  # noqa: E731
        page = running.chromium.launch(executable_path=shutil.which("chromium"), args=flags).new_page(
            viewport={"width": 1280, "height": 720}
        )
        page.goto(f"{address}slides/0")
        until(page, "document.documentElement.dataset.ready === 'slide'")
        first = page.evaluate("document.documentElement.dataset.milliseconds")
        print(f"first tile: {first} ms after the page was asked for")
        print(f"memory of the server: {memory():.0f} MiB")
        for again in ("", " again"):
            page.check("#show-nuclei")
            shown = until(page, "document.getElementById('overlay').dataset.drawn.includes('nuclei')")
            print(f"nuclei switched on{again}: shown after {shown:.1f} s; {memory():.0f} MiB")
            if not again:
                page.uncheck("#show-nuclei")
        print(f"density: {frames(page)}")
        for _ in range(12):
            page.click("#in")
            drawn, loaded = settled(page)
            if drawn:
                scale = page.locator("#scale span").inner_text()
                print(f"{drawn:,} outlines, scale bar {scale}, all there {loaded:.1f} s later: ", end="")
                print(frames(page))
        about = json.load(urllib.request.urlopen(f"{address}slides/0/nuclei.json"))
        print(f"a cell: {about['side']} px, {options.nuclei / len(about['cells']):.0f} nuclei")
        cells = list(about["cells"])[:: max(1, len(about["cells"]) // 20)]
        times = np.array([asked(f"{address}slides/0/nuclei/{cell}.bin") for cell in cells])
        milliseconds, size = np.median(times, 0)
        slowest = times[:, 0].max()
        print(f"a request of a cell: {milliseconds:.1f} ms, {size:,.0f} bytes; at most {slowest:.1f} ms")
        print(f"memory of the server: {memory():.0f} MiB")


if __name__ == "__main__":
    main()
