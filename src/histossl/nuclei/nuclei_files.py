"""Nuclei from a file or from polygons in memory, and to a file by its ending."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from histossl.core.errors import FileFormatError, SettingsError
from histossl.nuclei import export
from histossl.nuclei.geojson import Outlined, read_outlined
from histossl.nuclei.instances import Nuclei


def read_nuclei(source: str | Path | Iterable[Any]) -> Nuclei:
    """Outlines from a GeoJSON of ours or of QuPath, or from polygons in memory.

    Args:
        source: the path of a .geojson or .geojson.gz; or a GeoDataFrame, a GeoSeries, or any sequence of shapely
            polygons, in level-0 pixels. Of several parts of one shape each is a nucleus; holes are closed.

    Returns:
        The nuclei; measures are zero except the centroid.

    Raises:
        LabelError: the file is not a GeoJSON of polygons.
        FileFormatError: something in memory is not a polygon.
    """
    if isinstance(source, str | Path):
        return read_outlined(Path(source)).nuclei()
    shapes = list(getattr(source, "geometry", source))
    polygons: list[shapely.Polygon] = []
    for k, shape in enumerate(shapes):
        parts = shapely.get_parts(shape) if isinstance(shape, shapely.Polygon | shapely.MultiPolygon) else []
        if not len(parts):
            raise FileFormatError(f"nucleus {k} is a {type(shape).__name__}, not a polygon", "pass shapely polygons")
        polygons += [part for part in parts if not part.is_empty]
    return Outlined(np.array(polygons, object)).nuclei()


def write_nuclei(nuclei: Nuclei, path: str | Path, mpp: float) -> None:
    """Write nuclei for another tool, by the ending of the path; the file is whole or absent.

    Args:
        nuclei: in level-0 pixels.
        path: .geojson or .geojson.gz, which QuPath opens; or .parquet, which geopandas opens (needs pyarrow).
        mpp: µm per level-0 pixel.

    Raises:
        SettingsError: another ending, or pyarrow is not installed.
    """
    path = Path(path)
    if path.name.lower().endswith((".geojson", ".geojson.gz")):
        export.write_geojson(path, [nuclei], mpp)
    elif path.suffix.lower() == ".parquet":
        export.write_parquet(path, [nuclei], mpp)
    else:
        raise SettingsError(f"{path.name}: nuclei are not written with that ending", "use .geojson or .parquet")
