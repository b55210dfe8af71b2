"""Outlines of nuclei, divided into square cells of the slide, so that a page fetches only what it shows."""

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
_PER_CELL = 400  # nuclei in a cell, about
_SIDES = (256, 4096)  # smallest and largest side of a cell in level-0 pixels
_QUARTERS = 4  # steps per level-0 pixel in which outlines are sent
# First and last line of a file that `write_geojson` wrote, which has one feature per line.
_OURS, _LAST = b'{"type":"FeatureCollection","features":[', b"]}"
_BLOCK = 2**24  # bytes parsed at once
_FEWEST, _UNPACKED = 2**26, 40  # bytes of a gzipped GeoJSON: outlines unpack to some six times its size
_LONGEST = 2**28  # bytes of a GeoJSON of others, of which a parser takes ten times as many
_BEFORE = np.frombuffer(b'"coordinates":[[[', np.uint8)
_COMMA, _OPEN, _CLOSE, _MINUS, _POINT, _ZERO = b",[]-.0"
_SHORTEST_POINT = len("[1,2]")
_DENSITY = (0, 160, 80)  # RGB of the density picture


@dataclass(frozen=True)
class Outlines:
    """The nuclei of a slide.

    Attributes:
        points: (P, 2) float32, one outline after another, (x, y) in level-0 pixels.
        start: (N + 1,) int64, outline n is `points[start[n] : start[n + 1]]`.
        side: side of a cell in level-0 pixels.
        columns: number of cells in a row.
        cell: (N,) int64, ascending, the cell that holds the middle of an outline: row * columns + column.
        middles: (N, 2) float32, the mean of each outline's points, (x, y) in level-0 pixels.
        size: size of the slide in level-0 pixels.
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
        """Bytes that its arrays take."""
        return self.points.nbytes + self.start.nbytes + self.cell.nbytes + self.middles.nbytes

    def about(self) -> dict[str, Any]:
        """What a page needs before it requests cells: number of nuclei, grid of cells, nuclei per cell, and reach."""
        cells, counts = np.unique(self.cell, return_counts=True)
        return {
            "count": len(self),
            "side": self.side,
            "columns": self.columns,
            "reach": self._reach(),
            "cells": dict(zip(map(str, cells.tolist()), counts.tolist(), strict=True)),
        }

    def _reach(self) -> float:
        """The most level-0 pixels by which an outline extends beyond its cell; at most the side of a cell."""
        if not len(self):
            return 0.0
        corner = np.column_stack([self.cell % self.columns, self.cell // self.columns]) * self.side
        low = corner - np.minimum.reduceat(self.points, self.start[:-1])
        high = np.maximum.reduceat(self.points, self.start[:-1]) - (corner + self.side)
        return float(np.clip(max(low.max(), high.max()), 0, self.side))

    def packed(self, cell: int) -> bytes:
        """The outlines of one cell, packed for the page.

        Args:
            cell: number of the cell, row * columns + column.

        Returns:
            Little-endian: uint32 n, the number of outlines; n uint16, the number of points of each; then int16 x, y of
            all points from the cell's top-left corner, in quarters of a level-0 pixel.
        """
        first, last = np.searchsorted(self.cell, [cell, cell + 1])
        counts = np.diff(self.start[first : last + 1])
        corner = np.array([cell % self.columns, cell // self.columns]) * self.side
        steps = (self.points[self.start[first] : self.start[last]] - corner) * _QUARTERS
        steps = np.clip(np.rint(steps), -(2**15), 2**15 - 1).astype("<i2")
        return np.uint32(last - first).astype("<u4").tobytes() + counts.astype("<u2").tobytes() + steps.tobytes()

    def density(self) -> bytes:
        """The density of nuclei as a PNG of the whole slide: the more nuclei, the more opaque."""
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
    """The file of a slide's nuclei.

    Args:
        folder: the folder of the nuclei.
        slide_id: name of the slide, and of the file without its ending.

    Returns:
        The file, of the first of ENDINGS that exists; None where there is none.
    """
    for ending in ENDINGS:
        path = folder / f"{slide_id}{ending}"
        if path.is_file():
            return path
    return None


def read_outlines(path: Path, size: Size) -> Outlines:
    """The nuclei in a GeoJSON or GeoParquet file that histossl or QuPath wrote.

    Args:
        path: the file, of one of ENDINGS.
        size: size of the slide in level-0 pixels.

    Returns:
        The nuclei, divided into cells.

    Raises:
        FileFormatError: the file is damaged, holds something else, or needs pyarrow, which is not installed.
    """
    try:
        points, counts = _parquet(path) if path.suffix == ".parquet" else _geojson(path)
    except (OSError, ValueError, EOFError, zlib.error, MemoryError) as error:
        raise FileFormatError(f"{path.name}: no nuclei can be read ({error})", "write it again") from error
    kept = counts < 2**16  # `packed` counts points in uint16; no nucleus has more
    points, counts = points[np.repeat(kept, counts)], counts[kept]
    return _cut(points.astype(np.float32), counts, size)


def _cut(points: NDArray[np.float32], counts: NDArray[np.int64], size: Size) -> Outlines:
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    sums = np.add.reduceat(points, start[:-1], dtype=np.float64) if len(counts) else np.empty((0, 2))
    middles = np.clip(sums / counts[:, None], 0, [size.width - 1, size.height - 1]).astype(np.float32)
    wanted = (size.width * size.height * _PER_CELL / max(1, len(counts))) ** 0.5
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
    from histossl.nuclei.geojson import read_outlined

    nuclei = read_outlined(path).nuclei()
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
    with path.open("rb") as head:
        packed = head.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb") as opened:
        file, length = _Capped(opened, _FEWEST + _UNPACKED * path.stat().st_size), 0
        while block := file.read(_BLOCK):
            length += len(block)
            if length > _LONGEST:
                raise ValueError(f"it is longer than {_LONGEST // 2**20} MiB; let histossl write it, or as .parquet")


def _blocks(file: _Capped) -> Iterator[bytes]:
    """Blocks of whole lines.

    Raises:
        ValueError: the file is truncated.
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
    """Points and counts of the outer rings in lines of `write_geojson`; a JSON parser takes thirty times as long."""
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
