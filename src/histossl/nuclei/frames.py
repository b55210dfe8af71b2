"""Polygons with measures as a data frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd


def frame_of(polygons: NDArray, columns: Mapping[str, NDArray]) -> pd.DataFrame:
    """Polygons with their columns as a data frame.

    Args:
        polygons: (N,) shapely polygons, the column `geometry`.
        columns: name -> (N,) values.

    Returns:
        A GeoDataFrame; without geopandas a DataFrame.
    """
    import pandas as pd

    table = pd.DataFrame({"geometry": pd.Series(list(polygons), dtype=object)} | dict(columns))
    try:
        import geopandas  # optional: nothing else here needs it
    except ImportError:
        return table
    return geopandas.GeoDataFrame(table, geometry="geometry")
