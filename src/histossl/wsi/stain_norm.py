"""The colours of a slide as a few numbers, and tiles as they would look in the colours of another slide.

Macenko et al. (ISBI 2009): amounts of the slide's two stains, brought to the other's strength and painted in its
stains; what is neither stain stays as it is, where they leave it out. Reinhard et al. (2001): mean and deviation of the
logarithms of cones' answers, in the axes of lightness and two colours. Both are a few products a pixel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histossl.core.config import check_choice
from histossl.core.errors import SlideError
from histossl.wsi.slide import Slide
from histossl.wsi.stain import Stains, Vector, concentrations, estimate_stains, optical_density, sample_fields
from histossl.wsi.tissue import TissueMask

METHODS = ("macenko", "reinhard")
_FIELDS, _PIXELS, _MPP = 8, 60_000, 1.0  # of the sample of a slide; µm per pixel, or the slide's where it is coarser
_TISSUE = 0.12  # mean optical density of a pixel that counts for Reinhard's statistics
_ALIKE = 0.999  # cosine of two stains that are one
_LEAST, _RATIO = 0.05, 5.0  # of a stain's strength, and of two strengths: beyond, one of the stains is not there

# Reinhard's: RGB to the answers of cones; their logarithms to lightness, yellow against blue, red against green.
_CONES = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]]).T


@dataclass(frozen=True)
class Look:
    """The colours of a slide.

    Attributes:
        stains: its stain vectors and the colour of its glass.
        strength: the 99th percentile of the amount of either stain, in optical density.
        mean, deviation: of Reinhard's three axes, over tissue.
    """

    stains: Stains
    strength: tuple[float, float]
    mean: Vector
    deviation: Vector

    def __str__(self) -> str:
        """A cell of slides.csv, such as `H 0.65 0.70 0.29; E 0.07 0.99 0.11`: unit optical densities in R, G, B."""
        told = (("H", self.stains.hematoxylin), ("E", self.stains.eosin))
        return "; ".join(f"{name} {' '.join(f'{value:.2f}' for value in vector)}" for name, vector in told)

    def numbers(self) -> list[float]:
        """All numbers in one row, of `NUMBERS` values."""
        known = self.stains
        rows = (known.hematoxylin, known.eosin, known.white, (known.scale,), self.strength, self.mean, self.deviation)
        return [round(float(value), 5) for row in rows for value in row]


NUMBERS = 18


def look_from(numbers: Sequence[float]) -> Look:
    """The inverse of `Look.numbers`.

    Args:
        numbers: `NUMBERS` values.

    Raises:
        ValueError: there are more or fewer.
    """
    values = [float(value) for value in numbers]
    if len(values) != NUMBERS:
        raise ValueError(f"{len(values)} numbers are no look of a slide")
    h, e, white, mean, deviation = (_three(values[at : at + 3]) for at in (0, 3, 6, 12, 15))
    return Look(Stains(h, e, white, values[9]), (values[10], values[11]), mean, deviation)


def _three(values: Sequence[float]) -> Vector:
    red, green, blue = values
    return red, green, blue


def look_of(slide: Slide, mask: TissueMask) -> Look | None:
    """Estimate the colours of a slide from eight fields of its tissue.

    Args:
        slide: the slide.
        mask: its tissue.

    Returns:
        The colours; None where too little is stained, all is stained alike, or the slide is grey.

    Raises:
        SlideError: the slide cannot be read.
    """
    fields = sample_fields(slide, mask, max(_MPP, slide.mpp), _FIELDS, np.random.default_rng(0))
    pixels = np.concatenate([field.reshape(-1, 3) for field in fields] or [np.zeros((0, 3), np.uint8)])
    pixels = pixels[:: max(1, len(pixels) // _PIXELS)]
    try:
        stains = estimate_stains(pixels, every_channel=False)
    except SlideError:  # grey
        return None
    if stains is None or np.dot(stains.hematoxylin, stains.eosin) > _ALIKE:
        return None
    density = optical_density(pixels, stains.white)
    stained = density.mean(1) > _TISSUE
    amounts = np.percentile(concentrations(density[stained], stains), 99, axis=0)
    axes = np.log10(_cones(pixels[stained])) @ _axes()
    mean, deviation = _three(axes.mean(0).tolist()), _three(axes.std(0).tolist())
    return Look(stains, (float(amounts[0]), float(amounts[1])), mean, deviation)


def usual_look(looks: Sequence[Look]) -> Look:
    """The median of the colours of slides, number by number; stain vectors have length 1 again.

    Args:
        looks: one or more.
    """
    middle = np.median([look.numbers() for look in looks], axis=0)
    for at in (0, 3):
        middle[at : at + 3] /= np.linalg.norm(middle[at : at + 3])
    return look_from(middle.tolist())


@dataclass(frozen=True)
class Change:
    """Tiles of a slide in the colours of another.

    Attributes:
        method: macenko or reinhard.
        source: the colours of the slide.
        target: the colours that it gets.

    Raises:
        SettingsError: an unknown method.
    """

    method: str
    source: Look
    target: Look

    def __post_init__(self) -> None:
        check_choice("stain method", self.method, METHODS)

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Change tiles.

        Args:
            tiles: (n, h, w, 3) uint8 RGB.

        Returns:
            The same shape, uint8; each pixel depends on itself alone.
        """
        change = _macenko if self.method == "macenko" else _reinhard
        found = np.empty_like(tiles)
        for k, tile in enumerate(tiles):
            pixels = change(tile.reshape(-1, 3), self.source, self.target)
            found[k] = np.clip(np.rint(pixels), 0, 255).astype(np.uint8).reshape(tile.shape)
        return found


