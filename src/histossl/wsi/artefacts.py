"""Artefacts on slides without a network: folds, pens, bubbles, blood and fat on an overview; blur and dirt on tiles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histossl.core.errors import SettingsError
from histossl.wsi.bubbles import find_bubbles
from histossl.wsi.density import (
    average,
    blurred,
    largest,
    least,
    parts_of,
    variation,
    within,
    without_small,
)
from histossl.wsi.folds import find_folds

# Kind -> the share of a tile from which on it is one of that kind, and its colour on pictures.
_KINDS = {
    "pen-black": (0.5, (0, 0, 0)),
    "pen-blue": (0.5, (30, 90, 255)),
    "pen-green": (0.5, (0, 170, 60)),
    "pen-red": (0.5, (255, 30, 30)),
    "bubble": (0.1, (0, 200, 220)),
    "fold": (0.05, (255, 150, 0)),
    "blood": (0.5, (150, 0, 60)),
    "empty": (0.6, (200, 200, 60)),
    "blur": (0.3, (180, 80, 255)),
    "dirt": (0.002, (110, 70, 30)),
}
KINDS = tuple(_KINDS)
LIMITS = np.array([limit for limit, _ in _KINDS.values()], np.float32)
# From which share on a tile is left out where its kind is dropped: what a fold only touches still tells of it.
DROPPED = np.where(np.array(KINDS) == "fold", np.float32(0.001), LIMITS)
COLOURS = tuple(colour for _, colour in _KINDS.values())
PENS, OVERVIEW, PIXELS = KINDS[:4], KINDS[:8], KINDS[8:]  # by what shows them

_EVEN = 0.02, 0.06  # deviation of the density over its mean; strokes of pens lie below, tissue above
_FINE, _COARSE = 2.0, 16.0  # µm over which intensities change in sharp tissue, and in any
_SHARP = 0.12  # squared change over the fine distance, as part of that over the coarse one
_PLAIN, _NOISE = 25.0, 8.0  # squared changes that tell nothing, and those of a camera's noise
_SPECK = 4  # steps of 2 µm, side of the smallest square that is dark
# Share of a tile under ink, a bubble or a fold, from which on its pixels tell nothing else: a tenth of a pixel of the
# overview, as the end of a dark fold is dirt otherwise.
_COVERED = 1e-4
_OPAQUE = 54  # intensity of the brightest channel; nuclei leave more of the blue
_BLUER = 4.0  # intensities, the most by which blue passes better than green: H&E absorbs green most, dirt does not
_NUCLEUS = 120.0  # µm², of what is dark at once; of dark nuclei less


def check_kinds(kinds: Sequence[str]) -> None:
    """Refuse names that are no kinds of artefacts.

    Args:
        kinds: names of `KINDS`, or "pen" for pens of any colour.

    Raises:
        SettingsError: an unknown name.
    """
    known = {*KINDS, "pen"}
    if unknown := [kind for kind in kinds if kind not in known]:
        raise SettingsError(f"{unknown[0]!r} is no kind of artefact", f"they are pen, {', '.join(KINDS)}")


def are_dropped(kinds: Sequence[str]) -> NDArray[np.bool_]:
    """Which kinds are named.

    Args:
        kinds: names of `KINDS`, or "pen" for pens of any colour.

    Returns:
        (len(KINDS),) bool.
    """
    return np.array([kind in kinds or kind.partition("-")[0] in kinds for kind in KINDS])


@dataclass(frozen=True, eq=False)
class TileArtefacts:
    """What artefacts the tiles of a slide show.

    Attributes:
        scores: (n, len(KINDS)) float32 in [0, 1], of the tiles that stay: the share of its area that a kind covers; NaN
            where it was not judged.
        shares: (len(KINDS),) float32, their mean over all tiles, those left out included; NaN where not judged.
        left_out: (len(KINDS),) int64, how many tiles were left out, each because of the kind that it shows most.
    """

    scores: NDArray[np.float32]
    shares: NDArray[np.float32]
    left_out: NDArray[np.int64]

    def __str__(self) -> str:
        """A cell of slides.csv, such as `fold 0.031; blur 0.120; left out 12 tiles: fold 12`; no kind under 0.001."""
        shares = np.nan_to_num(self.shares)
        told = [f"{KINDS[k]} {shares[k]:.3f}" for k in np.argsort(-shares, kind="stable") if shares[k] >= 0.001]
        return "; ".join([*told, *filter(None, [left_out_text(self.left_out)])])


def left_out_text(counts: NDArray[np.int64]) -> str:
    """How many tiles were left out, and because of what.

    Args:
        counts: (len(KINDS),).

    Returns:
        Such as `left out 12 tiles: fold 9, blur 3`; "" where there are none.
    """
    why = ", ".join(f"{KINDS[k]} {counts[k]}" for k in np.argsort(-counts, kind="stable") if counts[k])
    return f"left out {counts.sum()} tiles: {why}" if why else ""


def left_out_of(cell: str) -> NDArray[np.int64]:
    """The number of tiles that were left out, from a cell of slides.csv.

    Args:
        cell: as of `TileArtefacts`.

    Returns:
        (len(KINDS),).
    """
    told = dict(re.findall(r"([a-z-]+) (\d+)", cell.partition(" tiles: ")[2]))
    return np.array([int(told.get(kind, 0)) for kind in KINDS], np.int64)


def judge(scores: NDArray[np.float32], drop: Sequence[str]) -> tuple[NDArray[np.bool_], TileArtefacts]:
    """Leave out the tiles of dropped kinds; those that a fold touches, too.

    Args:
        scores: (n, len(KINDS)); NaN where a kind was not judged.
        drop: names of `KINDS`, or "pen" for pens of any colour.

    Returns:
        (n,) bool, the tiles that stay; and their artefacts.
    """
    bad = np.where((scores >= DROPPED) & are_dropped(drop), scores / LIMITS, 0)
    kept = np.asarray(~bad.any(1))
    left_out = np.bincount(bad[~kept].argmax(1), minlength=len(KINDS))
    shares = np.full(len(KINDS), np.nan, np.float32)
    if len(scores):
        counted = np.isfinite(scores)
        shares = np.where(counted.any(0), np.nan_to_num(scores).sum(0) / np.maximum(counted.sum(0), 1), shares)
    return kept, TileArtefacts(scores[kept], shares.astype(np.float32), left_out)


def with_pixels(overview: NDArray[np.float32], pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scores of tiles of which the overview and the pixels were judged.

    Args:
        overview: (n, len(KINDS)).
        pixels: (n, 2), of `tile_scores`.

    Returns:
        (n, len(KINDS)); what is dark or soft in a tile with ink, a bubble or a fold is neither dirt nor blur.
    """
    first = [k for k, kind in enumerate(KINDS) if kind in (*PENS, "bubble", "fold")]
    covered = overview[:, first].sum(1) >= _COVERED
    return np.concatenate(
        [overview[:, : len(OVERVIEW)], np.where(covered[:, None] & np.isfinite(pixels), 0, pixels)], 1
    )


