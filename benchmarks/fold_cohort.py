"""How well a probe tells a class of which all slides have folds, and what is left of it when their tiles are dropped.

    python benchmarks/fold_cohort.py OUT [--seed 0] [--slides 100] [--draws 20] [--folds 2] [--encoder self]

Every slide is of its own patient, tissue and stain. Each is painted without folds and with --folds. A draw says which
half of the slides is the class with folds; it is what the probe predicts, and nothing else goes with it. Vectors are
means of tiles' features, of the encoder that `self` learns or of any other. Given are
the mean of the probe's AUROC over the draws and their standard deviation, for

    none      no slide has folds
    folds     those of one class have
    dropped   the same, tiles with folds left out of all slides, as `--tissue.drop fold` does
    shape     no slide has folds; in one class the tiles are left out where another slide's folds lie
    painted   as `dropped`, by what was painted instead of what is found: what would be left if none were missed

Chance is what `none` gives, which is .5 over many slides. The last columns are the differences from `none` of the same
draw. Draws share the slides: several seeds say more than many draws. OUT keeps pictures and features.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

import histossl as hs
from histossl.core.interchange import TileFeatures
from histossl.encoders.tile_encoder import TileEncoder
from histossl.wsi.geometry import Region
from histossl.wsi.synth import SynthSettings, artefacts_of, paint_artefacts, paint_region
from histossl.wsi.tissue import TissueSettings

WIDTH, HEIGHT = 1536, 1792  # pixels of 1 µm
TILE = hs.TileSpec()
PROBE = {"shots": (), "bootstraps": 100, "rivals": ()}
Keep = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Painted:
    """A slide without folds (False) and with them (True): features of all tiles, and which are kept."""

    tiles: dict[bool, TileFeatures]
    found: dict[bool, Keep]  # where no fold is found
    clean: dict[bool, Keep]  # where none was painted


def paint(folder: Path, seed: int, slides: int, folds: int) -> None:
    """The pictures of all slides, and where folds were painted."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(slides):
        file = folder / f"{k:03d}-folds.png"  # the last of the three
        if file.exists():
            continue
        number = 1_000_000 + 1000 * seed + k
        factors = np.random.default_rng(number).integers(2, size=3).tolist()
        form = SynthSettings(WIDTH, HEIGHT, 1.0, 64.0, number, number, *factors)
        clean = paint_region(form, Region(0, 0, WIDTH, HEIGHT))
        painted = artefacts_of(replace(form, artefacts=("fold",) * folds))
        folded, covers = paint_artefacts(clean, 1.0, painted)
        np.save(folder / f"{k:03d}.npy", np.packbits(covers.any(0)))
        Image.fromarray(clean).save(folder / f"{k:03d}-none.png", compress_level=1)
        Image.fromarray(folded).save(file, compress_level=1)


def slides_of(folder: Path, features: Path, encoder: str | TileEncoder, slides: int) -> list[Painted]:
    """Encode all pictures, and say which tiles are kept."""
    names = [f"{k:03d}-{kind}" for k in range(slides) for kind in ("none", "folds")]
    pictures = [folder / f"{name}.png" for name in names]
    cohort = hs.encode(pictures, encoder, TILE, out=features, mpp_default=1.0, device="cpu")
    found = []
    for k in range(slides):
        bits = np.unpackbits(np.load(folder / f"{k:03d}.npy"))[: WIDTH * HEIGHT]
        cover = bits.reshape(HEIGHT, WIDTH).astype(bool)
        tiles = {folds: cohort[f"{k:03d}-{'folds' if folds else 'none'}"] for folds in (False, True)}
        laid = {folds: _places(folder / f"{k:03d}-{'folds' if folds else 'none'}.png") for folds in tiles}
        kept = {folds: np.array([tuple(at) in laid[folds] for at in _xy(one).tolist()]) for folds, one in tiles.items()}
        clean = {
            folds: np.array([not (folds and cover[y : y + TILE.px, x : x + TILE.px].any()) for x, y in _xy(one)])
            for folds, one in tiles.items()
        }
        found.append(Painted(tiles, kept, clean))
    return found


def _xy(tiles: TileFeatures) -> NDArray[np.int64]:
    assert tiles.xy is not None
    return tiles.xy


