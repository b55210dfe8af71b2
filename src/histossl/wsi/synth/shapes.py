"""The cells of synthetic tissue: each unit of the lattice owns the points nearest to a site at random in it.

All lengths are in µm. Cells know nothing of the kinds of tissue, so that neither their borders nor the stroma between
them tell how the kinds are arranged; what fills a cell stays inside it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from histossl.wsi.synth.texture import BLOTCH, MASK, N, normal, state, uniform

STROMA, GLAND, LYMPHOID, ADIPOSE, NEST, LESION = range(6)  # as in recipe.KINDS
LOBED = 0.4  # share of the cells whose body is in two parts
# By kind: distance of the body from the border of its cell, at least and usually; how rough its outline is; width of
# the seams between its parts.
_BODIES = np.array(
    [[8, 8, 1, 0], [1.9, 3, 1.3, 0], [0.2, 1.5, 3, 0], [0.5, 0.8, 0.3, 1], [0.5, 2.6, 2, 2.2], [0.2, 0.8, 2, 0]]
)
_ROUND = 11.0  # corners of cells are round on this length
_ANGLES = 48
_STRAY = 0.4  # a site lies up to so many units outside its own: else the cells stand in rows


class Form(NamedTuple):
    """A cell and what is drawn for its content, in µm from its centre."""

    x: float  # the centre, on the slide
    y: float
    box: tuple[float, float, float, float]  # least and most x, least and most y of the cell, from the centre
    depth: float  # distance of the centre from the border
    sides: NDArray[np.float64]  # (n, 3): unit normal x, y, and distance from the centre, of each side
    loose: float  # stroma around the body, over the usual
    chord: tuple[float, float, float, float]  # like a side, and how bent; it parts the body
    waves: tuple[float, float, float, float]  # amplitudes of a round outline's waves, in parts of the radius
    row: int  # offset in the textures
    column: int
    whim: float  # in [0, 1], for all other variation


@njit
def _site(w, i, j):
    s = np.empty(1, np.uint64)
    s[0] = state(w.seed, i, j, 40)
    return (j + uniform(s, -_STRAY, 1 + _STRAY)) * w.unit, (i + uniform(s, -_STRAY, 1 + _STRAY)) * w.unit


@njit
def _polygon(w, i, j):
    """Centre, sides and box of the cell of unit (i, j): the points nearest to its site.

    The nearest site of a point is less than 2 units away. Three rings of neighbours bound all but the rarest cells,
    which may overlap another a little.
    """
    x, y = _site(w, i, j)
    sides, used, total = np.empty((48, 3)), np.zeros(48, np.bool_), 0
    for k in range(49):
        if k != 24:
            nx, ny = _site(w, i + k // 7 - 3, j + k % 7 - 3)
            d = math.sqrt((nx - x) ** 2 + (ny - y) ** 2)
            sides[total] = (nx - x) / d, (ny - y) / d, d / 2
            total += 1
    area, cx, cy = 1e-9, 0.0, 0.0
    left, right, top, low = 0.0, 0.0, 0.0, 0.0
    for a in range(_ANGLES):
        c, s = math.cos(2 * math.pi * a / _ANGLES), math.sin(2 * math.pi * a / _ANGLES)
        inverse = 0.0
        for k in range(48):
            inverse = max(inverse, (c * sides[k, 0] + s * sides[k, 1]) / sides[k, 2])
        for k in range(48):  # a side between two angles is nearly the nearest on one of them
            used[k] |= (c * sides[k, 0] + s * sides[k, 1]) / sides[k, 2] > 0.8 * inverse
        r = 1 / inverse
        area, cx, cy = area + r * r / 2, cx + c * r**3 / 3, cy + s * r**3 / 3
        left, right, top, low = min(left, c * r), max(right, c * r), min(top, s * r), max(low, s * r)
    cx, cy = cx / area, cy / area
    for k in range(48):
        sides[k, 2] -= cx * sides[k, 0] + cy * sides[k, 1]
    # The round corners lie inside the box of the rays, which end on the sharp border.
    return x + cx, y + cy, sides[used], (left - cx, right - cx, top - cy, low - cy)


@njit
def form_of(w, i, j):
    """The cell of a unit, drawn in the same way for all kinds; each kind uses the fields that it needs.

    Args:
        w: the `World` of the slide.
        i: row of the unit.
        j: column of the unit.

    Returns:
        The `Form`.
    """
    x, y, sides, box = _polygon(w, i, j)
    s = np.empty(1, np.uint64)
    s[0] = state(w.seed, i, j, 41)
    depth = 1e9
    for k in range(len(sides)):
        depth = min(depth, sides[k, 2])
    turn = uniform(s, 0, 2 * math.pi)
    chord = math.cos(turn), math.sin(turn), uniform(s, -0.3, 0.3) * depth, uniform(s, -0.012, 0.012)
    loose = 0.16 * w.unit * uniform(s, 0, 1) ** 4
    waves = (normal(s, 0, 0.05), normal(s, 0, 0.05), normal(s, 0, 0.04), normal(s, 0, 0.04))
    row, column, whim = int(uniform(s, 0, N)), int(uniform(s, 0, N)), uniform(s, 0, 1)
    return Form(x, y, box, depth, sides, loose, chord, waves, row, column, whim)


@njit
def in_cell(sides, u, v):
    """Distance to the border of a cell with round corners.

    Args:
        sides: of the cell's `Form`.
        u: x from its centre, µm.
        v: y from its centre, µm.

    Returns:
        µm, positive inside; never more than the distance to the sharp border.
    """
    nearest = 1e9
    for k in range(sides.shape[0]):
        d = sides[k, 2] - u * sides[k, 0] - v * sides[k, 1]
        if d < 0:
            return d
        blend = _ROUND - abs(nearest - d)
        nearest = min(nearest, d)
        if blend > 0:
            nearest -= blend * blend * (0.25 / _ROUND)
    return nearest


@njit
def in_body(kind, loose, whim, chord, cell, u, v, local):
    """Distance to the rough outline of what fills a cell: a gland, a fat cell, a nest.

    Args:
        kind: index into `recipe.KINDS`.
        loose: of the cell's `Form`, as `whim` and `chord`.
        whim: see there.
        chord: see there.
        cell: distance to the cell's border, of `in_cell`.
        u: x from its centre, µm.
        v: y from its centre, µm.
        local: the texture BLOTCH of the cell.

    Returns:
        µm, positive inside.
    """
    rough, seam = _BODIES[kind, 2], _BODIES[kind, 3]
    d = cell - max(_BODIES[kind, 0], _BODIES[kind, 1] + (0.3 * loose if kind == ADIPOSE else loose) - rough * local)
    if seam > 0 and whim < LOBED:
        along = v * chord[0] - u * chord[1]
        off = chord[2] + chord[3] * along * along - u * chord[0] - v * chord[1]
        d = min(d, abs(off) - 0.5 * seam + 0.3 * rough * local)
    return d


@njit
def body_at(w, kind, form, u, v):
    """`in_body` at any point of a cell.

    Args:
        w: the `World` of the slide.
        kind: index into `recipe.KINDS`.
        form: the cell.
        u: x from its centre, µm.
        v: y from its centre, µm.

    Returns:
        µm, positive inside.
    """
    y, x = math.floor((form.y + v) / w.mpp), math.floor((form.x + u) / w.mpp)
    local = w.tex[BLOTCH, (y + form.row) & MASK, (x + form.column) & MASK] / 40.0
    return in_body(kind, form.loose, form.whim, form.chord, in_cell(form.sides, u, v), u, v, local)


@njit
def vessel(form):
    """The vessel of a cell of stroma.

    Args:
        form: the cell.

    Returns:
        Radius in µm, 0 for no vessel.
    """
    share = (form.whim - 0.7) / 0.3
    return min(4.5 + 20 * share**3, 0.65 * form.depth) if share > 0 and form.depth > 9 else 0.0


@njit
def outline(form, radius, u, v):
    """Signed distance to a wavy circle around the centre of a cell.

    Args:
        form: the cell, which has the waves.
        radius: radius of the circle, µm.
        u: x from the centre, µm.
        v: y from the centre, µm.

    Returns:
        µm, positive outside.
    """
    r = math.sqrt(u * u + v * v) + 1e-6
    c, s = u / r, v / r
    c2, s2 = 2 * c * c - 1, 2 * s * c
    a, b, d, e = form.waves
    return r - 0.96 * radius * (1 + a * c2 + b * s2 + d * (c2 * c - s2 * s) + e * (s2 * c + c2 * s))