def together(overview: TileArtefacts, pixels: TileArtefacts) -> TileArtefacts:
    """What was judged on an overview, and then on the pixels of the tiles that it left.

    Args:
        overview: the tiles when they were laid.
        pixels: of these the ones that stay.

    Returns:
        The latter, with what the former says of all tiles.
    """
    shares = np.where(np.isnan(overview.shares), pixels.shares, overview.shares)
    return replace(pixels, shares=shares, left_out=overview.left_out + pixels.left_out)


def overview(
    density: NDArray[np.float32], raw: NDArray[np.float32], tissue: NDArray[np.bool_], mpp: float, pens: bool
) -> NDArray[np.uint8]:
    """Find the artefacts that an overview of a slide shows.

    Args:
        density: (h, w, 3) optical density, blurred by about a nucleus.
        raw: the same, not blurred.
        tissue: (h, w), what is not glass.
        mpp: µm per pixel, about 8.
        pens: whether to look for pens; small fields have none, and blood in them would look like red ink.

    Returns:
        (h, w) 1 + index of `KINDS`, 0 for none. One kind a pixel: pens before bubbles, folds, blood and fat.
    """
    found = np.zeros(tissue.shape, np.uint8)
    ink = _ink(density, mpp) if pens else found.copy()
    tissue = tissue & (ink == 0)
    bubbles = find_bubbles(raw, tissue, mpp)
    for kind, where in (
        ("empty", tissue & (average(density) < 0.05)),
        ("blood", tissue & _blood(density, mpp)),
        ("fold", find_folds(density, raw, tissue & ~bubbles, mpp)),
        ("bubble", bubbles),
    ):
        found[where] = 1 + KINDS.index(kind)
    return np.where(ink > 0, ink, found)


