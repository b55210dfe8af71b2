"""Finds the tissue on a slide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histossl.core.errors import SettingsError
from histossl.wsi.geometry import Region, Size
from histossl.wsi.slide import Slide

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LONGEST, _SHORTEST = 2048, 512  # pixels of the picture that is analysed, for slides of any size
_CROP = 2000.0  # µm: smaller fields have no pen marks, and blood in them would look like red ink
_INK_TOLD = 0.02  # share of a slide; less is a dot of a pen, which needs no note
_EVEN = 0.02, 0.06  # deviation of the density over its mean; strokes of pens lie below, tissue above
_DARK = 12.0  # intensities below it are a camera's noise, without colour


@dataclass(frozen=True)
class TissueSettings:
    """How tissue is separated from glass.

    Attributes:
        mpp: µm per pixel of the picture that is analysed.
        blur: µm, sigma of the Gaussian before judging: about a nucleus, so that cells merge and noise does not count.
        threshold: on colour plus texture, in units of optical density; lower values find paler tissue, and more dirt.
        smallest: µm; pieces with less area than a square of this side are dirt.
        hole: µm; holes with less area than a square of this side belong to the tissue around them.
        pens: whether ink of marker pens is left out.
    """

    mpp: float = 8.0
    blur: float = 8.0
    threshold: float = 0.03
    smallest: float = 100.0
    hole: float = 200.0
    pens: bool = True

    def __post_init__(self) -> None:
        for name in ("mpp", "blur", "threshold"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"tissue {name} must be positive, got {getattr(self, name)}")
        for name in ("smallest", "hole"):
            if not getattr(self, name) >= 0:
                raise SettingsError(f"tissue {name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class TissueMask:
    """Tissue on a slide.

    Attributes:
        mask: (h, w) bool, covers the slide exactly.
        size: of the slide's level 0.
        ink: the part of what is not glass that was taken for ink of pens and left out, in [0, 1].
    """

    mask: NDArray[np.bool_]
    size: Size
    ink: float = 0.0

    @property
    def ink_note(self) -> str:
        """A note on how much was taken for ink and how to keep it; "" where it is negligible."""
        if self.ink < _INK_TOLD:
            return ""
        return f"{self.ink:.0%} of what is not glass was taken for pen ink; --tissue.pens false takes it for tissue"

    def __repr__(self) -> str:
        height, width = self.mask.shape
        return (
            f"TissueMask({self.mask.mean():.0%} tissue, {width} x {height} pixels for a slide of "
            f"{self.size.width} x {self.size.height})"
        )

    def plot(self, ax: Axes | None = None, colour: str = "tab:green") -> Axes:
        """Draw the outlines of the tissue.

        Args:
            ax: matplotlib axes in level-0 pixels, such as those of `Slide.plot`; None makes new ones.
            colour: of the lines.

        Returns:
            The axes.
        """
        from histossl.wsi.plot import draw_mask

        return draw_mask(self.mask, self.size, colour, ax)


def find_tissue(slide: Slide, settings: TissueSettings | None = None) -> TissueMask:
    """Find the tissue of a slide.

    Glass has neither colour nor texture, whatever its brightness, so tissue is where the chroma of the optical density
    (its largest minus its smallest channel, relative to the slide's own glass) plus its local deviation is above an
    absolute threshold. A threshold per slide would fail on a field that is all tissue.
    Marker pens are left out of slides of at least 2 mm: H&E absorbs green most, blue and green ink red, black ink all
    alike, red ink green and blue alike. Special stains may do so, too; but ink is even where tissue is not.

    Args:
        slide: the slide.
        settings: how tissue is separated from glass; None takes the defaults.

    Returns:
        The mask; all False on an empty slide, be it white, grey or black.

    Raises:
        SlideError: the slide cannot be read.
    """
    settings = settings or TissueSettings()
    mpp, picture = _picture(slide, settings.mpp)
    sigma = settings.blur / mpp
    intensity = picture.astype(np.float32)
    smooth = _blurred(intensity, sigma)
    glass = _glass(smooth)
    density = _optical_density(smooth, glass)
    evidence = np.ptp(density, axis=2) + _deviation(_optical_density(intensity, glass).mean(2), sigma)
    area = 1 / mpp**2
    mask = evidence > settings.threshold
    holes = np.asarray(ndimage.binary_fill_holes(mask)) & ~mask
    mask |= holes & ~_without_small(holes, settings.hole**2 * area)
    mask = ~_within(~mask, settings.blur / mpp)  # the blur spreads tissue beyond its edge
    before = mask.sum()
    if settings.pens and min(slide.size.width, slide.size.height) * slide.mpp >= _CROP:
        mask &= ~_ink(density, mpp)
    ink = 1 - float(mask.sum()) / int(before) if before else 0.0
    mask = _without_small(mask, min(settings.smallest**2 * area, 0.01 * mask.size))
    return TissueMask(mask, slide.size, ink)


def _picture(slide: Slide, mpp: float) -> tuple[float, NDArray[np.uint8]]:
    """The slide at `mpp`, or at the nearest mpp that keeps the longer side within bounds."""
    side = max(slide.size.width, slide.size.height) * slide.mpp
    mpp = max(slide.mpp, side / _LONGEST, min(mpp, side / _SHORTEST))
    return mpp, slide.read(Region.whole(slide.size), mpp)


def _glass(smooth: NDArray[np.float32]) -> NDArray[np.float32]:
    """(3,) the colour of empty glass, dim or tinted: the brightest percent, if that is not pink; else white."""
    bright = np.percentile(smooth.reshape(-1, 3), 99, axis=0).astype(np.float32)
    red, green, blue = _optical_density(bright, np.full(3, 255, np.float32))
    pink = green - (red + blue) / 2
    tinted = max(red, green, blue) - min(red, green, blue)
    return bright if bright.min() >= 60 and pink < 0.01 and tinted < 0.06 else np.full(3, 255, np.float32)


def _optical_density(intensity: NDArray[np.float32], glass: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.log10(glass / np.clip(intensity, _DARK, glass))


def _deviation(density: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """The local standard deviation under a Gaussian window."""
    mean = _blurred(density, sigma)
    return np.sqrt(np.maximum(_blurred(density**2, sigma) - mean**2, 0))


def _blurred(values: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    blurred = np.empty_like(values)
    ndimage.gaussian_filter(values, sigma, mode="nearest", axes=(0, 1), output=blurred)
    return blurred


def _ink(density: NDArray[np.float32], mpp: float) -> NDArray[np.bool_]:
    """(h, w) where marker pens were: of a colour that H&E has not, and as even as no tissue is.

    Special stains have the colours of ink, and their density varies with the structure under them.
    """
    red, green, blue = np.moveaxis(density, 2, 0)
    mean = density.mean(2)
    cold = (red > 1.25 * green) & (red - green > 0.06) | (red > 0.65) & (red > 0.95 * green)
    black = (mean > 0.75) & (np.ptp(density, axis=2) < 0.25 * mean)
    warm = (green > 0.5) & (red < 0.25 * green) & (blue > 0.75 * green)
    coloured = _without_small(cold | black | warm, (150 / mpp) ** 2)
    if not coloured.any():
        return coloured
    # At the edge of a stroke its colour mixes with that of the glass, and its density with the glass's.
    inner = ~_within(~coloured, max(1.0, 20 / mpp))
    # Ink over tissue shows some of its structure, but is denser than tissue alone.
    even = inner & (_variation(density, inner, 20 / mpp) < np.clip(mean / 12, *_EVEN))
    most = _blurred(even.astype(np.float32), 60 / mpp) > 0.5 * _blurred(inner.astype(np.float32), 60 / mpp)
    stroke = _without_small(coloured & most, (150 / mpp) ** 2)
    return _within(stroke, 50 / mpp)


def _variation(density: NDArray[np.float32], where: NDArray[np.bool_], sigma: float) -> NDArray[np.float32]:
    """(h, w) the local standard deviation over the local mean under a Gaussian window, of the pixels in `where`."""
    weight = where.astype(np.float32)[..., None]
    total = np.maximum(_blurred(weight, sigma), 1e-6)
    mean = _blurred(weight * density, sigma) / total
    variance = np.maximum(_blurred(weight * density**2, sigma) / total - mean**2, 0)
    return np.sqrt(variance.mean(2)) / np.maximum(mean.mean(2), 1e-6)


def _within(mask: NDArray[np.bool_], distance: float) -> NDArray[np.bool_]:
    """The mask widened by `distance` pixels."""
    return np.asarray(ndimage.distance_transform_edt(~mask)) <= distance if mask.any() else mask


def _without_small(mask: NDArray[np.bool_], area: float) -> NDArray[np.bool_]:
    """The mask without its 8-connected parts of fewer than `area` pixels."""
    labels = np.empty(mask.shape, np.int32)
    ndimage.label(mask, np.ones((3, 3)), output=labels)
    large = np.bincount(labels.ravel()) >= area
    large[0] = False
    return large[labels]
