"""Nuclei to files that other tools open: GeoJSON (QuPath), GeoParquet, label images, OME-Zarr labels, an overlay."""

from __future__ import annotations

import gzip
import json
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from histossl.core.atomic import whole, whole_buffer, whole_folder
from histossl.core.errors import SettingsError
from histossl.core.hdf5 import write_h5ad
from histossl.nuclei.instances import MEASURES, Nuclei
from histossl.wsi.geometry import Region, Size
from histossl.wsi.slide import Slide

_TOLERANCE = 0.1  # µm that an outline may move when points are dropped
_BAND = 1024  # rows of a label image that are in memory at once
_TILE = 256  # side of the tiles of a label TIFF

# As QuPath calls them where it measures detections (shape features, and intensity features by channel).
_TITLES = {
    "area_um2": "Area µm^2",
    "perimeter_um": "Length µm",
    "circularity": "Circularity",
    "solidity": "Solidity",
    "max_diameter_um": "Max diameter µm",
    "min_diameter_um": "Min diameter µm",
    "eccentricity": "Eccentricity",
    "hematoxylin_od": "Hematoxylin: Mean",
    "hematoxylin_std": "Hematoxylin: Std.Dev.",
    "hematoxylin_min": "Hematoxylin: Min",
    "hematoxylin_max": "Hematoxylin: Max",
    "eosin_od": "Eosin: Mean",
    "eosin_std": "Eosin: Std.Dev.",
    "eosin_min": "Eosin: Min",
    "eosin_max": "Eosin: Max",
    "confidence": "Confidence",
}


def spare_outlines(nuclei: Nuclei, mpp: float) -> NDArray:
    """Outlines with few points: simplified by at most 0.1 µm, counter-clockwise as RFC 7946 requires.

    Args:
        nuclei: the nuclei, in level-0 pixels.
        mpp: µm per level-0 pixel.

    Returns:
        (N,) valid shapely polygons in level-0 pixels.
    """
    shapes = nuclei.polygons()
    # With topology kept a simplified outline cannot cross itself.
    simple = shapely.simplify(shapes, _TOLERANCE / mpp, preserve_topology=True)
    broken = ~shapely.is_valid(simple)
    if broken.any():
        simple[broken] = [_largest(shapely.make_valid(shape)) for shape in shapes[broken]]
    return np.asarray(shapely.orient_polygons(simple))


def _largest(shape: Any) -> Any:
    parts = [part for part in shapely.get_parts(shape) if isinstance(part, shapely.Polygon)]
    return max(parts, key=lambda part: part.area)


def write_geojson(path: Path, parts: Iterable[Nuclei], mpp: float) -> int:
    """A FeatureCollection of QuPath detections in level-0 pixels, streamed; gzipped where the name ends in .gz.

    Args:
        path: the file.
        parts: the nuclei in level-0 pixels; only one part is in memory at a time.
        mpp: µm per level-0 pixel.

    Returns:
        How many nuclei were written; nucleus k has the id of the integer k, from 1, as in the label images.
    """
    count = 0
    with whole(path) as part_path, _text(part_path, path.suffix == ".gz") as file:
        file.write('{"type":"FeatureCollection","features":[')
        for part in parts:
            for feature in _features(part, mpp, count):
                file.write(",\n" if count else "\n")
                file.write(feature)
                count += 1
        file.write("\n]}\n")
    return count


@contextmanager
def _text(path: Path, zipped: bool) -> Iterator[IO[str]]:
    if not zipped:
        with path.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        return
    import io

    # No name and no time in the header: the same nuclei give the same bytes.
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
        io.TextIOWrapper(packed, "utf-8", newline="\n") as file,
    ):
        yield file


def _features(nuclei: Nuclei, mpp: float, before: int) -> Iterator[str]:
    columns = [(title, MEASURES.index(name)) for name, title in _TITLES.items()]
    for k, (shape, row) in enumerate(zip(spare_outlines(nuclei, mpp), nuclei.measures.tolist(), strict=True), 1):
        # x.25 in the repr of a float64 is short; float32's would not be.
        ring = np.round(shapely.get_coordinates(shape), 2).tolist()
        yield json.dumps(
            {
                "type": "Feature",
                "id": str(uuid.UUID(int=before + k)),
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {
                    "objectType": "detection",
                    "classification": {"name": "Nucleus", "color": [0, 160, 80]},
                    "measurements": {title: round(row[c], 4) for title, c in columns},
                },
            },
            ensure_ascii=False,
            allow_nan=False,
            separators=(",", ":"),
        )


