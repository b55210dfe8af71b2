"""The interface of methods that find nuclei."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from histossl.nuclei.pseudo_labels import SureNuclei
from histossl.nuclei.settings import PseudoLabelSettings
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
    def support(self) -> PseudoLabelSettings | None:
        """How the sure nuclei are found that support the method on a slide (`slide_head.py`, `evidence.py`); or None.

        None is of a method that they do not support.
        """
        ...

    def prepare(self, fields: list[NDArray[np.uint8]], stains: Stains, sure: SureNuclei | None) -> Any:
        """Measure what `confidence` needs of a slide, such as a threshold.

        Args:
            fields: a sample of the slide, (H, W, 3) uint8 RGB at `mpp`.
            stains: stains of the slide.
            sure: the slide's sure nuclei, where they support the method; else None.

        Returns:
            The `context` of `confidence`.
        """
        ...

    def confidence(self, rgb: NDArray[np.uint8], stains: Stains, context: Any) -> NDArray[np.float32]:
        """Find nuclei in a picture.

        Args:
            rgb: (H, W, 3) uint8 RGB at `mpp`.
            stains: stains of the slide.
            context: what `prepare` returned for the slide.

        Returns:
            (2, H, W) float32 in [0, 1]: confidence that a pixel is nucleus, and depth inside the nucleus.
        """
        ...