def _macenko(pixels: NDArray[np.uint8], source: Look, target: Look) -> NDArray[np.float32]:
    matrix, shift = _macenko_map(source, target)
    return np.exp(_LOG[pixels] @ matrix + shift) - 1


_LOG = np.log(np.arange(256, dtype=np.float32) + 1)


@functools.lru_cache(maxsize=64)
def _macenko_map(source: Look, target: Look) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """In the logarithm of the intensity plus one: a matrix and a shift."""
    here, there = (np.array([look.stains.hematoxylin, look.stains.eosin]) for look in (source, target))
    ratio = np.array(target.strength) / np.maximum(source.strength, _LEAST)
    amounts = np.linalg.pinv(here)
    matrix = np.eye(3) - amounts @ here + amounts @ np.diag(np.clip(ratio, 1 / _RATIO, _RATIO)) @ there
    glass, its = (np.log(np.array(look.stains.white) + 1) for look in (source, target))
    return matrix.astype(np.float32), (its - glass @ matrix).astype(np.float32)


def _reinhard(pixels: NDArray[np.uint8], source: Look, target: Look) -> NDArray[np.float32]:
    matrix, shift = _reinhard_map(source, target)
    logs = np.log10(_cones(pixels)) @ matrix + shift
    return np.asarray((10**logs) @ np.linalg.inv(_CONES).astype(np.float32) - 1, np.float32)


@functools.lru_cache(maxsize=64)
def _reinhard_map(source: Look, target: Look) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """In the logarithms of the cones' answers: a matrix and a shift."""
    ratio = np.array(target.deviation) / np.maximum(source.deviation, 1e-3)
    inverse = np.diag(np.clip(ratio, 1 / _RATIO, _RATIO)) @ np.linalg.inv(_axes())
    shift = np.array(target.mean) @ np.linalg.inv(_axes()) - np.array(source.mean) @ inverse
    return (_axes() @ inverse).astype(np.float32), shift.astype(np.float32)


def _cones(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return (pixels.astype(np.float32) + 1) @ _CONES.astype(np.float32)


@functools.cache
def _axes() -> NDArray[np.float64]:
    """(3, 3) orthonormal: logarithms of cones' answers to lightness, yellow against blue, red against green."""
    return np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]]).T / np.sqrt([3, 6, 2])
