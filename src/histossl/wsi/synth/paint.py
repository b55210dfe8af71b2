"""Paints pixels: hematoxylin and eosin of the tissue, nuclei drawn over them, and their colours.

Any region can be painted in any order, since all randomness is a hash of (seed, unit, purpose). A unit fades into the
common stroma before its border, so that units do not depend on each other. Fast-math is off: the same seed must give
the same bytes.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
from numba import njit

from histossl.wsi.synth.painted_nuclei import (
    ADIPOSE,
    CLUMP,
    COLUMNS,
    COS,
    EDGE_UM,
    GLAND,
    HEMA,
    LYMPHOID,
    NEST,
    NUCLEOLUS,
    PALE,
    SIN,
    STROMA,
    TEX,
    A,
    B,
    X,
    Y,
    body,
    form_of,
    gland,
    outline,
    radius_at,
    unit_nuclei,
    vessel,
)
from histossl.wsi.synth.texture import BLOTCH, CELLS, CHROMATIN, CYTO, FAR, FIBRE, GRAIN, MASK, N, slow, state


@njit
def _box(n, mpp, x0, y0, height, width, extra):
    side = n[A] * 1.35 + extra
    return (
        max(0, math.ceil((n[Y] - side) / mpp - 0.5) - y0),
        min(height, math.floor((n[Y] + side) / mpp - 0.5) + 1 - y0),
        max(0, math.ceil((n[X] - side) / mpp - 0.5) - x0),
        min(width, math.floor((n[X] + side) / mpp - 0.5) + 1 - x0),
    )


@njit
def _stamp(w, hema, eosin, x0, y0, n, soft):
    mpp, tex = w.mpp, w.tex
    r0, r1, c0, c1 = _box(n, mpp, x0, y0, hema.shape[0], hema.shape[1], soft)
    oy, ox = int(n[TEX]) // N, int(n[TEX]) % N
    nu, nv = n[A] * 0.35 * (oy / 512 - 1), n[B] * 0.35 * (ox / 512 - 1)
    for r in range(r0, r1):
        dy = (r + y0 + 0.5) * mpp - n[Y]
        for c in range(c0, c1):
            dx = (c + x0 + 0.5) * mpp - n[X]
            u, v = dx * n[COS] + dy * n[SIN], dy * n[COS] - dx * n[SIN]
            q = radius_at(n, u, v)
            m = (1 - q) * n[B] / soft + 0.5
            if m <= 0:
                continue
            m = min(m, 1.0)
            clump = tex[CHROMATIN, (r + y0 + oy) & MASK, (c + x0 + ox) & MASK] / 40.0
            inner = max(0.0, 1 - q * q)
            h = n[HEMA] * (1 - n[PALE] * inner) * (1 + n[CLUMP] * clump * min(1.0, 2 * inner + 0.3))
            if n[NUCLEOLUS] > 0.55:
                spot = n[NUCLEOLUS] - math.sqrt((u - nu) ** 2 + (v - nv) ** 2)
                h += 0.7 * min(1.0, max(0.0, spot / soft + 0.5))
            hema[r, c] += m * (max(h, 0.25) - hema[r, c])
            eosin[r, c] += m * (0.3 - eosin[r, c])


# ---- tissue between the nuclei


@njit
def _clamp(x):
    return min(1.0, max(0.0, x))


@njit
def _ground(fibre, blotch, cyto):
    """Collagen: eosin along the fibres, thin white clefts between them."""
    eosin = 0.53 + 0.1 * fibre + 0.09 * blotch + 0.04 * cyto
    cleft = _clamp(2.75 + 1.25 * fibre + 0.6 * blotch)
    return 0.05 + 0.03 * (blotch + 1), max(0.05, eosin) * (0.15 + 0.85 * cleft)


@njit
def _gland(form, u, v, h, e, cyto, blotch):
    q, wall = 9.0, 9.0
    for k in range(5):
        x, y, radius, height = gland(form, k)
        if radius > 0 and (u - x) ** 2 + (v - y) ** 2 < (1.3 * radius + 2) ** 2:
            near = outline(form, radius, u - x, v - y)
            if near < q:
                q, wall = near, height
    q += 0.5 * cyto
    if q > 1.8:
        return h, e
    if q > 0:
        return h, e + 0.3 * (1 - abs(q - 0.9) / 0.9)
    inside = min(1.0, -q / 1.2)
    deep = -q / wall + 0.07 * blotch
    if deep < 1:
        return h + inside * (0.36 - 0.16 * deep + 0.05 * cyto - h), e + inside * (0.5 + 0.1 * cyto - e)
    rim = min(1.0, (deep - 1) * wall / 1.5)
    secret = max(0.0, 0.25 * max(0.0, form.whim - 0.5) * (2.2 + blotch + 0.5 * cyto))
    return (1 - rim) * 0.2 + rim * 0.3 * secret, (1 - rim) * 0.6 + rim * secret


@njit
def _fat(form, u, v, h, e, cyto):
    for k in range(5):
        d = form.circles[k, 2] - math.sqrt((u - form.circles[k, 0]) ** 2 + (v - form.circles[k, 1]) ** 2) + 0.4 * cyto
        if form.circles[k, 2] > 0 and d > -0.6:
            empty = _clamp((d - 0.9) / 1.2)
            return (h + 0.05) * (1 - empty), (0.55 + 0.08 * cyto) * (1 - empty)
    return h, e


@njit
def _stroma(form, u, v, h, e, cyto, blotch):
    radius = vessel(form)
    if radius == 0:
        return h, e
    q = outline(form, radius, u - form.x, v - form.y)
    if q > 1.5:
        return h, e
    if q > -1.2:
        return h + 0.05, e + 0.25 * _clamp((1.5 - q) / 1.2)
    red = _clamp(1.2 + 2.5 * blotch - 1.5 * _clamp(q + 2.2)) if form.whim > 0.78 else 0.0
    return 0.02, red * (0.95 + 0.08 * cyto)


@njit
def _content(kind, form, u, v, half, h, e, cells, cyto, blotch):
    """Hematoxylin and eosin at (u, v) µm from the unit's middle, on the ground (h, e)."""
    if kind == GLAND:
        return _gland(form, u, v, h, e, cyto, blotch)
    if kind == ADIPOSE:
        return _fat(form, u, v, h, e, cyto)
    if kind == STROMA:
        return _stroma(form, u, v, h, e, cyto, blotch)
    inside = -body(form, half, u, v)
    if kind == LYMPHOID:
        m = 0.8 * _clamp(inside / 9)
        return h + m * (0.2 + 0.09 * cyto - h), e + m * (0.3 + 0.12 * cyto - e)
    m = _clamp((inside - 0.4 + min(0.4, 1.8 * blotch - 1.2)) / 1.6)
    seam = _clamp(1 - 3.2 * cells)
    if kind == NEST:
        return (
            h + m * (0.36 + 0.06 * cyto - 0.12 * seam - h),
            e + m * (0.55 + 0.09 * cyto + 0.05 * blotch - 0.22 * seam - e),
        )
    return h + m * (0.34 + 0.08 * cyto - 0.1 * seam - h), e + m * (0.6 + 0.13 * cyto - 0.2 * seam - e)


