"""Encoding a slide from end to end against the bare network on the same batches, in one run.

    python benchmarks/encode_speed.py [SIDE]

SIDE: level-0 pixels of the painted slide's side at 0.5 µm per pixel, 20,000 by default (it is painted once, into out/).
Prints, as ratios: features of all tiles and augmented views, read to written, over the network alone (the faster of
one batch of eight at a time and of eight on each core); features over a straightforward pipeline of the same tiles (one
process: read the region, resize it, normalise it, the whole ResNet-18 in float32, 64 at a time); the network cut after
layer3 over the whole ResNet-18; our composed augmentation over kornia's chain, where kornia is installed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import torch

from histossl.encoders import encode
from histossl.encoders.augment import AugmentSettings, augment, draw_augmentation, to_float
from histossl.encoders.encode import EncodeJob, EncodeSettings
from histossl.encoders.encode_slides import encode_slides
from histossl.encoders.forward import encode_tiles
from histossl.encoders.resnet import IMAGENET_MEAN, IMAGENET_STD, ResNet18, fold_batch_norms
from histossl.encoders.tile_encoder import TileEncoder, load_encoder
from histossl.execution.workers import Workers
from histossl.study.survey import SurveyJob, survey_slide
from histossl.wsi.synth import SynthSettings, write_slide
from histossl.wsi.tiles import TileSpec
from histossl.wsi.tissue import TissueSettings

TILE = TileSpec(px=224, mpp=1.0)
SECONDS = 15  # of repetitions behind each rate of the network alone


def rate(function: Callable[[], object], tiles: int) -> float:
    """Tiles a second of a function that handles `tiles`, over SECONDS of repetitions."""
    function()
    start, count = time.perf_counter(), 0
    while time.perf_counter() < start + SECONDS:
        function()
        count += tiles
    return count / (time.perf_counter() - start)


def end_to_end(slide: Path, folder: Path, encoder: TileEncoder, settings: EncodeSettings) -> tuple[float, int]:
    """(tiles a second, tiles) of a slide, read to written; the start of the worker processes is not counted."""
    tiles_path = folder / "tiles.h5"
    job = SurveyJob("s", slide, None, None, TissueSettings(), TILE, tiles_path, folder / "qc.jpg")
    survey = survey_slide(job)
    todo = EncodeJob("s", slide, survey.mpp, TILE, tiles_path, folder / "features.h5", folder / "views")
    with Workers() as workers:
        list(workers.map(time.sleep, [0.1] * workers.count))
        start = time.perf_counter()
        done = 0
        for step in encode_slides([todo], encoder, settings, workers):
            if step.error:
                raise step.error
            done += step.tiles
        return done / (time.perf_counter() - start), survey.tiles


def main(side: int) -> None:
    """Print the table."""
    slide = Path("out/benchmarks") / f"{side}.tiff"
    if not slide.exists():
        write_slide(slide, SynthSettings(width=side, height=side, mpp=0.5, patch_um=224.0))
    straight = straightforward(slide)
    print(f"a straightforward pipeline: {straight:.0f} tiles/s")
    for precision in ("float32", "auto"):
        encoder = load_encoder("random", precision=precision)
        batch = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 224, 224, 3), np.uint8))
        few = to_float(batch[:8], encoder.dtype)  # as many at once as the program passes
        bare = max(
            rate(lambda encoder=encoder, few=few: encoder(few), 8),
            rate(lambda encoder=encoder, batch=batch: encode_tiles(encoder, batch, None), 64),
        )
        name = str(encoder.dtype).removeprefix("torch.")
        print(f"{name}: bare encoder {bare:.0f} tiles/s")
        with tempfile.TemporaryDirectory() as folder:
            encode.CACHE_BYTES = 0
            plain, tiles = end_to_end(slide, Path(folder), encoder, EncodeSettings(views=0, precision=precision))
            print(f"{name}: features of all {tiles} tiles {plain:.0f} tiles/s, ratio {plain / bare:.2f} (floor 0.90)")
            print(f"{name}: over the straightforward pipeline, ratio {plain / straight:.1f} (floor 2.0)")
            settings = EncodeSettings(views=8, tiles=256, precision=precision)
            both, tiles = end_to_end(slide, Path(folder), encoder, settings)
            count = 8 * min(256, tiles)
            views = count / ((tiles + count) / both - tiles / plain)
            print(f"{name}: augmented views {views:.0f} tiles/s, ratio {views / bare:.2f} (floor 0.60)")
        networks = [fold_batch_norms(ResNet18(stages)).to(encoder.dtype) for stages in (3, 4)]
        cut, whole = (
            TileEncoder({}, n.to(memory_format=torch.channels_last), n.dim, IMAGENET_MEAN, IMAGENET_STD,
                        encoder.dtype, encoder.device)
            for n in networks
        )  # fmt: skip
        ratio = rate(lambda cut=cut, few=few: cut(few), 8) / rate(lambda whole=whole, few=few: whole(few), 8)
        print(f"{name}: cut after layer3 over the whole ResNet-18, ratio {ratio:.2f} (floor 1.20)")
    rivals(batch)


@torch.inference_mode()
def straightforward(slide: Path, count: int = 256) -> float:
    """Tiles a second of what one would write in an afternoon, at the first tiles of the slide's middle row."""
    file, network = openslide.OpenSlide(slide), ResNet18(4).eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    side = round(TILE.px * TILE.mpp / 0.5)
    columns = file.dimensions[0] // side
    start = time.perf_counter()
    for first in range(0, count, 64):
        tiles = []
        for k in range(first, first + 64):
            corner = side * (k % columns), side * (columns // 3 + k // columns)
            region = file.read_region(corner, 0, (side, side)).convert("RGB")
            tiles.append(np.asarray(region.resize((TILE.px, TILE.px))))
        x = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float() / 255
        network((x - mean) / std).numpy()
    return count / (time.perf_counter() - start)


def rivals(batch: torch.Tensor) -> None:
    """Our augmentation against kornia's chain with the same domain, on the same tiles."""
    try:
        import kornia.augmentation as K
    except ImportError:
        return

    chain = K.AugmentationSequential(
        K.RandomResizedCrop((224, 224), scale=(0.5, 1.0), same_on_batch=True),
        K.RandomHorizontalFlip(same_on_batch=True),
        K.RandomRotation(180.0, same_on_batch=True),
        K.ColorJitter(0.4, 0.4, 0.4, 0.2, p=0.8, same_on_batch=True),
        K.RandomGrayscale(p=0.2, same_on_batch=True),
        K.RandomGaussianBlur((5, 5), (0.1, 1.0), p=0.5, same_on_batch=True),
    )
    rng = np.random.default_rng(0)
    x = to_float(batch).contiguous()
    ours = rate(lambda: augment(batch, draw_augmentation(AugmentSettings(), rng)), 64)
    theirs = rate(lambda: chain(x), 64)
    print(f"augmentation: ours {ours:.0f} tiles/s, kornia's chain {theirs:.0f}, ratio {ours / theirs:.1f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
