"""Optical density of pictures at low resolution, and the filters that judge it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

_DARK = 12.0  # intensities below it are a camera's noise, without colour
_WIDE, _BLOCK = 8, 5  # pixels of a window that is as good on means of blocks, and the most of such a block
_NEAR = 8  # pixels, up to which a mask is widened row by row: sooner done than all distances


def least(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """The smallest channel; NumPy's own reduction over three of them takes many times as long.

    Args:
        values: (..., 3).

    Returns:
        (...).
    """
    return np.minimum(np.minimum(values[..., 0], values[..., 1]), values[..., 2])


def largest(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """The largest channel, see `least`.

    Args:
        values: (..., 3).

    Returns:
        (...).
    """
    return np.maximum(np.maximum(values[..., 0], values[..., 1]), values[..., 2])


def average(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean of the channels, see `least`.

    Args:
        values: (..., 3).

    Returns:
        (...).
    """
    return (values[..., 0] + values[..., 1] + values[..., 2]) / np.float32(3)


def glass_colour(smooth: NDArray[np.float32]) -> NDArray[np.float32]:
    """The colour of empty glass, dim or tinted: the brightest percent, if that is not pink; else white.

    Args:
        smooth: (h, w, 3) intensities, blurred.

    Returns:
        (3,) intensities.
    """
    bright = np.percentile(smooth.reshape(-1, 3), 99, axis=0).astype(np.float32)
    red, green, blue = optical_density(bright, np.full(3, 255, np.float32))
    pink = green - (red + blue) / 2
    tinted = max(red, green, blue) - min(red, green, blue)
    return bright if bright.min() >= 60 and pink < 0.01 and tinted < 0.06 else np.full(3, 255, np.float32)


