"""Heatmaps written as a table, as GeoJSON for QuPath, and as a picture."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histossl.core import tables
from histossl.core.atomic import whole, whole_buffer
from histossl.evaluate.heatmap import Heatmap
from histossl.wsi.geometry import Size


def write_heatmap_table(path: Path, heatmap: Heatmap, xy: NDArray, in_um: bool = False) -> None:
    """Write a CSV with one row per tile: `tile`, its corner `x`, `y` in level-0 pixels, `looked_at`, `share(CLASS)`.

    Each `share` column sums to the slide's logit.

    Args:
        path: of the file.
        heatmap: of the slide.
        xy: (N, 2) corners of the tiles, level-0 pixels or µm.
        in_um: whether `xy` is in µm; the columns are then `x_um` and `y_um`.
    """
    corners = ["x_um", "y_um"] if in_um else ["x", "y"]
    with whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = tables.writer(file)
        writer.writerow(["tile", *corners, "looked_at", *(f"share({name})" for name in heatmap.names)])
        for k, (corner, seen, shares) in enumerate(zip(xy.tolist(), heatmap.looked_at, heatmap.shares, strict=True)):
            writer.writerow([k, *corner, f"{seen:.9g}", *(f"{share:.9g}" for share in shares)])


def write_heatmap_geojson(path: Path, heatmap: Heatmap, xy: NDArray, extent: float) -> None:
    """Write a FeatureCollection of QuPath detections: one square per tile, in level-0 pixels.

    Measurements are `share(CLASS)` and, for colours, `score(CLASS)` as in `Heatmap.scores`. Tiles with `looked_at` 0
    are left out. Features are written one by one, so that memory does not grow with the file.

    Args:
        path: of the file.
        heatmap: of the slide.
        xy: (N, 2) corners of the tiles, level-0 pixels.
        extent: level-0 pixels of a tile's side.
    """
    scores = heatmap.scores()
    with whole(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        file.write('{"type":"FeatureCollection","features":[')
        for number, k in enumerate(np.flatnonzero(heatmap.looked_at > 0)):
            file.write(",\n" if number else "\n")
            (x, y), side = xy[k].tolist(), round(extent, 2)
            ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
            measured = {f"share({name})": float(f"{heatmap.shares[k, c]:.6g}") for c, name in enumerate(heatmap.names)}
            measured |= {f"score({name})": float(f"{scores[k, c]:.6g}") for c, name in enumerate(heatmap.names)}
            feature = {
                "type": "Feature",
                "id": str(uuid.UUID(int=int(k) + 1)),
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"objectType": "detection", "name": f"tile {k}", "measurements": measured},
            }
            file.write(json.dumps(feature, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
        file.write("\n]}\n")


def write_heatmap_picture(
    path: Path,
    heatmap: Heatmap,
    xy: NDArray,
    extent: float,
    size: Size,
    picture: NDArray[np.uint8] | None = None,
    target: str = "",
) -> None:
    """Write a PNG of the slide with its tiles' scores for the class with the highest logit: red for, blue against.

    Args:
        path: of the file.
        heatmap: of the slide.
        xy: (N, 2) corners of the tiles, level-0 pixels.
        extent: level-0 pixels of a tile's side.
        size: of the slide at level 0.
        picture: (h, w, 3) of the whole slide; None draws on white.
        target: name of the target, for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = int(heatmap.logits.argmax())
    scores = heatmap.scores()[:, chosen]
    if picture is None:
        scale = 1200 / max(size.width, size.height)
        picture = np.full((max(1, round(size.height * scale)), max(1, round(size.width * scale)), 3), 255, np.uint8)
    ground = _painted(scores, xy, extent, size, picture.shape[:2])
    known = np.abs(scores[np.isfinite(scores)])
    # A quantile instead of the maximum: one extreme tile would make all others pale.
    most = float(np.quantile(known, 0.98)) if len(known) and known.max() > 0 else 1.0
    height, width = picture.shape[:2]
    figure = Figure(figsize=(9.5, 1 + 8 * min(2.0, max(0.3, height / width))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(picture)
    shown = axes.imshow(np.ma.masked_invalid(ground), cmap="RdBu_r", vmin=-most, vmax=most, alpha=0.55)
    axes.set_axis_off()
    name = heatmap.names[chosen]
    what = f"{target}: " if target else ""
    title = f"{heatmap.slide_id}\n{what}logit of {name} is {heatmap.logits[chosen]:.2f}"
    axes.set_title(title, parse_math=False, wrap=True)
    bar = figure.colorbar(shown, ax=axes, shrink=0.7, extend="both")
    bar.set_label(f"score of a tile for {name}; the mean is the slide's logit", parse_math=False)
    with whole_buffer(path) as file:
        figure.savefig(file, format="png", dpi=130)


def _painted(scores: NDArray, xy: NDArray, extent: float, size: Size, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The score of the tile at each pixel of the picture (h, w), nan where there is no tile."""
    scale = np.array([shape[1] / size.width, shape[0] / size.height])
    low = np.floor(xy * scale + 1e-6).astype(int).clip(min=0)
    high = np.maximum(low + 1, np.floor((xy + extent) * scale + 1e-6).astype(int))
    ground = np.full(shape, np.nan)
    for (x0, y0), (x1, y1), score in zip(low.tolist(), high.tolist(), scores, strict=True):
        if np.isfinite(score):
            ground[y0:y1, x0:x1] = score
    return ground
