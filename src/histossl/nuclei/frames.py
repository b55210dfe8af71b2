"""Polygons with measures as a data frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd


def frame_of(polygons: NDArray, columns: Mapping[str, NDArray]) -> pd.DataFrame:
    """Polygons with their columns as a GeoDataFrame; without geopandas as a DataFrame.

    Args:
        polygons: (N,) shapely polygons, the column `geometry`.
        columns: name -> (N,) values.
    """
    import pandas as pd

    table = pd.DataFrame({"geometry": pd.Series(list(polygons), dtype=object)} | dict(columns))
    try:
        import geopandas  # an extra of the user's: nothing of ours needs it
    except ImportError:
        return table
    return geopandas.GeoDataFrame(table, geometry="geometry")
