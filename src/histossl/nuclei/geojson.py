"""Reads nuclei from GeoJSON of QuPath and other tools: decides which geometry of a feature is a nucleus."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from histossl.core.errors import LabelError
from histossl.nuclei.instances import MEASURES, Nuclei, concatenate
from histossl.wsi.geojson import GEOJSON_HINT, read_features

_NO_NUCLEI = ("annotation", "tmacore", "tma core", "tma_core", "root", "pathannotationobject", "pathrootobject", "tile")


@dataclass(frozen=True)
class Outlined:
    """The nuclei of a file.

    Attributes:
        shapes: (N,) shapely polygons in level-0 pixels, holes and all.
        read: how many of them were of each kind.
        left: how many features were left out, by reason.
    """

    shapes: NDArray
    read: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)

    def note(self) -> str:
        """What was read and what was left out, as text; "" where each feature is one nucleus."""
        details = [f"{count} {kind}" for kind, count in self.read.items() if kind != "detections"]
        lost = [f"{count} {why}" for why, count in self.left.items()]
        if not details and not lost:
            return ""
        read = [f"{count} {kind}" for kind, count in self.read.items()]
        return f"read {', '.join(read) or 'nothing'}" + (f"; left out {', '.join(lost)}" if lost else "")

    def nuclei(self) -> Nuclei:
        """Their outlines, holes closed; measures are zero but for the centroid."""
        if not len(self.shapes):
            return concatenate([])
        rings = [np.asarray(shape.exterior.coords, np.float32)[:-1, :2] for shape in self.shapes]
        whole = shapely.polygons(shapely.get_exterior_ring(self.shapes))
        start = np.concatenate([[0], np.cumsum([len(ring) for ring in rings])]).astype(np.int64)
        measures = np.zeros((len(rings), len(MEASURES)), np.float32)
        measures[:, :2] = shapely.get_coordinates(shapely.centroid(whole))
        return Nuclei(np.concatenate(rings), start, measures)


def read_outlined(path: Path) -> Outlined:
    """Read the nuclei of a GeoJSON.

    - The `nucleusGeometry` of a cell is the nucleus, on the feature or among its properties; the cell's own geometry is
      its border. Cells without a nucleus are left out.
    - Detections are nuclei, and so are features that do not say what they are.
    - Annotations, TMA cores and tiles are not nuclei.
    - Each part of a MultiPolygon is a nucleus, since some tools write all nuclei as one; points and lines are not.

    Args:
        path: the file, gzipped or not.

    Returns:
        The polygons in the unit of the file, and counts of the features that were read and left out, by kind.

    Raises:
        LabelError: not a GeoJSON of polygons; or it holds only features that are not nuclei.
    """
    features = read_features(path)
    shapes: list[Any] = []
    read: Counter[str] = Counter()
    left: Counter[str] = Counter()
    try:
        for feature in features:
            kind, geometry = _nucleus_of(feature)
            if geometry is None:
                left[kind] += 1
                continue
            found = shapely.get_parts(_shape(geometry))
            parts = [part for part in found if isinstance(part, shapely.Polygon) and not part.is_empty]
            if not parts:
                left["points or lines"] += 1
                continue
            shapes += parts
            read[kind] += 1
    except (
        ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, shapely.errors.ShapelyError,
    ) as error:  # fmt: skip
        raise LabelError(f"{path}: no GeoJSON of polygons ({error})", GEOJSON_HINT) from error
    if not shapes and left:
        lost = ", ".join(f"{count} {why}" for why, count in left.items())
        raise LabelError(f"{path}: holds no nuclei, only {lost}", "export detections or cells with their nuclei")
    polygons = np.empty(len(shapes), object)
    polygons[:] = shapes
    return Outlined(polygons, read, left)


def _nucleus_of(feature: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """The kind of a feature, and the geometry of its nucleus; None, and why, where it has none."""
    about = feature.get("properties") or {}
    kind = str(about.get("objectType") or about.get("object_type") or feature.get("id") or "").lower()
    nucleus = next(
        (
            place[name]
            for place in (feature, about)
            for name in ("nucleusGeometry", "nucleus_geometry", "nucleusgeometry")
            if isinstance(place.get(name), dict)
        ),
        None,
    )
    if kind in _NO_NUCLEI:
        what = "annotations" if "annotation" in kind else "tiles" if kind == "tile" else "TMA cores"
        return what, None
    if nucleus is not None:
        return "nuclei of cells", nucleus
    if kind in ("cell", "pathcellobject"):
        return "cells without a nucleus", None
    return "detections", feature["geometry"]


def _shape(geometry: dict[str, Any]) -> Any:
    """A valid geometry; the largest part of a ring that crosses itself."""
    shape = shapely.geometry.shape(geometry)
    if shape.is_valid or shape.is_empty:
        return shape
    parts = [part for part in shapely.get_parts(shapely.make_valid(shape)) if isinstance(part, shapely.Polygon)]
    if isinstance(shape, shapely.Polygon) and parts:
        return max(parts, key=lambda part: part.area)
    return shapely.MultiPolygon(parts)


def paint(outlined: Outlined, band_top: int, shape: tuple[int, int]) -> NDArray[np.int32]:
    """Paint a band of the label image; holes of nuclei stay open.

    A pixel belongs to the nucleus that contains its centre; where two do, to the later one.

    Args:
        outlined: the nuclei.
        band_top: first row of the band.
        shape: (height, width) of the band.

    Returns:
        (height, width) int32: the polygon of index k has the value k + 1.
    """
    from skimage.draw import polygon

    band = np.zeros(shape, np.int32)
    bounds = shapely.bounds(outlined.shapes).reshape(-1, 4)
    for k in np.flatnonzero((bounds[:, 3] > band_top) & (bounds[:, 1] < band_top + shape[0])):
        nucleus = outlined.shapes[k]
        rows, columns = _inside(nucleus.exterior, band_top, shape, polygon)
        places = rows * shape[1] + columns
        for hole in nucleus.interiors:
            empty_rows, empty_columns = _inside(hole, band_top, shape, polygon)
            places = places[~np.isin(places, empty_rows * shape[1] + empty_columns)]
        band.ravel()[places] = k + 1
    return band


def _inside(ring: Any, top: int, shape: tuple[int, int], polygon: Any) -> tuple[NDArray, NDArray]:
    points = np.asarray(ring.coords, np.float64)[:, :2] - 0.5
    return polygon(points[:, 1] - top, points[:, 0], shape)


def label_image(outlined: Outlined, height: int, width: int) -> NDArray[np.int32]:
    """Paint the label image of all polygons in memory.

    Args:
        outlined: the polygons, in pixels of the image.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Returns:
        (height, width) int32, 0 = none, 1..n in the order of the polygons.
    """
    return paint(outlined, 0, (height, width))
