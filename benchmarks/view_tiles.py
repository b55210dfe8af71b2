"""The viewer's tiles: how soon the first comes, and what fifty requests at once cost in memory, round after round.

    python benchmarks/view_tiles.py SLIDE [SLIDE ...]

The first tile is the one that a page begins with, of a slide that was not opened before; asked for by the program, so
that no browser counts. Rounds of fifty tiles of the finest level, all at once, none twice.
"""

from __future__ import annotations

import json
import sys
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from histossl.study.folder import COLUMNS, Study
from histossl.view.pyramid import SIDE, Pyramid
from histossl.wsi.geometry import Size
from view_nuclei import asked, served

AT_ONCE, ROUNDS = 50, 6


def main(slides: list[Path]) -> None:
    """Print a line a slide."""
    with tempfile.TemporaryDirectory() as folder:
        study = Study(folder)
        rows = [{"slide_id": path.stem, "path": str(path.resolve()), "status": "inspected"} for path in slides]
        study.write_slides([dict.fromkeys(COLUMNS, "") | row for row in rows])
        with served(study) as (address, server):
            asked(f"{address}static/slide.js")  # the server has woken up
            for k, path in enumerate(slides):
                facts_ms, _ = asked(f"{address}slides/{k}/facts.json")
                facts = json.load(urllib.request.urlopen(f"{address}slides/{k}/facts.json"))
                pyramid = Pyramid(Size(facts["width"], facts["height"]))
                first_ms, _ = asked(f"{address}slides/{k}/tiles/{SIDE.bit_length() - 1}/0_0.jpg")
                print(f"{path.name}: opened in {facts_ms:.0f} ms, the first tile {first_ms:.0f} ms later")
                columns, lines = (-(-length // SIDE) for length in (facts["width"], facts["height"]))
                of = f"{address}slides/{k}/tiles/{pyramid.last}"
                tiles = [f"{of}/{i}_{j}.jpg" for j, i in product(range(lines), range(columns))]
                memory = [server.memory_info().rss]
                with ThreadPoolExecutor(AT_ONCE) as fifty:
                    for first in range(0, min(len(tiles), AT_ONCE * ROUNDS), AT_ONCE):
                        list(fifty.map(asked, tiles[first : first + AT_ONCE]))
                        memory.append(server.memory_info().rss)
                told = ", ".join(f"{size / 2**20:.0f}" for size in memory)
                print(f"{path.name}: MiB of the server before and after each round of {AT_ONCE}: {told}")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
