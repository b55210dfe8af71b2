"""What it costs to find tissue on a slide of 100,000 x 60,000 pixels and to judge it, and to judge its tiles.

    python benchmarks/slide_qc.py PICTURE

PICTURE is a slide or picture with tissue, of 2,048 pixels at 1 µm per pixel or more; an ellipse of copies of it on
glass is written into out/ as a pyramid of JPEG tiles. Prints processor seconds and the memory on top of the
imports, for what `histossl inspect` does to a slide; and for batches of its tiles the time of their artefact scores
beside that of encoding them (ResNet-18, random weights, one thread).
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile

from histossl.study.survey import SurveyJob, survey_slide
from histossl.wsi.geometry import Region
from histossl.wsi.slide import open_slide
from histossl.wsi.tile_reader import ReadJob, read_batch
from histossl.wsi.tiles import TileSpec
from histossl.wsi.tissue import TissueSettings

WIDTH, HEIGHT, MPP, TILE, SIDE = 100_000, 60_000, 0.25, 512, 8192  # level-0 pixels; SIDE is the period of the copies
LEVELS = (1, 4, 16, 64)


def write_large(picture: Path, out: Path) -> None:
    """Write the pyramid; equal tiles are encoded once."""
    with open_slide(picture, mpp_default=1.0) as slide:
        centre = slide.size.width / 2, slide.size.height / 2
        side = SIDE * MPP / slide.mpp
        field = Region(centre[0] - side / 2, centre[1] - side / 2, side, side)
        base = {step: slide.read(field, MPP * step) for step in LEVELS[1:]}
    base[1] = base[4].repeat(4, 0).repeat(4, 1)
    with tifffile.TiffWriter(out, bigtiff=True) as tiff:
        for step in LEVELS:
            shape = -(-HEIGHT // step), -(-WIDTH // step), 3
            tiff.write(
                _tiles(base[step], step, shape),
                shape=shape,
                dtype=np.uint8,
                tile=(TILE, TILE),
                resolution=(1e4 / (MPP * step),) * 2,
                resolutionunit="CENTIMETER",
                subfiletype=1 if step > 1 else 0,
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                metadata=None,
            )


def _tiles(base: np.ndarray, step: int, shape: tuple[int, int, int]) -> Iterator[bytes]:
    glass, known = np.array([243, 242, 244], np.uint8), dict[bytes, bytes]()
    here = np.arange(TILE)
    for top in range(0, shape[0], TILE):
        for left in range(0, shape[1], TILE):
            y, x = (top + here) * step, (left + here) * step
            corners = _inside(y[[0, -1]], x[[0, -1]])
            inside = corners[:1, :1] if corners.all() or not corners.any() else _inside(y, x)
            key = bytes(f"{y[0] % SIDE} {x[0] % SIDE} ", "ascii") + np.packbits(inside).tobytes()
            if key not in known:
                tile = base[np.ix_(y % SIDE // step % len(base), x % SIDE // step % len(base))]
                pixels = np.where(inside[..., None], tile, glass)
                known[key] = bytes(imagecodecs.jpeg8_encode(pixels, level=80, subsampling="420"))
            yield known[key]


def _inside(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return (y[:, None] / HEIGHT * 2 - 1) ** 2 + (x[None] / WIDTH * 2 - 1) ** 2 < 0.8


def main(picture: Path) -> None:
    out = Path("out") / "slide-qc.tiff"
    out.parent.mkdir(exist_ok=True)
    if not out.exists():
        write_large(picture, out)
    with tempfile.TemporaryDirectory() as place:
        folder, spec = Path(place), TileSpec()
        job = SurveyJob("s", out, None, None, TissueSettings(), spec, folder / "t.h5", folder / "q.jpg")
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        survey = survey_slide(job)
        took, after = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"tissue, artefacts, tiles, stains and picture of {WIDTH:,} x {HEIGHT:,} pixels: {took:.2f} s of CPU")
        print(f"memory {(after - before) / 1024:.0f} MB on top of {before / 1024:.0f}; {survey.tiles} tiles")
        _scores(out, folder / "t.h5", spec)


def _scores(slide: Path, tiles: Path, spec: TileSpec) -> None:
    import torch

    from histossl.encoders.forward import encode_tiles
    from histossl.encoders.tile_encoder import load_encoder
    from histossl.wsi.artefacts import tile_scores
    from histossl.wsi.tile_files import read_tiles_of

    torch.set_num_threads(1)
    laid = read_tiles_of(tiles)
    chosen = laid.xy[:: max(1, len(laid.xy) // 64)][:64]
    batch = read_batch(ReadJob(0, 0, slide, MPP, chosen, laid.extent, spec.mpp, spec.px)).tiles
    encoder = load_encoder("random", 0, "cpu", "float32")
    encode_tiles(encoder, torch.from_numpy(batch[:8]), None)
    seconds = {}
    for name, work in {
        "scores": lambda: tile_scores(batch, spec.mpp),
        "encoding": lambda: encode_tiles(encoder, torch.from_numpy(batch), None),
    }.items():
        start = time.process_time()
        work()
        seconds[name] = (time.process_time() - start) / len(batch) * 1e3
    share = seconds["scores"] / seconds["encoding"]
    print(f"a tile: scores {seconds['scores']:.2f} ms, encoding {seconds['encoding']:.1f} ms: {share:.1%}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
