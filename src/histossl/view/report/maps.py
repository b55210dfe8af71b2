"""Maps of the slides by their vectors: coloured by what is known of them, and with pictures of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from histossl.view.report.charts import MapPoint, slide_map

POINTS = 4000  # on a map
COLOURS = 8  # of classes on a map; page.css has as many, and one for all others
MAPS = 4  # one per target
MEASURED = 20  # with more different numbers, or on more than half of the slides, the probe takes no classes either
WIDTH, SIDE = 640, 52  # of a map, and of a picture on it
THUMBNAILS, THUMBNAIL = 60, 96  # pictures on a map, and pixels of their longer side


def slide_maps(
    vectors: np.ndarray | None,
    ids: list[str],
    labels: pd.DataFrame | None,
    slides: list[dict[str, str]],
    pictures: Mapping[str, Callable[[], str | None]],
) -> dict[str, Any]:
    """The same map once for each target, or coloured by patient where there are no targets; and once with pictures.

    Args:
        vectors: (N, d); None or fewer than three give no map.
        ids: of the N slides.
        labels: a column a target, by slide.
        slides: rows of slides.csv.
        pictures: slide -> what makes a small picture of it, as a data URI; None where it cannot be read.

    Returns:
        What the template draws.
    """
    if vectors is None or len(vectors) < 3:
        return {"maps": []}
    drawn = np.arange(len(ids))
    if len(ids) > POINTS:
        drawn = np.sort(np.random.default_rng(0).choice(len(ids), POINTS, replace=False))
    xy, height, share = slide_map(vectors)
    colourings = _colourings(labels, slides, ids)
    maps = [_one_map(name, classes, xy, ids, drawn) for name, classes in colourings[:MAPS]]
    return {
        "maps": maps,
        "thumbnails": _thumbnails(xy, ids, height, pictures),
        "height": round(height, 1),
        "share": share,
        "drawn": len(drawn),
        "of": len(ids),
        "more": max(0, len(colourings) - MAPS),
    }


def _colourings(
    labels: pd.DataFrame | None, slides: list[dict[str, str]], ids: list[str]
) -> list[tuple[str, list[str]]]:
    """(name, class of each slide, "" for no class) of each map."""
    if labels is not None:
        rows = {str(slide): row for slide, row in labels.to_dict("index").items()}
        targets = [str(name) for name in labels.columns if name != "patient_id"]
        found = [(name, [rows.get(slide, {}).get(name) for slide in ids]) for name in targets]
        told = [(name, ["" if v is None or v != v else str(v) for v in values]) for name, values in found]
        if told := [(name, values) for name, values in told if not _measured(values)]:
            return told
    of_slide = {row["slide_id"]: row["patient_id"] for row in slides}
    patients = [of_slide.get(slide, "") for slide in ids]
    several = 1 < len(set(patients) - {""}) <= 2 * COLOURS and len(set(patients)) < len(ids)
    return [("patient", patients)] if several else [("", [""] * len(ids))]


def _measured(values: list[str]) -> bool:
    """Whether a target is of numbers, or of times, censored ones with a plus: their colours would tell nothing."""
    given = [value for value in values if value]
    found = set(given)
    many = len(found) > MEASURED or 2 * len(found) > len(given)
    return many and all(re.fullmatch(r"-?[\d.]+(?:e[+-]?\d+)?\+?", value) for value in found)


def _one_map(name: str, classes: list[str], xy: np.ndarray, ids: list[str], drawn: np.ndarray) -> dict[str, Any]:
    counts = Counter(value for value in classes if value)
    ranked = [value for value, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    shown = sorted(ranked[:COLOURS]) if len(ranked) > COLOURS else sorted(ranked)
    kinds = {value: k for k, value in enumerate(shown)}
    points = [
        MapPoint(
            round(float(xy[k, 0]), 1),
            round(float(xy[k, 1]), 1),
            None if name and not classes[k] else kinds.get(classes[k], COLOURS if name else 0),
            f"{ids[k]}: {classes[k]}" if classes[k] else ids[k],
        )
        for k in drawn
    ]
    keys = [{"kind": kinds[value], "name": value, "count": counts[value]} for value in shown]
    others = sum(counts[value] for value in ranked if value not in kinds)
    if others:
        keys.append({"kind": COLOURS, "name": f"{len(ranked) - len(shown)} others", "count": others})
    return {
        "name": name,
        "points": points,
        "keys": keys,
        "unlabelled": len(classes) - sum(counts.values()) if name else 0,
    }


def _thumbnails(
    xy: np.ndarray, ids: list[str], height: float, pictures: Mapping[str, Callable[[], str | None]]
) -> list[dict[str, Any]]:
    """Pictures at the places of their slides: as many as do not cover each other."""
    found: list[dict[str, Any]] = []
    taken: list[np.ndarray] = []
    for k in np.random.default_rng(0).permutation(len(ids))[:POINTS]:
        corner = np.clip(xy[k] - SIDE / 2, 0, [WIDTH - SIDE, max(0.0, height - SIDE)])
        if ids[k] not in pictures or any(np.abs(corner - other).max() < SIDE + 2 for other in taken):
            continue
        if (uri := pictures[ids[k]]()) is None:
            continue
        taken.append(corner)
        found.append({"x": round(corner[0], 1), "y": round(corner[1], 1), "uri": uri, "title": ids[k]})
        if len(found) == THUMBNAILS:
            break
    return found
