"""The nuclei of synthetic slides: positions, outlines and appearance.

All lengths are in µm. The content of a unit depends on that unit alone, and stays inside it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from histossl.wsi.synth.texture import ANGLE, FAR, MASK, N, depth_at, normal, slow, state, uniform

EDGE_UM = 22.0  # largest distance of the tissue's fine outline from its coarse outline
STROMA, GLAND, LYMPHOID, ADIPOSE, NEST, LESION = range(6)  # as in recipe.KINDS
# Columns of a nucleus: centre, semi-axes, direction and outline, then appearance.
X, Y, A, B, COS, SIN, C2, C3, HEMA, CLUMP, PALE, NUCLEOLUS, KIND, TEX = range(14)
COLUMNS = 14
LOBED = 0.5  # share of the units whose content comes in several parts
# By type, as in recipe.NUCLEI: semi-axes and their spread in µm, hematoxylin, its clumps, how pale the middle is,
# radius of the nucleolus in µm, waviness of the outline.
LOOKS = (
    (6.2, 1.4, 1.6, 0.3, 1.5, 0.18, 0.15, 0.0, 0.07),
    (4.3, 0.4, 3.1, 0.25, 1.55, 0.2, 0.25, 0.4, 0.04),
    (3.2, 0.25, 2.9, 0.2, 2.1, 0.25, 0.0, 0.0, 0.03),
    (4.6, 0.5, 3.8, 0.4, 1.35, 0.24, 0.4, 0.8, 0.05),
    (6.0, 1.2, 4.4, 0.8, 1.75, 0.34, 0.3, 1.3, 0.1),
)


class Form(NamedTuple):
    """The shape of a unit's content, in µm from the unit's centre."""

    x: float
    y: float
    radius: float
    waves: tuple[float, float, float, float]  # amplitudes of the outline's waves, in parts of the radius
    wall: float  # height of a gland's epithelium
    row: int  # offset in the textures
    column: int
    whim: float  # in [0, 1], for all other variation
    circles: NDArray[np.float64]  # (5, 3): x, y, radius of disjoint circles, 0 for none: fat cells, tubules, lobes


@njit
def form_of(w, i, j):
    """The shape of a unit's content, drawn in the same way for all kinds; each kind uses the fields that it needs.

    Args:
        w: the `World` of the slide.
        i: row of the unit.
        j: column of the unit.

    Returns:
        The `Form`.
    """
    s = np.empty(1, np.uint64)
    s[0] = state(w.seed, i, j, 41)
    half = w.unit / 2
    radius = half * uniform(s, 0.78, 0.97)
    slack = max(0.0, half - radius * 1.02 - 0.4)
    waves = (normal(s, 0, 0.035), normal(s, 0, 0.035), normal(s, 0, 0.03), normal(s, 0, 0.03))
    circles = np.zeros((5, 3))
    for k in range(5):
        for _ in range(12):
            x, y = uniform(s, -0.9, 0.9) * half, uniform(s, -0.9, 0.9) * half
            r = min(uniform(s, 0.45, 0.95) * half, half - 1.5 - max(abs(x), abs(y)))
            for m in range(k):
                r = min(r, math.hypot(x - circles[m, 0], y - circles[m, 1]) - circles[m, 2] - 0.4)
            if r > circles[k, 2] and r > 6:
                circles[k] = x, y, r
    x, y = uniform(s, -slack, slack), uniform(s, -slack, slack)
    wall = min(14.5, 0.6 * radius) * uniform(s, 0.85, 1.1)
    return Form(x, y, radius, waves, wall, int(uniform(s, 0, N)), int(uniform(s, 0, N)), uniform(s, 0, 1), circles)


@njit
def outline(form, radius, dx, dy):
    """Signed distance to a wavy circle.

    Args:
        form: the unit's `Form`, which has the waves.
        radius: radius of the circle, µm.
        dx: µm from its centre.
        dy: µm from its centre.

    Returns:
        µm, positive outside.
    """
    r = math.sqrt(dx * dx + dy * dy) + 1e-6
    c, s = dx / r, dy / r
    c2, s2 = 2 * c * c - 1, 2 * s * c
    a, b, d, e = form.waves
    return r - 0.96 * radius * (1 + a * c2 + b * s2 + d * (c2 * c - s2 * s) + e * (s2 * c + c2 * s))


@njit
def gland(form, k):
    """One of the glands of a unit, which has one large gland or up to five tubules.

    Args:
        form: the unit's `Form`.
        k: index of the gland, 0 to 4.

    Returns:
        x, y from the unit's centre, radius (0: no such gland), height of the epithelium; µm.
    """
    if form.whim >= LOBED:
        return form.x, form.y, form.radius if k == 0 else 0.0, form.wall
    radius = form.circles[k, 2]
    return form.circles[k, 0], form.circles[k, 1], radius if radius > 10 else 0.0, min(form.wall, 0.68 * radius)


@njit
def outside_glands(form, half, u, v):
    """Signed distance to the nearest gland.

    Args:
        form: the unit's `Form`.
        half: half the side of the unit, µm.
        u: x from the unit's centre, µm.
        v: y from the unit's centre, µm.

    Returns:
        µm, positive outside, at most `half`.
    """
    nearest = half
    for k in range(5):
        x, y, radius, _ = gland(form, k)
        if radius > 0:
            nearest = min(nearest, outline(form, radius, u - x, v - y))
    return nearest


@njit
def body(form, half, u, v):
    """Signed distance to the body of cells in a unit, which is whole or in lobes and stays inside the unit.

    Args:
        form: the unit's `Form`.
        half: half the side of the unit, µm.
        u: x from the unit's centre, µm.
        v: y from the unit's centre, µm.

    Returns:
        µm, positive outside.
    """
    if form.whim < LOBED:
        nearest = half
        for k in range(5):
            if form.circles[k, 2] > 0:
                d = math.sqrt((u - form.circles[k, 0]) ** 2 + (v - form.circles[k, 1]) ** 2)
                nearest = min(nearest, d - form.circles[k, 2] - 1.3)
        return nearest
    size = 1.01 * form.radius / half
    u, v = (u - form.x) / half, (v - form.y) / half
    d2 = u * u + v * v
    d = 0.5 * math.sqrt(d2) + 0.5 * math.sqrt(math.sqrt(u * u * u * u + v * v * v * v))
    wave = 1.6 * (form.waves[0] * (u * u - v * v) + 2 * form.waves[1] * u * v) / (d2 + 0.02)
    return half * (d - size * min(1.0, 0.97 + wave))


@njit
def vessel(form):
    """The capillary of a unit of stroma.

    Args:
        form: the unit's `Form`.

    Returns:
        Radius in µm, 0 for no capillary.
    """
    return max(0.0, form.whim - 0.7) * 18 + 4.5 if form.whim > 0.7 else 0.0


@njit
def _reach(n, dx, dy):
    """Radius of a nucleus's ellipse in a direction."""
    d = math.sqrt(dx * dx + dy * dy) + 1e-9
    u, v = (dx * n[COS] + dy * n[SIN]) / d, (dy * n[COS] - dx * n[SIN]) / d
    return n[A] * n[B] / math.sqrt((n[B] * u) ** 2 + (n[A] * v) ** 2)


