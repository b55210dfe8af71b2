"""Paints artefacts over tissue, synthetic or real: folds, fields out of focus, bubbles, strokes of pens, dust.

What is painted at a point depends on its place on the slide alone, so any region can be painted in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import SettingsError
from histossl.wsi.synth.recipe import SynthSettings, plan

# Optical densities of ink in red, green and blue.
_INK = {
    "pen-black": (1.15, 1.15, 1.1),
    "pen-blue": (1.2, 0.75, 0.2),
    "pen-green": (1.1, 0.3, 0.75),
    "pen-red": (0.06, 0.95, 0.9),
}
PAINTED = ("fold", "blur", "bubble", "dirt", *_INK)
MARGIN_UM = 160.0  # what is painted at a point depends on no tissue further away
# µm, least and most: length of a fold, radii of a blurred field, a bubble and a heap of dust, length of a stroke.
_SIZES = {"fold": (500, 1400), "blur": (250, 700), "bubble": (120, 450), "dirt": (60, 250), "pen": (800, 2400)}


@dataclass(frozen=True)
class Artefact:
    """One artefact on a slide.

    Attributes:
        kind: one of `PAINTED`.
        x: of its middle, in µm.
        y: of its middle, in µm.
        size: length or radius, in µm.
        angle: of its axis, in radians.
        seed: of its shape.
    """

    kind: str
    x: float
    y: float
    size: float
    angle: float
    seed: int


def draw_artefacts(kinds: Sequence[str], middles: NDArray[np.float64], rng: np.random.Generator) -> list[Artefact]:
    """Draw one artefact a kind.

    Args:
        kinds: of `PAINTED`; a kind that comes twice is drawn twice.
        middles: (n, 2) places on the tissue, (x, y) in µm.
        rng: draws places, sizes and shapes.

    Returns:
        The artefacts, in the order of the kinds; none where there is no tissue.

    Raises:
        SettingsError: an unknown kind.
    """
    if unknown := [kind for kind in kinds if kind not in PAINTED]:
        raise SettingsError(f"{unknown[0]!r} is no kind of artefact that is painted", f"they are {', '.join(PAINTED)}")
    found = []
    for kind in kinds if len(middles) else ():
        x, y = middles[rng.integers(len(middles))]
        size = rng.uniform(*_SIZES[kind.partition("-")[0]])
        angle, seed = rng.uniform(0, np.pi), int(rng.integers(2**31))
        found.append(Artefact(kind, float(x), float(y), float(size), float(angle), seed))
    return found


def paint_artefacts(
    rgb: NDArray[np.uint8], mpp: float, artefacts: Sequence[Artefact], x0: float = 0.0, y0: float = 0.0
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Paint artefacts over a picture.

    Args:
        rgb: (h, w, 3) uint8; points nearer than `MARGIN_UM` to its border are true only if it is the slide's border.
        mpp: µm per pixel.
        artefacts: to paint, one over the other.
        x0: of the picture's left edge, in µm.
        y0: of its upper edge, in µm.

    Returns:
        The picture, and the pixels that each artefact covers: (len(artefacts), h, w) bool.
    """
    rgb, covers = rgb.copy(), np.zeros((len(artefacts), *rgb.shape[:2]), bool)
    for k, artefact in enumerate(artefacts):
        reach = 1.3 * artefact.size + MARGIN_UM
        low = [int((at - reach - start) / mpp) for at, start in ((artefact.x, x0), (artefact.y, y0))]
        high = [int((at + reach - start) / mpp) + 1 for at, start in ((artefact.x, x0), (artefact.y, y0))]
        (left, right), (top, bottom) = (
            (max(0, a), min(n, max(0, b))) for a, b, n in zip(low, high, rgb.shape[1::-1], strict=True)
        )
        if left >= right or top >= bottom:
            continue
        part = slice(top, bottom), slice(left, right)
        y, x = np.mgrid[part]
        across = (x + 0.5) * mpp + x0 - artefact.x, (y + 0.5) * mpp + y0 - artefact.y
        u = across[0] * np.cos(artefact.angle) + across[1] * np.sin(artefact.angle)
        v = across[1] * np.cos(artefact.angle) - across[0] * np.sin(artefact.angle)
        density = -np.log10((rgb[part].astype(np.float32) + 1) / 256)
        painted, cover = _painter(artefact.kind)(density, u, v, mpp, artefact)
        rgb[part] = np.clip(np.rint(256 * 10**-painted - 1), 0, 255).astype(np.uint8)
        covers[(k, *part)] = cover
    return rgb, covers


