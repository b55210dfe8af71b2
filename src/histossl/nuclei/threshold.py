"""Nuclei without any learning: hematoxylin above one threshold a slide. What everything else must beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.color import hed_from_rgb
from skimage.filters import threshold_otsu

from histossl.nuclei.component_tree import filled
from histossl.nuclei.stain import Stains, concentrations, gaussian, optical_density, unmixed


@dataclass(frozen=True)
class PriorSettings:
    """How hematoxylin becomes nuclei; lengths in µm.

    Attributes:
        stains: "fixed" (the vectors of Ruifrok and Johnston, 2001, the same for every slide) or "estimated" (the
            slide's own).
        blur: sigma of the Gaussian before the threshold.
        opening: radius of the disc that opens the mask.
        hole: µm², holes up to this area are filled.
        inner: distance from the outline that counts as the middle of a nucleus.
    """

    stains: str = "fixed"
    blur: float = 0.25
    opening: float = 0.5
    hole: float = 40.0
    inner: float = 5.0


class Prior:
    """A threshold on hematoxylin, by Otsu over a sample of the slide.

    Args:
        settings: how hematoxylin becomes nuclei.
    """

    name = "prior"
    mpp = 0.5
    learned = False

    def __init__(self, settings: PriorSettings = PriorSettings()) -> None:
        self.settings = settings

    def prepare(self, fields: list[NDArray[np.uint8]], stains: Stains) -> float:
        """The threshold of a slide from a sample of it: (H, W, 3) pictures at `mpp`."""
        values = np.concatenate([self.hematoxylin(field, stains).ravel() for field in fields])
        return float(threshold_otsu(values))

    def hematoxylin(self, rgb: NDArray[np.uint8], stains: Stains) -> NDArray[np.float32]:
        """(H, W) hematoxylin, smoothed."""
        if self.settings.stains == "estimated":
            amount = concentrations(optical_density(rgb, stains.white), stains)[..., 0]
        else:
            amount = unmixed(optical_density(rgb), hed_from_rgb[:, 0])
        return gaussian(amount, self.settings.blur / self.mpp)

    def confidence(self, rgb: NDArray[np.uint8], stains: Stains, context: float) -> NDArray[np.float32]:
        """(2, H, W) in [0, 1]: nucleus (a step at the threshold), and depth inside of it."""
        amount = self.hematoxylin(rgb, stains)
        disc = _disc(self.settings.opening / self.mpp)
        opened = np.asarray(ndimage.binary_opening(amount > context, disc), bool)
        mask = filled(opened, self.settings.hole / self.mpp**2)
        depth = np.asarray(ndimage.distance_transform_edt(mask)) * self.mpp / self.settings.inner
        return np.stack([mask, np.minimum(depth, 1)]).astype(np.float32)


def _disc(radius: float) -> NDArray[np.bool_]:
    reach = int(np.ceil(radius))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return np.hypot(y, x) <= radius + 1e-9
