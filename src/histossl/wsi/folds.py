"""Finds folds of tissue on an overview: bands where layers of it lie on each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histossl.wsi.density import average, blurred, least, long_parts, parts_of, within

_PALE = 0.25  # density, mean of the colours, that folds have, but on pale slides: there `_TIMES` that of most tissue
_LAYERS = 1.0, 1.4  # density over that of the tissue around, least of a pixel, and where it is sure
# The same over a line of 160 µm; dark tissue beside a fold may join it at the lower limits, and a fold that crosses it.
_LINES = 1.25, 1.4, 1.5, 1.65, 1.8, 2.4
_LONG = 100.0, 220.0, 1.3, 3000.0  # least length and most width in µm, area over width squared, least area in µm²
_DUST = 0.9, 0.4, 300.0, 3.0  # density in each colour, share of a band; least length in µm and area over width squared
_BESIDE = 20.0, 60.0  # µm from a band, where the tissue is that it is compared with
_TIMES, _BLACK = 1.75, 1.1  # density over that beside it, in each colour; and where no camera sees more
_SAME = 1.5  # the most that this may differ between the colours, as a factor
_EVEN = 2.0, 1.75  # the densest of it over the median, and where that is as dense as dust
# Where a fold goes on: µm from it, over a lumen or some fat; least length, most width and least area of a piece; the
# limits on lines and on colours, which tell less of a piece that is short.
_FURTHER, _PIECE = 160.0, (30.0, 120.0, 600.0)
_ON_LINE, _ON_SAME = 1.1, 1.75
_TURN, _END = 0.9, 200.0  # cosine of the most that it turns there, and µm of its end that say where it goes
_EDGE = 16.0  # µm, by which a fold is widened: it ends more softly than it is found


def find_folds(
    density: NDArray[np.float32], raw: NDArray[np.float32], tissue: NDArray[np.bool_], mpp: float
) -> NDArray[np.bool_]:
    """Long bands, denser than the tissue beside them by the same factor in all colours, as layers of it are.

    Args:
        density: (h, w, 3) optical density, blurred by about a nucleus.
        raw: the same, not blurred.
        tissue: (h, w), where folds are looked for.
        mpp: µm per pixel, about 8.

    Returns:
        (h, w).
    """
    weight = tissue.astype(np.float32)[..., None]
    around = blurred(weight * density, 200 / mpp)
    around /= np.maximum(blurred(weight, 200 / mpp), 1e-3)
    smooth = blurred(density, 12 / mpp)
    layers = least(smooth / np.maximum(around, 0.05))
    # Glands and cells show through a fold, but not along it: over some of them it is dense everywhere.
    through, ending = _along(np.log(np.clip(layers, 0.5, 3.0)), 160 / mpp)
    mean = average(smooth)
    usual = float(np.median(mean[tissue])) if tissue.any() else 0.0
    dense = tissue & (layers > _LAYERS[0]) & (mean > min(_PALE, _TIMES * usual))
    bands = _Bands(density, least(raw) > _DUST[0], np.exp(through), np.exp(ending), mpp)
    found = bands.found(dense, tissue, _LINES)
    if found.any():  # what crosses a denser fold is no even band with it
        near = within(found, _EDGE / mpp)
        found |= bands.found(dense & ~near, tissue & ~near, _LINES[:2])
        found |= bands.further(found, dense, tissue)
    return within(found, _EDGE / mpp) & tissue


@dataclass(frozen=True, eq=False)
class _Bands:
    density: NDArray[np.float32]
    opaque: NDArray[np.bool_]  # where no camera sees more
    line: NDArray[np.float32]  # density over that around, along the best of the lines through a pixel
    ending: NDArray[np.float32]  # the same of the lines that end there
    mpp: float

    def found(
        self, dense: NDArray[np.bool_], tissue: NDArray[np.bool_], limits: tuple[float, ...]
    ) -> NDArray[np.bool_]:
        """Where in dense tissue folds are, as bands over any of the limits show them."""
        found, mpp = np.zeros(tissue.shape, bool), self.mpp
        length, width, slim, area = _LONG[0] / mpp, _LONG[1] / mpp, _LONG[2], _LONG[3] / mpp**2
        for limit in limits:
            for place, part, wide in long_parts(dense & (self.line > limit), length, width, area):
                # Folds of dark tissue let as little light pass as dust, whose heaps are shorter.
                dark = self.opaque[place][part].mean() > _DUST[1]
                if dark and np.hypot(*part.shape) * mpp < _DUST[2]:
                    continue
                sure = (self.line[place][part] > _LAYERS[1]).mean() > 0.3
                if sure and part.sum() > (_DUST[3] if dark else slim) * wide**2:
                    found[place] |= part & _layers(self.density, tissue, place, part, mpp, _SAME)
        return found

    def further(
        self, found: NDArray[np.bool_], dense: NDArray[np.bool_], tissue: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Where folds go on: at an end half of each line lies beyond it, and lumina cut off what is short by itself."""
        mpp, reached, last = self.mpp, found, found
        dense = dense & (self.ending > _ON_LINE)
        length, width, area = _PIECE[0] / mpp, _PIECE[1] / mpp, _PIECE[2] / mpp**2
        for _ in range(3):  # behind each other
            rest = tissue & ~within(reached, _EDGE / mpp)
            labels, count = parts_of(dense & rest)
            touched = np.zeros(count + 1, bool)
            touched[labels[_near(last, _FURTHER / mpp)]] = True  # what others reach was refused before
            touched[0] = False
            last, (folds, _) = np.zeros(found.shape, bool), parts_of(reached)
            for place, part, _ in long_parts(touched[labels], length, width, area):
                if _ahead(folds, place, part, mpp):
                    last[place] |= part & _layers(self.density, rest, place, part, mpp, _ON_SAME)
            if not last.any():
                break
            reached = reached | last
        return reached


