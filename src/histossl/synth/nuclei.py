"""The nuclei of synthetic slides: where they lie, their outlines and looks.

Everything is in µm. A unit's content depends on that unit alone, and stays inside of it."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from histossl.synth.texture import ANGLE, FAR, MASK, N, depth_at, normal, slow, state, uniform

EDGE_UM = 22.0  # the tissue's fine outline strays at most so far from its coarse one
STROMA, GLAND, LYMPHOID, ADIPOSE, NEST, LESION = range(6)  # as in recipe.KINDS
# Columns of a nucleus: centre, semi-axes, direction and outline, then looks.
X, Y, A, B, COS, SIN, C2, C3, HEMA, CLUMP, PALE, NUCLEOLUS, KIND, TEX = range(14)
COLUMNS = 14


@njit(cache=True)
def shape(w, i, j, out):
    """The form of a unit's content: centre, radius, harmonics, lumen, offsets into the textures, fat cells."""
    s = np.empty(1, np.uint64)
    s[0] = state(w.seed, i, j, 41)
    unit = w.unit
    radius = unit / 2 * uniform(s, 0.66, 0.9)
    slack = unit / 2 - radius * 1.06 - 2
    out[0], out[1], out[2] = uniform(s, -slack, slack), uniform(s, -slack, slack), radius
    for k in range(3, 7):
        out[k] = normal(s, 0, 0.045)
    out[7] = min(14.5, 0.6 * radius) * uniform(s, 0.85, 1.1)
    out[8], out[9] = math.floor(uniform(s, 0, N)), math.floor(uniform(s, 0, N))
    out[10] = uniform(s, 0, 1)
    for k in range(4):
        out[11 + 2 * k] = ((k % 2) - 0.5) * unit * 0.5 + uniform(s, -0.13, 0.13) * unit
        out[12 + 2 * k] = ((k // 2) - 0.5) * unit * 0.5 + uniform(s, -0.13, 0.13) * unit


@njit(cache=True)
def outline(p, dx, dy):
    """µm outside (positive) or inside of the unit's round content."""
    r = math.sqrt(dx * dx + dy * dy) + 1e-6
    c, s = dx / r, dy / r
    c2, s2 = 2 * c * c - 1, 2 * s * c
    wave = p[3] * c2 + p[4] * s2 + p[5] * (c2 * c - s2 * s) + p[6] * (s2 * c + c2 * s)
    return r - p[2] * (1 + wave)


@njit(cache=True)
def _reach(n, dx, dy):
    """Radius of a nucleus's ellipse in a direction."""
    d = math.sqrt(dx * dx + dy * dy) + 1e-9
    u, v = (dx * n[COS] + dy * n[SIN]) / d, (dy * n[COS] - dx * n[SIN]) / d
    return n[A] * n[B] / math.sqrt((n[B] * u) ** 2 + (n[A] * v) ** 2)


@njit(cache=True)
def _free(nuclei, count, n, gap):
    for k in range(count):
        dx, dy = n[X] - nuclei[k, X], n[Y] - nuclei[k, Y]
        if dx * dx + dy * dy < (n[A] + nuclei[k, A] + gap) ** 2 and (
            math.sqrt(dx * dx + dy * dy) < _reach(n, dx, dy) + _reach(nuclei[k], dx, dy) + gap
        ):
            return False
    return True


@njit(cache=True)
def _make(s, n, kind, x, y, angle, habit):
    """Size, outline and looks of a nucleus of a kind: stromal, epithelial, lymphocyte, tumour, atypical."""
    if kind == 0:
        a, b, hema, clump, pale, nucleolus, odd = normal(s, 5.6, 1.0), normal(s, 1.9, 0.3), 1.75, 0.16, 0.1, 0.0, 0.05
    elif kind == 1:
        a, b, hema, clump, pale, nucleolus, odd = normal(s, 4.3, 0.4), normal(s, 3.1, 0.25), 1.6, 0.2, 0.25, 0.4, 0.04
    elif kind == 2:
        a, b, hema, clump, pale, nucleolus, odd = normal(s, 3.3, 0.25), normal(s, 3.0, 0.2), 2.2, 0.25, 0.0, 0.0, 0.03
    elif kind == 3:
        a, b, hema, clump, pale, nucleolus, odd = normal(s, 4.7, 0.5), normal(s, 3.9, 0.4), 1.4, 0.24, 0.4, 0.8, 0.05
    else:
        a, b, hema, clump, pale, nucleolus, odd = normal(s, 6.0, 1.2), normal(s, 4.4, 0.8), 1.65, 0.34, 0.3, 1.3, 0.1
    n[X], n[Y] = x, y
    n[A], n[B] = max(a, b, 1.2) * habit[0], max(min(a, b), 1.2) * habit[0]
    n[COS], n[SIN] = math.cos(angle), math.sin(angle)
    n[C2], n[C3] = normal(s, 0, odd), normal(s, 0, odd)
    n[HEMA] = hema * habit[1] * max(0.5, normal(s, 1, 0.14))
    n[CLUMP], n[PALE] = clump, pale * uniform(s, 0.5, 1.3)
    n[NUCLEOLUS] = nucleolus * uniform(s, 0.5, 1.4)
    n[KIND], n[TEX] = kind, math.floor(uniform(s, 0, N * N))


@njit(cache=True)
def _fibre_angle(w, x, y):
    at = np.empty(4)
    slow(w, x, y, at)
    return w.tex[ANGLE, int((at[2] + FAR) / w.mpp) & MASK, int((at[1] + FAR) / w.mpp) & MASK] / 40.0


@njit(cache=True)
def _septal(w, i, j, nuclei, count):
    """Spindle nuclei on the left and the upper border of a unit, there whatever the kinds on both sides."""
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


@njit(cache=True)
def _ring(s, p, cx, cy, habit, nuclei, count):
    """Epithelial nuclei around a gland, their long axis towards the lumen."""
    turn = uniform(s, 0, 2 * math.pi)
    n = int(2 * math.pi * (p[2] - 5) / (7.6 * habit[0]))
    for row in range(2):
        for k in range(n):
            t = turn + 2 * math.pi * (k + 0.5 * row) / n + normal(s, 0, 0.12 * 6 / n)
            c, d = math.cos(t), math.sin(t)
            wave = outline(p, c * p[2], d * p[2])
            r = p[2] - wave - normal(s, 5.6 + 3.2 * row, 0.6 + 0.5 * row)
            _make(s, nuclei[count], 1, cx + r * c, cy + r * d, t + normal(s, 0, 0.12), habit)
            if (row == 0 or uniform(s, 0, 1) < 0.45) and r > 5 and _free(nuclei, count, nuclei[count], 0.3):
                count += 1
    return count


@njit(cache=True)
def _inside_unit(n, i, j, unit):
    side = n[A] * 1.1 + 0.8
    return (
        n[X] - side > j * unit
        and n[X] + side < (j + 1) * unit
        and n[Y] - side > i * unit
        and n[Y] + side < (i + 1) * unit
    )


@njit(cache=True)
def unit_nuclei(w, i, j, nuclei):
    """The nuclei of unit (i, j) into `nuclei` (cap, COLUMNS), lengths in µm; returns how many."""
    count = _septal(w, i, j, nuclei, 0)
    own = count
    # Septal nuclei of the units to the right and below reach in here: keep clear of them, then drop them.
    count = _septal(w, i, j + 1, nuclei, count)
    guests = _septal(w, i + 1, j, nuclei, count)
    count = guests
    unit, kind = w.unit, w.kinds[i // w.units, j // w.units]
    p, s = np.empty(20), np.empty(1, np.uint64)
    shape(w, i, j, p)
    s[0] = state(w.seed, i, j, 51)
    mx, my = (j + 0.5) * unit, (i + 0.5) * unit
    cap = nuclei.shape[0] - 1
    if kind == GLAND:
        count = _ring(s, p, mx + p[0], my + p[1], w.habit, nuclei, count)
    area = unit * unit
    tries = area / 25 if kind == LYMPHOID else area / 40 if kind in (NEST, LESION) else area / 420
    if kind in (LYMPHOID, NEST, LESION):
        tries *= 3
    for _ in range(int(tries)):
        if count >= cap:
            break
        x, y = uniform(s, -0.5, 0.5) * unit, uniform(s, -0.5, 0.5) * unit
        u, angle, gap = uniform(s, 0, 1), uniform(s, 0, math.pi), 0.5
        if kind == LYMPHOID:
            what, gap = (2 if u < 0.93 else 3), 0.35
        elif kind == NEST:
            what, gap = (3 if u < 0.97 else 2), 1.5
        elif kind == LESION:
            what, gap = (4 if u < 0.8 else 2), 1.6
        else:
            what = 0 if u < 0.85 or kind == ADIPOSE else 2
        if kind == GLAND and outline(p, x - p[0], y - p[1]) < 6:
            continue
        if kind == ADIPOSE:
            x, y, angle = _to_membrane(p, x, y)
        elif what == 0:
            angle = _fibre_angle(w, mx + x, my + y) + normal(s, 0, 0.2)
        _make(s, nuclei[count], what, mx + x, my + y, angle, w.habit)
        if (
            _inside_unit(nuclei[count], i, j, unit)
            and depth_at(w, mx + x, my + y) > EDGE_UM
            and _free(nuclei, count, nuclei[count], gap)
        ):
            count += 1
    nuclei[own : own + count - guests] = nuclei[guests:count].copy()
    return own + count - guests


@njit(cache=True)
def _to_membrane(p, x, y):
    """The nearest place between two fat cells, and the direction of the membrane there."""
    first, second, a, b = 1e9, 1e9, 0, 0
    for k in range(4):
        d = math.hypot(x - p[11 + 2 * k], y - p[12 + 2 * k])
        if d < first:
            first, second, a, b = d, first, k, a
        elif d < second:
            second, b = d, k
    ex, ey = p[11 + 2 * b] - p[11 + 2 * a], p[12 + 2 * b] - p[12 + 2 * a]
    length = math.hypot(ex, ey)
    shift = (second - first) / 2 * (second + first) / length / length
    return x + ex * shift, y + ey * shift, math.atan2(ey, ex) + math.pi / 2


@njit(cache=True)
def radius_at(n, u, v):
    """How far a place (u, v) along a nucleus's axes, in µm, lies out: 1 on the outline."""
    q = math.sqrt((u / n[A]) ** 2 + (v / n[B]) ** 2) + 1e-9
    c, s = u / n[A] / q, v / n[B] / q
    c2 = 2 * c * c - 1
    return q / (1 + n[C2] * c2 + n[C3] * (c2 * c - 2 * s * s * c))


@njit(cache=True, nogil=True)
def collect(w, i, j0, j1):
    """The nuclei of units (i, j0) to (i, j1), the last excluded: (n, COLUMNS) in µm, and their ids (n,) int64."""
    cap, columns = w.cap, w.kinds.shape[1] * w.units
    out, ids, total = np.empty((cap * (j1 - j0), COLUMNS)), np.empty(cap * (j1 - j0), np.int64), 0
    for j in range(j0, j1):
        if w.kinds[i // w.units, j // w.units] >= 0:
            count = unit_nuclei(w, i, j, out[total : total + cap])
            for k in range(count):
                ids[total + k] = 1 + (i * columns + j) * cap + k
            total += count
    return out[:total].copy(), ids[:total].copy()