def write_parquet(path: Path, parts: Iterable[Nuclei], mpp: float) -> None:
    """Write GeoParquet 1.1: one row per nucleus.

    The columns are `id`, the outline as WKB in level-0 pixels, and MEASURES.

    Args:
        path: the file to write, whole or absent.
        parts: the nuclei in portions; each portion becomes a row group.
        mpp: µm per pixel of level 0; it sets how finely outlines are written.

    Raises:
        SettingsError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise SettingsError("GeoParquet needs pyarrow", "pip install 'histossl[nuclei]'") from error
    geometry = {"encoding": "WKB", "geometry_types": ["Polygon"], "crs": None, "orientation": "counterclockwise"}
    meta = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": geometry}}
    names: list[tuple[str, Any]] = [("id", pa.int32()), ("geometry", pa.binary())]
    schema = pa.schema(names + [(name, pa.float32()) for name in MEASURES], {"geo": json.dumps(meta)})
    count = 0
    with whole(path) as part_path, pq.ParquetWriter(part_path, schema) as writer:
        for part in parts:
            ids = np.arange(count + 1, count + 1 + len(part), dtype=np.int32)
            count += len(part)
            arrays = [pa.array(ids), pa.array(shapely.to_wkb(spare_outlines(part, mpp)), pa.binary())]
            arrays += [pa.array(np.ascontiguousarray(column)) for column in part.measures.T]
            writer.write_table(pa.table(arrays, schema=schema))


def write_anndata(path: Path, nuclei: Nuclei, mpp: float, slide: str) -> None:
    """Write AnnData: X (N, measures) float32, obsm['spatial'] the centroids in level-0 pixels, obs['slide'].

    Args:
        path: the file.
        nuclei: in level-0 pixels.
        mpp: µm per level-0 pixel, in uns.
        slide: its name.
    """
    import anndata
    import pandas as pd

    names = [name for name in MEASURES if name not in ("x", "y")]
    ids = [str(k) for k in range(1, len(nuclei) + 1)]
    data = anndata.AnnData(
        np.ascontiguousarray(nuclei.measures[:, [MEASURES.index(name) for name in names]]),
        obs=pd.DataFrame({"slide": pd.Categorical([slide] * len(ids))}, index=pd.Index(ids)),
        var=pd.DataFrame({"title": [_TITLES[name] for name in names]}, index=pd.Index(names)),
        uns={"mpp": mpp},
    )
    data.obsm["spatial"] = nuclei.measures[:, :2].astype(np.float64)
    write_h5ad(path, data)


def label_bands(nuclei: Nuclei, size: Size, height: int = _BAND) -> Iterator[NDArray[np.int32]]:
    """Paint the label image of nuclei from top to bottom, in bands.

    A pixel belongs to the nucleus that contains its centre; where two do, to the later one.

    Args:
        nuclei: the nuclei, in pixels of the image.
        size: width and height of the image in pixels.
        height: rows of a band; the last band may have fewer.

    Yields:
        (height, W) int32; nucleus k has the value k, from 1.
    """
    from skimage.draw import polygon

    points = nuclei.points.astype(np.float64) - 0.5
    rows = np.repeat(np.arange(len(nuclei)), np.diff(nuclei.start))
    top, bottom = np.full(len(nuclei), np.inf), np.full(len(nuclei), -np.inf)
    np.minimum.at(top, rows, points[:, 1])
    np.maximum.at(bottom, rows, points[:, 1])
    for first in range(0, size.height, height):
        band = np.zeros((min(height, size.height - first), size.width), np.int32)
        for k in np.flatnonzero((bottom >= first) & (top < first + len(band))):
            outline = points[nuclei.start[k] : nuclei.start[k + 1]]
            band[polygon(outline[:, 1] - first, outline[:, 0], band.shape)] = k + 1
        yield band


def label_image(nuclei: Nuclei, size: Size) -> NDArray[np.int32]:
    """Paint the label image of all nuclei in memory.

    Args:
        nuclei: the nuclei, in level-0 pixels.
        size: width and height of the image in pixels.

    Returns:
        (H, W) int32, 0 = none, 1..n in the order of the nuclei.
    """
    return np.concatenate(list(label_bands(nuclei, size)))


def write_label_tiff(path: Path, nuclei: Nuclei, size: Size) -> None:
    """Write the label image as a compressed, tiled TIFF of int32, band by band.

    Args:
        path: the file to write, whole or absent.
        nuclei: the nuclei, in level-0 pixels.
        size: width and height of level 0 in pixels.
    """
    import tifffile

    with whole(path) as part:
        tifffile.imwrite(
            part,
            _tiles(label_bands(nuclei, size, _TILE)),
            shape=size.shape,
            dtype=np.int32,
            tile=(_TILE, _TILE),
            photometric="minisblack",
            compression="zlib",
            bigtiff=size.width * size.height * 4 > 2**31,
        )


def _tiles(bands: Iterable[NDArray[np.int32]]) -> Iterator[NDArray[np.int32]]:
    for band in bands:
        for left in range(0, band.shape[1], _TILE):
            tile = band[:, left : left + _TILE]
            yield np.pad(tile, ((0, _TILE - tile.shape[0]), (0, _TILE - tile.shape[1])))


def write_zarr(path: Path, nuclei: Nuclei, size: Size, mpp: float) -> None:
    """Write OME-Zarr 0.4 labels (`labels/nuclei`) at the size of level 0, chunk by chunk.

    Args:
        path: the folder to write, whole or absent.
        nuclei: the nuclei, in level-0 pixels.
        size: width and height of level 0 in pixels.
        mpp: µm per pixel of level 0, the scale of both axes.

    Raises:
        SettingsError: zarr is not installed.
    """
    try:
        import zarr
    except ImportError as error:
        raise SettingsError("OME-Zarr needs zarr", "pip install 'histossl[nuclei]'") from error
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
    scale = [{"type": "scale", "scale": [mpp, mpp]}]
    multiscale = {
        "version": "0.4",
        "name": "nuclei",
        "axes": axes,
        "datasets": [{"path": "0", "coordinateTransformations": scale}],
    }
    with whole_folder(path) as folder:
        root = zarr.open_group(folder, mode="w", zarr_format=2)
        labels = root.create_group("labels")
        labels.attrs["labels"] = ["nuclei"]
        group = labels.create_group("nuclei")
        group.attrs["multiscales"] = [multiscale]
        group.attrs["image-label"] = {"version": "0.4"}
        chunks = tuple(min(_BAND, side) for side in size.shape)
        array = group.create_array("0", shape=size.shape, chunks=chunks, dtype="int32")
        for k, band in enumerate(label_bands(nuclei, size)):
            array[k * _BAND : k * _BAND + len(band)] = band


def write_overlay(path: Path, slide: Slide, parts: Iterable[Nuclei], longest: int = 4096) -> None:
    """Write a JPEG of the slide with its nuclei: outlines on small slides, dots on large ones.

    Args:
        path: the file to write, whole or absent.
        slide: the slide.
        parts: the nuclei in portions, in level-0 pixels.
        longest: longer side of the thumbnail in pixels; small pictures with outlines are enlarged twofold.
    """
    picture = Image.fromarray(slide.thumbnail(longest))
    scale = picture.width / slide.size.width
    # Below two pixels an outline hides its nucleus.
    fine = slide.mpp / scale < 2.5
    large = picture.resize((picture.width * 2, picture.height * 2)) if fine and picture.width < 1200 else picture
    scale *= large.width / picture.width
    draw = ImageDraw.Draw(large)
    for part in parts:
        if fine:
            points = part.points.astype(np.float64) * scale
            for k in range(len(part)):
                ring = points[part.start[k] : part.start[k + 1]]
                draw.line([*map(tuple, ring.tolist()), tuple(ring[0])], fill=(255, 230, 0), width=1)
        else:
            draw.point((part.measures[:, :2].astype(np.float64) * scale).ravel().tolist(), fill=(0, 90, 40))
    with whole_buffer(path) as file:
        large.save(file, "JPEG", quality=90)


def extent(nuclei: Nuclei) -> Region:
    """The smallest region from the corner (0, 0) that holds all nuclei.

    Args:
        nuclei: the nuclei; may be empty.

    Returns:
        The region, in the unit of the outlines.
    """
    far = nuclei.points.max(0, initial=1)
    return Region(0, 0, float(np.ceil(far[0])), float(np.ceil(far[1])))
