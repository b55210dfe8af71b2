"""Reads the features of a GeoJSON file, as QuPath and other tools write it."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

from histossl.core.errors import LabelError

GEOJSON_HINT = "give a FeatureCollection as QuPath writes it"
_FEWEST, _UNPACKED = 2**26, 40  # bytes that a gzipped file may unpack to: at least, and for each of its own


def read_features(path: Path) -> list[dict[str, Any]]:
    """Read the features of a GeoJSON: of a FeatureCollection, a list, one feature or a bare geometry.

    Args:
        path: the file, gzipped or not.

    Returns:
        The features as they are written.

    Raises:
        LabelError: the file cannot be read, or is no GeoJSON.
    """
    try:
        data = path.read_bytes()
        text = (_unpacked(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
        found = json.loads(text)
        if isinstance(found, dict) and "features" not in found and found.get("type") != "FeatureCollection":
            found = [found] if found.get("type") == "Feature" else [{"geometry": found, "properties": {}}]
        features = found["features"] if isinstance(found, dict) else found
        if not isinstance(features, list) or not all(isinstance(feature, dict) for feature in features):
            raise ValueError("its features are no list")
        return features
    except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError, MemoryError, zlib.error) as error:
        raise LabelError(f"{path}: no GeoJSON of polygons ({error})", GEOJSON_HINT) from error


def _unpacked(data: bytes) -> bytes:
    """Gzipped bytes, up to far more than outlines unpack to: some six times their size."""
    most = _FEWEST + _UNPACKED * len(data)
    text = gzip.GzipFile(fileobj=io.BytesIO(data)).read(most + 1)
    if len(text) > most:
        raise ValueError("it unpacks to far more than outlines do")
    return text
