"""One self-contained HTML page of a study: settings, state of every slide, training, vectors and scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from histossl.core.atomic import whole
from histossl.evaluate.risk_groups import p_text
from histossl.evaluate.summary import NEW_SITES
from histossl.study.qc_sheet import trust
from histossl.view.report.charts import curve, key_line, shots_chart, small_picture, survival_chart
from histossl.view.report.maps import THUMBNAIL, slide_maps
from histossl.view.report.sheets import HEATMAPS, Sheet
from histossl.view.report.short import GIGA_SSL, cautions, methods, named
from histossl.wsi.artefacts import KINDS as KINDS_OF_DIRT
from histossl.wsi.artefacts import left_out_of, left_out_text

COLUMNS = ("slide_id", "patient_id", "mpp", "width", "height", "tiles", "status", "error", "artefacts")
PICTURES = 24  # in the QC sheet
ROWS = 100  # of slides or failures in a table
GAUGES = {
    "loss": "lower is better; its floor depends on the batch",
    "spread": "0 is collapse, 1 fills the sphere",
    "matched": "views whose nearest other view is of their own slide",
    "alignment": "distance of the two views of a slide; lower is better",
    "agreement": "correlation of what tiles are with what their neighbours predict",
    "uniformity": "how evenly the slides fill the sphere; lower is better",
    "effective_rank": "number of directions that the vectors use; 1 is collapse",
    "rate": "learning rate",
    "lr": "learning rate",
}


# Main score -> its title, the second score, its heading, a phrase, and what the target is ("" tells its classes). The
# first that a row has is its main score.
KINDS = {
    "c_index": ("Harrell's C", "ibs", Markup("integrated<br>Brier"), "a C-index of", "survival"),
    "spearman": ("Spearman's correlation", "r2", "R²", "a Spearman's correlation of", "numbers"),
    "auroc": ("AUROC", "balanced_accuracy", Markup("balanced<br>accuracy"), "an AUROC of", ""),
}


@dataclass(frozen=True)
class ReportInput:
    """The content of a page; a section whose input is None or empty is left out.

    Attributes:
        title: title of the page, such as the name of the study.
        slides: one row per slide with the columns of slides.csv; values may be text. A slide has failed where `status`
            is "failed".
        qc: slide_id -> picture file of tissue and tiles; absent files are left out.
        training: one row per logged step: `step`, `loss`, and any further numbers (`rate`, gauges of collapse).
        vectors: (N, d) finite floats, the slide vectors.
        ids: the N slide ids of the vectors.
        labels: index slide_id, one column per target (None or "" where unlabelled); `patient_id` is not a target.
        probe: the content of probe.json.
        slide_bytes: size of the files of all encoded slides, None where unknown.
        settings: the resolved settings, nested dictionaries.
        versions: program -> version.
        durations: stage -> seconds.
        sheets: sheets of example pictures.
        painted: whether the slides are synthetic.
    """

    title: str
    slides: pd.DataFrame
    qc: Mapping[str, Path] = field(default_factory=dict)
    training: pd.DataFrame | None = None
    vectors: np.ndarray | None = None
    ids: Sequence[str] = ()
    labels: pd.DataFrame | None = None
    probe: Mapping[str, Any] | None = None
    slide_bytes: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    durations: Mapping[str, float] = field(default_factory=dict)
    sheets: Sequence[Sheet] = ()
    painted: bool = False


def write_report(path: Path, context: ReportInput) -> None:
    """Write the page: HTML that includes its style, figures and pictures, loads nothing and runs no script.

    Slide names, labels, errors and settings are escaped, so that they always show as text.

    Args:
        path: the HTML file; whole or absent.
        context: the content.

    Raises:
        OSError: the file cannot be written.
    """
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": _size, "time": _time, "figure": _figure, "named": named}
    slides = _records(context.slides)
    whole_slides = [row for row in slides if row["status"] != "failed"]
    sheets = [found for found in map(_sheet, context.sheets) if found["shown"]]
    pictures = _pictures(context.qc, slides)
    small = {slide: partial(_drawn, path, THUMBNAIL) for slide, path in context.qc.items()}
    page = environment.get_template("page.html.j2").render(
        title=context.title,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        summary=_summary(context, slides),
        slides=_slides(slides),
        pictures=pictures,
        first=_first_pictures(sheets, pictures["shown"]),
        cautions=cautions(whole_slides, [_tiles(row) for row in whole_slides], context.probe, context.painted),
        methods=methods(context.settings, context.versions, context.probe),
        citation=GIGA_SSL,
        sheets=sheets,
        training=_training(context.training),
        maps=slide_maps(context.vectors, [str(name) for name in context.ids], context.labels, slides, small),
        probe=_probe(context.probe),
        settings=list(_flat(context.settings)),
        versions=context.versions,
        durations=context.durations,
    )
    with whole(path) as part:
        # File names that are not Unicode contain surrogates, which UTF-8 cannot encode.
        part.write_bytes(page.encode("utf-8", "replace"))


def _records(slides: pd.DataFrame) -> list[dict[str, str]]:
    """slides.csv as rows of text with all COLUMNS, "" for empty cells."""
    rows = [
        {str(k): "" if v is None or v != v else str(v) for k, v in row.items()} for row in slides.to_dict("records")
    ]
    return [dict.fromkeys(COLUMNS, "") | row for row in rows]


def _tiles(row: Mapping[str, str]) -> int:
    try:
        return int(float(row["tiles"]))
    except ValueError:
        return 0


def _summary(context: ReportInput, slides: list[dict[str, str]]) -> dict[str, Any]:
    vectors = context.vectors
    return {
        "slides": len(slides),
        "failed": sum(row["status"] == "failed" for row in slides),
        "tiles": sum(_tiles(row) for row in slides if row["status"] != "failed"),
        "patients": len({row["patient_id"] for row in slides} - {""}),
        "vectors": None if vectors is None else vectors.shape,
        "slide_bytes": context.slide_bytes,
        "vector_bytes": 0 if vectors is None else vectors.size * 4,
    }


def _slides(slides: list[dict[str, str]]) -> dict[str, Any]:
    failed = [row for row in slides if row["status"] == "failed"]
    # An error begins with the name of its slide; without it, equal reasons can be counted.
    reasons = Counter(row["error"].partition(": ")[2] or row["error"] for row in failed)
    return {
        "failed": failed[:ROWS],
        "failed_more": max(0, len(failed) - ROWS),
        "reasons": reasons.most_common(5) if len(failed) > ROWS else [],
        "rows": slides[:ROWS],
        "more": max(0, len(slides) - ROWS),
    }


def _pictures(qc: Mapping[str, Path], slides: list[dict[str, str]]) -> dict[str, Any]:
    """The QC pictures, what is suspicious first, with what is said of it."""
    rows = {row["slide_id"]: row for row in sorted(slides, key=trust)}
    there = [slide for slide in rows if slide in qc and Path(qc[slide]).is_file()]
    drawn = [(slide, _drawn(qc[slide])) for slide in there[:PICTURES]]
    told = {slide: row.get("note") or row["artefacts"] for slide, row in rows.items()}
    shown = [{"slide": s, "tiles": _tiles(rows[s]), "told": told[s], "uri": uri} for s, uri in drawn if uri]
    left_out = left_out_text(
        sum((left_out_of(row["artefacts"]) for row in slides), np.zeros(len(KINDS_OF_DIRT), np.int64))
    )
    return {"shown": shown, "more": max(0, len(there) - PICTURES), "left_out": left_out}


def _first_pictures(sheets: Sequence[Mapping[str, Any]], qc: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Two pictures for the first screen: what a classifier looked at, else tissue and tiles of the largest slides."""
    explained = next((sheet["shown"] for sheet in sheets if sheet["title"] == HEATMAPS), [])
    if explained:
        return [{"uri": one["uri"], "caption": one["caption"], "note": one["note"]} for one in explained[:2]]
    largest = sorted(qc, key=lambda one: -one["tiles"])[:2]
    return [{"uri": one["uri"], "caption": one["slide"], "note": "tissue and tiles"} for one in largest]