def _places(picture: Path) -> set[tuple[int, int]]:
    """Where tiles are laid when those with folds are dropped."""
    with hs.open_slide(picture, mpp_default=1.0) as slide:
        grid = hs.tile_grid(slide, hs.find_tissue(slide, TissueSettings(drop=("fold",))), TILE)
    return set(map(tuple, grid.xy.tolist()))


def of_class(painted: list[Painted], way: str, folded: Keep) -> dict[str, TileFeatures]:
    """The tiles of every slide of a draw."""
    found = {}
    for k, slide in enumerate(painted):
        folds = bool(folded[k]) and way not in ("none", "shape")
        tiles = slide.tiles[folds]
        keep = np.ones(len(tiles.features), bool)
        if way == "dropped":
            keep = slide.found[folds]
        elif way == "painted":
            keep = slide.clean[folds]
        elif way == "shape" and folded[k]:
            other = painted[k - 1]
            lost = set(map(tuple, _xy(other.tiles[True])[~other.clean[True]].tolist()))
            keep = np.array([tuple(at) not in lost for at in _xy(tiles).tolist()])
        if not keep.any():  # as a study, which would leave the slide out; both classes keep their number
            keep[:] = True
        found[f"{k:03d}"] = replace(tiles, name=f"{k:03d}", features=tiles.features[keep], xy=_xy(tiles)[keep])
    return found


def means(tiles: dict[str, TileFeatures]) -> pd.DataFrame:
    return pd.DataFrame({name: one.features.mean(0) for name, one in tiles.items()}).T


def auroc(vectors: pd.DataFrame, folded: Keep, seed: int) -> float:
    labels = pd.DataFrame({"slide_id": vectors.index, "label": np.where(folded, "folds", "none")})
    return float(hs.probe(vectors, labels, seed=seed, **PROBE).table["auroc"].iloc[0])


def table(painted: list[Painted], draws: int) -> None:
    ways = ("none", "folds", "dropped", "shape", "painted")
    found: dict[str, list[float]] = {way: [] for way in ways}
    for draw in range(draws):
        folded = np.random.default_rng(draw).permutation(np.arange(len(painted)) % 2).astype(bool)
        for way in ways:
            found[way].append(auroc(means(of_class(painted, way, folded)), folded, draw))
    none = np.array(found["none"])
    for way, scores in found.items():
        more = np.array(scores) - none
        print(
            f"  {way:8s} {np.mean(scores):.3f}  deviation {np.std(scores):.3f}   "
            f"minus none {more.mean():+.3f}  deviation {more.std():.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of all slides")
    parser.add_argument("--slides", type=int, default=100)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--folds", type=int, default=2, help="on a slide, of 2.8 mm²")
    parser.add_argument("--encoder", default="self", help="self, random, or what `histossl run` takes")
    given = parser.parse_args()
    folder = given.out / f"seed-{given.seed}-folds-{given.folds}"
    paint(folder, given.seed, given.slides, given.folds)
    encoder = given.encoder
    if encoder == "self":  # learned from half of the slides with folds, and half without, as a draw has them
        half = [folder / f"{k:03d}-{('none', 'folds')[k % 2]}.png" for k in range(given.slides)]
        encoder = hs.pretrain_tiles(half, TILE, mpp_default=1.0, device="cpu", out=folder / "self")
    painted = slides_of(folder, folder / f"features-{Path(given.encoder).name}", encoder, given.slides)
    folded = [slide.clean[True] for slide in painted]
    lost = sum(int((~slide.found[True] & ~slide.clean[True]).sum()) for slide in painted)
    total, touched = sum(map(len, folded)), sum(int((~one).sum()) for one in folded)
    wrong = sum(int((~slide.found[False]).sum()) for slide in painted)
    print(
        f"{len(painted)} slides, {total} tiles with folds painted, {touched} of them touched, {lost} of these dropped"
    )
    print(f"without folds {sum(len(slide.found[False]) for slide in painted)} tiles, {wrong} dropped")
    print(f"means of tiles, {given.encoder}, {given.draws} draws")
    table(painted, given.draws)


if __name__ == "__main__":
    main()