@njit
def _unit(w, i, j, x0, y0, hema, eosin):
    mpp, unit, tex, kind = w.mpp, w.unit, w.tex, w.kinds[i // w.units, j // w.units]
    height, width = hema.shape
    r0, r1 = max(0, math.ceil(i * unit / mpp - 0.5) - y0), min(height, math.ceil((i + 1) * unit / mpp - 0.5) - y0)
    c0, c1 = max(0, math.ceil(j * unit / mpp - 0.5) - x0), min(width, math.ceil((j + 1) * unit / mpp - 0.5) - x0)
    left, right = np.empty(4), np.empty(4)
    form = form_of(w, i, j)
    oy, ox = form.row, form.column
    for r in range(r0, r1):
        y = (r + y0 + 0.5) * mpp
        v = y - (i + 0.5) * unit
        slow(w, j * unit, y, left)
        slow(w, (j + 1) * unit, y, right)
        for c in range(c0, c1):
            x = (c + x0 + 0.5) * mpp
            f = x / unit - j
            inside = left[0] + f * (right[0] - left[0])
            if inside < -EDGE_UM:
                continue
            wy = int((left[2] + f * (right[2] - left[2]) + FAR) / mpp) & MASK
            wx = int((left[1] + f * (right[1] - left[1]) + FAR) / mpp) & MASK
            fibre, blotch = tex[FIBRE, wy, wx] / 40.0, tex[BLOTCH, wy, wx] / 40.0
            alpha = min(1.0, max(0.0, (inside + 4 * blotch + 0.7 * fibre) / 3))
            if alpha == 0:
                continue
            h, e = _ground(fibre, blotch, tex[CYTO, wy, wx] / 40.0)
            ly, lx = (r + y0 + oy) & MASK, (c + x0 + ox) & MASK
            cyto, cells = tex[CYTO, ly, lx] / 40.0, tex[CELLS, ly, lx] / 120.0
            local = tex[BLOTCH, ly, lx] / 40.0
            h, e = _content(kind, form, x - (j + 0.5) * unit, v, unit / 2, h, e, cells, cyto, local)
            thick = alpha * (left[3] + f * (right[3] - left[3]))
            hema[r, c], eosin[r, c] = thick * max(h, 0.0), thick * max(e, 0.0)


@njit
def _colours(w, x0, y0, hema, eosin, out):
    """Optical densities to grey levels, with the sensor's noise."""
    stain, noise, tex = w.stain, w.habit[3], w.tex
    table = np.empty(4096)
    for k in range(4096):
        table[k] = 255 * math.exp(-k / 1024)
    z = state(w.seed, 1, 1, 61)
    oy, ox = int(z & np.uint64(MASK)), int((z >> np.uint64(16)) & np.uint64(MASK))
    for r in range(hema.shape[0]):
        for c in range(hema.shape[1]):
            for k in range(3):
                od = hema[r, c] * stain[0, k] + eosin[r, c] * stain[1, k] + stain[2, k]
                # Each 1024-pixel column and channel takes other rows of the grain, so that its period does not show.
                gy = (r + y0 + oy + 331 * k + 97 * ((c + x0) >> 10)) & MASK
                gx = (c + x0 + ox + 619 * k + 193 * ((r + y0) >> 10)) & MASK
                value = table[min(4095, int(od * 1024))] + noise * tex[GRAIN, gy, gx] / 40.0
                out[r, c, k] = np.uint8(min(255.0, max(0.0, value + 0.5)))


@njit
def _units(w, x0, y0, height, width):
    """The units that may be visible in a region: first and last row, first and last column, ends excluded."""
    rows, columns, px = w.kinds.shape[0] * w.units, w.kinds.shape[1] * w.units, w.unit / w.mpp
    i0, i1 = math.floor(y0 / px) - 1, math.floor((y0 + height) / px) + 2
    j0, j1 = math.floor(x0 / px) - 1, math.floor((x0 + width) / px) + 2
    return max(0, i0), min(rows, i1), max(0, j0), min(columns, j1)


@njit
def _paint(w, x0, y0, height, width):
    """(height, width, 3) uint8 of the level-0 pixels from (x0, y0)."""
    hema, eosin = np.zeros((height, width), np.float32), np.zeros((height, width), np.float32)
    i0, i1, j0, j1 = _units(w, x0, y0, height, width)
    for i in range(i0, i1):
        for j in range(j0, j1):
            if w.kinds[i // w.units, j // w.units] >= 0:
                _unit(w, i, j, x0, y0, hema, eosin)
    nuclei = np.empty((w.cap, COLUMNS))
    soft = math.sqrt(w.habit[2] ** 2 + w.mpp**2)
    for i in range(i0, i1):
        for j in range(j0, j1):
            if w.kinds[i // w.units, j // w.units] >= 0:
                for k in range(unit_nuclei(w, i, j, nuclei)):
                    _stamp(w, hema, eosin, x0, y0, nuclei[k], soft)
    out = np.empty((height, width, 3), np.uint8)
    _colours(w, x0, y0, hema, eosin, out)
    return out


@njit
def _label(w, x0, y0, height, width):
    """(height, width) int32 of nucleus ids, 0 = none; an id is 1 + unit · cap + index in the unit."""
    out = np.zeros((height, width), np.int32)
    mpp, columns = w.mpp, w.kinds.shape[1] * w.units
    i0, i1, j0, j1 = _units(w, x0, y0, height, width)
    nuclei = np.empty((w.cap, COLUMNS))
    for i in range(i0, i1):
        for j in range(j0, j1):
            if w.kinds[i // w.units, j // w.units] < 0:
                continue
            for k in range(unit_nuclei(w, i, j, nuclei)):
                n = nuclei[k]
                r0, r1, c0, c1 = _box(n, mpp, x0, y0, height, width, 0.0)
                for r in range(r0, r1):
                    dy = (r + y0 + 0.5) * mpp - n[Y]
                    for c in range(c0, c1):
                        dx = (c + x0 + 0.5) * mpp - n[X]
                        if radius_at(n, dx * n[COS] + dy * n[SIN], dy * n[COS] - dx * n[SIN]) <= 1:
                            out[r, c] = 1 + (i * columns + j) * w.cap + k
    return out


@njit
def _collect(w, i, j0, j1):
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


def _entries(sources: int):
    """The functions to call from Python, with their compiled code cached on disk.

    Numba's cache notices changes of a function's own file, but not of the functions that it calls. It also notices
    changed closure variables, so these functions close over a checksum of all sources.
    """

    @njit(cache=True, nogil=True)
    def paint(w, x0, y0, height, width):
        assert sources >= 0
        return _paint(w, x0, y0, height, width)

    @njit(cache=True, nogil=True)
    def label(w, x0, y0, height, width):
        assert sources >= 0
        return _label(w, x0, y0, height, width)

    @njit(cache=True, nogil=True)
    def collect(w, i, j0, j1):
        assert sources >= 0
        return _collect(w, i, j0, j1)

    return paint, label, collect


_SOURCES = ("texture", "painted_nuclei", "paint")
paint, label, collect = _entries(
    zlib.crc32(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in _SOURCES))
)
