"""Nuclei scored organ by organ: by a model as it is, trained on the other organs, or on the organ's own unlabelled
images.

python benchmarks/nuclei_quality.py FOLDER --mode prior|model|adapt|self|others|all [--model general|MODEL]
    [--method self-training|patch-contrast] [--seeds 0 1 2] [--reduce 2]

FOLDER holds images/ and labels/ with equal names. Labels are read by the scorer only. `all` trains once on all images;
`adapt` adapts the model to each organ's images, as `nuclei segment --adapt` does. Recall by darkness and area, last.
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

from histossl.nuclei.adapt import adapt
from histossl.nuclei.metrics import METRICS, score
from histossl.nuclei.patch_contrast import learn_patch_contrast
from histossl.nuclei.patch_sampling import PatchContrastSettings
from histossl.nuclei.segmenter import NucleiSegmenter, samples
from histossl.nuclei.self_training import SelfTraining
from histossl.nuclei.settings import AdaptSettings, SelfTrainingSettings
from histossl.nuclei.stain_survey import survey
from histossl.nuclei.strata import BY, found_nuclei, grouped
from histossl.wsi.array_slide import picture_slide
from histossl.wsi.stain import optical_density

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


def adapted(pictures: list[np.ndarray], mpp: float, model: str, seed: int) -> NucleiSegmenter:
    """A model adapted to pictures without labels; prints what came of it."""
    segmenter = NucleiSegmenter.load(model)
    teacher = segmenter.method
    assert isinstance(teacher, SelfTraining)
    known = [survey(picture_slide(picture, mpp), SelfTraining.mpp, support=teacher.support) for picture in pictures]
    with tempfile.TemporaryDirectory() as logs:
        result = adapt(samples(known, seed), teacher, AdaptSettings(seed=seed), Path(logs))
    print("helped" if result.helped else "did not help", result.before, result.after)
    segmenter.method = result.model
    return segmenter


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mode", choices=("prior", "model", "adapt", "self", "others", "all"), default="model")
    parser.add_argument("--model", default="general")
    parser.add_argument("--method", choices=("self-training", "patch-contrast"), default="self-training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--organs", nargs="+", default=list(ORGANS))
    parser.add_argument("--steps", type=int, default=SelfTrainingSettings().steps)
    parser.add_argument("--mpp", type=float, default=0.25)
    parser.add_argument("--reduce", type=int, default=1)
    return parser.parse_args()


def made(asked: argparse.Namespace, seed: int, own: list[Path], files: list[Path]) -> NucleiSegmenter:
    """The segmenter for an organ's own images."""
    mpp, by = asked.mpp * asked.reduce, asked.reduce
    if asked.mode in ("prior", "model"):
        return NucleiSegmenter.load("prior" if asked.mode == "prior" else asked.model)
    if asked.mode == "adapt":
        return adapted([read(f, by) for f in own], mpp, asked.model, seed)
    taught = {"self": own, "others": [f for f in files if f not in own], "all": files}[asked.mode]
    return learned([read(f, by) for f in taught], mpp, asked.method, seed, asked.steps)


def main() -> None:
    """Print a row an organ and their mean, a block a seed, then recall in groups."""
    asked = options()
    mpp, by = asked.mpp * asked.reduce, asked.reduce
    files = sorted((asked.folder / "images").glob("*.png"))
    print("mode seed organ", *METRICS, "seconds")
    for seed in asked.seeds:
        rows, groups, model = [], [], None
        for organ in asked.organs:
            own = [f for f in files if organ_of(f) == organ]
            start = time.monotonic()
            if model is None or asked.mode not in ("all", "prior", "model"):
                model = made(asked, seed, own, files)
            seconds = time.monotonic() - start
            found = []
            for f in own:
                picture, truth = read(f, by), read_labels(f, by)
                labels = model.predict(picture, mpp)
                found.append(astuple(score(labels, truth)))
                groups.append(found_nuclei(labels, truth, mpp, optical_density(picture).mean(-1)))
            rows += found
            print(asked.mode, seed, organ, *np.mean(found, 0).round(3), round(seconds), flush=True)
        print(asked.mode, seed, "MEAN", *np.mean(rows, 0).round(3), flush=True)
        for kind in BY:
            for g in grouped(groups, kind):
                what = f"{kind} {g.low:g} to {g.high:g}: {g.nuclei} nuclei"
                print(asked.mode, seed, what, f"recall {g.recall:.3f} missed {g.missed:.3f}", flush=True)


if __name__ == "__main__":
    main()
