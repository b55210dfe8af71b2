"""Outlines of nuclei, cut into cells of the slide, so that a page fetches what it shows."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from histossl.core.errors import FileFormatError
from histossl.wsi.geometry import Size

ENDINGS = (".parquet", ".geojson", ".geojson.gz")  # the fastest to read first
_A_CELL = 400  # nuclei, about
_SIDES = (256, 4096)  # level-0 pixels of a cell
_QUARTERS = 4  # steps of a level-0 pixel in which outlines are sent
_OURS, _LAST = b'{"type":"FeatureCollection","features":[', b"]}"  # of what `write_geojson` writes, a feature a line
_BLOCK = 2**24  # bytes parsed at once
_FEWEST, _UNPACKED = 2**26, 40  # bytes of a gzipped GeoJSON: outlines unpack to some six times its size
_LONGEST = 2**28  # bytes of a GeoJSON of others, of which a parser takes ten times as many
_BEFORE = np.frombuffer(b'"coordinates":[[[', np.uint8)
_COMMA, _OPEN, _CLOSE, _MINUS, _POINT, _ZERO = b",[]-.0"
_SHORTEST_POINT = len("[1,2]")
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
        """What a page needs to know before it asks for cells: those that hold nuclei, and how far these stick out."""
        cells, counts = np.unique(self.cell, return_counts=True)
        return {
            "count": len(self),
            "side": self.side,
            "columns": self.columns,
            "reach": self._reach(),
            "cells": dict(zip(map(str, cells.tolist()), counts.tolist(), strict=True)),
        }

    def _reach(self) -> float:
        """Level-0 pixels by which an outline leaves its cell at most; a cell's side at most."""
        if not len(self):
            return 0.0
        corner = np.column_stack([self.cell % self.columns, self.cell // self.columns]) * self.side
        low = corner - np.minimum.reduceat(self.points, self.start[:-1])
        high = np.maximum.reduceat(self.points, self.start[:-1]) - (corner + self.side)
        return float(np.clip(max(low.max(), high.max()), 0, self.side))

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
    except (OSError, ValueError, EOFError, zlib.error, MemoryError) as error:
        raise FileFormatError(f"{path.name}: no nuclei can be read ({error})", "write it anew") from error
    long = counts < 2**16  # no nucleus has more
    points, counts = points[np.repeat(long, counts)], counts[long]
    return _cut(points.astype(np.float32), counts, size)


def _cut(points: NDArray[np.float32], counts: NDArray[np.int64], size: Size) -> Outlines:
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    sums = np.add.reduceat(points, start[:-1], dtype=np.float64) if len(counts) else np.empty((0, 2))
    middles = np.clip(sums / counts[:, None], 0, [size.width - 1, size.height - 1]).astype(np.float32)
    wanted = (size.width * size.height * _A_CELL / max(1, len(counts))) ** 0.5
    side = 2 ** int(np.round(np.log2(np.clip(wanted, *_SIDES))))
    columns = -(-size.width // side)
    column, row = (middles // side).astype(np.int64).T
    cell = row * columns + column
    order = np.argsort(cell, kind="stable")
    before = np.concatenate([[0], np.cumsum(counts[order])]).astype(np.int64)
    points = points[np.repeat(start[:-1][order] - before[:-1], counts[order]) + np.arange(len(points))]
    return Outlines(points, before, side, columns, cell[order], middles[order], size)


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
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as opened:
        file = _Capped(opened, _FEWEST + _UNPACKED * path.stat().st_size)
        if file.readline(len(_OURS) + 2).strip() == _OURS:
            found = [_rings(np.frombuffer(block, np.uint8)) for block in _blocks(file)]
            points = np.concatenate([points for points, _ in found]) if found else np.empty((0, 2), np.float32)
            counts = np.concatenate([counts for _, counts in found]) if found else np.empty(0, np.int64)
            return points, counts
    _check_length(path)
    from histossl.nuclei.export import read_geojson

    nuclei = read_geojson(path)
    return nuclei.points, np.diff(nuclei.start)


class _Capped:
    """A file that is read up to a number of bytes.

    Raises:
        ValueError: it has more.
    """

    def __init__(self, file: IO[bytes] | gzip.GzipFile, most: int) -> None:
        self._file, self._left = file, most

    def read(self, size: int) -> bytes:
        return self._counted(self._file.read(size))

    def readline(self, size: int) -> bytes:
        return self._counted(self._file.readline(size))

    def _counted(self, block: bytes) -> bytes:
        self._left -= len(block)
        if self._left < 0:
            raise ValueError("it unpacks to far more than outlines do")
        return block


def _check_length(path: Path) -> None:
    """Refuse a GeoJSON of others that is too long to be read as a whole."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as opened:
        file, length = _Capped(opened, _FEWEST + _UNPACKED * path.stat().st_size), 0
        while block := file.read(_BLOCK):
            length += len(block)
            if length > _LONGEST:
                raise ValueError(f"it is longer than {_LONGEST // 2**20} MiB; let histossl write it, or as .parquet")


def _blocks(file: _Capped) -> Iterator[bytes]:
    """Whole lines, many at once.

    Raises:
        ValueError: the file ends before its end.
    """
    rest = last = b""
    while block := file.read(_BLOCK):
        lines, _, rest = (rest + block).rpartition(b"\n")
        if lines:
            yield lines
            last = lines[-len(_LAST) :]
    if rest or last != _LAST:
        raise ValueError("it is cut short")


@njit(cache=True, nogil=True)
def _rings(text: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Points and counts of the outer rings in lines of ours: a JSON parser would take thirty times as long."""
    points = np.empty((len(text) // _SHORTEST_POINT + 1, 2), np.float32)
    counts = np.empty(len(text) // len(_BEFORE) + 1, np.int64)
    point = ring = matched = at = 0
    while at < len(text):
        matched = matched + 1 if text[at] == _BEFORE[matched] else int(text[at] == _BEFORE[0])
        at += 1
        if matched < len(_BEFORE):
            continue
        first, matched, more = point, 0, True
        while more:
            at = _number(text, at, points, point, 0)
            at = _past(text, at, _COMMA)
            at = _number(text, at, points, point, 1)
            at = _past(text, at, _CLOSE)
            point += 1
            more = at < len(text) and text[at] == _COMMA
            if more:
                at = _past(text, at + 1, _OPEN)
        at = _past(text, at, _CLOSE)
        counts[ring] = point - first
        ring += 1
    return points[:point].copy(), counts[:ring].copy()


@njit(cache=True, nogil=True)
def _past(text: NDArray[np.uint8], at: int, sign: int) -> int:
    if at >= len(text) or text[at] != sign:
        raise ValueError("an outline is no list of points")
    return at + 1


@njit(cache=True, nogil=True)
def _number(text: NDArray[np.uint8], at: int, into: NDArray[np.float32], row: int, column: int) -> int:
    """Reads a decimal number and returns where it ends."""
    minus = at < len(text) and text[at] == _MINUS
    at += minus
    first, value, scale = at, 0.0, 1.0
    while at < len(text) and _ZERO <= text[at] < _ZERO + 10:
        value = 10 * value + (text[at] - _ZERO)
        at += 1
    if at == first:
        raise ValueError("an outline is no list of points")
    if at < len(text) and text[at] == _POINT:
        at += 1
        while at < len(text) and _ZERO <= text[at] < _ZERO + 10:
            value = 10 * value + (text[at] - _ZERO)
            scale *= 10
            at += 1
    into[row, column] = (-value if minus else value) / scale
    return at
