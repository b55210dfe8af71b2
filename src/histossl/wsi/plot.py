"""Drawings on matplotlib axes in level-0 pixels, so that a slide, its tiles and its nuclei share the same axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from histossl.wsi.geometry import Size

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def axes_or_new(ax: Axes | None, size: Size | None = None) -> Axes:
    """The axes, or new ones with y pointing down and square pixels, as pictures have them.

    Args:
        ax: returned as they are where given.
        size: size of the slide in level-0 pixels, the limits of new axes; None takes the limits from what is drawn.

    Returns:
        The axes.
    """
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    axes: Axes = plt.subplots(layout="constrained")[1]
    axes.set_aspect("equal")
    axes.set_axis_off()
    if size is None:
        axes.yaxis.set_inverted(True)
    else:
        axes.set(xlim=(0, size.width), ylim=(size.height, 0))
    return axes


def draw_picture(rgb: NDArray[np.uint8], size: Size, mpp: float, title: str, ax: Axes | None = None) -> Axes:
    """A picture of a whole slide with a scale bar.

    Args:
        rgb: (h, w, 3) uint8, covers the slide.
        size: of the slide in level-0 pixels.
        mpp: µm per level-0 pixel.
        title: above the picture.
        ax: axes to draw on; None makes new ones.

    Returns:
        The axes, in level-0 pixels.
    """
    axes = axes_or_new(ax, size)
    axes.imshow(rgb, extent=(0, size.width, size.height, 0), interpolation="antialiased")
    axes.set_title(title, fontsize="medium")
    length = _round_length(size.width * mpp / 5)
    x0, y = 0.04 * size.width, 0.96 * size.height
    axes.plot([x0, x0 + length / mpp], [y, y], color="black", linewidth=2.5, solid_capstyle="butt")
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    axes.text(x0, y - 0.015 * size.height, text, fontsize="small", va="bottom")
    return axes


def _round_length(micrometres: float) -> float:
    """The longest of 1, 2 or 5 times a power of ten that is no longer."""
    power = 10.0 ** np.floor(np.log10(micrometres))
    return float(power * max(k for k in (1, 2, 5) if k * power <= micrometres * (1 + 1e-9)))


def draw_mask(mask: NDArray[np.bool_], size: Size, colour: str, ax: Axes | None = None) -> Axes:
    """Draw the outlines of a mask as one line collection.

    Args:
        mask: (h, w) bool, covers the slide.
        size: size of the slide in level-0 pixels.
        colour: colour of the lines, as matplotlib takes it.
        ax: axes to draw on; None makes new ones.

    Returns:
        The axes.
    """
    from skimage.measure import find_contours

    # One empty pixel around the mask closes outlines at the slide's edge; pixel centres lie at k + 0.5.
    scale = np.array([size.width / mask.shape[1], size.height / mask.shape[0]])
    rings = [(ring[:, ::-1] - 0.5) * scale for ring in find_contours(np.pad(mask, 1).astype(np.float32), 0.5)]
    return draw_polygons(rings, None, colour, ax, size)


def draw_squares(
    xy: NDArray[np.int64], extent: float, size: Size, values: NDArray | None, colour: str, ax: Axes | None = None
) -> Axes:
    """Draw squares of one size: frames, or filled by a value each.

    Args:
        xy: (N, 2) top-left corners (x, y) in level-0 pixels.
        extent: side in level-0 pixels.
        size: size of the slide in level-0 pixels.
        values: (N,) numbers that colour the squares, or None for frames.
        colour: colour of the frames, or name of the colour map.
        ax: axes to draw on; None makes new ones.

    Returns:
        The axes.
    """
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * extent
    return draw_polygons(np.asarray(xy, np.float64)[:, None] + corners, values, colour, ax, size)


def draw_polygons(
    rings: Sequence[NDArray] | NDArray, values: NDArray | None, colour: str, ax: Axes | None, size: Size | None = None
) -> Axes:
    """Draw closed outlines as one collection: lines, or filled by a value each.

    Args:
        rings: N outlines, (points, 2) each, (x, y) in level-0 pixels.
        values: (N,) numbers that colour the outlines, or None for lines.
        colour: colour of the lines, or name of the colour map.
        ax: axes to draw on; None makes new ones.
        size: size of the slide in level-0 pixels, for the limits of new axes.

    Returns:
        The axes.
    """
    from matplotlib.collections import PolyCollection

    new, axes = ax is None, axes_or_new(ax, size)
    how: dict[str, Any] = {"facecolors": "none", "edgecolors": colour, "linewidths": 0.8}
    if values is not None:
        how = {"array": np.asarray(values, np.float64), "cmap": colour, "alpha": 0.6, "linewidths": 0}
    axes.add_collection(PolyCollection(list(rings), closed=True, **how), autolim=new and size is None)
    if new and size is None:
        axes.autoscale_view()
    return axes
