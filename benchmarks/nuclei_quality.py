"""Nuclei scored organ by organ: trained on the other organs, or on the organ's own unlabelled images.

python benchmarks/nuclei_quality.py FOLDER --mode prior|self|others|all [--method self-training|patch-contrast]
    [--seeds 0 1 2] [--reduce 2]

FOLDER holds images/ and labels/ with equal names. Labels are read by the scorer only. `all` trains once on all images.
`--reduce 2` makes a 20x slide's images of a 40x slide's: means of 2 x 2 pixels, every second label.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import astuple
from pathlib import Path

import numpy as np
from PIL import Image

from histossl.nuclei.metrics import METRICS, score
from histossl.nuclei.patch_contrast import learn_patch_contrast
from histossl.nuclei.patch_sampling import PatchContrastSettings
from histossl.nuclei.pseudo_labels import SelfTrainingSettings
from histossl.nuclei.segmenter import NucleiSegmenter
from histossl.nuclei.stain_survey import survey
from histossl.wsi.array_slide import picture_slide

# The organs of MoNuSeg's training images, by the middle of the TCGA barcode.
ORGANS = {
    "breast": "A7-A13E A7-A13F AR-A1AK AR-A1AS E2-A14V E2-A1B5",
    "kidney": "B0-5698 B0-5710 B0-5711 HE-7128 HE-7129 HE-7130",
    "liver": "18-5592 21-5784 21-5786 38-6178 49-4488 50-5931",
    "prostate": "CH-5767 G9-6336 G9-6348 G9-6356 G9-6362 G9-6363",
    "bladder": "DK-A2I6 G2-A2EK",
    "colon": "AY-A8YK NH-A8F7",
    "stomach": "KB-A93J RD-A8N9",
}


def organ_of(path: Path) -> str:
    """The organ of an image of MoNuSeg, by its name."""
    return next(organ for organ, ids in ORGANS.items() if any(f"TCGA-{i}-" in path.name for i in ids.split()))


def read(path: Path, by: int = 1) -> np.ndarray:
    """An image as (H, W, 3), a `by`-th as wide."""
    image = Image.open(path).convert("RGB")
    return np.asarray(image.reduce(by) if by > 1 else image)


def read_labels(path: Path, by: int = 1) -> np.ndarray:
    """Its labels, (H, W) int32: of every `by`-th pixel."""
    labels = np.asarray(Image.open(path.parents[1] / "labels" / path.name)).astype(np.int32)
    return labels[by // 2 :: by, by // 2 :: by]


def learned(pictures: list[np.ndarray], mpp: float, method: str, seed: int, steps: int) -> NucleiSegmenter:
    """A segmenter that learned on pictures without labels."""
    if method == "self-training":
        return NucleiSegmenter(SelfTrainingSettings(seed=seed, steps=steps)).fit(pictures, mpp)
    settings = PatchContrastSettings(seed=seed)
    known = [survey(picture_slide(picture, mpp), settings.mpp) for picture in pictures]
    fields = [field for one in known for field in one.fields if one.stains is not None]
    segmenter = NucleiSegmenter()
    with tempfile.TemporaryDirectory() as logs:
        segmenter.method = learn_patch_contrast(fields, settings, Path(logs))
    return segmenter


def main() -> None:
    """Print a row an organ and their mean, a block a seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mode", choices=("prior", "self", "others", "all"), default="self")
    parser.add_argument("--method", choices=("self-training", "patch-contrast"), default="self-training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--organs", nargs="+", default=list(ORGANS))
    parser.add_argument("--steps", type=int, default=SelfTrainingSettings().steps)
    parser.add_argument("--mpp", type=float, default=0.25)
    parser.add_argument("--reduce", type=int, default=1)
    options = parser.parse_args()
    mpp, by = options.mpp * options.reduce, options.reduce
    files = sorted((options.folder / "images").glob("*.png"))
    print("mode seed organ", *METRICS, "seconds")
    for seed in options.seeds:
        rows, shared = [], None
        for organ in options.organs:
            own = [f for f in files if organ_of(f) == organ]
            taught = {"self": own, "others": [f for f in files if f not in own], "all": files, "prior": []}
            start = time.monotonic()
            if options.mode == "prior":
                model = NucleiSegmenter.load("prior")
            elif shared is not None:
                model = shared
            else:
                pictures = [read(f, by) for f in taught[options.mode]]
                model = learned(pictures, mpp, options.method, seed, options.steps)
                shared = model if options.mode == "all" else None
            seconds = time.monotonic() - start
            found = [astuple(score(model.predict(read(f, by), mpp), read_labels(f, by))) for f in own]
            rows += found
            print(options.mode, seed, organ, *np.mean(found, 0).round(3), round(seconds), flush=True)
        print(options.mode, seed, "MEAN", *np.mean(rows, 0).round(3), flush=True)


if __name__ == "__main__":
    main()