def artefacts_of(settings: SynthSettings) -> list[Artefact]:
    """The artefacts of a slide, a pure function of its settings.

    Args:
        settings: the slide.

    Returns:
        The artefacts, in the order in which they are painted.
    """
    rows, columns = np.nonzero(plan(settings).kinds >= 0)
    middles = (np.stack([columns, rows], 1).astype(np.float64) + 0.5) * settings.patch_um
    each = max(1, round(settings.width * settings.height * settings.mpp**2 / 4e6))
    return draw_artefacts(settings.artefacts * each, middles, np.random.default_rng([settings.seed, 303]))


def with_artefacts(
    settings: SynthSettings,
    x: int,
    y: int,
    width: int,
    height: int,
    paint: Callable[[int, int, int, int], NDArray[np.uint8]],
) -> NDArray[np.uint8]:
    """Paint a region of a slide and its artefacts.

    Args:
        settings: the slide.
        x: of the left column of pixels.
        y: of the upper row.
        width: in pixels.
        height: in pixels.
        paint: paints the tissue alone: (x, y, height, width) -> (height, width, 3).

    Returns:
        (height, width, 3) uint8.
    """
    if not settings.artefacts:
        return paint(x, y, height, width)
    m, mpp = math.ceil(MARGIN_UM / settings.mpp), settings.mpp
    around = paint(x - m, y - m, height + 2 * m, width + 2 * m)
    painted, _ = paint_artefacts(around, mpp, artefacts_of(settings), (x - m) * mpp, (y - m) * mpp)
    return painted[m : m + height, m : m + width]


def _painter(kind: str):
    return {"fold": _fold, "blur": _blur, "bubble": _bubble, "dirt": _dirt}.get(kind, _pen)


def _rng(artefact: Artefact) -> np.random.Generator:
    return np.random.default_rng([artefact.seed, 404])


def _bent(u: NDArray, v: NDArray, length: float, rng: np.random.Generator) -> NDArray:
    """The distance from a gently bent line, with its sign."""
    phase, bend = rng.uniform(0, 2 * np.pi), rng.uniform(-0.25, 0.25)
    return v - bend * u**2 / length - 0.03 * length * np.sin(2 * np.pi * u / (0.7 * length) + phase)


def _fold(density: NDArray, u: NDArray, v: NDArray, mpp: float, artefact: Artefact) -> tuple[NDArray, NDArray]:
    """Tissue lies over tissue: the densities of two or three places add up, out of focus; not beyond its edge."""
    from scipy import ndimage

    rng, length = _rng(artefact), artefact.size
    away = np.abs(_bent(u, v, length, rng))
    width = rng.uniform(35, 120) * np.clip(1 - (2 * u / length) ** 4, 0, 1)
    layers, step = int(rng.integers(2, 4)), width.max() / mpp
    shift = np.rint([step * np.cos(artefact.angle), -step * np.sin(artefact.angle)]).astype(int)
    total = density.copy()
    for side in (1, -1)[: layers - 1]:
        total += ndimage.shift(density, (*(side * shift), 0), order=0, mode="nearest")
    total = ndimage.gaussian_filter(total, 1.5 / mpp, mode="nearest", axes=(0, 1))
    tissue = np.clip(ndimage.gaussian_filter(density.mean(2), 20 / mpp) / 0.04 - 1.5, 0, 1)  # lumina belong to it
    alpha = np.clip((width / 2 - away) / 4 + 0.5, 0, 1) * tissue
    return density + alpha[..., None] * (total - density), alpha > 0.5


