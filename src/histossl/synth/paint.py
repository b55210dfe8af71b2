"""The painter's loops: hematoxylin and eosin at every pixel, nuclei stamped on them, their colours.

Any region can be painted at any time, in any order, since all randomness is a hash of (seed, unit, purpose). A unit
fades into the common stroma before its border: units do not see each other. Fast-math stays off: the same seed
has to give the same bytes."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from histossl.synth.nuclei import (
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
    outline,
    radius_at,
    shape,
    unit_nuclei,
)
from histossl.synth.texture import BLOTCH, CELLS, CHROMATIN, CYTO, FAR, FIBRE, GRAIN, MASK, N, slow, state


@njit(cache=True)
def _box(n, mpp, x0, y0, height, width, extra):
    side = n[A] * 1.35 + extra
    return (
        max(0, math.ceil((n[Y] - side) / mpp - 0.5) - y0),
        min(height, math.floor((n[Y] + side) / mpp - 0.5) + 1 - y0),
        max(0, math.ceil((n[X] - side) / mpp - 0.5) - x0),
        min(width, math.floor((n[X] + side) / mpp - 0.5) + 1 - x0),
    )


@njit(cache=True)
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


# ---- what lies between the nuclei


@njit(cache=True)
def _ground(fibre, blotch):
    """Collagen: eosin along the fibres, white clefts between them."""
    eosin = 0.62 + 0.2 * fibre + 0.13 * blotch
    cleft = min(1.0, max(0.0, 2.6 + 2.0 * fibre - 0.6 * blotch))
    return 0.05 + 0.03 * (blotch + 1), max(0.05, eosin) * cleft


@njit(cache=True)
def _gland(p, u, v, h, e, cyto, blotch):
    q = outline(p, u - p[0], v - p[1]) + 0.5 * cyto
    if q > 1.6:
        return h, e
    if q > 0:
        m = 1 - abs(q - 0.8) / 0.8
        return h, e + 0.35 * m
    inside = min(1.0, -q / 1.2)
    deep = -q / p[7] + 0.07 * blotch
    if deep < 1:
        return h + inside * (0.34 - 0.14 * deep + 0.05 * cyto - h), e + inside * (0.52 + 0.1 * cyto - e)
    rim = min(1.0, (deep - 1) * p[7] / 1.5)
    secret = 0.22 * max(0.0, p[10] - 0.55) * (2.2 + blotch + 0.5 * cyto)
    return (1 - rim) * 0.22 + rim * 0.3 * secret, (1 - rim) * 0.62 + rim * max(0.0, secret)


@njit(cache=True)
def _fat(p, u, v, h, e, m, cyto):
    first, second = 1e9, 1e9
    for k in range(4):
        d = math.sqrt((u - p[11 + 2 * k]) ** 2 + (v - p[12 + 2 * k]) ** 2)
        if d < first:
            first, second = d, first
        elif d < second:
            second = d
    wall = min(1.0, max(0.0, 1.6 - (second - first) * 0.55)) * (0.8 + 0.2 * cyto)
    return h + m * (0.08 * wall - h), e + m * (0.5 * wall - e)


@njit(cache=True)
def _content(kind, p, u, v, half, h, e, local, cells, cyto, blotch):
    """Hematoxylin and eosin at (u, v) µm from the unit's middle, on the ground (h, e)."""
    if kind == GLAND:
        return _gland(p, u, v, h, e, cyto, blotch)
    d = math.sqrt(math.sqrt(u * u * u * u + v * v * v * v))
    m = min(1.0, max(0.0, (half - 1.0 - d + 1.6 * min(0.5, blotch)) / 2.2))
    if m == 0:
        return h, e
    if kind == STROMA:
        return h, e * (1 + 0.12 * m * (p[10] - 0.4))
    if kind == ADIPOSE:
        return _fat(p, u, v, h, e, m, cyto)
    seam = max(0.0, 1 - cells * 1.6)
    if kind == LYMPHOID:
        return h + m * (0.22 + 0.08 * cyto - h), e + m * (0.26 + 0.1 * cyto - e)
    if kind == NEST:
        return h + m * (0.36 + 0.07 * cyto - 0.1 * seam - h), e + m * (
            0.6 + 0.1 * cyto + 0.05 * blotch - 0.2 * seam - e
        )
    return h + m * (0.34 + 0.08 * cyto - 0.1 * seam - h), e + m * (0.64 + 0.14 * cyto - 0.2 * seam - e)


@njit(cache=True)
def _unit(w, i, j, x0, y0, hema, eosin):
    mpp, unit, tex, kind = w.mpp, w.unit, w.tex, w.kinds[i // w.units, j // w.units]
    height, width = hema.shape
    r0, r1 = max(0, math.ceil(i * unit / mpp - 0.5) - y0), min(height, math.ceil((i + 1) * unit / mpp - 0.5) - y0)
    c0, c1 = max(0, math.ceil(j * unit / mpp - 0.5) - x0), min(width, math.ceil((j + 1) * unit / mpp - 0.5) - x0)
    p, left, right = np.empty(20), np.empty(4), np.empty(4)
    shape(w, i, j, p)
    oy, ox = int(p[8]), int(p[9])
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
            alpha = min(1.0, max(0.0, (inside + 4.5 * blotch + 1.5 * fibre) / 3))
            if alpha == 0:
                continue
            h, e = _ground(fibre, blotch)
            ly, lx = (r + y0 + oy) & MASK, (c + x0 + ox) & MASK
            cyto, cells = tex[CYTO, ly, lx] / 40.0, tex[CELLS, ly, lx] / 120.0
            local = tex[BLOTCH, ly, lx] / 40.0
            h, e = _content(kind, p, x - (j + 0.5) * unit, v, unit / 2, h, e, local, cells, cyto, local)
            thick = alpha * (left[3] + f * (right[3] - left[3]))
            hema[r, c], eosin[r, c] = thick * max(h, 0.0), thick * max(e, 0.0)


@njit(cache=True)
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
                # Another row of the grain in every 1024-pixel column and channel, lest its period show.
                gy = (r + y0 + oy + 331 * k + 97 * ((c + x0) >> 10)) & MASK
                gx = (c + x0 + ox + 619 * k + 193 * ((r + y0) >> 10)) & MASK
                value = table[min(4095, int(od * 1024))] + noise * tex[GRAIN, gy, gx] / 40.0
                out[r, c, k] = np.uint8(min(255.0, max(0.0, value + 0.5)))


@njit(cache=True)
def _units(w, x0, y0, height, width):
    """The units that may show in a region: first and last row, first and last column, ends excluded."""
    rows, columns, px = w.kinds.shape[0] * w.units, w.kinds.shape[1] * w.units, w.unit / w.mpp
    i0, i1 = math.floor(y0 / px) - 1, math.floor((y0 + height) / px) + 2
    j0, j1 = math.floor(x0 / px) - 1, math.floor((x0 + width) / px) + 2
    return max(0, i0), min(rows, i1), max(0, j0), min(columns, j1)


@njit(cache=True, nogil=True)
def paint(w, x0, y0, height, width):
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


@njit(cache=True, nogil=True)
def label(w, x0, y0, height, width):
    """(height, width) int32 of nucleus ids, 0 = none; an id is 1 + unit · cap + place in the unit."""
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