def _sheet(sheet: Sheet) -> dict[str, Any]:
    longest = 560 if sheet.layout == "wide" else 320
    drawn = [(picture, _drawn(picture.path, longest, sheet.part)) for picture in sheet.pictures]
    shown = [{"caption": picture.caption, "note": picture.note, "uri": uri} for picture, uri in drawn if uri]
    return {"title": sheet.title, "text": sheet.text, "layout": sheet.layout, "shown": shown}


def _drawn(path: Path, longest: int = 320, part: bool = False) -> str | None:
    """A picture as a data URI; None where it is absent or damaged, so that the report is written without it."""
    try:
        return small_picture(Path(path), longest, part)
    except OSError:
        return None


def _training(log: pd.DataFrame | None) -> list[dict[str, Any]]:
    if log is None or log.empty:
        return []
    columns = {str(name): np.asarray(pd.to_numeric(log[name], errors="coerce"), float) for name in log.columns}
    steps = columns.pop("step", np.arange(len(log), dtype=float))
    names = [name for name, values in columns.items() if np.isfinite(values).any()]
    known = list(GAUGES)
    names.sort(key=lambda name: (known.index(name) if name in known else len(known) - 2.5, name))
    return [
        {
            "name": name,
            "note": GAUGES.get(name, ""),
            "last": f"{columns[name][np.isfinite(columns[name])][-1]:.3g}",
            "svg": curve(steps.tolist(), columns[name].tolist()),
        }
        for name in names
    ]