def optical_density(
    intensity: NDArray[np.float32] | NDArray[np.uint8], glass: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The decadic optical density relative to glass, 0 where it is brighter.

    Args:
        intensity: (..., 3), 0 to 255; of whole numbers each is looked up.
        glass: (3,) intensities of empty glass.

    Returns:
        (..., 3).
    """
    if intensity.dtype == np.uint8:
        table = optical_density(np.arange(256, dtype=np.float32)[:, None], glass)
        known = cast(NDArray[np.uint8], intensity)
        return np.stack([table[:, k].take(known[..., k]) for k in range(3)], -1)
    return np.log10(glass / np.clip(intensity, _DARK, glass))


def blurred(values: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """The values under a Gaussian window.

    A window of more than 16 pixels is laid over the means of blocks of up to an eighth of it and 5 pixels, since its
    cost grows with its width.

    Args:
        values: (h, w) or (h, w, channels).
        sigma: of the window, in pixels.

    Returns:
        The same shape.
    """
    if (step := min(int(sigma // _WIDE), _BLOCK)) > 1:
        rows, columns = (np.arange(0, length, step) for length in values.shape[:2])
        counts = np.diff(rows, append=values.shape[0])[:, None] * np.diff(columns, append=values.shape[1])
        sums = np.add.reduceat(np.add.reduceat(values, rows, 0), columns, 1)
        means = (sums / counts.reshape(*counts.shape, *[1] * (values.ndim - 2))).astype(values.dtype)
        wide = _gaussian(means, sigma / step).repeat(step, 0).repeat(step, 1)
        return wide[: values.shape[0], : values.shape[1]]
    return _gaussian(values, sigma)


def _gaussian(values: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    for _ in range(2):  # along rows, and turned: down columns SciPy takes several times as long
        turned = np.ascontiguousarray(values.swapaxes(0, 1))
        values = np.empty_like(turned)
        ndimage.gaussian_filter1d(turned, sigma, axis=1, mode="nearest", output=values)
    return values


def deviation(density: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """The local standard deviation under a Gaussian window.

    Args:
        density: (h, w).
        sigma: of the window, in pixels.

    Returns:
        (h, w).
    """
    mean = blurred(density, sigma)
    return np.sqrt(np.maximum(blurred(density**2, sigma) - mean**2, 0))


def variation(density: NDArray[np.float32], where: NDArray[np.bool_], sigma: float) -> NDArray[np.float32]:
    """The local standard deviation over the local mean under a Gaussian window.

    Args:
        density: (h, w, 3).
        where: (h, w), the pixels that count.
        sigma: of the window, in pixels.

    Returns:
        (h, w).
    """
    weight = where.astype(np.float32)[..., None]
    total = np.maximum(blurred(weight, sigma), 1e-6)
    mean = blurred(weight * density, sigma) / total
    variance = np.maximum(blurred(weight * density**2, sigma) / total - mean**2, 0)
    return np.sqrt(variance.mean(2)) / np.maximum(mean.mean(2), 1e-6)


def opened(values: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """The values without what is higher than its surroundings and narrower than a square: the grey opening.

    The same as SciPy's, several times as fast: whole rows and columns are compared, with the doubled window each time.

    Args:
        values: (h, w).
        side: of the square, odd, in pixels.

    Returns:
        (h, w).
    """
    for compared, beyond in ((np.minimum, np.inf), (np.maximum, -np.inf)):
        for axis in (0, 1):
            values = _over_window(values, side, axis, compared, beyond)
    return values


def _over_window(values: NDArray[np.float32], side: int, axis: int, compared: np.ufunc, beyond: float) -> NDArray:
    """The least or largest value in a window along an axis; outside of the array lies nothing."""
    pads = [(0, 0), (0, 0)]
    pads[axis] = (side // 2, side // 2)
    window, wide = np.pad(values, pads, constant_values=beyond), 1
    while wide < side:
        step = min(wide, side - wide)
        length = window.shape[axis] - step
        here, further = (window[at : at + length] if axis == 0 else window[:, at : at + length] for at in (0, step))
        window, wide = compared(here, further), wide + step
    return window


def within(mask: NDArray[np.bool_], distance: float) -> NDArray[np.bool_]:
    """The mask widened.

    Args:
        mask: (h, w).
        distance: in pixels.

    Returns:
        (h, w).
    """
    if distance < 1 or not mask.any():
        return mask
    if distance > _NEAR:
        return np.asarray(ndimage.distance_transform_edt(~mask)) <= distance
    reach, height = int(distance), len(mask)
    wide = np.zeros(mask.shape, bool)
    for down in range(reach + 1):
        half = int((distance**2 - down**2) ** 0.5)
        row = ndimage.maximum_filter1d(mask.view(np.uint8), 2 * half + 1, 1, mode="constant").view(bool)
        wide[down:] |= row[: height - down]
        wide[: height - down] |= row[down:]
    return wide


def parts_of(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """The 8-connected parts of a mask.

    Args:
        mask: (h, w).

    Returns:
        (h, w) the number of the part, 0 for none; and the largest number.
    """
    labels = np.empty(mask.shape, np.int32)
    count = ndimage.label(mask, np.ones((3, 3)), output=labels)
    return labels, int(count)  # type: ignore[arg-type]


def without_small(mask: NDArray[np.bool_], area: float) -> NDArray[np.bool_]:
    """The mask without its 8-connected parts of a smaller area.

    Args:
        mask: (h, w).
        area: in pixels.

    Returns:
        (h, w).
    """
    labels, _ = parts_of(mask)
    large = np.bincount(labels.ravel()) >= area
    large[0] = False
    return large[labels]


def long_parts(
    mask: NDArray[np.bool_], length: float, width: float, area: float = 0.0
) -> Iterator[tuple[tuple[slice, slice], NDArray[np.bool_], float]]:
    """The 8-connected parts of a mask that are at least so long, at most so wide and at least so large.

    Args:
        mask: (h, w).
        length: of the diagonal of the box around a part, in pixels.
        width: twice the largest distance of its pixels to where it ends, in pixels.
        area: in pixels.

    Yields:
        The rows and columns of the box; the part in it, bool; and its width.
    """
    labels, _ = parts_of(mask)
    areas = np.bincount(labels.ravel())
    for number, place in enumerate(ndimage.find_objects(labels), 1):
        if areas[number] < area or np.hypot(*(side.stop - side.start for side in place)) < length:
            continue
        part = labels[place] == number
        wide = 2 * float(depth(part).max())
        if wide <= width:
            yield place, part, wide


def depth(part: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The distance of its pixels to where a part ends; outside of the array it does.

    Args:
        part: (h, w).

    Returns:
        (h, w), in pixels.
    """
    return np.asarray(ndimage.distance_transform_edt(np.pad(part, 1)))[1:-1, 1:-1]
