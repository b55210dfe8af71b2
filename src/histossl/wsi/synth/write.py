"""Synthetic slides as arrays and files: regions, pyramidal TIFFs, true nuclei as GeoJSON."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from histossl.core.atomic import whole
from histossl.core.console import Bar, progress_bar
from histossl.core.errors import SettingsError
from histossl.wsi.geometry import Region, Size
from histossl.wsi.synth.artefacts import with_artefacts
from histossl.wsi.synth.recipe import NUCLEI, SOFTWARE, SynthSettings, plan

if TYPE_CHECKING:
    import pandas as pd

    from histossl.wsi.synth.texture import World

_TILE = 512  # pixels, side of a tile of the TIFF
_CORNERS = 24  # of a polygon
_LONG_PX = 100_000_000  # slides of more pixels show their progress
_T = TypeVar("_T")
_R = TypeVar("_R")


def paint_region(settings: SynthSettings, region: Region) -> NDArray[np.uint8]:
    """Paint a region, with its artefacts; a pixel is the same in every region that contains it.

    Beyond the slide is glass.

    Args:
        settings: the slide.
        region: level-0 pixels, whole numbers.

    Returns:
        (height, width, 3) uint8 RGB.

    Raises:
        SettingsError: the region is not in whole pixels.
    """
    from histossl.wsi.synth import paint

    x, y, width, height = _whole_pixels(region)
    return with_artefacts(settings, x, y, width, height, partial(paint.paint, _world(settings)))


def nuclei_in(settings: SynthSettings, region: Region) -> tuple[NDArray[np.int32], pd.DataFrame]:
    """The true nuclei of a region.

    Args:
        settings: the slide.
        region: level-0 pixels, whole numbers.

    Returns:
        (height, width) int32 of ids that are unique on the slide, 0 = none, by pixel centres; and a table of the ids
        in it, ascending: id, x, y (centre of the whole nucleus, level-0 pixels), type (of `NUCLEI`).

    Raises:
        SettingsError: the region is not in whole pixels.
    """
    import pandas as pd

    from histossl.wsi.synth import paint, painted_nuclei

    x, y, width, height = _whole_pixels(region)
    labels = paint.label(_world(settings), x, y, height, width)
    unit_px = plan(settings).unit_um / settings.mpp
    rows = range(math.floor(y / unit_px) - 2, math.floor((y + height) / unit_px) + 3)
    parts = [_row(settings, i, x - 2 * unit_px, x + width + 2 * unit_px) for i in rows]
    table, ids = np.concatenate([t for t, _ in parts]), np.concatenate([n for _, n in parts])
    here = np.isin(ids, np.unique(labels))
    table, ids = table[here], ids[here]
    xy = table[:, [painted_nuclei.X, painted_nuclei.Y]] / settings.mpp
    kind = np.array(NUCLEI, dtype=object)[table[:, painted_nuclei.KIND].astype(int)]
    return labels, pd.DataFrame({"id": ids, "x": xy[:, 0], "y": xy[:, 1], "type": kind})


def _whole_pixels(region: Region) -> tuple[int, int, int, int]:
    values = region.x, region.y, region.width, region.height
    if any(v != int(v) for v in values):
        raise SettingsError(f"a painted region is in whole pixels, got {values}")
    x, y, width, height = (int(v) for v in values)
    return x, y, width, height


def _world(settings: SynthSettings) -> World:
    from histossl.wsi.synth.texture import World, textures

    p, mpp = plan(settings), settings.mpp
    fields = p.unit_um, p.units, p.kinds, p.depth, p.node_um, p.stain, p.habit
    return World(settings.seed, mpp, *fields, textures(mpp), p.cap)


def _row(settings: SynthSettings, i: int, x0: float, x1: float) -> tuple[NDArray, NDArray]:
    """Nuclei (n, columns) in µm and their ids (n,), of the units of row i between two level-0 x coordinates."""
    from histossl.wsi.synth.paint import COLUMNS, collect

    made = plan(settings)
    rows, columns = (n * made.units for n in made.kinds.shape)
    unit_px = made.unit_um / settings.mpp
    first, last = max(0, math.floor(x0 / unit_px)), min(columns, math.floor(x1 / unit_px) + 1)
    if not (0 <= i < rows and first < last):
        return np.empty((0, COLUMNS)), np.empty(0, np.int64)
    return collect(_world(settings), i, first, last)


# ---- files


class _Halves:
    """The tiles of a level at half size, in a temporary file: the next level is made of them."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.rows, self.columns = _tiles(size)
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - the caller closes it

    def put(self, k: int, pixels: NDArray[np.uint8]) -> None:
        """Store the 2 x 2 means of tile k, row-major; `pixels` is (512, 512, 3)."""
        quad = pixels.reshape(_TILE // 2, 2, _TILE // 2, 2, 3).astype(np.uint16)
        half = (quad[:, 0, :, 0] + quad[:, 0, :, 1] + quad[:, 1, :, 0] + quad[:, 1, :, 1] + 2) >> 2
        os.pwrite(self.file.fileno(), half.astype(np.uint8).tobytes(), k * half.size)

    def tile(self, i: int, j: int) -> NDArray[np.uint8]:
        """Tile (i, j) of the next level, (512, 512, 3)."""
        half = _TILE // 2
        out = np.full((2, half, 2, half, 3), 255, np.uint8)
        for di in range(min(2, self.rows - 2 * i)):
            for dj in range(min(2, self.columns - 2 * j)):
                k = (2 * i + di) * self.columns + 2 * j + dj
                data = os.pread(self.file.fileno(), half * half * 3, k * half * half * 3)
                out[di, :, dj] = np.frombuffer(data, np.uint8).reshape(half, half, 3)
        return out.reshape(_TILE, _TILE, 3)


def write_slide(path: str | Path, settings: SynthSettings) -> None:
    """Write a slide as a pyramidal tiled TIFF with mpp, each level half the size of the one before.

    It paints on all cores, in constant memory. While it writes it needs a third of the raw pixels as free disk space.

    Args:
        path: the file, `.tiff`; whole or absent.
        settings: the slide.

    Raises:
        OSError: the folder is not writable, or the disk is full.
    """
    import tifffile

    sizes = [Size(settings.width, settings.height)]
    while max(sizes[-1].shape) > _TILE:
        sizes.append(Size(max(1, sizes[-1].width // 2), max(1, sizes[-1].height // 2)))
    tiles = sum(math.prod(_tiles(size)) for size in sizes)
    jpeg = {"photometric": "ycbcr", "compression": "jpeg", "subsampling": (2, 2)}
    form: dict[str, Any] = jpeg if settings.quality else {"photometric": "rgb", "compression": "deflate"}
    with (
        whole(Path(path)) as part,
        progress_bar(f"painting {Path(path).name}", tiles, shown=settings.width * settings.height > _LONG_PX) as bar,
        ExitStack() as opened,
        tifffile.TiffWriter(part, bigtiff=True) as tiff,
    ):
        draw = partial(_painted, settings)
        for level, size in enumerate(sizes):
            halves = _Halves(part.parent, size)
            opened.enter_context(halves.file)
            tiff.write(
                _encoded(draw, size, halves, settings.quality, bar),
                shape=(*size.shape, 3),
                dtype=np.uint8,
                tile=(_TILE, _TILE),
                resolution=(1e4 / (settings.mpp * 2**level),) * 2,
                resolutionunit="CENTIMETER",
                subfiletype=1 if level else 0,
                software=SOFTWARE,
                metadata=None,
                **form,
            )
            draw = halves.tile


def _tiles(size: Size) -> tuple[int, int]:
    return math.ceil(size.height / _TILE), math.ceil(size.width / _TILE)


def _painted(settings: SynthSettings, i: int, j: int) -> NDArray[np.uint8]:
    return paint_region(settings, Region(j * _TILE, i * _TILE, _TILE, _TILE))


def _encoded(
    draw: Callable[[int, int], NDArray[np.uint8]],
    size: Size,
    halves: _Halves,
    quality: int,
    bar: Bar,
) -> Iterator[bytes]:
    """The encoded tiles of a level, row-major; stores them at half size for the next level."""
    import imagecodecs

    rows, columns = _tiles(size)

    def encode(k: int) -> bytes:
        pixels = draw(*divmod(k, columns))
        halves.put(k, pixels)
        if not quality:
            return bytes(imagecodecs.zlib_encode(pixels.tobytes(), 4))
        colours: dict[str, Any] = {"colorspace": "rgb", "outcolorspace": "ycbcr", "subsampling": "420"}
        return bytes(imagecodecs.jpeg8_encode(pixels, level=quality, **colours))

    for data in _in_order(encode, range(rows * columns)):
        bar.advance(1)
        yield data


def _in_order(function: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """`function` of each item, on all cores and in order; at most two results per core wait in memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_truth(path: str | Path, settings: SynthSettings) -> int:
    """Write every nucleus of a slide as GeoJSON, row by row: detections for QuPath, in level-0 pixels.

    Args:
        path: the file, `.geojson`; whole or absent.
        settings: the slide.

    Returns:
        The number of nuclei. A feature's `properties.id` is the id that `nuclei_in` gives.

    Raises:
        OSError: the folder is not writable, or the disk is full.
    """
    from histossl.wsi.synth.painted_nuclei import KIND

    made = plan(settings)
    count = 0
    with whole(Path(path)) as part, part.open("w", encoding="utf-8") as out:
        out.write('{"type": "FeatureCollection", "features": [')
        for i in range(made.kinds.shape[0] * made.units):
            nuclei, ids = _row(settings, i, 0, settings.width)
            for n, name, ring in zip(
                nuclei[:, KIND].astype(int), ids.tolist(), _rings(nuclei, settings.mpp), strict=True
            ):
                out.write(",\n" if count else "\n")
                out.write(_feature(name, NUCLEI[n], ring))
                count += 1
        out.write("\n]}\n")
    return count


def _rings(nuclei: NDArray, mpp: float) -> list[list[list[float]]]:
    """Closed outlines in level-0 pixels, rounded to a tenth."""
    from histossl.wsi.synth.painted_nuclei import C2, C3, COS, SIN, A, B, X, Y

    t = np.linspace(0, 2 * np.pi, _CORNERS + 1)
    column = {k: nuclei[:, k, None] for k in (A, B, C2, C3, COS, SIN, X, Y)}
    wave = 1 + column[C2] * np.cos(2 * t) + column[C3] * np.cos(3 * t)
    u, v = column[A] * wave * np.cos(t), column[B] * wave * np.sin(t)
    x = column[X] + u * column[COS] - v * column[SIN]
    y = column[Y] + u * column[SIN] + v * column[COS]
    ring = np.round(np.stack([x, y], axis=2) / mpp, 1)
    ring[:, -1] = ring[:, 0]
    return ring.tolist()


def _feature(name: int, kind: str, ring: list[list[float]]) -> str:
    return json.dumps(
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"id": name, "objectType": "detection", "classification": {"name": kind}},
        }
    )
