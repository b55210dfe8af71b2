"""What tile encoders tell apart: tissue classes of single real tiles, on sources that the judge has not seen.

    python benchmarks/real_cells.py CELLS.npz ENCODER [ENCODER ...]

CELLS.npz has `cells` (N, side, side, 3) uint8, `classes` (N,) and `sources` (N,), the picture that each was cut from.
ENCODER is what `--encoder` takes. Five folds of disjoint sources; a logistic regression (C = 1, standardised) and the
20 nearest by cosine; accuracy, and its 95 % interval from resampled sources. Each as the cells are, and with every cell
brought to the mean optical density of all, so that colour alone tells no class. `colour` is the mean and deviation of
the three densities.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from histossl.encoders.tile_encoder import load_encoder


def density(cells: np.ndarray) -> np.ndarray:
    """(N, side, side, 3) float32 optical density."""
    return -np.log((cells.astype(np.float32) + 1) / 256)


def equalised(cells: np.ndarray) -> np.ndarray:
    """Every cell with the mean density of all cells, channel by channel."""
    amounts = density(cells)
    means = amounts.mean((1, 2), keepdims=True).clip(0.02)
    return (256 * np.exp(-amounts * (means.mean(0) / means).clip(0.4, 2.5)) - 1).clip(0, 255).astype(np.uint8)


def encoded(name: str, cells: np.ndarray) -> np.ndarray:
    """(N, d)."""
    if name == "colour":
        amounts = density(cells)
        return np.concatenate([amounts.mean((1, 2)), amounts.std((1, 2))], 1)
    encoder = load_encoder(name)
    batches = torch.from_numpy(cells).permute(0, 3, 1, 2).float().div(255).split(64)
    with torch.inference_mode():
        return torch.cat([encoder(batch) for batch in batches]).numpy()


def right(model, vectors: np.ndarray, classes: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """(N,) whether each cell was told by a model of other sources."""
    found = np.zeros(len(classes), bool)
    for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=0).split(vectors, classes, sources):
        found[test] = model.fit(vectors[train], classes[train]).predict(vectors[test]) == classes[test]
    return found


def interval(found: np.ndarray, sources: np.ndarray) -> tuple[float, float]:
    """95 % of the accuracy over resampled sources."""
    of = np.unique(sources, return_inverse=True)[1]
    sums, counts, rng = np.bincount(of, found), np.bincount(of), np.random.default_rng(0)
    drawn = rng.integers(len(sums), size=(1000, len(sums)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    """Print a line an encoder and kind of cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path)
    parser.add_argument("encoders", nargs="+")
    options = parser.parse_args()
    data = np.load(options.cells)
    classes, sources = data["classes"], data["sources"]
    judges = {
        "linear": make_pipeline(StandardScaler(), LogisticRegression(C=1, max_iter=2000)),
        "nearest": make_pipeline(StandardScaler(), Normalizer(), KNeighborsClassifier(20, metric="cosine")),
    }
    print(f"{len(classes)} cells of {len(np.unique(sources))} sources, {len(np.unique(classes))} classes")
    for kind, cells in (("as they are", data["cells"]), ("equalised", equalised(data["cells"]))):
        for name in ("colour", *options.encoders):
            vectors = encoded(name, cells)
            line = f"{kind:12s} {name:40s}"
            for judge, model in judges.items():
                found = right(model, vectors, classes, sources)
                low, high = interval(found, sources)
                line += f" {judge} {found.mean():.3f} ({low:.3f}-{high:.3f})"
            print(line, flush=True)


if __name__ == "__main__":
    main()
