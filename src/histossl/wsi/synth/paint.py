"""Paints pixels: hematoxylin and eosin of the tissue, nuclei drawn over them, and their colours.

Any region can be painted in any order, since all randomness is a hash of (seed, unit, purpose). What fills a cell stays
inside it, on stroma that is common to all, so that cells do not depend on each other. Fast-math is off: the same
seed must give the same bytes.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
from numba import njit

from histossl.wsi.synth.painted_nuclei import (
    CLUMP,
    COLUMNS,
    COS,
    EDGE_UM,
    HEMA,
    NUCLEOLUS,
    PALE,
    SIN,
    TEX,
    A,
    B,
    X,
    Y,
    radius_at,
    unit_nuclei,
)
from histossl.wsi.synth.shapes import ADIPOSE, GLAND, LYMPHOID, NEST, STROMA, form_of, in_body, in_cell, outline, vessel
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
def _gland(form, inside, h, e, cyto, blotch):
    if inside < -1.8:
        return h, e
    if inside < 0:
        return h, e + 0.3 * (1 - abs(inside + 0.9) / 0.9)
    edge, wall = min(1.0, inside / 1.2), min(14.5, 0.62 * form.depth) * (0.85 + 0.25 * form.whim)
    deep = inside / wall + 0.07 * blotch
    if deep < 1:
        return h + edge * (0.36 - 0.16 * deep + 0.05 * cyto - h), e + edge * (0.5 + 0.1 * cyto - e)
    rim = min(1.0, (deep - 1) * wall / 1.5)
    secret = max(0.0, 0.25 * max(0.0, form.whim - 0.5) * (2.2 + blotch + 0.5 * cyto))
    return (1 - rim) * 0.2 + rim * 0.3 * secret, (1 - rim) * 0.6 + rim * secret


@njit
def _stroma(form, u, v, h, e, cyto, blotch):
    radius = vessel(form)
    if radius == 0:
        return h, e
    q = outline(form, radius, u, v)
    if q > 1.5:
        return h, e
    if q > -1.2:
        return h + 0.05, e + 0.25 * _clamp((1.5 - q) / 1.2)
    red = _clamp(1.2 + 2.5 * blotch - 1.5 * _clamp(q + 2.2)) if form.whim > 0.78 else 0.0
    return 0.02, red * (0.95 + 0.08 * cyto)


@njit
def _content(kind, form, inside, h, e, cells, cyto, blotch):
    """Hematoxylin and eosin `inside` µm deep in a body, on the ground (h, e)."""
    if kind == GLAND:
        return _gland(form, inside, h, e, cyto, blotch)
    if kind == ADIPOSE:
        m, empty = _clamp((inside + 1.0) / 0.8), _clamp((inside - 0.5) / 1.2)
        return (h + m * (0.06 - h)) * (1 - empty), (e + m * (0.5 + 0.08 * cyto - e)) * (1 - empty)
    if kind == LYMPHOID:
        m = 0.8 * _clamp(inside / 9)
        return h + m * (0.2 + 0.09 * cyto - h), e + m * (0.3 + 0.12 * cyto - e)
    m = _clamp((inside + min(0.4, 1.8 * blotch - 1.2)) / 1.6)
    seam = _clamp(1 - 3.2 * cells)
    if kind == NEST:
        return (
            h + m * (0.36 + 0.06 * cyto - 0.12 * seam - h),
            e + m * (0.55 + 0.09 * cyto + 0.05 * blotch - 0.22 * seam - e),
        )
    return h + m * (0.34 + 0.08 * cyto - 0.1 * seam - h), e + m * (0.6 + 0.13 * cyto - 0.2 * seam - e)


@njit
def _ground(w, i, j0, j1, x0, y0, hema, eosin, thick):
    """Paint the collagen of a row of units, eosin along the fibres with white clefts, and the section's thickness."""
    mpp, unit, tex = w.mpp, w.unit, w.tex
    height, width = hema.shape
    r0, r1 = max(0, math.ceil(i * unit / mpp - 0.5) - y0), min(height, math.ceil((i + 1) * unit / mpp - 0.5) - y0)
    left, right = np.empty(4), np.empty(4)
    for r in range(r0, r1):
        y, known = (r + y0 + 0.5) * mpp, False
        for j in range(j0, j1):
            c0, c1 = max(0, math.ceil(j * unit / mpp - 0.5) - x0), math.ceil((j + 1) * unit / mpp - 0.5) - x0
            if w.kinds[i // w.units, j // w.units] < 0 or c1 <= 0 or c0 >= width:
                known = False
                continue
            if known:
                left, right = right, left
            else:
                slow(w, j * unit, y, left)
            slow(w, (j + 1) * unit, y, right)
            known = True
            for c in range(c0, min(width, c1)):
                f = (c + x0 + 0.5) * mpp / unit - j
                inside = left[0] + f * (right[0] - left[0])
                if inside < -EDGE_UM:
                    continue
                wy = int((left[2] + f * (right[2] - left[2]) + FAR) / mpp) & MASK
                wx = int((left[1] + f * (right[1] - left[1]) + FAR) / mpp) & MASK
                fibre, blotch, cyto = tex[FIBRE, wy, wx] / 40.0, tex[BLOTCH, wy, wx] / 40.0, tex[CYTO, wy, wx] / 40.0
                alpha = min(1.0, max(0.0, (inside + 4 * blotch + 0.7 * fibre) / 3))
                thick[r, c] = alpha * (left[3] + f * (right[3] - left[3]))
                hema[r, c] = 0.05 + 0.03 * (blotch + 1)
                cleft = _clamp(2.75 + 1.25 * fibre + 0.6 * blotch)
                eosin[r, c] = max(0.05, 0.53 + 0.1 * fibre + 0.09 * blotch + 0.04 * cyto) * (0.15 + 0.85 * cleft)


@njit
def _body(w, kind, form, x0, y0, hema, eosin, thick):
    """Paint what fills a cell, over the ground."""
    mpp, tex = w.mpp, w.tex
    left, right, top, low = form.box
    r0 = max(0, math.ceil((form.y + top) / mpp - 0.5) - y0)
    r1 = min(hema.shape[0], math.floor((form.y + low) / mpp - 0.5) + 1 - y0)
    c0 = max(0, math.ceil((form.x + left) / mpp - 0.5) - x0)
    c1 = min(hema.shape[1], math.floor((form.x + right) / mpp - 0.5) + 1 - x0)
    sides, loose, whim, chord, row, column = form.sides, form.loose, form.whim, form.chord, form.row, form.column
    for r in range(r0, r1):
        v, ly = (r + y0 + 0.5) * mpp - form.y, (r + y0 + row) & MASK
        for c in range(c0, c1):
            u, lx = (c + x0 + 0.5) * mpp - form.x, (c + x0 + column) & MASK
            cell = in_cell(sides, u, v)
            if cell <= 0 or thick[r, c] == 0:
                continue
            h, e = hema[r, c], eosin[r, c]
            cyto, blotch = tex[CYTO, ly, lx] / 40.0, tex[BLOTCH, ly, lx] / 40.0
            if kind == STROMA:
                hema[r, c], eosin[r, c] = _stroma(form, u, v, h, e, cyto, blotch)
                continue
            inside = in_body(kind, loose, whim, chord, cell, u, v, blotch)
            if inside > -1.9:
                cells = tex[CELLS, ly, lx] / 120.0
                hema[r, c], eosin[r, c] = _content(kind, form, inside, h, e, cells, cyto, blotch)


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
    """The units whose cells may be visible in a region: first and last row, first and last column, ends excluded."""
    rows, columns, px = w.kinds.shape[0] * w.units, w.kinds.shape[1] * w.units, w.unit / w.mpp
    i0, i1 = math.floor(y0 / px) - 3, math.floor((y0 + height) / px) + 4
    j0, j1 = math.floor(x0 / px) - 3, math.floor((x0 + width) / px) + 4
    return max(0, i0), min(rows, i1), max(0, j0), min(columns, j1)


@njit
def _visible(w, form, x0, y0, height, width):
    left, right, top, low = form.box
    return (
        (form.x + left) / w.mpp < x0 + width + 2
        and (form.x + right) / w.mpp > x0 - 2
        and (form.y + top) / w.mpp < y0 + height + 2
        and (form.y + low) / w.mpp > y0 - 2
    )


@njit
def _paint(w, x0, y0, height, width):
    """(height, width, 3) uint8 of the level-0 pixels from (x0, y0)."""
    hema, eosin, thick = np.zeros((3, height, width), np.float32)
    i0, i1, j0, j1 = _units(w, x0, y0, height, width)
    tissue = [(i, j) for i in range(i0, i1) for j in range(j0, j1) if w.kinds[i // w.units, j // w.units] >= 0]
    for i in range(i0, i1):
        _ground(w, i, j0, j1, x0, y0, hema, eosin, thick)
    cells = [(i, j, form_of(w, i, j)) for i, j in tissue]
    cells = [cell for cell in cells if _visible(w, cell[2], x0, y0, height, width)]
    for i, j, form in cells:
        kind = w.kinds[i // w.units, j // w.units]
        if kind != STROMA or vessel(form):
            _body(w, kind, form, x0, y0, hema, eosin, thick)
    hema, eosin = thick * np.maximum(hema, np.float32(0)), thick * np.maximum(eosin, np.float32(0))
    nuclei, soft = np.empty((w.cap, COLUMNS)), math.sqrt(w.habit[2] ** 2 + w.mpp**2)
    for i, j, form in cells:
        for k in range(unit_nuclei(w, i, j, form, nuclei)):
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
            for k in range(unit_nuclei(w, i, j, form_of(w, i, j), nuclei)):
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
            count = unit_nuclei(w, i, j, form_of(w, i, j), out[total : total + cap])
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


_SOURCES = ("texture", "shapes", "painted_nuclei", "paint")
paint, label, collect = _entries(
    zlib.crc32(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in _SOURCES))
)