def _ink(density: NDArray[np.float32], mpp: float) -> NDArray[np.uint8]:
    """(h, w) 1 + kind of the pens: of a colour that H&E has not, and as even as no tissue is.

    H&E absorbs green most, blue and green ink red, black ink all alike, red ink green and blue alike.
    Special stains have the colours of ink, and their density varies with the structure under them.
    """
    red, green, blue = np.moveaxis(density, 2, 0)
    mean = average(density)
    cold = (red > 1.25 * green) & (red - green > 0.06)
    cold |= (red > 0.65) & (red > 0.95 * green) & (blue < 0.65 * red)  # where no camera sees more red; folds are black
    black = (mean > 0.75) & (largest(density) - least(density) < 0.25 * mean)
    warm = (green > 0.5) & (red < 0.25 * green) & (blue > 0.75 * green)
    warm |= (green > 0.9) & (red < 0.45 * green) & (blue > 0.85 * green)  # dark tissue under it
    if black.any():  # folds of dark tissue are narrower
        black = within(~within(~black, 70 / mpp), 70 / mpp) & black
    coloured = without_small(cold | black | warm, (150 / mpp) ** 2)
    if not coloured.any():
        return coloured.astype(np.uint8)
    # At the edge of a stroke its colour mixes with that of the glass, and its density with the glass's.
    inner = ~within(~coloured, max(1.0, 20 / mpp))
    # Ink over tissue shows some of its structure, but is denser than tissue alone.
    even = inner & (variation(density, inner, 20 / mpp) < np.clip(mean / 12, *_EVEN))
    most = blurred(even.astype(np.float32), 60 / mpp) > 0.5 * blurred(inner.astype(np.float32), 60 / mpp)
    stroke = without_small(coloured & most, (150 / mpp) ** 2)
    if not stroke.any():
        return stroke.astype(np.uint8)
    colour = np.select([black, warm, green > blue], [1, 4, 2], 3).astype(np.uint8)
    near = ndimage.distance_transform_edt(~stroke, return_distances=False, return_indices=True)
    return np.where(within(stroke, 50 / mpp), colour[tuple(near)], 0).astype(np.uint8)  # type: ignore[arg-type]


def _blood(density: NDArray[np.float32], mpp: float) -> NDArray[np.bool_]:
    """(h, w) pools of red cells: eosin's red without hematoxylin, and more yellow in it; a small field may be one.

    Where many cells lie on each other, the yellow is less beside the red; tissue is not as dense without hematoxylin.
    """
    red, green, blue = np.moveaxis(density, 2, 0)
    cells = (green > 0.4) & (red < 0.3 * green) & (blue > 0.65 * green)
    cells |= (green > 0.8) & (red < 0.15 * green) & (blue > 0.5 * green)
    return without_small(cells, min((60 / mpp) ** 2, 0.25 * cells.size))


