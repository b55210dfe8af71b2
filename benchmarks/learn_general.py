"""Learns the model `general` that comes with the package, from public tissue and without any label.

python benchmarks/learn_general.py DATA --out FOLDER [--seed 0] [--stages 2] [--mpp 0.2]
python benchmarks/learn_general.py DATA --estimate

DATA holds nuclei/nuinsseg/*.jpg (NuInsSeg, CC BY 4.0), cohort/lymphoma/slides/*.jpg (one field a patient is taken) and
slides/CMU-1-Small-Region.svs (OpenSlide's test data, CC0). `--estimate` prints the mpp of NuInsSeg, which states none:
at the right one the usual nucleus of the median image has 40 µm², as a disc of 7 µm.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from histossl.nuclei.pseudo_labels import MPP, PseudoLabelSettings, sure_nuclei
from histossl.nuclei.self_training import Sample, SelfTraining, learn
from histossl.nuclei.settings import SelfTrainingSettings
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

    Glass has (160, 148, 152) in NuInsSeg: without this all of its tissue has four tenths of the highest optical density
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
        areas = [sure_nuclei(s.fields, s.stains, MPP).tree.objects.usual for s in organs(data, mpp, every=4)]
        usual = float(np.median([a for a in areas if a > 0]))
        print(f"at {mpp:.3f} µm/px the usual nucleus has {usual:.1f} µm²", flush=True)
        mpp *= (USUAL / usual) ** 0.5
    return mpp


@dataclass(frozen=True)
class Stage:
    """One training, which begins at the weights of the one before.

    Attributes:
        steps, rate, seed, strength: of `SelfTrainingSettings`.
        pale, paled: of `PseudoLabelSettings`.
        balance: whether NuInsSeg is brought to the light of a scanner.
    """

    steps: int
    rate: float
    seed: int
    pale: float = 0.5
    paled: bool = True
    strength: float = 0.15
    balance: bool = True


# The first is what `nuclei train` does on the images as they are.
STAGES = (
    Stage(800, 4e-3, 0, pale=1, paled=False, strength=0, balance=False),
    Stage(250, 2e-3, 1),
)


def trained(asked: argparse.Namespace, stage: Stage, number: int, before: SelfTraining | None) -> SelfTraining:
    """The model after a stage."""
    start = time.monotonic()
    labels = PseudoLabelSettings(pale=stage.pale, paled=stage.paled)
    settings = SelfTrainingSettings(
        seed=asked.seed + stage.seed,
        steps=stage.steps,
        rate=stage.rate,
        strength=stage.strength,
        turns=1,
        support=True,
        pseudo_labels=labels,
    )
    samples = organs(asked.data, asked.mpp, stage.balance) + lymphoma(asked.data) + slide(asked.data)
    with tempfile.TemporaryDirectory() as logs:
        model = learn(samples, settings, Path(logs), asked.device, before)
    print(f"stage {number} of {asked.stages}: {len(samples)} samples, {time.monotonic() - start:.0f} s", flush=True)
    return model


def main() -> None:
    """Write the model's weights and settings, or print the mpp."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="added to that of each stage")
    parser.add_argument("--stages", type=int, default=len(STAGES), help="so many of the stages")
    parser.add_argument("--mpp", type=float, default=0.2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--estimate", action="store_true")
    asked = parser.parse_args()
    if asked.estimate:
        print(f"{estimate(asked.data):.3f} µm/px")
        return
    if asked.out is None:
        parser.error("--out is missing")
    model = None
    for number, stage in enumerate(STAGES[: asked.stages], 1):
        model = trained(asked, stage, number, model)
    assert model is not None
    model.save(asked.out)


if __name__ == "__main__":
    main()