def _probe(content: Mapping[str, Any] | None) -> dict[str, Any] | None:
    rows = [*content["table"], *content.get("numbers", ()), *content.get("survival", ())] if content else []
    if not content or not rows:
        return None
    kinds = ["AUROC"] if content["table"] else []
    kinds += ["Spearman's correlation"] if content.get("numbers") else []
    kinds += ["Harrell's C"] if content.get("survival") else []
    curves = content.get("risk_groups") or {}
    return {
        "targets": [
            _target(name, [row for row in rows if row["target"] == name]) | {"groups": _groups(curves.get(name))}
            for name in dict.fromkeys(row["target"] for row in rows)
        ],
        "figures": " or ".join(kinds),
        "new_sites": any(str(row["embedding"]).endswith(NEW_SITES) for row in rows),
        "audit": content.get("audit", ()),
        "complaints": content.get("complaints", ()),
        "method": content.get("method", ""),
    }


def _target(name: str, table: list[Mapping[str, Any]]) -> dict[str, Any]:
    score = next(name for name in KINDS if name in table[0])
    title, second, heading, phrase, kinds = KINDS[score]
    table = [{**row, "score": row[score], "second": row[second]} for row in table]
    counts = list(dict.fromkeys(str(row["n_labelled"]) for row in table))
    embeddings = list(dict.fromkeys(row["embedding"] for row in table))
    at = {(row["embedding"], str(row["n_labelled"])): row for row in table}
    last, drawn = counts[-1], [e for e in embeddings if not e.endswith(NEW_SITES)]
    return {
        "name": name,
        "counts": counts,
        "rows": [{"name": e, "cells": [at.get((e, n)) for n in counts], "last": at[e, last]} for e in embeddings],
        "keys": [*map(key_line, range(len(drawn))), ""],
        "figure": phrase,
        "kinds": kinds or f"{table[0]['n_classes']} classes",
        "second": heading,
        "chart": shots_chart(
            counts,
            [[_interval(at[e, n]) for n in counts] for e in drawn],
            (title, 0.0 if score == "spearman" else 0.5),
        ),
        "first": at[embeddings[0], last],
        "verdict": _verdict(embeddings[0], [at[e, last] for e in drawn[1:]]),
    }


def _groups(parted: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The curves of the risk groups of a survival target, and the numbers at risk."""
    if not parted:
        return None
    return {
        "chart": survival_chart(parted["groups"], parted["ticks"], parted.get("unit") or "time"),
        "p": p_text(float("nan") if parted["p"] is None else parted["p"]),
        "ticks": [f"{tick:.3g}" for tick in parted["ticks"]],
        "rows": [group | {"key": key_line(k)} for k, group in enumerate(reversed(parted["groups"]))],
    }


def _interval(row: Mapping[str, Any]) -> tuple[float, float, float]:
    score, low, high = (float("nan") if row[name] is None else row[name] for name in ("score", "low", "high"))
    return score, low, high


def _verdict(first: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence that compares the first embedding with the others, by whether the interval excludes 0."""
    found = {"is ahead of": [], "is behind": [], "is not clearly different from": []}
    for row in rows:
        low, high = row["difference_low"], row["difference_high"]
        word = "is ahead of" if (low or 0) > 0 else "is behind" if (high or 0) < 0 else "is not clearly different from"
        found[word].append(row["embedding"])
    parts = [f"{word} {' and '.join(names)}" for word, names in found.items() if names]
    return f"With all labels, {named(first)} {', and '.join(parts)}, at 95 %." if parts else ""


def _flat(settings: Mapping[str, Any], prefix: str = ""):
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _size(count: float) -> str:
    if count < 1000:
        return f"{count:.0f} bytes"
    k = min(int(np.log10(count) / 3), 4)
    value = count / 1000**k
    return f"{value:.0f} {'KMGT'[k - 1]}B" if value >= 100 else f"{value:.2g} {'KMGT'[k - 1]}B"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.{int(seconds < 10)}f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _figure(value: float | None, sign: bool = False) -> str:
    """A score as papers print it, .83; a difference with its sign, +.05."""
    if value is None or value != value:
        return "–"
    text = f"{abs(value):.2f}"
    text = text[1:] if text.startswith("0") else text
    return (("−" if value < 0 else "+") if sign else "") + text
