"""What a method that finds nuclei offers."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from histossl.nuclei.stain import Stains


class Method(Protocol):
    """What finds nuclei: `prior`, `self-training`, `patch-contrast`."""

    @property
    def name(self) -> str: ...

    @property
    def mpp(self) -> float:
        """µm per pixel of the pictures that it takes."""
        ...

    @property
    def learned(self) -> bool:
        """Whether the depth was learned, or is the plain distance to the outline."""
        ...

    def prepare(self, fields: list[NDArray[np.uint8]], stains: Stains) -> float:
        """A number of the slide that `confidence` needs, from a sample of it."""
        ...

    def confidence(self, rgb: NDArray[np.uint8], stains: Stains, context: float) -> NDArray[np.float32]:
        """(2, H, W) in [0, 1] of a picture (H, W, 3) at `mpp`: nucleus, and depth inside of it."""
        ...