@njit
def _free(nuclei, count, n, gap):
    for k in range(count):
        dx, dy = n[X] - nuclei[k, X], n[Y] - nuclei[k, Y]
        if dx * dx + dy * dy < (n[A] + nuclei[k, A] + gap) ** 2 and (
            math.sqrt(dx * dx + dy * dy) < _reach(n, dx, dy) + _reach(nuclei[k], dx, dy) + gap
        ):
            return False
    return True


@njit
def _make(s, n, kind, x, y, angle, habit):
    """Draw size, outline and appearance of a nucleus of a type (index into NUCLEI) into the row `n`."""
    a, da, b, db, hema, clump, pale, nucleolus, odd = LOOKS[kind]
    a, b = normal(s, a, da), normal(s, b, db)
    n[X], n[Y] = x, y
    n[A], n[B] = max(a, b, 1.2) * habit[0], max(min(a, b), 1.2) * habit[0]
    n[COS], n[SIN] = math.cos(angle), math.sin(angle)
    n[C2], n[C3] = normal(s, 0, odd), normal(s, 0, odd)
    n[HEMA] = hema * habit[1] * max(0.5, normal(s, 1, 0.14))
    n[CLUMP], n[PALE] = clump, pale * uniform(s, 0.5, 1.3)
    n[NUCLEOLUS] = nucleolus * uniform(s, 0.5, 1.4)
    n[KIND], n[TEX] = kind, math.floor(uniform(s, 0, N * N))


