"""Checks whether a slide's nuclei have a usual size; a wrong mpp changes it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from histossl.nuclei.instances import MEASURES, Nuclei

USUAL = 40.0
"""µm², the usual nucleus: a disc of 7 µm."""

SMALLEST, LARGEST = 18.0, 75.0
"""µm², between which the usual nucleus of an image lies where the mpp is right: on MoNuSeg's training images `general`
has 19.1 to 74, but for three that lie below (9.3 to 16.2)."""

_LEAST = 30  # nuclei; with fewer the size is not judged


def usual_size(parts: Iterable[Nuclei]) -> float:
    """The usual size of a slide's nuclei: half of all nuclear area is in larger nuclei.

    Args:
        parts: the nuclei of the slide, in portions.

    Returns:
        Area in µm²; 0 where there are hardly any nuclei.
    """
    column = MEASURES.index("area_um2")
    areas = np.sort(np.concatenate([np.zeros(0), *(part.measures[:, column].astype(np.float64) for part in parts)]))
    if len(areas) < _LEAST:
        return 0.0
    total = np.cumsum(areas)
    return float(areas[np.searchsorted(total, total[-1] / 2)])


def doubt_about_mpp(usual: float, mpp: float) -> str:
    """Warn about nuclei of unusual size, which a wrong mpp causes.

    Args:
        usual: µm² of the slide's usual nucleus, 0 where it is unknown.
        mpp: µm per level-0 pixel that it was measured with.

    Returns:
        The warning; empty where the size is usual.
    """
    if not usual or SMALLEST <= usual <= LARGEST:
        return ""
    how = "small" if usual < SMALLEST else "large"
    better = mpp * (USUAL / usual) ** 0.5
    return (
        f"its nuclei are unusually {how} (usual one {usual:.0f} µm²) at {mpp:.3g} µm/px: if the mpp is wrong, "
        f"{better:.2g} would make them usual"
    )
