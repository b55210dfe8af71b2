"""Finds the tissue on a slide."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histossl.core.errors import SettingsError
from histossl.wsi.artefacts import PENS, are_dropped, check_kinds, overview
from histossl.wsi.density import (
    average,
    blurred,
    deviation,
    glass_colour,
    largest,
    least,
    optical_density,
    within,
    without_small,
)
from histossl.wsi.geometry import Region, Size
from histossl.wsi.slide import Slide

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LONGEST, _SHORTEST = 2048, 512  # pixels of the picture that is analysed, for slides of any size
_CROP = 2000.0  # µm: smaller fields have no pen marks, and blood in them would look like red ink
_INK_TOLD = 0.02  # share of a slide; less is a dot of a pen, which needs no note


@dataclass(frozen=True)
class TissueSettings:
    """How tissue is separated from glass.

    Attributes:
        mpp: µm per pixel of the picture that is analysed.
        blur: µm, sigma of the Gaussian before judging: about a nucleus, so that cells merge and noise does not count.
        threshold: threshold on colour plus texture, in units of optical density; lower values find paler tissue, and
            more dirt.
        smallest: µm; pieces with less area than a square of this side are dirt.
        hole: µm; holes with less area than a square of this side belong to the tissue around them.
        pens: whether ink of marker pens is left out.
        drop: further kinds of artefacts whose tiles are left out: fold, blur, bubble, dirt, blood, empty, or pens of
            one colour (pen-black, pen-blue, pen-green, pen-red).
    """

    mpp: float = 8.0
    blur: float = 8.0
    threshold: float = 0.03
    smallest: float = 100.0
    hole: float = 200.0
    pens: bool = True
    drop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("mpp", "blur", "threshold"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"tissue {name} must be positive, got {getattr(self, name)}")
        for name in ("smallest", "hole"):
            if not getattr(self, name) >= 0:
                raise SettingsError(f"tissue {name} must not be negative, got {getattr(self, name)}")
        check_kinds(self.drop)

    @property
    def dropped(self) -> tuple[str, ...]:
        """All kinds of artefacts whose tiles are left out."""
        return ("pen", *self.drop) if self.pens else self.drop


@dataclass(frozen=True)
class TissueMask:
    """Tissue on a slide.

    Attributes:
        mask: (h, w) bool, covers the slide exactly.
        size: of the slide's level 0.
        ink: the part of what is not glass that was taken for ink of pens and left out, in [0, 1].
        kinds: (h, w) 1 + index of `artefacts.KINDS` of what an overview shows, 0 for none; of any scale.
        drop: the kinds whose tiles are left out.
        areas: (h, w), where the user's areas lie, tissue or not; None where none restrict the mask.
    """

    mask: NDArray[np.bool_]
    size: Size
    ink: float = 0.0
    kinds: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((1, 1), np.uint8))
    drop: tuple[str, ...] = ()
    areas: NDArray[np.bool_] | None = None

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
    Ink of marker pens is left out, of slides of at least 2 mm; other artefacts are told, see `artefacts`.

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
    smooth = blurred(picture.astype(np.float32), sigma)
    glass = glass_colour(smooth)
    density, raw = optical_density(smooth, glass), optical_density(picture, glass)
    evidence = largest(density) - least(density) + deviation(average(raw), sigma)
    area = 1 / mpp**2
    mask = evidence > settings.threshold
    holes = np.asarray(ndimage.binary_fill_holes(mask)) & ~mask
    mask |= holes & ~without_small(holes, settings.hole**2 * area)
    mask = ~within(~mask, settings.blur / mpp)  # the blur spreads tissue beyond its edge
    before = mask.sum()
    kinds = overview(density, raw, mask, mpp, min(slide.size.width, slide.size.height) * slide.mpp >= _CROP)
    mask &= ~np.isin(kinds, 1 + np.flatnonzero(are_dropped(settings.dropped)[: len(PENS)]))
    ink = 1 - float(mask.sum()) / int(before) if before else 0.0
    mask = without_small(mask, min(settings.smallest**2 * area, 0.01 * mask.size))
    return TissueMask(mask, slide.size, ink, kinds, settings.dropped)


def _picture(slide: Slide, mpp: float) -> tuple[float, NDArray[np.uint8]]:
    """The slide at `mpp`, or at the nearest mpp that keeps the longer side within bounds."""
    side = max(slide.size.width, slide.size.height) * slide.mpp
    mpp = max(slide.mpp, side / _LONGEST, min(mpp, side / _SHORTEST))
    return mpp, slide.read(Region.whole(slide.size), mpp)
