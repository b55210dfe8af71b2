"""Separation of hematoxylin and eosin in optical density, by fixed stain vectors or by those of the slide."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histossl.core.errors import SlideError
from histossl.wsi.geometry import Region, Size, level0_length
from histossl.wsi.slide import Slide
from histossl.wsi.tissue import TissueMask

_TISSUE = 0.12  # least optical density of a stained pixel in every channel; less is glass (Macenko's beta)
_LEAST = 500  # stained pixels that an estimate needs
_NUCLEAR = 0.02  # share of the stained pixels, the darkest in red, that hematoxylin is estimated from
_SAMPLE_SIDE = 256  # pixels, side of one field of a slide's sample

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Stains:
    """The stains of a slide; always statistics of the whole slide, never of a tile.

    Attributes:
        hematoxylin: unit optical density in (red, green, blue).
        eosin: unit optical density in (red, green, blue).
        white: intensity of empty glass in (red, green, blue), 0 to 255.
        scale: the 99th percentile of the optical density of stained pixels; networks take densities divided by it.
    """

    hematoxylin: Vector
    eosin: Vector
    white: Vector = (255.0, 255.0, 255.0)
    scale: float = 1.0

    @property
    def has_hematoxylin(self) -> bool:
        """Whether the bluer stain can be hematoxylin, which absorbs a fair share of red light; eosin absorbs little.

        Measured on real slides: .18 to .42 of the estimated hematoxylin's total density is in the red channel (less
        where there are few nuclei, which contain eosin too), and .05 to .32 of the estimated eosin's; on one slide they
        differ by .08 or more.
        """
        red, other = self.hematoxylin[0] / sum(self.hematoxylin), self.eosin[0] / sum(self.eosin)
        return red > 0.3 or (red > 0.16 and red - other > 0.05)

    @property
    def is_eosin_alone(self) -> bool:
        """Whether even the bluer stain absorbs next to no red, as where there is eosin alone: no nuclei to find.

        The estimated hematoxylin of real slides has .18 or more of its density in the red channel.
        """
        return self.hematoxylin[0] / sum(self.hematoxylin) < 0.12

    @property
    def has_brown(self) -> bool:
        """Whether the other stain absorbs mostly blue, as DAB of immunohistochemistry does, but eosin does not."""
        return self.eosin[2] > 0.41 * sum(self.eosin)


# Ruifrok and Johnston (2001), normalised; eosin as measured by them.
FIXED = Stains(hematoxylin=(0.651, 0.701, 0.290), eosin=(0.070, 0.991, 0.110))


def optical_density(rgb: NDArray[np.uint8], white: Vector = (255.0, 255.0, 255.0)) -> NDArray[np.float32]:
    """Optical density, -log10 of the transmitted light.

    Args:
        rgb: (..., 3) uint8.
        white: intensity of empty glass in (red, green, blue), 0 to 255.

    Returns:
        (..., 3) float32, not negative; 0 is glass, 2.4 is black.
    """
    table = -np.log10((np.arange(256, dtype=np.float32)[:, None] + 1) / (np.asarray(white, np.float32) + 1))
    table = np.maximum(table, 0).astype(np.float32)
    return np.stack([table[:, c][rgb[..., c]] for c in range(3)], -1)


def concentrations(density: NDArray[np.float32], stains: Stains) -> NDArray[np.float32]:
    """Amounts of hematoxylin and eosin, by least squares.

    Args:
        density: (..., 3) optical density.
        stains: stains of the slide.

    Returns:
        (..., 2) float32, optical density along each stain's vector; may be slightly negative.
    """
    basis = np.array([stains.hematoxylin, stains.eosin], np.float32)
    return unmixed(density, np.linalg.pinv(basis))


def unmixed(density: NDArray[np.float32], weights: NDArray) -> NDArray[np.float32]:
    """Weighted sums of the channels.

    Computed channel by channel: in a matrix product the last bit of a pixel depends on the width of its picture.

    Args:
        density: (..., 3) optical density.
        weights: (3,) or (3, n).

    Returns:
        (...) or (..., n) float32.
    """
    red, green, blue = weights.astype(np.float32)
    channel = density if weights.ndim == 1 else density[..., None, :]
    return channel[..., 0] * red + channel[..., 1] * green + channel[..., 2] * blue


def estimate_stains(pixels: NDArray[np.uint8], every_channel: bool = True) -> Stains | None:
    """Estimate the stain vectors of a slide from a sample of its pixels.

    Hematoxylin absorbs red: it is the mean direction of the bluer half of the 2 % of stained pixels that are darkest in
    red. Eosin is the mean direction of the strongly stained pixels with the least share of red. Macenko et al.
    (ISBI 2009) take the 1st and 99th percentile of all directions instead, which misses hematoxylin where less than one
    pixel in a hundred is nucleus, as in muscle or blood. Glass is the 99th percentile of the pixels, if that is bright.

    Args:
        pixels: (N, 3) uint8 RGB, glass included.
        every_channel: whether a stained pixel absorbs in every channel, as nuclei do; else in all together. Eosin that
            absorbs hardly any red is stained in the latter sense only.

    Returns:
        The stains; None where too few pixels are stained or all are stained alike, as on an empty slide.

    Raises:
        SlideError: the pixels are greyscale, so that the stains cannot be distinguished.
    """
    white = _glass(pixels)
    density = optical_density(pixels, white)
    seen = (pixels > 12).any(1)
    stained = density[(density > _TISSUE).all(1) & seen]
    if not every_channel or len(stained) < _LEAST:  # on a pale slide, one channel may be below the limit everywhere
        stained = density[(density.sum(1) > 3 * _TISSUE) & seen]
    if len(stained) < _LEAST:
        return None
    if np.percentile(np.ptp(stained, axis=1), 95) < 0.02:
        raise SlideError(
            "image", "is greyscale, so that hematoxylin and eosin cannot be distinguished", "give the colour image"
        )
    scale = float(np.percentile(stained, 99))
    if scale < 1.25 * np.percentile(stained, 1):
        return None
    hematoxylin, eosin = _extremes(stained)
    return Stains(_vector(hematoxylin), _vector(eosin), white, scale)


def _extremes(stained: NDArray[np.float32]) -> tuple[NDArray, NDArray]:
    """Unit vectors (3,) of hematoxylin and eosin, from the optical density of stained pixels (N, 3)."""
    red, total = stained[:, 0], stained.sum(1)
    nuclear = stained[red >= np.quantile(red, 1 - _NUCLEAR)]
    strong = stained[total >= np.median(total)]
    return _purest(nuclear, 0.5, 1), _purest(strong, 0.02, -1)


def _purest(density: NDArray[np.float32], part: float, sign: int) -> NDArray:
    """The mean direction of the share `part` of the pixels that absorb relatively most (sign 1) or least (-1) red."""
    share = sign * density[:, 0] / density.sum(1)
    chosen = density[share >= np.quantile(share, 1 - part)].astype(np.float64)
    mean = (chosen / np.linalg.norm(chosen, axis=1, keepdims=True)).mean(0)
    return mean / np.linalg.norm(mean)


def _glass(pixels: NDArray[np.uint8]) -> Vector:
    bright = np.percentile(pixels, 99, axis=0)
    return _vector(bright if bright.min() >= 200 and np.ptp(bright) < 30 else np.full(3, 255.0))


def _vector(values: NDArray) -> Vector:
    red, green, blue = (round(float(v), 4) for v in values)
    return red, green, blue


def sample_fields(
    slide: Slide, mask: TissueMask, mpp: float, fields: int, rng: np.random.Generator, side: int = _SAMPLE_SIDE
) -> list[NDArray[np.uint8]]:
    """Fields of a slide, for statistics or for training: squares around random pixels of tissue.

    A slide that has hardly more pixels than requested is returned whole, as one field.

    Args:
        slide: the slide.
        mask: its tissue.
        mpp: µm per pixel of the fields.
        fields: number of fields.
        rng: chooses the fields.
        side: pixels, side of a field at `mpp`.

    Returns:
        Pictures (H, W, 3) uint8 RGB at `mpp`; none where there is no tissue.

    Raises:
        SlideError: the slide cannot be read.
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
                _clamp(float(columns[k] + 0.5) * scale[0] - extent / 2, slide.size.width - extent),
                _clamp(float(rows[k] + 0.5) * scale[1] - extent / 2, slide.size.height - extent),
                extent,
                extent,
            ),
            mpp,
        )
        for k in chosen
    ]


def gaussian(values: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Smooth a map with a Gaussian.

    Args:
        values: (H, W).
        sigma: pixels.

    Returns:
        (H, W) float32.
    """
    result = np.empty_like(values, np.float32)
    ndimage.gaussian_filter(values, sigma, mode="nearest", output=result)
    return result


def _mask_scale(mask: TissueMask) -> tuple[float, float]:
    size = Size(mask.mask.shape[1], mask.mask.shape[0])
    return mask.size.width / size.width, mask.size.height / size.height


def _clamp(value: float, highest: float) -> float:
    return min(max(0.0, value), max(0.0, highest))