@njit
def _fibre_angle(w, x, y):
    at = np.empty(4)
    slow(w, x, y, at)
    return w.tex[ANGLE, int((at[2] + FAR) / w.mpp) & MASK, int((at[1] + FAR) / w.mpp) & MASK] / 40.0


@njit
def _septal(w, i, j, nuclei, count):
    """Spindle nuclei on the left and the upper border of a unit, for all kinds of the units on both sides."""
    s = np.empty(1, np.uint64)
    s[0] = state(w.seed, i, j, 31)
    for k in range(6):
        along, across = (k // 2 + uniform(s, 0.3, 0.7)) / 3 * (w.unit - 24) + 12, normal(s, 0, 1.3)
        x, y = (j * w.unit + along, i * w.unit + across) if k % 2 else (j * w.unit + across, i * w.unit + along)
        keep = uniform(s, 0, 1) < 0.55
        angle = _fibre_angle(w, x, y) + normal(s, 0, 0.25)
        _make(s, nuclei[count], 0, x, y, angle, w.habit)
        if keep and depth_at(w, x, y) > EDGE_UM and _free(nuclei, count, nuclei[count], 0.5):
            count += 1
    return count


@njit
def _ring(w, s, form, mx, my, radius, nuclei, count):
    """Epithelial nuclei around a gland, their long axis towards the lumen."""
    turn = uniform(s, 0, 2 * math.pi)
    n = int(2 * math.pi * (radius - 5) / (5.9 * w.habit[0]))
    for row in range(2):
        for k in range(n):
            t = turn + 2 * math.pi * (k + 0.5 * row) / n + normal(s, 0, 0.7 / n)
            c, d = math.cos(t), math.sin(t)
            r = -outline(form, radius, c * 1e-3, d * 1e-3) - normal(s, 5.4 + 3.6 * row, 0.8 + 0.5 * row)
            _make(s, nuclei[count], 1, mx + r * c, my + r * d, t + normal(s, 0, 0.15), w.habit)
            if (row == 0 or uniform(s, 0, 1) < 0.5) and r > 3.5 and _free(nuclei, count, nuclei[count], 0.1):
                count += 1
    return count


@njit
def _rim(w, s, x, y, radius, chance, nuclei, count):
    """Flat nuclei along the rim of a fat cell or a capillary."""
    for _ in range(int(radius / 3) + 1):
        t, what = uniform(s, 0, 2 * math.pi), uniform(s, 0, 1)
        _make(s, nuclei[count], 0, x + radius * math.cos(t), y + radius * math.sin(t), t + math.pi / 2, w.habit)
        nuclei[count, A] *= min(0.85, 0.1 * radius)
        nuclei[count, B] *= 0.85
        if what < chance and _free(nuclei, count, nuclei[count], 0.5):
            count += 1
    return count


@njit
def _inside_unit(n, i, j, unit):
    side = n[A] * 1.1 + 0.8
    return (
        n[X] - side > j * unit
        and n[X] + side < (j + 1) * unit
        and n[Y] - side > i * unit
        and n[Y] + side < (i + 1) * unit
    )


@njit
def _dart(w, s, kind, form, half):
    """A random point in the unit, the type of nucleus that may lie there (-1: none), and its gap to the next."""
    x, y = uniform(s, -half, half), uniform(s, -half, half)
    u, v = uniform(s, 0, 1), uniform(s, 0, 1)
    inside = -body(form, half, x, y)
    if kind == LYMPHOID:
        return x, y, (2 if u < 0.95 else 0) if v < 0.25 + inside / 6 else -1, 0.15
    if kind == NEST:
        return x, y, (3 if u < 0.97 else 2) if inside > 3.2 else -1, 0.35
    if kind == LESION:
        return x, y, (4 if u < 0.75 else 2) if inside > 3.2 else -1, 0.7
    what = 0 if u < 0.8 else 2
    if kind == GLAND and outside_glands(form, half, x, y) < 4:
        what = -1
    if kind == STROMA and vessel(form) and outline(form, vessel(form), x - form.x, y - form.y) < 5:
        what = -1
    return x, y, what, 0.6


@njit
def unit_nuclei(w, i, j, nuclei):
    """Draw the nuclei of a unit.

    Args:
        w: the `World` of the slide.
        i: row of the unit.
        j: column of the unit.
        nuclei: (cap, COLUMNS) float64, receives the nuclei in its first rows, lengths in µm.

    Returns:
        The number of nuclei.
    """
    own = _septal(w, i, j, nuclei, 0)
    # Septal nuclei of the units to the right and below extend into this one: avoid them, then drop them.
    guests = _septal(w, i + 1, j, nuclei, _septal(w, i, j + 1, nuclei, own))
    half, kind = w.unit / 2, w.kinds[i // w.units, j // w.units]
    mx, my = (j + 0.5) * w.unit, (i + 0.5) * w.unit
    form, s = form_of(w, i, j), np.empty(1, np.uint64)
    s[0] = state(w.seed, i, j, 51)
    count = guests
    if kind == GLAND:
        for k in range(5):
            x, y, radius, _ = gland(form, k)
            if radius > 0:
                count = _ring(w, s, form, mx + x, my + y, radius, nuclei, count)
    elif kind == ADIPOSE:
        for k in range(5):
            if form.circles[k, 2] > 0:
                count = _rim(
                    w, s, mx + form.circles[k, 0], my + form.circles[k, 1], form.circles[k, 2], 0.16, nuclei, count
                )
    elif kind == STROMA and vessel(form):
        count = _rim(w, s, mx + form.x, my + form.y, vessel(form), 0.8, nuclei, count)
    area = 4.0 if kind == LYMPHOID else 5.0 if kind in (NEST, LESION) else 1e9 if kind == ADIPOSE else 190.0
    for _ in range(int(w.unit * w.unit / area)):
        if count >= w.cap - 1:
            break
        x, y, what, gap = _dart(w, s, kind, form, half)
        angle = uniform(s, 0, math.pi)
        if what < 0:
            continue
        if what == 0:
            angle = _fibre_angle(w, mx + x, my + y) + normal(s, 0, 0.2)
        _make(s, nuclei[count], what, mx + x, my + y, angle, w.habit)
        if _free(nuclei, count, nuclei[count], gap):
            count += 1
    kept = own
    for k in range(guests, count):
        if _inside_unit(nuclei[k], i, j, w.unit) and depth_at(w, nuclei[k, X], nuclei[k, Y]) > EDGE_UM:
            nuclei[kept] = nuclei[k]
            kept += 1
    return kept


@njit
def radius_at(n, u, v):
    """Relative distance of a point from a nucleus's centre.

    Args:
        n: (COLUMNS,) the nucleus.
        u: µm from its centre along the long axis.
        v: µm from its centre along the short axis.

    Returns:
        0 at the centre, 1 on the outline, more outside.
    """
    q = math.sqrt((u / n[A]) ** 2 + (v / n[B]) ** 2) + 1e-9
    c, s = u / n[A] / q, v / n[B] / q
    c2 = 2 * c * c - 1
    return q / (1 + n[C2] * c2 + n[C3] * (c2 * c - 2 * s * s * c))
