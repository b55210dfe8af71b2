"""How well artefacts painted over tissue are found, each kind by itself: precision and recall over tiles.

    python benchmarks/artefact_floors.py [--part set|show|new] [--seed 0] [--slides 12] [--data $HISTOSSL_DATA]

Thresholds are set by looking at one part of the material alone; the other parts show what they are worth. Synthetic:
seeds below 200 set, the others show; --seed takes others, and draws other artefacts. Real: mosaics of the fields of
one lymphoma patient each, of twenty patients to set and of the last ten to show; two sections (CPTAC-C3L-00601-26,
TCGA-CR-7395) set, a piece of skin (CMU-1-Small-Region) and mosaics of tiles of lung, one a class, show. `new` is of
other organs: fields of MoNuSeg, a patient each, mirrored side by side. Each slide is painted anew for each kind. A
tile counts as painted from the share at which its kind is told (`artefacts.LIMITS`; a field out of focus from .5, dirt
from .003), as clean where nothing of the kind was painted, and not at all where a clean slide was already said to be
of that kind: those are counted in the last column. Bubbles and folds are painted out of focus, and so are no error of
blur.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histossl.wsi.array_slide import picture_slide
from histossl.wsi.artefacts import KINDS, LIMITS, PENS, tile_scores, with_pixels
from histossl.wsi.geometry import Region
from histossl.wsi.slide import open_slide
from histossl.wsi.synth import PAINTED, SynthSettings, draw_artefacts, paint_artefacts, paint_region
from histossl.wsi.tiles import TileSpec, tile_grid
from histossl.wsi.tissue import TissueSettings, find_tissue

PX, SIDE, EACH = 224, 2400, 2  # pixels of 1 µm; artefacts painted on a slide
SECTIONS = ("CPTAC-C3L-00601-26.tiff", "TCGA-CR-7395-01A-01-TS1.svs"), ("CMU-1-Small-Region.svs",)
PARTS = "set", "show", "new"
SHOWN = 10  # patients
SOFT = {"bubble", "fold"}
PAINTED_FROM = {"blur": 0.5, "dirt": 0.003}  # what is found of dirt is the middle of its specks


def synthetic(first: int, slides: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Name and picture of synthetic slides, of all classes and stains."""
    for k in range(slides):
        seed = first + k
        classes = {"composition": k % 2, "arrangement": k // 2 % 2, "lesion": k // 4 % 2}
        form = SynthSettings(SIDE, SIDE, seed=seed, patient=seed, **classes)
        yield f"synthetic-{seed}", paint_region(form, Region(0, 0, SIDE, SIDE))


def real(part: str, slides: int, data: Path) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Name and picture of sections, and of mosaics of real fields and tiles."""
    if part == "new":
        files = sorted((data / "nuclei/monuseg-train/images").glob("*.png"))
        for file in files[:: max(1, len(files) // slides)][:slides]:
            field = np.asarray(Image.open(file).convert("RGB").reduce(4))
            yield file.stem, np.pad(field, ((0, SIDE - len(field)), (0, SIDE - field.shape[1]), (0, 0)), "symmetric")
        return
    shown = part == "show"
    for name in SECTIONS[shown]:
        with open_slide(data / "slides" / name, mpp_default=1.0) as slide:
            yield name, slide.read(Region.whole(slide.size), 1.0)
    if shown:
        tiles = _listed(data / "tiles/lung/tiles.csv", "class", "file")
        for kind, files in tiles.items():
            yield kind, _mosaic([data / "tiles/lung" / file for file in files[:100]], 10, 1)
    fields = _listed(data / "cohort/lymphoma/labels.csv", "patient_id", "slide_id")
    patients = sorted(fields)[-SHOWN:] if shown else sorted(fields)[:-SHOWN]
    for patient in patients[:slides]:
        folder, names = data / "cohort/lymphoma/slides", sorted(fields[patient])[:9]
        yield patient, _mosaic([next(folder.glob(f"{name}.*")) for name in names], 3, 2)


def _listed(table: Path, key: str, value: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    with table.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row[key], []).append(row[value])
    return found


def _mosaic(files: list[Path], columns: int, step: int) -> NDArray[np.uint8]:
    """Pictures of one size side by side, each reduced by a step, repeated to the side of a slide."""
    parts = [np.asarray(Image.open(file).convert("RGB").reduce(step)) for file in files]
    rows = [np.concatenate(parts[k : k + columns], 1) for k in range(0, len(parts), columns)]
    return np.tile(np.concatenate(rows), (2, 2, 1))[:SIDE, :SIDE]


def places(rgb: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(n, 2) the left upper corners of the tiles of tissue."""
    slide = picture_slide(rgb, 1.0)
    return tile_grid(slide, find_tissue(slide, TissueSettings(pens=False)), TileSpec(PX, 1.0)).xy


def scored(rgb: NDArray[np.uint8]) -> dict[tuple[int, int], NDArray[np.float32]]:
    """The scores of each tile by its place; of all tiles, those of ink too."""
    slide = picture_slide(rgb, 1.0)
    grid = tile_grid(slide, find_tissue(slide, TissueSettings(pens=False)), TileSpec(PX, 1.0))
    tiles = np.stack([rgb[y : y + PX, x : x + PX] for x, y in grid.xy])
    assert grid.artefacts is not None
    scores = with_pixels(grid.artefacts.scores, tile_scores(tiles, 1.0))
    return dict(zip(map(tuple, grid.xy.tolist()), scores, strict=True))


def judged(rgb: NDArray[np.uint8], seed: int) -> Iterator[tuple[str, float, NDArray, NDArray, tuple[int, int]]]:
    """Of each tile of each painting: what was painted, its share, and its scores before and after."""
    before = scored(rgb)
    middles = np.array(list(before)) + PX / 2
    for k, kind in enumerate(PAINTED):
        artefacts = draw_artefacts([kind] * EACH, middles, np.random.default_rng([seed, k]))
        painted, covers = paint_artefacts(rgb, 1.0, artefacts)
        cover = covers.any(0)
        for (x, y), scores in scored(painted).items():
            if (x, y) in before:
                yield kind, float(cover[y : y + PX, x : x + PX].mean()), before[x, y], scores, (x, y)


def table(found: list[tuple[str, float, NDArray, NDArray, tuple[int, int]]], tiles: int) -> None:
    kinds = np.array([one[0] for one in found])
    shares = np.array([one[1] for one in found])
    before, after = (np.stack([one[k] for one in found]) for k in (2, 3))
    print(f"  {'kind':10s} painted  found  false  precision  recall   before ({tiles} tiles)")
    for kind in PAINTED:
        k = KINDS.index(kind)
        told, already = after[:, k] >= LIMITS[k], before[:, k] >= LIMITS[k]
        least = PAINTED_FROM.get(kind, LIMITS[k])
        mine = (kinds == kind) & (shares >= least)
        clean = ((kinds != kind) | (shares == 0)) & ~already
        if kind == "blur":
            clean &= ~(np.isin(kinds, list(SOFT)) & (shares > 0))
        hit, false = (told & mine).sum(), (told & clean).sum()
        unpainted = int(already[kinds == PENS[0]].sum())
        print(
            f"  {kind:10s} {mine.sum():7d} {hit:6d} {false:6d}  {hit / max(1, hit + false):9.2f}  "
            f"{hit / max(1, mine.sum()):6.2f}  {unpainted:6d}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="show")
    parser.add_argument("--seed", type=int, default=0, help="of other artefacts, and of other synthetic slides")
    parser.add_argument("--slides", type=int, default=12, help="synthetic slides, and mosaics at most")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HISTOSSL_DATA", "../shared/data")))
    given = parser.parse_args()
    number = PARTS.index(given.part)
    for name, slides in {
        "synthetic": synthetic(200 * number + 1000 * given.seed, given.slides),
        "real": real(given.part, given.slides, given.data),
    }.items():
        found, tiles, count = [], 0, 0
        for k, (_, rgb) in enumerate(slides):
            new = list(judged(rgb, 2 * k + number + 1000 * given.seed))
            tiles += sum(one[0] == PENS[0] for one in new)
            found += new
            count += 1
        print(f"{name}, the part to {given.part}: {count} slides", flush=True)
        table(found, tiles)


if __name__ == "__main__":
    main()
