"""The interface of methods that find nuclei."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from histossl.wsi.stain import Stains


class Method(Protocol):
    """A method that finds nuclei: `prior`, `self-training`, `patch-contrast`."""

    @property
    def name(self) -> str:
        """The name of the method on the command line."""
        ...

    @property
    def mpp(self) -> float:
        """µm per pixel of the input pictures."""
        ...

    @property
    def learned(self) -> bool:
        """Whether the depth is learned; otherwise it is the distance to the outline."""
        ...

    @property
    def supported(self) -> bool:
        """Whether the sure nuclei of a slide support what the method finds there (`evidence.py`)."""
        ...

    def prepare(self, fields: list[NDArray[np.uint8]], stains: Stains) -> float:
        """Measure the number that `confidence` needs of a slide, such as a threshold.

        Args:
            fields: a sample of the slide, (H, W, 3) uint8 RGB at `mpp`.
            stains: stains of the slide.

        Returns:
            The `context` of `confidence`.
        """
        ...

    def confidence(self, rgb: NDArray[np.uint8], stains: Stains, context: float) -> NDArray[np.float32]:
        """Find nuclei in a picture.

        Args:
            rgb: (H, W, 3) uint8 RGB at `mpp`.
            stains: stains of the slide.
            context: what `prepare` returned for the slide.

        Returns:
            (2, H, W) float32 in [0, 1]: confidence that a pixel is nucleus, and depth inside the nucleus.
        """
        ...