def tile_scores(tiles: NDArray[np.uint8], mpp: float) -> NDArray[np.float32]:
    """Judge what is smaller than a pixel of an overview: whether tiles are out of focus, and dirt on them.

    In sharp tissue intensities change over 2 µm, out of focus only over longer distances. Blocks of 16 in which nothing
    changes at all do not count. Dirt lets pass no colour; pigment does not, either, and counts as dirt.

    Args:
        tiles: (n, px, px, 3) uint8 RGB.
        mpp: µm per pixel.

    Returns:
        (n, 2): the share of the structured blocks that are out of focus, NaN at more than 2.5 µm per pixel; and the
        share of the area that is dirt.
    """
    return np.stack([_blur(tiles[..., 1], mpp), _dirt(tiles, mpp)], 1)


def _dirt(tiles: NDArray[np.uint8], mpp: float) -> NDArray[np.float32]:
    """(n,) the share of the area where no colour passes, over more than a nucleus."""
    step = max(1, round(2 / mpp))
    red, green, blue = (tiles[:, ::step, ::step, k] for k in range(3))
    dark = np.maximum(np.maximum(red, green), blue) < _OPAQUE
    rows, columns = (side - _SPECK + 1 for side in dark.shape[1:])
    if rows < 1 or columns < 1:
        return np.zeros(len(tiles), np.float32)
    filled = sum((dark.view(np.uint8)[:, k : k + rows] for k in range(1, _SPECK)), dark.view(np.uint8)[:, :rows])
    filled = sum((filled[:, :, k : k + columns] for k in range(1, _SPECK)), filled[:, :, :columns])
    shares = np.zeros(len(tiles), np.float32)
    for k in np.flatnonzero((filled >= 0.9 * _SPECK**2).any((1, 2))):
        specks = np.zeros(dark.shape[1:], bool)
        for down, right in np.ndindex(_SPECK, _SPECK):
            specks[down : down + rows, right : right + columns] |= filled[k] >= 0.9 * _SPECK**2
        labels, _ = parts_of(specks & dark[k])
        sizes = np.bincount(labels.ravel())
        bluer = np.bincount(labels[blue[k] > green[k] + np.float32(_BLUER)], minlength=len(sizes))
        told = (sizes >= _NUCLEUS / (step * mpp) ** 2) & (bluer < sizes / 2)  # dark nuclei may touch dirt
        told[0] = False
        shares[k] = told[labels].mean()
    return shares


def _blur(green: NDArray[np.uint8], mpp: float) -> NDArray[np.float32]:
    """(n,) the share of the structured ones among 16 blocks that are out of focus."""
    px = green.shape[1]
    fine, coarse = max(1, round(_FINE / mpp)), max(2, round(_COARSE / mpp))
    if mpp > 2.5 or px < 4 * coarse:
        return np.full(len(green), np.nan, np.float32)
    values = green.astype(np.float32)
    changes = [_changes(values, distance, (px - coarse) // 4) for distance in (fine, coarse)]
    sharp, any_ = (np.maximum(change - _NOISE, 0) for change in changes)
    structured = any_ > _PLAIN
    soft = structured & (sharp < _SHARP * any_)
    return (soft.sum((1, 2)) / np.maximum(structured.sum((1, 2)), 4)).astype(np.float32)


def _changes(values: NDArray[np.float32], distance: int, side: int) -> NDArray[np.float32]:
    """(n, 4, 4) the mean squared change over a distance, right and down, in blocks."""
    last = 4 * side
    here = values[:, :last:2, :last:2]
    total = np.zeros((len(values), 4, 4), np.float32)
    for moved in (
        values[:, distance : distance + last : 2, :last:2],
        values[:, :last:2, distance : distance + last : 2],
    ):
        change = (moved - here) ** 2
        blocks = np.add.reduceat(change, np.arange(4) * (side // 2), axis=1)
        total += np.add.reduceat(blocks, np.arange(4) * (side // 2), axis=2)
    return total / (2 * (here.shape[1] / 4) ** 2)