def _blur(density: NDArray, u: NDArray, v: NDArray, mpp: float, artefact: Artefact) -> tuple[NDArray, NDArray]:
    """The focus was on another plane, by 2.5 to 6 µm of blur."""
    from scipy import ndimage

    rng = _rng(artefact)
    q = np.hypot(u, v * rng.uniform(1, 1.6)) / artefact.size
    light = ndimage.gaussian_filter(10**-density, rng.uniform(2.5, 6) / mpp, mode="nearest", axes=(0, 1))
    alpha = np.clip((1 - q) * 8, 0, 1)[..., None]
    return -np.log10((1 - alpha) * 10**-density + alpha * light), q < 0.95


def _bubble(density: NDArray, u: NDArray, v: NDArray, mpp: float, artefact: Artefact) -> tuple[NDArray, NDArray]:
    """Air under the coverslip: a dark rim with a bright line inside; what lies under it is paler and out of focus."""
    from scipy import ndimage

    rng = _rng(artefact)
    turn = np.arctan2(v, u)
    edge = 1 + rng.uniform(0, 0.08) * np.cos(2 * turn + rng.uniform(0, 6)) + rng.uniform(0, 0.04) * np.cos(3 * turn)
    inside = (edge - np.hypot(u, v) / artefact.size) * artefact.size
    rim, dark = rng.uniform(10, 24), rng.uniform(0.45, 0.9)
    light = ndimage.gaussian_filter(10**-density, rng.uniform(2, 5) / mpp, mode="nearest", axes=(0, 1))
    within = np.clip(inside / 4 + 0.5, 0, 1)[..., None]
    pale = -np.log10((1 - within) * 10**-density + within * (0.8 * light + 0.17))
    ring = np.clip((rim - np.abs(inside - rim / 2) * 2) / 4, 0, 1)[..., None]
    gleam = np.clip(1 - np.abs(inside - 1.6 * rim) / (0.4 * rim), 0, 1)[..., None]
    return pale * (1 - 0.5 * gleam) + dark * ring, inside > 0


def _dirt(density: NDArray, u: NDArray, v: NDArray, mpp: float, artefact: Artefact) -> tuple[NDArray, NDArray]:
    """Specks of 15 to 70 µm and a fibre now and then, nearly opaque."""
    rng = _rng(artefact)
    opaque = np.zeros_like(u)
    for _ in range(int(rng.integers(4, 12))):
        x, y = rng.normal(0, artefact.size / 2, 2).clip(-artefact.size, artefact.size)
        radius, wave, phase = rng.uniform(7, 35), rng.uniform(0, 0.3), rng.uniform(0, 6, 2)
        near = np.hypot(u - x, v - y)
        turn = np.arctan2(v - y, u - x)
        edge = radius * (1 + wave * np.cos(2 * turn + phase[0]) + wave / 2 * np.cos(5 * turn + phase[1]))
        opaque = np.maximum(opaque, np.clip((edge - near) / 3 + 0.5, 0, 1))
    if rng.random() < 0.4:
        near = np.abs(_bent(u, v, artefact.size, rng))
        opaque = np.maximum(opaque, np.clip((7 - near) / 3 + 0.5, 0, 1) * (np.abs(u) < artefact.size))
    ink = np.array([1.1, 1.15, 1.2]) * rng.uniform(0.9, 1.3)
    return density + opaque[..., None] * (ink - 0.5 * density), opaque > 0.5


def _pen(density: NDArray, u: NDArray, v: NDArray, mpp: float, artefact: Artefact) -> tuple[NDArray, NDArray]:
    """A stroke of a marker: even, with denser edges."""
    rng, length = _rng(artefact), artefact.size
    away, width = np.abs(_bent(u, v, length, rng)), rng.uniform(180, 450)
    past = np.maximum(np.abs(u) - length / 2, 0)
    away = np.hypot(away, past)
    alpha = np.clip((width / 2 - away) / 8 + 0.5, 0, 1)
    even = 1 + 0.04 * np.sin(u / 90) * np.sin(v / 70) + 0.12 * np.clip(1 - (width / 2 - away) / 20, 0, 1)
    ink = np.array(_INK[artefact.kind], np.float32) * rng.uniform(0.85, 1.15)
    return density * (1 - 0.45 * alpha[..., None]) + (alpha * even)[..., None] * ink, alpha > 0.5
