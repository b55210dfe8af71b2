"""Nuclei without learning, by one threshold on hematoxylin per slide: the baseline of all other methods."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.color import hed_from_rgb
from skimage.filters import threshold_otsu

from histossl.nuclei.component_tree import filled
from histossl.nuclei.pseudo_labels import SureNuclei
from histossl.wsi.stain import Stains, concentrations, gaussian, optical_density, unmixed


@dataclass(frozen=True)
class PriorSettings:
    """Settings of the threshold method.

    Attributes:
        stains: "fixed" (the vectors of Ruifrok and Johnston, 2001, the same for every slide) or "estimated" (the
            slide's own).
        blur: µm, sigma of the Gaussian before the threshold.
        opening: µm, radius of the disc that opens the mask.
        hole: µm², holes up to this area are filled.
        inner: µm, distance from the outline at which the depth reaches 1.
    """

    stains: str = "fixed"
    blur: float = 0.25
    opening: float = 0.5
    hole: float = 40.0
    inner: float = 5.0


class Prior:
    """A threshold on hematoxylin, found by Otsu's method on a sample of the slide.

    Args:
        settings: blur, opening and the like.
    """

    name = "prior"
    mpp = 0.5
    learned = False
    support = None

    def __init__(self, settings: PriorSettings = PriorSettings()) -> None:
        self.settings = settings

    def prepare(self, fields: list[NDArray[np.uint8]], stains: Stains, sure: SureNuclei | None = None) -> float:
        """Find the threshold of a slide.

        Args:
            fields: a sample of the slide, (H, W, 3) uint8 RGB at `mpp`.
            stains: stains of the slide; used where the settings say "estimated".
            sure: not used.

        Returns:
            The threshold on `hematoxylin`.
        """
        values = np.concatenate([self.hematoxylin(field, stains).ravel() for field in fields])
        return float(threshold_otsu(values))

    def hematoxylin(self, rgb: NDArray[np.uint8], stains: Stains) -> NDArray[np.float32]:
        """The smoothed amount of hematoxylin.

        Args:
            rgb: (H, W, 3) uint8 RGB at `mpp`.
            stains: stains of the slide; used where the settings say "estimated".

        Returns:
            (H, W) float32, optical density.
        """
        if self.settings.stains == "estimated":
            amount = concentrations(optical_density(rgb, stains.white), stains)[..., 0]
        else:
            amount = unmixed(optical_density(rgb), hed_from_rgb[:, 0])
        return gaussian(amount, self.settings.blur / self.mpp)

    def confidence(self, rgb: NDArray[np.uint8], stains: Stains, context: float) -> NDArray[np.float32]:
        """Find nuclei in a picture.

        Args:
            rgb: (H, W, 3) uint8 RGB at `mpp`.
            stains: stains of the slide.
            context: the threshold that `prepare` found.

        Returns:
            (2, H, W) float32: the mask (0 or 1), and the depth inside the nucleus, in [0, 1].
        """
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
