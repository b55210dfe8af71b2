"""Thousands of slides on the viewer's map: how soon it shows, and how smoothly it moves.

    python benchmarks/view_map.py [--slides 10000]

The study has vectors and no slides; it is written once, into out/. The browser is the system's Chromium, without a
window and a GPU, at 1280 x 720.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, sync_playwright

from histossl.core.embeddings import write_embeddings
from histossl.study.folder import Study
from view_nuclei import frames, served, until

CLOUDS, FEATURES = 5, 64


def study_of(folder: Path, count: int) -> Study:
    """A study of so many slides in five clouds."""
    study, rng = Study(folder / f"map-{count}"), np.random.default_rng(0)
    if study.embeddings.exists():
        return study
    cloud = rng.integers(0, CLOUDS, count)
    vectors = rng.normal(size=(count, FEATURES))
    vectors[:, :2] = 3 * vectors[:, :2] + 9 * np.stack([np.cos(1.257 * cloud), np.sin(1.257 * cloud)], 1)
    empty = dict.fromkeys(study.columns, "") | {"width": "40000", "height": "30000", "status": "encoded"}
    tiles = rng.integers(50, 3000, count)
    rows = [
        empty
        | {"slide_id": f"slide-{k:05d}", "path": f"slide-{k:05d}.svs", "patient_id": f"p{k // 2}"}
        | {"tiles": str(tiles[k]), "cloud": "ABCDE"[cloud[k]]}
        for k in range(count)
    ]
    study.write_slides(rows)
    write_embeddings(study.embeddings, rows, {"giga-ssl": vectors}, {}, "made")
    return study


def shown(page: Page) -> str:
    """What the map says that it drew."""
    told = page.evaluate("({...document.getElementById('points').dataset})")
    return f"{int(told['drawn']):,} slides, {'a shade' if told['dense'] else 'points'}"


def main() -> None:
    """Print a line a figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--slides", type=int, default=10_000)
    options = parser.parse_args()
    study = study_of(Path("out/benchmarks"), options.slides)
    with served(study) as (address, server), sync_playwright() as running:
        flags = ["--no-sandbox", "--disable-gpu"]
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        start = time.monotonic()
        page.goto(address)
        until(page, "document.documentElement.dataset.ready === 'atlas'")
        print(f"map: {time.monotonic() - start:.1f} s after the page was asked for; {shown(page)}: ", end="")
        print(frames(page, "#points"))
        for steps in (3, 4, 5, 7):
            page.click("#whole")
            page.focus("#points")
            for _ in range(steps):
                page.keyboard.press("+")
            page.wait_for_timeout(500)
            print(f"zoomed: {shown(page)}: {frames(page, '#points')}")
        start = time.monotonic()
        page.fill("#filter", "slide-01")
        until(page, "document.getElementById('count').textContent.includes(' of ')")
        print(f"filter: {1e3 * (time.monotonic() - start):.0f} ms; memory of the server: ", end="")
        print(f"{server.memory_info().rss / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
