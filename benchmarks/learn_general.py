"""Learns the model `general` that comes with the package, from public tissue and without any label.

python benchmarks/learn_general.py DATA --out FOLDER [--begin MODEL] [--seed 0] [--steps 800] [--rate 4e-3]
python benchmarks/learn_general.py DATA --estimate

DATA holds nuclei/nuinsseg/*.jpg (NuInsSeg, CC BY 4.0), cohort/lymphoma/slides/*.jpg (one field a patient is taken) and
slides/CMU-1-Small-Region.svs (OpenSlide's test data, CC0). `--again N` adds a second round of N steps, in which the
trained network has a say in what is learned from. `--estimate` prints the mpp of NuInsSeg, which states none: at the
right one the usual nucleus of the median image has 40 µm², as a disc of 7 µm.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from histossl.nuclei.pseudo_labels import MPP, PseudoLabelSettings, SelfTrainingSettings, usual_area
from histossl.nuclei.self_training import Sample, SelfTraining, learn
from histossl.nuclei.stain_survey import survey
from histossl.wsi.array_slide import picture_slide
from histossl.wsi.slide import open_slide

USUAL = 40.0  # µm²
SIDE = 256  # pixels, of the middle of a lymphoma field
GLASS = 245.0  # intensity that empty glass is brought to


def read(path: Path) -> np.ndarray:
    """A picture as (H, W, 3) uint8."""
    return np.asarray(Image.open(path).convert("RGB"))


def balanced(pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Pictures of one dim microscope with their light brought to what a scanner's is.

    Glass has (160, 148, 152) in NuInsSeg: without this all of its tissue has a third of the highest optical density
    laid over it, and what was learned there does not carry over to slides.
    """
    bright = np.array([np.percentile(p.reshape(-1, 3), 99, axis=0) for p in pictures])
    brightest = np.argsort(bright.min(1))[-max(1, len(bright) // 10) :]
    factor = GLASS / np.median(bright[brightest], axis=0)
    return [np.minimum(np.rint(p * factor), 255).astype(np.uint8) for p in pictures]


def organs(data: Path, mpp: float, balance: bool = True, every: int = 1) -> list[Sample]:
    """NuInsSeg, an image a sample; those without clear hematoxylin are left out."""
    files = sorted((data / "nuclei" / "nuinsseg").glob("*.jpg"), key=lambda path: int(path.stem))
    pictures = [read(path) for path in files]
    pictures = (balanced(pictures) if balance else pictures)[::every]
    known = [survey(picture_slide(picture, mpp), MPP) for picture in pictures]
    return [Sample(k.fields, k.stains) for k in known if k.stains is not None and k.stains.has_hematoxylin]


def lymphoma(data: Path) -> list[Sample]:
    """The middle of the first field of each patient, 20x; the stains are the whole field's."""
    first: dict[str, Path] = {}
    for path in sorted((data / "cohort" / "lymphoma" / "slides").glob("*.jpg")):
        first.setdefault(path.stem.rpartition("_")[0], path)
    found = []
    for path in first.values():
        picture = read(path)
        known = survey(picture_slide(picture, MPP, path.name), MPP)
        if known.stains is not None and known.stains.has_hematoxylin:
            top, left = ((n - SIDE) // 2 for n in picture.shape[:2])
            found.append(Sample([picture[top : top + SIDE, left : left + SIDE]], known.stains))
    return found


def slide(data: Path) -> list[Sample]:
    """OpenSlide's CMU-1-Small-Region, 24 fields."""
    with open_slide(data / "slides" / "CMU-1-Small-Region.svs") as opened:
        known = survey(opened, MPP)
    assert known.stains is not None
    return [Sample(known.fields, known.stains)]


def estimate(data: Path) -> float:
    """The mpp at which NuInsSeg's usual nucleus has the usual area; of every fourth image, the median."""
    mpp = 0.25
    for _ in range(4):
        areas = [usual_area(s.fields, s.stains, MPP) for s in organs(data, mpp, every=4)]
        usual = float(np.median([a for a in areas if a > 0]))
        print(f"at {mpp:.3f} µm/px the usual nucleus has {usual:.1f} µm²", flush=True)
        mpp *= (USUAL / usual) ** 0.5
    return mpp


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--begin", type=Path, help="a model's folder: training begins at its weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--again", type=int, default=0, help="steps of a second round")
    parser.add_argument("--pale", type=float, default=0.5)
    parser.add_argument("--paled", type=int, choices=(0, 1), default=1)
    parser.add_argument("--strength", type=float, default=0.15)
    parser.add_argument("--balance", type=int, choices=(0, 1), default=1)
    parser.add_argument("--mpp", type=float, default=0.2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--estimate", action="store_true")
    asked = parser.parse_args()
    if asked.out is None and not asked.estimate:
        parser.error("--out is missing")
    return asked


def taught(asked: argparse.Namespace) -> SelfTraining:
    """The model after one round or two."""
    start = time.monotonic()
    labels = PseudoLabelSettings(pale=asked.pale, paled=bool(asked.paled))
    settings = SelfTrainingSettings(
        seed=asked.seed, steps=asked.steps, rate=asked.rate, strength=asked.strength, pseudo_labels=labels
    )
    samples = organs(asked.data, asked.mpp, bool(asked.balance)) + lymphoma(asked.data) + slide(asked.data)
    print(f"{len(samples)} samples, {time.monotonic() - start:.0f} s", flush=True)
    begin = SelfTraining.load(asked.begin, asked.device) if asked.begin else None
    with tempfile.TemporaryDirectory() as logs:
        model = learn(samples, settings, Path(logs) / "first", asked.device, None, begin)
        if asked.again:
            settings = replace(settings, steps=asked.again, rate=settings.rate / 2, seed=settings.seed + 1)
            model = learn(samples, settings, Path(logs) / "second", asked.device, model)
    print(f"learned, {time.monotonic() - start:.0f} s", flush=True)
    return model


def main() -> None:
    """Write the model's weights and settings, or print the mpp."""
    asked = options()
    if asked.estimate:
        print(f"{estimate(asked.data):.3f} µm/px")
        return
    taught(asked).save(asked.out)
    print(asked.out)


if __name__ == "__main__":
    main()
