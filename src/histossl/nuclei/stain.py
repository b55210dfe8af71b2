"""Stains in optical density: hematoxylin and eosin apart, by fixed vectors or by the slide's own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histossl.errors import SlideError
from histossl.geometry import Region, Size, level0_length
from histossl.slide import Slide
from histossl.tissue import TissueMask

_TISSUE = 0.12  # optical density in every channel from which a pixel shows stain rather than glass (Macenko's beta)
_LEAST = 500  # stained pixels below which there is no stain to estimate
_SAMPLE_SIDE = 256  # pixels of one field of a slide's sample

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Stains:
    """What a slide is stained with; statistics of the slide, never of a tile.

    Attributes:
        hematoxylin: unit optical density in (red, green, blue).
        eosin: the same.
        white: intensity of empty glass in (red, green, blue), 0 to 255.
        scale: optical density that counts as 1: the 99th percentile of the stained pixels.
    """

    hematoxylin: Vector
    eosin: Vector
    white: Vector = (255.0, 255.0, 255.0)
    scale: float = 1.0

    @property
    def has_hematoxylin(self) -> bool:
        """Whether the bluer stain can be hematoxylin: it takes a fair part of the red light, which eosin lets pass.

        Hematoxylin absorbs .28 to .42 of its total density in the red, eosin .05 to .2.
        """
        return self.hematoxylin[0] > 0.24 * sum(self.hematoxylin)

    @property
    def has_brown(self) -> bool:
        """Whether the other stain absorbs blue most, as DAB does in immunohistochemistry and eosin never."""
        return self.eosin[2] > 0.41 * sum(self.eosin)


# Ruifrok and Johnston (2001), normalised; eosin as measured by them.
FIXED = Stains(hematoxylin=(0.651, 0.701, 0.290), eosin=(0.070, 0.991, 0.110))


def optical_density(rgb: NDArray[np.uint8], white: Vector = (255.0, 255.0, 255.0)) -> NDArray[np.float32]:
    """-log10 of the light that passes, (..., 3) float32, never negative; 0 is glass, 2.4 black."""
    table = -np.log10((np.arange(256, dtype=np.float32)[:, None] + 1) / (np.asarray(white, np.float32) + 1))
    table = np.maximum(table, 0).astype(np.float32)
    return np.stack([table[:, c][rgb[..., c]] for c in range(3)], -1)


def concentrations(density: NDArray[np.float32], stains: Stains) -> NDArray[np.float32]:
    """How much of each stain: (..., 3) optical density to (..., 2) of hematoxylin and eosin, least squares.

    The result has the unit of optical density along the stain's own vector, and may be slightly negative.
    """
    basis = np.array([stains.hematoxylin, stains.eosin], np.float32)
    return density @ np.linalg.pinv(basis).astype(np.float32)


def estimate_stains(pixels: NDArray[np.uint8]) -> Stains | None:
    """The stain vectors of a sample of a slide's pixels (Macenko et al., ISBI 2009).

    The two extreme directions (1st and 99th percentile of the angle) in the plane of largest variance. Of the two the
    one with the larger share of red is hematoxylin. Where the paper takes white for granted, the glass of the slide is
    its brightest percent, if that is bright at all.

    Args:
        pixels: (N, 3) uint8, glass included.

    Returns:
        The stains; None where fewer than a few hundred pixels are stained, as on an empty slide.

    Raises:
        SlideError: the pixels have no colour, so that nothing tells one stain from another.
    """
    white = _glass(pixels)
    density = optical_density(pixels, white)
    stained = density[(density > _TISSUE).all(1) & (pixels > 12).any(1)]
    if len(stained) < _LEAST:
        return None
    if np.percentile(np.ptp(stained, axis=1), 95) < 0.02:
        raise SlideError(
            "image", "is greyscale, so that hematoxylin cannot be told from eosin", "give the colour image"
        )
    scale = float(np.percentile(stained, 99))
    if scale < 1.25 * np.percentile(stained, 1):
        return None
    hematoxylin, eosin = _extremes(stained)
    return Stains(_vector(hematoxylin), _vector(eosin), white, scale)


def _extremes(stained: NDArray[np.float32]) -> tuple[NDArray, NDArray]:
    """Unit vectors (3,) of the stain with more and with less of its density in the red."""
    _, axes = np.linalg.eigh(np.cov(stained.T.astype(np.float64)))
    plane = axes[:, [2, 1]]
    plane *= np.where(plane.sum(0) < 0, -1, 1)
    angle = np.arctan2(*(stained @ plane).T[::-1])
    ends = [np.maximum(plane @ (np.cos(a), np.sin(a)), 0) for a in np.percentile(angle, [1, 99])]
    ends = [end / np.linalg.norm(end) for end in ends]
    ends.sort(key=lambda end: end[0] / end.sum(), reverse=True)
    return ends[0], ends[1]


def _glass(pixels: NDArray[np.uint8]) -> Vector:
    bright = np.percentile(pixels, 99, axis=0)
    return _vector(bright if bright.min() >= 200 and np.ptp(bright) < 30 else np.full(3, 255.0))


def _vector(values: NDArray) -> Vector:
    red, green, blue = (round(float(v), 4) for v in values)
    return red, green, blue


def sample_fields(
    slide: Slide, mask: TissueMask, mpp: float, fields: int, rng: np.random.Generator, side: int = _SAMPLE_SIDE
) -> list[NDArray[np.uint8]]:
    """Fields of a slide to take statistics of, or to learn from.

    A slide of hardly more pixels than asked for comes whole, as one field; else squares around random tissue.

    Returns:
        Pictures (H, W, 3) uint8 at `mpp`.
    """
    whole = Region.whole(slide.size).pixels(mpp, slide.mpp)
    if whole.width * whole.height <= 1.5 * fields * side**2:
        return [slide.read(Region.whole(slide.size), mpp)]
    rows, columns = np.nonzero(mask.mask)
    if not len(rows):
        return []
    extent = level0_length(side, mpp, slide.mpp)
    chosen = rng.choice(len(rows), fields, replace=len(rows) < fields)
    scale = _mask_scale(mask)
    return [
        slide.read(
            Region(
                _clamp((columns[k] + 0.5) * scale[0] - extent / 2, slide.size.width - extent),
                _clamp((rows[k] + 0.5) * scale[1] - extent / 2, slide.size.height - extent),
                extent,
                extent,
            ),
            mpp,
        )
        for k in chosen
    ]


def _mask_scale(mask: TissueMask) -> tuple[float, float]:
    size = Size(mask.mask.shape[1], mask.mask.shape[0])
    return mask.size.width / size.width, mask.size.height / size.height


def _clamp(value: float, highest: float) -> float:
    return min(max(0.0, value), max(0.0, highest))