def _near(mask: NDArray[np.bool_], distance: float) -> NDArray[np.bool_]:
    """The mask widened by about a distance in pixels, on blocks of a quarter of it, which is sooner done."""
    step = max(1, int(distance / 4))
    rows, columns = (np.arange(0, length, step) for length in mask.shape)
    blocks = np.logical_or.reduceat(np.logical_or.reduceat(mask, rows, 0), columns, 1)
    wide = within(blocks, distance / step).repeat(step, 0).repeat(step, 1)
    return wide[: mask.shape[0], : mask.shape[1]]


def _around(
    shape: tuple[int, ...], place: tuple[slice, slice], part: NDArray[np.bool_], margin: int
) -> tuple[tuple[slice, ...], NDArray[np.bool_], NDArray[np.float64]]:
    """The box of a part widened by a margin; there the part, and the distance to it in pixels."""
    wide = tuple(slice(max(0, side.start - margin), side.stop + margin) for side in place)
    here = np.pad(part, [(side.start - outer.start, margin) for side, outer in zip(place, wide, strict=True)])
    here = here[tuple(slice(0, length - outer.start) for length, outer in zip(shape, wide, strict=True))]
    return wide, here, np.asarray(ndimage.distance_transform_edt(~here))


def _ahead(folds: NDArray[np.int32], place: tuple[slice, slice], part: NDArray[np.bool_], mpp: float) -> bool:
    """Whether a part is smaller than what lies around it of the nearest fold, and lies where its end points to.

    What is dense beside a fold mostly does not, and what was taken for a fold goes on with the like of it.
    """
    wide, here, away = _around(folds.shape, place, part, int((_FURTHER + _END) / mpp) + 1)
    away = np.where(folds[wide] > 0, away, np.inf)
    fold = folds[wide] == folds[wide].flat[away.argmin()]
    end = np.argwhere(fold & (away < away.min() + _END / mpp))
    if len(end) < 2 or part.sum() >= fold.sum():
        return False
    axis = np.linalg.eigh(np.cov(end.T))[1][:, 1]
    way = np.argwhere(here).mean(0) - end.mean(0)
    return bool(abs(way @ axis) > _TURN * np.hypot(*way))


def _layers(
    density: NDArray[np.float32],
    tissue: NDArray[np.bool_],
    place: tuple[slice, slice],
    part: NDArray[np.bool_],
    mpp: float,
    same: float,
) -> NDArray[np.bool_]:
    """Where in the box of a band layers of the tissue close beside it lie, in every colour; nowhere if it is no fold.

    A rim that stains more and more has no such step beside it, a band of another colour is not layers of what lies
    beside it, and a heap of dust is darker at its specks than a fold is anywhere.
    """
    wide, here, away = _around(tissue.shape, place, part, int(_BESIDE[1] / mpp) + 1)
    away *= mpp
    beside = tissue[wide] & (away > _BESIDE[0]) & (away < _BESIDE[1])
    if not beside.any():
        return np.zeros(part.shape, bool)
    own, other = (np.median(density[wide][where], axis=0) for where in (here, beside))
    times = own / np.maximum(other, 0.03)
    dense = average(density[place])
    densest = np.quantile(dense[part], 0.95)
    even = densest < _EVEN[int(densest > _DUST[0])] * own.mean()
    if not even or (own < np.minimum(_TIMES * other, _BLACK)).any() or times.max() > same * times.min():
        return np.zeros(part.shape, bool)
    return dense > (own.mean() + other.mean()) / 2


def _along(values: NDArray[np.float32], length: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(h, w) the largest mean of eight values on a straight line of eight directions: through a pixel, and to it."""
    height, width = values.shape
    margin = int(length) + 2
    around = np.pad(values, margin, mode="edge")
    middle, end = (np.full(values.shape, -np.inf, np.float32) for _ in range(2))
    for angle in np.arange(8) * (np.pi / 8):
        step = np.array([np.sin(angle), np.cos(angle)]) * (length / 7)
        total = around
        for doubled in (1, 2, 4):
            total = total + np.roll(total, np.rint(-doubled * step).astype(int), (0, 1))
        for best, at in ((middle, 3.5), (end, 0), (end, 7)):
            top, left = margin - np.rint(at * step).astype(int)
            np.maximum(best, total[top : top + height, left : left + width], out=best)
    return middle / np.float32(8), end / np.float32(8)
