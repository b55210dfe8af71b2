"""What tile encoders tell apart: nearest neighbours of painted tiles whose tissue is known.

    python benchmarks/tile_encoders.py random SELF_FOLDER ...

Every encoder that `--encoder` takes. Patches of five kinds of tissue from slides that nothing was trained on, each with
a stain of its own; the 20 nearest by cosine vote, those of the same patient left out. Balanced accuracy, chance is .20.
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import NearestNeighbors

from histossl.encoders.tile_encoder import load_encoder
from histossl.wsi.geometry import Region
from histossl.wsi.synth import KINDS, SynthSettings, paint_region
from histossl.wsi.synth.recipe import plan
from results import statistics

PX, KNOWN = 64, KINDS[:5]  # a tile is a patch of the plan; the lesion is in too few slides


def tiles(slides: int, each: int, seed: int = 9000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, 64, 64, 3) uint8 tiles at 1 µm, the kind and the slide of each; so many of every kind and slide."""
    found: list[tuple[np.ndarray, int, int]] = []
    for slide in range(slides):
        settings = SynthSettings(seed=seed + slide, patient=seed + slide, composition=slide % 2)
        drawn, rng = plan(settings), np.random.default_rng(seed + slide)
        for kind in range(len(KNOWN)):
            places = np.argwhere(drawn.whole & (drawn.kinds == kind))
            for row, column in rng.permutation(places)[:each]:
                found.append((paint_region(settings, Region(column * PX, row * PX, PX, PX)), kind, slide))
    pictures, kinds, of = zip(*found, strict=True)
    return np.stack(pictures), np.array(kinds), np.array(of)


def encoded(name: str, pictures: np.ndarray) -> np.ndarray:
    """(N, d)."""
    if name == "colour and texture":
        return np.stack([list(statistics(picture).values()) for picture in pictures])
    encoder = load_encoder(name)
    batches = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(255).split(64)
    return torch.cat([encoder(batch) for batch in batches]).numpy()


def accuracy(vectors: np.ndarray, kinds: np.ndarray, slides: np.ndarray, neighbours: int = 20) -> tuple[float, ...]:
    """Balanced accuracy, and its 95 % interval from resampled slides."""
    scaled = (vectors - vectors.mean(0)) / vectors.std(0).clip(1e-6)
    scaled = scaled / np.linalg.norm(scaled, axis=1, keepdims=True).clip(1e-9)
    own = int(np.bincount(slides).max())
    near = NearestNeighbors(n_neighbors=neighbours + own).fit(scaled).kneighbors(scaled, return_distance=False)
    guess = np.zeros(len(kinds), int)
    for k, row in enumerate(near):
        guess[k] = np.bincount(kinds[row[slides[row] != slides[k]][:neighbours]], minlength=len(KNOWN)).argmax()
    rng, of = np.random.default_rng(0), [np.flatnonzero(slides == s) for s in np.unique(slides)]
    score = partial(_score, kinds, guess)
    drawn = [score(np.concatenate([of[s] for s in rng.integers(len(of), size=len(of))])) for _ in range(500)]
    return score(np.arange(len(kinds))), *np.percentile(drawn, [2.5, 97.5])


def _score(kinds: np.ndarray, guess: np.ndarray, rows: np.ndarray) -> float:
    return float(balanced_accuracy_score(kinds[rows], guess[rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="+")
    parser.add_argument("--slides", type=int, default=40)
    parser.add_argument("--each", type=int, default=12, help="tiles of a kind and slide")
    options = parser.parse_args()
    pictures, kinds, slides = tiles(options.slides, options.each)
    print(f"{len(pictures)} tiles of {options.slides} slides, {', '.join(KNOWN)}")
    for name in ("colour and texture", *options.encoders):
        found = accuracy(encoded(name, pictures), kinds, slides)
        print(f"{name:40s} {found[0]:.3f} ({found[1]:.3f}-{found[2]:.3f})", flush=True)


if __name__ == "__main__":
    main()
