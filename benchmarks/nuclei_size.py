"""Peak memory and time of nuclei on a large slide over a small one; memory should not grow, time only with the pixels.

    python benchmarks/nuclei_size.py [--model prior|MODEL] [--blocks 2 10]

Slides of BLOCKS x BLOCKS copies of one painted block of 4,096 px at 0.38 µm per pixel: 10 make 40,960 x 40,960 px with
about half a million nuclei. They are written once, into out/.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from histossl.wsi.geometry import Region
from histossl.wsi.synth import SynthSettings, paint_region
from memory import peak

BLOCK, TILE, MPP = 4096, 512, 0.38


def write(path: Path, blocks: int) -> None:
    """A pyramid of copies of one block."""
    block = paint_region(SynthSettings(width=BLOCK, height=BLOCK, mpp=MPP, patch_um=128.0), Region(0, 0, BLOCK, BLOCK))
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for level in range(4):
            side = blocks * BLOCK >> level
            tiff.write(
                _tiles(block, blocks),
                shape=(side, side, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                resolution=(1e4 / (MPP * 2**level),) * 2,
                resolutionunit="CENTIMETER",
                subfiletype=1 if level else 0,
                metadata=None,
                photometric="ycbcr",
                compression="jpeg",
                subsampling=(2, 2),
            )
            block = block.reshape(len(block) // 2, 2, -1, 2, 3).mean((1, 3)).astype(np.uint8)


def _tiles(block: NDArray[np.uint8], blocks: int) -> Iterator[bytes]:
    colours = {"colorspace": "rgb", "outcolorspace": "ycbcr", "subsampling": "420"}
    count = len(block) // TILE
    encoded = [
        [
            bytes(
                imagecodecs.jpeg8_encode(
                    np.ascontiguousarray(block[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE]),
                    level=90,
                    **colours,
                )
            )
            for j in range(count)
        ]
        for i in range(count)
    ]
    for _ in range(blocks):
        for row in encoded:
            for _ in range(blocks):
                yield from row


def main() -> None:
    """Print a line a slide: nuclei, peak memory, seconds a megapixel."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="prior")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 10])
    options = parser.parse_args()
    folder = Path("out/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    for blocks in options.blocks:
        slide = folder / f"nuclei-{blocks}.tiff"
        if not slide.exists():
            write(slide, blocks)
        with tempfile.TemporaryDirectory() as out:
            start = time.monotonic()
            segment = ["nuclei", "segment", str(slide), "--out", out, "--model", options.model]
            memory = peak([sys.executable, "-m", "histossl", *segment])
            seconds = time.monotonic() - start
            found = (Path(out) / "nuclei.csv").read_text("utf-8").strip().splitlines()[-1]
            written = (Path(out) / f"nuclei-{blocks}.geojson").stat().st_size
        megapixels = (blocks * BLOCK) ** 2 / 1e6
        print(
            f"{blocks * BLOCK} px, {options.model}: {memory / 2**20:.0f} MiB at the peak, {seconds:.0f} s, "
            f"{seconds / megapixels:.3f} s a megapixel, GeoJSON of {written / 2**20:.0f} MiB; {found}",
            flush=True,
        )


if __name__ == "__main__":
    main()
