"""Outlines of areas in files: QuPath's GeoJSON, GeoParquet, GeoPackage; read, checked against a slide, and painted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import LabelError, SlideError
from histossl.core.names import folded
from histossl.wsi.geojson import read_features

if TYPE_CHECKING:
    from histossl.wsi.slide import Slide

GEOJSON, TABLES = (".geojson", ".geojson.gz", ".json", ".json.gz"), (".parquet", ".geoparquet", ".gpkg")
_CLASS_COLUMNS = ("classification", "class", "area", "label", "name", "type")  # of tables, the preferred one first
_NO_AREAS = ("detection", "cell", "tile")  # objects of QuPath
_OUTSIDE = 0.1  # share of the areas that may lie outside of the slide: a hand draws over its edge


def read_outlines(path: Path) -> tuple[NDArray, list[str]]:
    """Read the polygons of a file of areas.

    A shape of several parts is read part by part, since parts may overlap; a ring that crosses itself is all of its
    own parts. QuPath's cells, detections and missing cores, points and lines are no areas.

    Args:
        path: a GeoJSON, gzipped or not; a GeoParquet or a GeoPackage.

    Returns:
        (n,) shapely polygons as they are written, and the class of each, "" for none.

    Raises:
        LabelError: the file cannot be read as such, or holds no area.
    """
    import shapely

    shapes: list[Any] = []
    classes: list[str] = []
    table = path.name.lower().endswith(TABLES)
    try:
        for shape, kind in _of_table(path) if table else _of_geojson(path):
            parts = shapely.get_parts(shapely.get_parts(shapely.make_valid(shapely.get_parts(shape))))
            parts = parts[(shapely.get_type_id(parts) == shapely.GeometryType.POLYGON) & ~shapely.is_empty(parts)]
            shapes += parts.tolist()
            classes += [kind] * len(parts)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, shapely.errors.ShapelyError) as error:
        what = "GeoParquet or GeoPackage" if table else "GeoJSON"
        raise LabelError(f"{path.name}: is no {what} of areas ({error})", "export it anew") from error
    if not shapes:
        raise LabelError(f"{path.name}: holds no area", "draw annotations (no points, no cells) and export")
    polygons = np.empty(len(shapes), object)
    polygons[:] = shapes
    return polygons, classes


def _of_geojson(path: Path) -> Iterable[tuple[Any, str]]:
    import shapely

    for feature in read_features(path):
        about = feature.get("properties") or {}
        kind = str(about.get("objectType") or about.get("object_type") or "").lower()
        if kind not in _NO_AREAS and not about.get("isMissing") and feature.get("geometry"):
            yield shapely.geometry.shape(feature["geometry"]), _class_of(about)


def _class_of(about: dict[str, Any]) -> str:
    """The class of an annotation, else its name."""
    found = about.get("classification") or about.get("name") or ""
    if isinstance(found, dict):
        found = found.get("name") or found.get("names") or ""
    return ": ".join(map(str, found)) if isinstance(found, list) else str(found)


def _of_table(path: Path) -> Iterable[tuple[Any, str]]:
    """The shapes of a GeoParquet or GeoPackage as geopandas writes them, and their classes."""
    import shapely

    read = _geopackage if path.name.lower().endswith(".gpkg") else _geoparquet
    for blob, about in read(path):
        if blob is None:
            continue
        named = {name.lower(): value for name, value in about.items()}
        kinds = (named[name] for name in _CLASS_COLUMNS if named.get(name) not in (None, ""))
        kind = next(kinds, "")
        yield shapely.from_wkb(blob), _class_of({"classification": kind if isinstance(kind, dict) else str(kind)})


def _geoparquet(path: Path) -> Iterable[tuple[bytes | None, dict[str, Any]]]:
    import json

    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError as error:
        raise LabelError(f"{path.name}: GeoParquet needs pyarrow", "pip install 'histossl[nuclei]'") from error
    try:
        table = pq.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise LabelError(f"{path.name}: is no GeoParquet of areas ({error})", "export it anew") from error
    about = json.loads((table.schema.metadata or {}).get(b"geo", b"{}"))
    column = about.get("primary_column", "geometry")
    if column not in table.column_names:
        raise LabelError(f"{path.name}: has no column of geometries", "write it with geopandas' to_parquet")
    encoding = about.get("columns", {}).get(column, {}).get("encoding", "WKB")
    if str(encoding).upper() != "WKB":
        what = f"{path.name}: its geometries are written as {encoding}"
        raise LabelError(what, "write them as WKB, which is geopandas' default")
    for row in table.to_pylist():
        yield row.pop(column), row


def _geopackage(path: Path) -> Iterable[tuple[bytes | None, dict[str, Any]]]:
    """Rows of all layers; a GeoPackage is an SQLite file whose shapes are WKB behind a short header."""
    import sqlite3
    from contextlib import closing

    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as file:
            layers = file.execute("SELECT table_name, column_name FROM gpkg_geometry_columns").fetchall()
            for layer, column in layers:
                quoted = layer.replace('"', '""')
                found = file.execute(f'SELECT * FROM "{quoted}"')
                names = [about[0] for about in found.description]
                for values in found:
                    row = dict(zip(names, values, strict=True))
                    yield _unwrapped(row.pop(column)), row
    except sqlite3.Error as error:
        raise LabelError(f"{path.name}: is no GeoPackage of areas ({error})", "export it anew") from error


def _unwrapped(blob: bytes | None) -> bytes | None:
    """The WKB in a shape of a GeoPackage: `GP`, a version, flags, a reference system, an envelope, then the WKB."""
    if blob is None:
        return None
    if blob[:2] != b"GP":
        raise ValueError("a shape is not written as a GeoPackage's")
    envelope = (0, 32, 48, 48, 64)[blob[3] >> 1 & 7]
    return blob[8 + envelope :]


def paint_outlines(
    path: Path, slide: Slide, include: Sequence[str], exclude: Sequence[str], tissue: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_], set[str]]:
    """Paint the areas of a file, after checking that they are of the slide.

    Args:
        path: as of `read_outlines`.
        slide: the slide.
        include: classes that count; none for all that are not excluded.
        exclude: classes that are cut out.
        tissue: (h, w), covers the slide exactly.

    Returns:
        (h, w) the pixels of the areas that count, None where the file has none; those that are cut out; all classes.

    Raises:
        SlideError: the file cannot be read, or its areas are not of this slide; names the file.
    """
    try:
        shapes, classes = read_outlines(path)
    except LabelError as error:
        raise SlideError(slide.path, error.what, error.hint) from error
    names = np.array([folded(name) for name in classes])
    out = np.isin(names, [folded(name) for name in exclude])
    chosen = np.isin(names, [folded(name) for name in include]) & ~out if include else ~out
    _check_place(path, slide, shapes)
    scale = np.array([tissue.shape[1] / slide.size.width, tissue.shape[0] / slide.size.height])
    cut = _painted(shapes[out], scale, tissue.shape)
    if not chosen.any():
        return None, cut, set(classes)
    inside = _painted(shapes[chosen], scale, tissue.shape)
    _check_unit(path, slide, inside, shapes[chosen], tissue)
    return inside, cut, set(classes)


def _check_place(path: Path, slide: Slide, shapes: NDArray) -> None:
    """Refuse areas that lie outside of the slide: they are of another slide, or in another unit."""
    import shapely

    x, y = shapely.total_bounds(shapes)[2:]
    width, height = slide.size.width, slide.size.height
    hint = "export them from this slide, in pixels of its level 0"
    if max(x, y) <= 1.5 < min(width, height) / 10:
        raise SlideError(slide.path, f"{path.name}: all coordinates lie within the first pixel", hint)
    inside = shapely.area(shapely.clip_by_rect(shapes, 0, 0, width, height)).sum()
    total = shapely.area(shapes).sum()
    if not inside >= (1 - _OUTSIDE) * total > 0:
        what = (
            f"{path.name}: {1 - inside / max(total, 1e-9):.0%} of its areas lie outside of the slide of {width} x "
            f"{height} pixels (they reach to x = {x:.0f}, y = {y:.0f})"
        )
        raise SlideError(slide.path, what, hint)


def _check_unit(
    path: Path, slide: Slide, inside: NDArray[np.bool_], shapes: NDArray, tissue: NDArray[np.bool_]
) -> None:
    """Refuse areas in µm: as pixels they lie on glass, and as µm on tissue."""
    import shapely

    share = (tissue & inside).sum() / max(1, inside.sum())
    x, y = shapely.total_bounds(shapes)[2:] / slide.mpp
    if share > 0.1 or x > slide.size.width * 1.02 or y > slide.size.height * 1.02:
        return
    scale = np.array([tissue.shape[1] / slide.size.width, tissue.shape[0] / slide.size.height]) / slide.mpp
    other = _painted(shapes, scale, tissue.shape)
    if (tissue & other).sum() > 0.5 * other.sum():
        what = f"{path.name}: its coordinates seem to be in µm: as such they lie on tissue, as pixels on glass"
        raise SlideError(slide.path, what, "export them in pixels of level 0")


def _painted(shapes: NDArray, scale: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The pixels whose centres lie in any of the polygons."""
    from skimage.draw import polygon

    inside = np.zeros(shape, bool)
    for area in shapes:
        ring = np.asarray(area.exterior.coords)[:, :2] * scale - 0.5
        if not area.interiors:
            inside[polygon(ring[:, 1], ring[:, 0], shape)] = True
            continue
        low = np.clip(np.floor(ring.min(0)).astype(int), 0, None)
        high = np.clip(np.ceil(ring.max(0)).astype(int) + 1, low, shape[::-1])
        part = np.zeros((high - low)[::-1], bool)
        part[polygon(ring[:, 1] - low[1], ring[:, 0] - low[0], part.shape)] = True
        for hole in area.interiors:
            ring = np.asarray(hole.coords)[:, :2] * scale - 0.5 - low
            part[polygon(ring[:, 1], ring[:, 0], part.shape)] = False
        inside[low[1] : high[1], low[0] : high[0]] |= part
    return inside
