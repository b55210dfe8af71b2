"""Reading every tile of a slide's finest level, against OpenSlide's and tiffslide's own read_region, in one run.

    python benchmarks/read_speed.py [SLIDE...]

Without slides the one that encode_speed.py has painted is read. Prints CPU-milliseconds a tile of 224 px to an RGB
array, and the ratios of both others to ours; the pixels are compared with OpenSlide's, too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import openslide
import tiffslide
from numpy.typing import NDArray

from histossl.wsi.geometry import Region
from histossl.wsi.slide import open_slide

PX, MOST = 224, 2000


def corners(width: int, height: int) -> Iterator[tuple[int, int]]:
    """Of the first tiles, row by row."""
    columns, rows = width // PX, height // PX
    for k in range(min(MOST, columns * rows)):
        yield PX * (k % columns), PX * (k // columns)


def cost(read: Callable[[int, int], NDArray[np.uint8]], places: list[tuple[int, int]]) -> float:
    """CPU-milliseconds a tile; the first pass opens what is opened once."""
    read(*places[0])
    start = time.process_time()
    for place in places:
        read(*place)
    return (time.process_time() - start) / len(places) * 1e3


def main(paths: list[str]) -> None:
    """Print a line a slide."""
    for path in paths:
        with (
            open_slide(path, mpp_default=1.0) as slide,
            openslide.OpenSlide(path) as other,
            tiffslide.TiffSlide(path) as third,
        ):
            places = list(corners(slide.size.width, slide.size.height))
            if not places:
                continue

            def ours(x: int, y: int, slide=slide) -> NDArray[np.uint8]:
                return slide.read(Region(x, y, PX, PX), slide.mpp)

            def theirs(x: int, y: int, other=other) -> NDArray[np.uint8]:
                return np.asarray(other.read_region((x, y), 0, (PX, PX)).convert("RGB"))

            def with_tiffslide(x: int, y: int, third=third) -> NDArray[np.uint8]:
                return np.asarray(third.read_region((x, y), 0, (PX, PX), as_array=True))[..., :3]

            same = all(np.array_equal(ours(*place), theirs(*place)) for place in places[:20])
            one, two, three = cost(ours, places), cost(theirs, places), cost(with_tiffslide, places)
            print(
                f"{Path(path).name}: {one:.2f} ms a tile, OpenSlide {two:.2f}, ratio {two / one:.1f}, tiffslide "
                f"{three:.2f}, ratio {three / one:.1f}, {len(places)} tiles, {'equal' if same else 'OTHER'} pixels",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:] or ["out/benchmarks/20000.tiff"])
