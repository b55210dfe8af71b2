"""What the slide's own hematoxylin says, laid over what a network says. No torch.

A network that learned elsewhere is unsure about nuclei that look unlike those that it has seen. The sure nuclei of the
slide's own component tree, which it would learn from if it were trained here, then decide.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from histossl.nuclei.pseudo_labels import SlideTree, depth_inside, hematoxylin
from histossl.wsi.stain import Stains, optical_density

_ODDS = np.float32(np.e)  # a sure nucleus makes it so many times as likely that its pixels are nucleus
_SHARE = np.float32(0.5)  # of the depth of a sure nucleus; the rest is the network's


def with_sure_nuclei(
    confidence: NDArray[np.float32], rgb: NDArray[np.uint8], stains: Stains, tree: SlideTree, mpp: float
) -> NDArray[np.float32]:
    """Raise confidence and depth where hematoxylin shows sure nuclei.

    Args:
        confidence: (2, H, W) float32 in [0, 1], confidence and depth by a network; not changed.
        rgb: (H, W, 3) uint8 RGB.
        stains: stains of the slide.
        tree: thresholds of the slide, as of `sure_nuclei`.
        mpp: µm per pixel.

    Returns:
        (2, H, W) float32 in [0, 1]; the same as `confidence` outside of sure nuclei.
    """
    amount = hematoxylin(optical_density(rgb, stains.white), stains, mpp)
    labels, quality = tree.objects_of(tree.grown(amount, mpp))
    sure = quality >= 1
    labels = ((np.cumsum(sure) * sure).astype(np.int32))[labels]
    nucleus, depth = confidence
    likely = nucleus * _ODDS / (1 + nucleus * (_ODDS - 1))
    mixed = (1 - _SHARE) * depth + _SHARE * depth_inside(labels)
    return np.where(labels > 0, np.stack([likely, mixed]), confidence)
