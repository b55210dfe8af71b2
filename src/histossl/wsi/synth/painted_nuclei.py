"""The nuclei of synthetic slides: positions, outlines and appearance.

All lengths are in µm. The nuclei of a cell of tissue depend on that cell alone, and stay inside it.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from histossl.wsi.synth.shapes import (
    ADIPOSE,
    GLAND,
    LESION,
    LYMPHOID,
    NEST,
    STROMA,
    body_at,
    in_cell,
    outline,
    vessel,
)
from histossl.wsi.synth.texture import ANGLE, BLOTCH, FAR, FIBRE, MASK, N, depth_at, normal, slow, state, uniform

EDGE_UM = 22.0  # largest distance of the tissue's fine outline from its coarse outline
# Columns of a nucleus: centre, semi-axes, direction and outline, then appearance.
X, Y, A, B, COS, SIN, C2, C3, HEMA, CLUMP, PALE, NUCLEOLUS, KIND, TEX = range(14)
COLUMNS = 14
_SPARSE = 190.0  # µm² for each try to place a nucleus in stroma
# By type, as in recipe.NUCLEI: semi-axes and their spread in µm, hematoxylin, its clumps, how pale the middle is,
# radius of the nucleolus in µm, waviness of the outline.
LOOKS = (
    (6.2, 1.4, 1.6, 0.3, 1.5, 0.18, 0.15, 0.0, 0.07),
    (4.3, 0.4, 3.1, 0.25, 1.55, 0.2, 0.25, 0.4, 0.04),
    (3.2, 0.25, 2.9, 0.2, 2.1, 0.25, 0.0, 0.0, 0.03),
    (4.6, 0.5, 3.8, 0.4, 1.35, 0.24, 0.4, 0.8, 0.05),
    (6.0, 1.2, 4.4, 0.8, 1.75, 0.34, 0.3, 1.3, 0.1),
)


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
def _clear_of_edge(w, x, y):
    """Whether the tissue is of full thickness around a point, with its fields interpolated as in the painting."""
    j = math.floor(x / w.unit)
    f = x / w.unit - j
    inside = (1 - f) * depth_at(w, j * w.unit, y) + f * depth_at(w, (j + 1) * w.unit, y)
    if inside > EDGE_UM:
        return True
    if inside < 0:
        return False
    left, right = np.empty(4), np.empty(4)
    slow(w, j * w.unit, y, left)
    slow(w, (j + 1) * w.unit, y, right)
    row = int((left[2] + f * (right[2] - left[2]) + FAR) / w.mpp) & MASK
    column = int((left[1] + f * (right[1] - left[1]) + FAR) / w.mpp) & MASK
    return inside + 0.1 * w.tex[BLOTCH, row, column] + 0.0175 * w.tex[FIBRE, row, column] > 9


@njit
def _inside_cell(n, form):
    for k in range(len(form.sides)):
        c, s, d = form.sides[k]
        along, across = n[A] * (c * n[COS] + s * n[SIN]), n[B] * (s * n[COS] - c * n[SIN])
        far = 1.1 * math.sqrt(along * along + across * across) + 0.8
        if d - c * (n[X] - form.x) - s * (n[Y] - form.y) < far:
            return False
    return True


@njit
def _on_ray(w, kind, form, c, s, depth):
    """Distance from the centre, along (c, s), of the outermost point that lies `depth` deep in the body."""
    low, high = 0.0, form.box[1] - form.box[0] + form.box[3] - form.box[2]
    for _ in range(10):
        middle = (low + high) / 2
        if body_at(w, kind, form, middle * c, middle * s) > depth:
            low = middle
        else:
            high = middle
    return low


@njit
def _ring(w, s, kind, form, what, depth, spacing, chance, nuclei, count):
    """Nuclei along the outline of a body, `depth` inside: across it as in epithelium, or (stromal ones) along it."""
    turn, gone = uniform(s, 0, 2 * math.pi), 0.0
    while gone < 2 * math.pi:
        t = turn + gone
        r = _on_ray(w, kind, form, math.cos(t), math.sin(t), depth + normal(s, 0, 0.16 * depth))
        u, v = r * math.cos(t), r * math.sin(t)
        gone += spacing / max(r, spacing)
        du = in_cell(form.sides, u - 1, v) - in_cell(form.sides, u + 1, v)
        dv = in_cell(form.sides, u, v - 1) - in_cell(form.sides, u, v + 1)
        angle = math.atan2(dv, du) + normal(s, 0, 0.15) + (0.0 if what else math.pi / 2)
        n = nuclei[count]
        _make(s, n, what, form.x + u, form.y + v, angle, w.habit)
        if what == 0:
            n[A], n[B] = 0.8 * n[A], 0.8 * n[B]
        taken = uniform(s, 0, 1) < chance and r > 3.5 and count < w.cap - 1
        if taken and _inside_cell(n, form) and _free(nuclei, count, n, 0.1):
            count += 1
    return count


@njit
def _endothelium(w, s, form, radius, nuclei, count):
    """Flat nuclei around a vessel."""
    for _ in range(int(radius / 3) + 1):
        t, what = uniform(s, 0, 2 * math.pi), uniform(s, 0, 1)
        x, y = form.x + radius * math.cos(t), form.y + radius * math.sin(t)
        _make(s, nuclei[count], 0, x, y, t + math.pi / 2, w.habit)
        nuclei[count, A] *= min(0.85, 0.1 * radius)
        nuclei[count, B] *= 0.85
        if what < 0.8 and _free(nuclei, count, nuclei[count], 0.5):
            count += 1
    return count


@njit
def _crowded(nuclei, count, x, y):
    """Whether every nucleus at a point would overlap another; spares drawing it."""
    for k in range(count):
        dx, dy, near = x - nuclei[k, X], y - nuclei[k, Y], nuclei[k, B] + 1.5
        if dx * dx + dy * dy < near * near:
            return True
    return False


@njit
def _type_at(w, kind, form, u, v, chance, other, area):
    """The type of nucleus that may lie at a point of a cell (-1: none), and its gap to the next.

    `chance` and `other` are uniform in [0, 1]; points come one for each `area` µm².
    """
    inside = body_at(w, kind, form, u, v)
    if kind == STROMA:
        inside = -9.0 if vessel(form) == 0 or outline(form, vessel(form), u, v) > 5 else 0.0
    if inside < -1.5:
        return (-1 if other > area / _SPARSE else 0 if chance < 0.8 else 2), 0.6
    if kind == LYMPHOID:
        return (-1 if other > 0.25 + inside / 6 else 2 if chance < 0.95 else 0), 0.15
    if kind == NEST and inside > 3.0:
        return (3 if chance < 0.97 else 2), 0.35
    if kind == LESION and inside > 3.0:
        return (4 if chance < 0.75 else 2), 0.7
    return -1, 0.0


@njit
def unit_nuclei(w, i, j, form, nuclei):
    """Draw the nuclei of a unit's cell.

    Args:
        w: the `World` of the slide.
        i: row of the unit.
        j: column of the unit.
        form: the cell.
        nuclei: (cap, COLUMNS) float64, receives the nuclei in its first rows, lengths in µm.

    Returns:
        The number of nuclei.
    """
    kind, s, count = w.kinds[i // w.units, j // w.units], np.empty(1, np.uint64), 0
    s[0] = state(w.seed, i, j, 51)
    if kind == GLAND:
        count = _ring(w, s, kind, form, 1, 5.2, 5.9 * w.habit[0], 1.0, nuclei, count)
        count = _ring(w, s, kind, form, 1, 9.0, 5.9 * w.habit[0], 0.5, nuclei, count)
    elif kind == ADIPOSE:
        count = _ring(w, s, kind, form, 0, 0.6, 9.0, 0.16, nuclei, count)
    elif kind == STROMA and vessel(form):
        count = _endothelium(w, s, form, vessel(form), nuclei, count)
    area = 5.0 if kind == LYMPHOID else 6.0 if kind in (NEST, LESION) else _SPARSE
    x0, x1, y0, y1 = form.box
    for _ in range(int((x1 - x0) * (y1 - y0) / area)):
        if count >= w.cap - 1:
            break
        u, v = uniform(s, x0, x1), uniform(s, y0, y1)
        chance, other, angle = uniform(s, 0, 1), uniform(s, 0, 1), uniform(s, 0, math.pi)
        if in_cell(form.sides, u, v) < 1.5 or _crowded(nuclei, count, form.x + u, form.y + v):
            continue
        what, gap = _type_at(w, kind, form, u, v, chance, other, area)
        if what < 0:
            continue
        if what == 0:
            angle = _fibre_angle(w, form.x + u, form.y + v) + normal(s, 0, 0.2)
        _make(s, nuclei[count], what, form.x + u, form.y + v, angle, w.habit)
        if _inside_cell(nuclei[count], form) and _free(nuclei, count, nuclei[count], gap):
            count += 1
    kept = 0
    for k in range(count):
        if _clear_of_edge(w, nuclei[k, X], nuclei[k, Y]):
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
