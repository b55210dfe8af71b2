"""The cores of a tissue microarray: found on the tissue, and named by the row and column of their grid."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histossl.core import atomic
from histossl.core.errors import LabelError, SlideError
from histossl.wsi.density import blurred, parts_of
from histossl.wsi.slide import Slide
from histossl.wsi.tissue import TissueMask

_DIAMETERS = 200.0, 4000.0  # µm, of cores that are punched
_FULL, _SOME = 0.55, 0.12  # share of a disc that is tissue in a whole core, and in one that is left of
_FEWEST = 4
_CIRCLE = 64  # corners


@dataclass(frozen=True)
class Core:
    """A core of a microarray.

    Attributes:
        name: row and column of its grid, from A-1 at the upper left; cores that are missing keep their place.
        x, y: its centre, level-0 pixels.
        radius: level-0 pixels, of the circle that is its area.
    """

    name: str
    x: float
    y: float
    radius: float


def find_cores(slide: Slide, tissue: TissueMask) -> list[Core]:
    """Find the cores of a microarray.

    Cores are discs of one size. Their diameter is that of the round pieces of tissue; their centres are where a disc of
    this diameter holds most tissue, so that a core in pieces is one and two that touch are two. A grid, which may be
    turned or bent a little, is fitted to the centres.

    Args:
        slide: the slide.
        tissue: its tissue.

    Returns:
        The cores, row by row.

    Raises:
        SlideError: there are fewer than four pieces of a core's size, or they lie in no grid.
    """
    scale = np.array([tissue.size.width / tissue.mask.shape[1], tissue.size.height / tissue.mask.shape[0]])
    pixel = float(scale.mean()) * slide.mpp
    diameter = _diameter(tissue.mask, pixel)
    hint = "--areas grid is for tissue microarrays; give a folder of areas for other slides"
    if not diameter:
        raise SlideError(slide.path, f"no cores found: fewer than {_FEWEST} round pieces of tissue of one size", hint)
    centres = _centres(tissue.mask, diameter)
    pitch, ij = _lattice(centres)
    if len(np.unique(ij, axis=0)) < len(ij) or len(centres) < _FEWEST:
        raise SlideError(slide.path, f"its {len(centres)} pieces of tissue do not lie in a grid of cores", hint)
    radius = min(0.65 * diameter, 0.49 * pitch)
    order = np.lexsort((ij[:, 1], ij[:, 0]))
    names = [f"{_letters(int(row))}-{column + 1}" for row, column in ij]
    places = centres * scale
    return [Core(names[k], float(places[k, 0]), float(places[k, 1]), radius * float(scale.mean())) for k in order]


def _diameter(mask: NDArray[np.bool_], pixel: float) -> float:
    """The usual diameter of round pieces, in pixels of the mask; 0 where there are few."""
    labels, _ = parts_of(np.asarray(ndimage.binary_closing(mask, iterations=2), bool))
    found = []
    for number, place in enumerate(ndimage.find_objects(labels), 1):
        height, width = (part.stop - part.start for part in place)
        area = int((labels[place] == number).sum())
        size = 2 * np.sqrt(area / np.pi)
        round_ = 0.7 < height / width < 1.43 and area > 0.6 * height * width
        if round_ and _DIAMETERS[0] < size * pixel < _DIAMETERS[1]:
            found.append(max(size, (height + width) / 2))
    if len(found) < _FEWEST:
        return 0.0
    # Debris is small and round, too: cores hold most of the tissue.
    sizes = np.sort(found)
    share = np.cumsum(sizes**2) / np.sum(sizes**2)
    usual = float(sizes[np.searchsorted(share, 0.5)])
    return usual if (abs(sizes / usual - 1) < 0.3).sum() >= _FEWEST else 0.0


def _centres(mask: NDArray[np.bool_], diameter: float) -> NDArray[np.float64]:
    """(n, 2) centres (x, y) of discs that hold tissue, in pixels of the mask; the fullest first."""
    step = max(1, int(diameter // 24))
    pad = int(-(-diameter // step)) + 2
    rows, columns = (np.arange(0, length, step) for length in mask.shape)
    coarse = np.add.reduceat(np.add.reduceat(mask.astype(np.float32), rows, 0), columns, 1) / step**2
    coarse, size = np.pad(coarse, pad), diameter / step
    y, x = np.ogrid[-(size // 2) : size // 2 + 1, -(size // 2) : size // 2 + 1]
    disc = (x**2 + y**2 <= (size / 2) ** 2).astype(np.float32)
    from scipy.signal import fftconvolve

    share = blurred(fftconvolve(coarse, disc / disc.sum(), mode="same").astype(np.float32), size / 12)
    found = []
    while share.max() > _SOME:
        row, column = np.unravel_index(int(share.argmax()), share.shape)
        top, left = max(0, int(row - size / 2)), max(0, int(column - size / 2))
        here = coarse[top : int(row + size / 2) + 1, left : int(column + size / 2) + 1]
        middle = np.asarray(ndimage.center_of_mass(here), np.float64)
        found.append((middle[1] + left, middle[0] + top, share[row, column]))
        inner = np.hypot(*np.ogrid[-row : share.shape[0] - row, -column : share.shape[1] - column]) < 0.75 * size
        share[inner] = 0
    table = np.array(found, np.float64).reshape(-1, 3)
    # A rim that the disc of a neighbour left over is no core of its own.
    kept = table[(table[:, 2] > _FULL) | _apart(table, size)]
    return (kept[:, :2] - pad + 0.5) * step


def _apart(table: NDArray[np.float64], size: float) -> NDArray[np.bool_]:
    """Whether no fuller disc lies within one and a third diameters."""
    distance = np.hypot(*(table[:, None, k] - table[None, :, k] for k in (0, 1)))
    fuller = table[None, :, 2] > table[:, None, 2]
    return np.asarray(~((distance < 1.02 * size) & fuller).any(1), bool)


def _lattice(centres: NDArray[np.float64]) -> tuple[float, NDArray[np.int64]]:
    """The distance of neighbours, and the (row, column) of each centre, from (0, 0)."""
    count = len(centres)
    if count < _FEWEST:
        return 1.0, np.zeros((count, 2), np.int64)
    offsets = centres[None] - centres[:, None]
    distance = np.hypot(offsets[..., 0], offsets[..., 1]) + np.diag(np.full(count, np.inf))
    flat = np.abs(offsets[..., 0]) > np.abs(offsets[..., 1])
    across = _step(offsets, np.where(flat, distance, np.inf), 0)
    down = _step(offsets, np.where(flat, np.inf, distance), 1)
    if across is None or down is None:  # a single row or column
        only = across if across is not None else down
        assert only is not None
        turned = np.array([-only[1], only[0]])
        across, down = (only, turned) if across is not None else (-turned, only)
    pitch = min(np.hypot(*across), np.hypot(*down))
    ij = _walk(offsets, distance, np.stack([down, across]), pitch)
    return float(pitch), ij - ij.min(0)


def _step(offsets: NDArray[np.float64], distance: NDArray[np.float64], axis: int) -> NDArray[np.float64] | None:
    """The usual offset to the nearest neighbour along an axis, towards larger coordinates."""
    nearest = distance.argmin(1)
    rows = np.flatnonzero(np.isfinite(distance.min(1)))
    if len(rows) < 2:
        return None
    found = offsets[rows, nearest[rows]]
    found = found * np.sign(found[:, axis : axis + 1])
    lengths = np.hypot(found[:, 0], found[:, 1])
    return np.median(found[lengths <= 1.3 * np.quantile(lengths, 0.3)], axis=0)


def _walk(
    offsets: NDArray[np.float64], distance: NDArray[np.float64], steps: NDArray[np.float64], pitch: float
) -> NDArray[np.int64]:
    """The (row, column) of each centre, from the nearest one that has them: a bent grid is straight between two."""
    inverse = np.linalg.inv(steps)
    ij = np.zeros((len(offsets), 2), np.int64)
    known = np.zeros(len(offsets), bool)
    known[int(distance.min(1).argmin())] = True
    while not known.all():
        reach = np.where(known[:, None] & ~known[None], distance, np.inf)
        start, end = np.unravel_index(int(reach.argmin()), reach.shape)
        ij[end] = ij[start] + np.rint(offsets[start, end] @ inverse).astype(np.int64)
        known[end] = True
    return ij


def _letters(number: int) -> str:
    """A to Z, AA, AB, ..."""
    text = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        text = chr(65 + rest) + text
    return text


def write_cores(path: Path, cores: list[Core], made: str) -> None:
    """Write cores as circles into a GeoJSON that QuPath reads, whole or absent.

    Args:
        path: the file.
        cores: of a slide.
        made: fingerprint of what made them.
    """
    angles = np.linspace(0, 2 * np.pi, _CIRCLE + 1)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    circle[-1] = circle[0]
    features = [
        {
            "type": "Feature",
            "geometry": {
                "type": "Polygon",
                "coordinates": [np.round(circle * core.radius + (core.x, core.y), 1).tolist()],
            },
            "properties": {"objectType": "annotation", "name": core.name},
        }
        for core in cores
    ]
    with atomic.whole(path) as part:
        part.write_text(json.dumps({"type": "FeatureCollection", "made": made, "features": features}), encoding="utf-8")


def read_made(path: Path) -> str:
    """The fingerprint in a file of cores, "" where there is none.

    Args:
        path: the file.

    Raises:
        LabelError: it is no file of cores.
    """
    if not path.exists():
        return ""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["made"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabelError(f"{path}: is no file of cores ({error})", "remove it to find them anew") from error
