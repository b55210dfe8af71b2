"""Hashed randomness, periodic textures, and slowly varying fields of synthetic slides."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

N = 1024  # side of a periodic texture, in pixels; a power of two
FAR = 4096.0  # µm added to warped coordinates to make them positive
MASK = N - 1
FIBRE, BLOTCH, CYTO, CHROMATIN, CELLS, GRAIN, ANGLE = range(7)


class World(NamedTuple):
    """What the compiled loops need of a slide; lengths in µm, fields as in `recipe.Plan`."""

    seed: int
    mpp: float
    unit: float
    units: int
    kinds: NDArray[np.int8]
    depth: NDArray[np.float32]
    node_um: float
    stain: NDArray[np.float64]
    habit: NDArray[np.float64]
    tex: NDArray[np.int8]
    cap: int  # upper bound of the number of nuclei in a unit


# ---- hashed randomness


@njit
def _mix(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit
def state(seed, i, j, purpose):
    """Hash to start a random sequence from.

    Args:
        seed: integer.
        i: integer, may be negative.
        j: integer, may be negative.
        purpose: integer; sequences of different purposes are independent.

    Returns:
        uint64.
    """
    z = _mix(np.uint64(seed) + np.uint64(purpose) * np.uint64(0x9E3779B97F4A7C15))
    z = _mix(z + np.uint64(i) * np.uint64(0xD1B54A32D192ED03))
    return _mix(z + np.uint64(j) * np.uint64(0x8CB92BA72F3D8DD7))


@njit
def uniform(state, low, high):
    """Draw a uniform number.

    Args:
        state: (1,) uint64, changed in place.
        low: lower limit.
        high: upper limit, excluded.

    Returns:
        float64.
    """
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    return low + (high - low) * (np.float64(_mix(state[0]) >> np.uint64(11)) * 1.1102230246251565e-16)


@njit
def normal(state, mean, scale):
    """Draw a nearly normal number, the sum of four uniform ones: never more than 3.5 scales from the mean.

    Args:
        state: (1,) uint64, changed in place.
        mean: mean.
        scale: standard deviation.

    Returns:
        float64.
    """
    total = uniform(state, -1, 1) + uniform(state, -1, 1) + uniform(state, -1, 1) + uniform(state, -1, 1)
    return mean + scale * 0.8660254 * total


@njit
def _noise(seed, purpose, x, y):
    """Smooth value noise in [-1, 1], with one random value per unit square."""
    i, j = math.floor(y), math.floor(x)
    fy, fx = y - i, x - j
    fy, fx = fy * fy * (3 - 2 * fy), fx * fx * (3 - 2 * fx)
    total = 0.0
    for di in range(2):
        for dj in range(2):
            value = np.float64(state(seed, i + di, j + dj, purpose) >> np.uint64(11)) * 2.220446049250313e-16 - 1
            total += value * (fy if di else 1 - fy) * (fx if dj else 1 - fx)
    return total


# ---- textures: periodic, the same for all slides of one mpp, read at hashed offsets


@njit(cache=True)
def _streaks(white, dy, dx, length):
    """White noise averaged along a field of steps (dy, dx), `length` steps to both sides, which looks like fibres."""
    mask = white.shape[0] - 1
    out = np.empty_like(white)
    for r in range(white.shape[0]):
        for c in range(white.shape[0]):
            total = white[r, c]
            for sign in (-1.0, 1.0):
                y, x = r + 0.5, c + 0.5
                for _ in range(length):
                    i, j = math.floor(y) & mask, math.floor(x) & mask
                    y += sign * dy[i, j]
                    x += sign * dx[i, j]
                    total += white[math.floor(y) & mask, math.floor(x) & mask]
            out[r, c] = total
    return out


@njit(cache=True)
def _mosaic(n, spacing, seed):
    """Cells of a jittered lattice: second-nearest minus nearest distance, in spacings."""
    cells = max(2, int(n / spacing))
    step = n / cells
    out = np.empty((n, n))
    for r in range(n):
        for c in range(n):
            i, j = int(r / step), int(c / step)
            first, second = 1e9, 1e9
            for di in range(-2, 3):
                for dj in range(-2, 3):
                    z = state(seed, (i + di) % cells, (j + dj) % cells, 1)
                    py = (i + di + 0.1 + 0.8 * (z & np.uint64(0xFFFF)) / 65535.0) * step
                    px = (j + dj + 0.1 + 0.8 * ((z >> np.uint64(16)) & np.uint64(0xFFFF)) / 65535.0) * step
                    d = math.sqrt((py - r) ** 2 + (px - c) ** 2)
                    if d < first:
                        first, second = d, first
                    elif d < second:
                        second = d
            out[r, c] = (second - first) / step
    return out


def _band(rng: np.random.Generator, sigma_px: float) -> NDArray[np.float64]:
    """Periodic Gaussian noise of unit variance and correlation length `sigma_px`."""
    f = np.fft.fftfreq(N)
    damp = np.exp(-2 * (np.pi * sigma_px) ** 2 * (f[:, None] ** 2 + f[None, : N // 2 + 1] ** 2))
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((N, N))) * damp, (N, N))
    field -= field.mean()
    return field / (field.std() + 1e-12)


@lru_cache(maxsize=4)
def textures(mpp: float) -> NDArray[np.int8]:
    """The textures of slides of one mpp.

    Args:
        mpp: µm per pixel.

    Returns:
        (7, 1024, 1024) int8; 40 is about one standard deviation, in ANGLE one radian, in CELLS a third of a spacing.
    """
    rng = np.random.default_rng(20)
    size = max(1.0, min(90 / mpp, N / 6))
    angle = 0.9 * _band(rng, size) + 0.25 * _band(rng, size / 6)
    white = _band(rng, max(0.35, 0.7 / mpp))
    step = max(1.0, 0.8 / mpp)
    fibre = _streaks(white, step * np.sin(angle), step * np.cos(angle), max(3, int(18 / mpp / step)))
    stack = [
        fibre / fibre.std(),
        0.8 * _band(rng, 14 / mpp) + 0.6 * _band(rng, 4 / mpp),
        0.7 * _band(rng, 0.8 / mpp) + 0.7 * _band(rng, 2.5 / mpp),
        0.8 * _band(rng, 0.45 / mpp) + 0.6 * _band(rng, 0.9 / mpp),
        3 * _mosaic(N, 11 / mpp, 5),
        _band(rng, 0.3),
        np.remainder(angle, np.pi),
    ]
    return np.clip(np.round(np.stack(stack) * 40), -127, 127).astype(np.int8)


# ---- slowly varying fields


@njit
def depth_at(w, x, y):
    """Signed distance to the tissue's edge.

    Args:
        w: the `World` of the slide.
        x: µm on the slide.
        y: µm on the slide.

    Returns:
        µm, positive inside.
    """
    depth = w.depth
    rows, columns = depth.shape
    fy, fx = min(max(y / w.node_um, 0.0), rows - 1.001), min(max(x / w.node_um, 0.0), columns - 1.001)
    i, j = int(fy), int(fx)
    fy, fx = fy - i, fx - j
    top = depth[i, j] * (1 - fx) + depth[i, j + 1] * fx
    low = depth[i + 1, j] * (1 - fx) + depth[i + 1, j + 1] * fx
    return top * (1 - fy) + low * fy


@njit
def slow(w, x, y, out):
    """Evaluate the slowly varying fields at a point.

    Args:
        w: the `World` of the slide.
        x: µm on the slide.
        y: µm on the slide.
        out: (4,) float64, receives the depth in µm, the warped x and y for the textures in µm, and the section's
            relative thickness.
    """
    out[0] = depth_at(w, x, y)
    out[1] = x + 70 * _noise(w.seed, 21, x / 330, y / 330)
    out[2] = y + 70 * _noise(w.seed, 22, x / 330, y / 330)
    out[3] = 1 + 0.1 * _noise(w.seed, 23, x / 700, y / 700) + 0.06 * _noise(w.seed, 24, x / 190, y / 190)
