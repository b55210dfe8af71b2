"""Outlines of nuclei, cut into cells of the slide, so that a page fetches what it shows."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from histossl.errors import FileFormatError
from histossl.geometry import Size

ENDINGS = (".parquet", ".geojson", ".geojson.gz")  # the fastest to read first
_A_CELL = 400  # nuclei, about
_SIDES = (256, 4096)  # level-0 pixels of a cell
_QUARTERS = 4  # steps of a level-0 pixel in which outlines are sent
_OURS = '{"type":"FeatureCollection","features":['  # the first line of what `write_geojson` writes, a feature a line
_LINES = 20_000  # parsed at once
_DENSITY = (0, 160, 80)  # colour of the picture of where nuclei are


@dataclass(frozen=True)
class Outlines:
    """The nuclei of a slide.

    Attributes:
        points: (P, 2) float32, one outline after another, (x, y) in level-0 pixels.
        start: (N + 1,) int64, outline n is `points[start[n] : start[n + 1]]`.
        side: level-0 pixels of a cell.
        columns: cells in a row.
        cell: (N,) int64, ascending, the cell in which the middle of an outline lies: row * columns + column.
        middles: (N, 2) float32.
        size: of the slide.
    """

    points: NDArray[np.float32]
    start: NDArray[np.int64]
    side: int
    columns: int
    cell: NDArray[np.int64]
    middles: NDArray[np.float32]
    size: Size

    def __len__(self) -> int:
        return len(self.start) - 1

    @property
    def nbytes(self) -> int:
        """Of its arrays."""
        return self.points.nbytes + self.start.nbytes + self.cell.nbytes + self.middles.nbytes

    def about(self) -> dict[str, Any]:
        """What a page needs to know before it asks for cells: those that hold nuclei are named."""
        cells, counts = np.unique(self.cell, return_counts=True)
        return {
            "count": len(self),
            "side": self.side,
            "columns": self.columns,
            "cells": dict(zip(map(str, cells.tolist()), counts.tolist(), strict=True)),
        }

    def packed(self, cell: int) -> bytes:
        """The outlines of a cell: uint32 n; n x uint16 points of each; int16 x, y from the cell's corner.

        Places are in quarters of a level-0 pixel; all little-endian.
        """
        first, last = np.searchsorted(self.cell, [cell, cell + 1])
        counts = np.diff(self.start[first : last + 1])
        corner = np.array([cell % self.columns, cell // self.columns]) * self.side
        steps = (self.points[self.start[first] : self.start[last]] - corner) * _QUARTERS
        steps = np.clip(np.rint(steps), -(2**15), 2**15 - 1).astype("<i2")
        return np.uint32(last - first).astype("<u4").tobytes() + counts.astype("<u2").tobytes() + steps.tobytes()

    def density(self) -> bytes:
        """A PNG over the whole slide: the more nuclei, the less transparent."""
        longest = int(np.clip(2 * len(self) ** 0.5, 64, 1024))
        scale = longest / max(self.size.width, self.size.height)
        shape = max(1, round(self.size.height * scale)), max(1, round(self.size.width * scale))
        limits = ((0, self.size.height), (0, self.size.width))
        counts = np.histogram2d(self.middles[:, 1], self.middles[:, 0], bins=shape, range=limits)[0]
        smooth = ndimage.gaussian_filter(counts, 1.0)
        high = np.percentile(smooth[smooth > 0], 99) if len(self) else 1.0
        picture = np.empty((*shape, 4), np.uint8)
        picture[..., :3] = _DENSITY
        picture[..., 3] = np.clip(smooth / high, 0, 1) ** 0.7 * 200
        buffer = io.BytesIO()
        Image.fromarray(picture, "RGBA").save(buffer, "PNG")
        return buffer.getvalue()


def find_outlines(folder: Path, slide_id: str) -> Path | None:
    """The file of a slide's nuclei in a folder, by its name; None where there is none."""
    for ending in ENDINGS:
        path = folder / f"{slide_id}{ending}"
        if path.is_file():
            return path
    return None


def read_outlines(path: Path, size: Size) -> Outlines:
    """The nuclei in a GeoJSON or GeoParquet file, of ours or of QuPath's.

    Raises:
        FileFormatError: it is damaged, or holds something else.
    """
    try:
        points, counts = _parquet(path) if path.suffix == ".parquet" else _geojson(path)
    except (OSError, ValueError, EOFError) as error:
        raise FileFormatError(f"{path.name}: no nuclei can be read ({error})", "write it anew") from error
    long = counts < 2**16  # no nucleus has more
    points, counts = points[np.repeat(long, counts)], counts[long]
    return _cut(points.astype(np.float32), counts, size)


def _cut(points: NDArray[np.float32], counts: NDArray[np.int64], size: Size) -> Outlines:
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    sums = np.add.reduceat(points.astype(np.float64), start[:-1]) if len(counts) else np.empty((0, 2))
    middles = np.clip(sums / counts[:, None], 0, [size.width - 1, size.height - 1]).astype(np.float32)
    wanted = (size.width * size.height * _A_CELL / max(1, len(counts))) ** 0.5
    side = 2 ** int(np.round(np.log2(np.clip(wanted, *_SIDES))))
    columns = -(-size.width // side)
    column, row = (middles // side).astype(np.int64).T
    cell = row * columns + column
    order = np.argsort(cell, kind="stable")
    owner = np.repeat(np.arange(len(counts)), counts)
    rank = np.empty(len(counts), np.int64)
    rank[order] = np.arange(len(counts))
    points = points[np.argsort(rank[owner], kind="stable")]
    start = np.concatenate([[0], np.cumsum(counts[order])]).astype(np.int64)
    return Outlines(points, start, side, columns, cell[order], middles[order], size)


def _parquet(path: Path) -> tuple[NDArray, NDArray[np.int64]]:
    import shapely

    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise FileFormatError(f"{path.name} needs pyarrow", "pip install 'histossl[nuclei]'") from error
    shapes = shapely.from_wkb(pq.read_table(path, columns=["geometry"])["geometry"].to_numpy())
    rings = shapely.get_exterior_ring(shapes)
    rings = rings[shapely.get_num_points(rings) > 0]
    return shapely.get_coordinates(rings), shapely.get_num_points(rings).astype(np.int64)


def _geojson(path: Path) -> tuple[NDArray, NDArray[np.int64]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        if file.readline().strip() == _OURS:
            found = list(_by_lines(file))
            points = np.concatenate([points for points, _ in found]) if found else np.empty((0, 2))
            counts = np.concatenate([counts for _, counts in found]) if found else np.empty(0, np.int64)
            return points, counts
    from histossl.nuclei.export import read_geojson

    nuclei = read_geojson(path)
    return nuclei.points, np.diff(nuclei.start)


def _by_lines(file: IO[str]) -> Iterator[tuple[NDArray, NDArray[np.int64]]]:
    """Points and counts of many features at once: a JSON parser would take ten times as long."""
    rings: list[str] = []
    for line in file:
        _, found, rest = line.partition('"coordinates":[[[')
        if found:
            rings.append(rest[: rest.index("]]")])
        if len(rings) == _LINES:
            yield _rings(rings)
            rings = []
    if rings:
        yield _rings(rings)


def _rings(rings: list[str]) -> tuple[NDArray, NDArray[np.int64]]:
    counts = np.array([ring.count("],[") + 1 for ring in rings], np.int64)
    numbers = ",".join(rings).replace("[", "").replace("]", "").split(",")
    return np.array(numbers, np.float32).reshape(-1, 2), counts
