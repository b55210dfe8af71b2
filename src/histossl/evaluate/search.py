"""Search for the slides most similar to a slide, and how often such slides of other patients share its label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from histossl.core.errors import SlideError
from histossl.evaluate.auroc import resample
from histossl.evaluate.labels import Labels
from histossl.wsi.slide import open_slide

RANKS = (1, 5, 10)
QUERIES = 5000  # a larger cohort is scored on this many of its slides, drawn at random


@dataclass(frozen=True)
class Hit:
    """A slide that was found: its row, and its similarity to the query in [-1, 1]."""

    row: int
    similarity: float


def directions(values: NDArray) -> NDArray[np.float32]:
    """Unit vectors whose products are similarities: features are standardised over the cohort, then rows scaled.

    The cosine of the raw vectors is near 1 for any two slides, since all share the mean of the cohort, and features
    with large values dominate it. After standardisation, unrelated slides of the cohort have a similarity near 0.

    Args:
        values: (N, d) finite; constant features become zero.

    Returns:
        (N, d) float32 rows of length 1; a row equal to the cohort's mean is zero.
    """
    x = np.asarray(values, np.float64)
    deviation = x.std(axis=0)
    x = (x - x.mean(axis=0)) / np.where(deviation > 1e-9 * np.abs(x).max(initial=0), deviation, np.inf)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return (x / np.where(length > 0, length, 1)).astype(np.float32)


def nearest(values: NDArray, patients: NDArray, query: int, top: int) -> list[Hit]:
    """Find the slides of other patients that are most similar to a slide.

    Args:
        values: (N, d) vectors.
        patients: (N,) patient of each slide.
        query: row of the slide.
        top: number of slides to find.

    Returns:
        At most `top` hits, the most similar first, ties in the order of the rows.
    """
    rows = directions(values)
    similarity = rows @ rows[query]
    others = np.flatnonzero(patients != patients[query])
    order = others[np.argsort(-similarity[others], kind="stable")][:top]
    return [Hit(int(row), float(similarity[row])) for row in order]


def retrieval(
    embeddings: Mapping[str, NDArray], ids: Sequence[str], labels: Labels, bootstraps: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Measure how well similarity finds slides of the same class; each slide is a query among those of other patients.

    Recall at k: share of queries with at least one slide of their class among the k most similar. mAP: mean over the
    queries of the average precision of the whole ranking. Intervals: 2.5 and 97.5 percentiles over resamples of the
    queries' patients. Slides whose class no other patient has are no queries.

    Args:
        embeddings: name -> (N, d).
        ids: N slide ids.
        labels: from `read_labels`.
        bootstraps: resamples behind the intervals.
        seed: of the resamples, of the random ranking, and of the choice of queries in cohorts of more than 5,000.

    Returns:
        One row per target and embedding, and one per target for a random ranking (`chance`). Columns: `target`,
        `embedding`, `recall@1`, `recall@5`, `recall@10`, `map`, `map_low`, `map_high`, `queries`.
    """
    found = []
    for target in labels.targets:
        column = labels.table[target].dropna()
        rows = np.flatnonzero(pd.Index(ids).isin(column.index))
        slides = np.asarray(ids, dtype=object)[rows]
        classes = np.unique(column.loc[slides].to_numpy(dtype=str), return_inverse=True)[1]
        patient = np.unique(labels.table["patient_id"].loc[slides].to_numpy(dtype=str), return_inverse=True)[1]
        rng = np.random.default_rng(seed)
        queries = np.sort(rng.permutation(len(rows))[:QUERIES])
        weights = resample(patient.max() + 1, bootstraps, rng)
        chance = rng.normal(size=(len(rows), 64))
        for name, values in (*((n, v[rows]) for n, v in embeddings.items()), ("chance", chance)):
            scores = np.concatenate(
                [
                    _query_scores(directions(values), classes, patient, part)
                    for part in np.array_split(queries, 1 + len(queries) // 256)
                ]
            )
            kept = ~np.isnan(scores[:, -1])
            share = weights[:, patient[queries[kept]]]
            with np.errstate(invalid="ignore"):
                samples = share @ scores[kept, -1] / share.sum(axis=1)
            low, high = np.nanpercentile(samples[1:], [2.5, 97.5]) if kept.any() else (np.nan, np.nan)
            means = scores[kept].mean(axis=0) if kept.any() else np.full(len(RANKS) + 1, np.nan)
            found.append(
                {"target": target, "embedding": name}
                | dict(zip((*(f"recall@{k}" for k in RANKS), "map"), means, strict=True))
                | {"map_low": low, "map_high": high, "queries": int(kept.sum())}
            )
    return pd.DataFrame(found)


def _query_scores(rows: NDArray, classes: NDArray, patient: NDArray, queries: NDArray) -> NDArray[np.float64]:
    """Recall at each rank and average precision of queries, (queries, ranks + 1); nan where no other has the class."""
    similarity = rows[queries] @ rows.T
    own = patient[queries][:, None] == patient
    similarity[own] = -np.inf
    order = np.argsort(-similarity, axis=1, kind="stable")
    same = (classes[order] == classes[queries][:, None]) & ~np.take_along_axis(own, order, axis=1)
    relevant = same.sum(axis=1)
    precision = np.cumsum(same, axis=1) / np.arange(1, same.shape[1] + 1)
    with np.errstate(invalid="ignore"):
        average = (precision * same).sum(axis=1) / relevant
    recall = np.stack([same[:, :k].any(axis=1) for k in RANKS], axis=1).astype(float)
    return np.column_stack([np.where(relevant[:, None] > 0, recall, np.nan), average])


def picture(frames: Sequence[tuple[str, Path | None, Path | None]], side: int = 320, columns: int = 5) -> Image.Image:
    """Draw thumbnails of slides in rows, a text under each, and a frame around the first (the query).

    Args:
        frames: (text, a picture file or None, the slide's file or None); the slide is used where its file exists, else
            the picture; where that cannot be read, an empty field says so.
        side: pixels of a thumbnail's longer side.
        columns: thumbnails per row.

    Returns:
        The picture, RGB.
    """
    gap, line = 12, 20
    texts = [text.split("\n") for text, _, _ in frames]
    height = side + line * max(map(len, texts)) + gap
    rows = -(-len(frames) // columns)
    sheet = Image.new("RGB", (min(columns, len(frames)) * (side + gap) + gap, rows * height + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for k, (lines, (_, small, slide)) in enumerate(zip(texts, frames, strict=True)):
        x, y = gap + k % columns * (side + gap), gap + k // columns * height
        shown = _thumbnail(small, slide, side)
        if shown is None:
            draw.rectangle((x, y, x + side - 1, y + side - 1), outline="#bbbbbb")
            draw.text((x + 8, y + 8), "no picture of this slide", "#777777", font)
        else:
            sheet.paste(shown, (x + (side - shown.width) // 2, y + (side - shown.height) // 2))
        if k == 0:
            draw.rectangle((x - 4, y - 4, x + side + 3, y + side + 3), outline="#c2410c", width=3)
        for step, text in enumerate(lines):
            draw.text((x, y + side + 4 + step * line), _fitted(text, font, side), "black", font)
    return sheet


def _thumbnail(small: Path | None, slide: Path | None, side: int) -> Image.Image | None:
    try:
        if slide is not None and slide.is_file():
            with open_slide(slide, mpp_default=1.0) as opened:
                shown = Image.fromarray(opened.thumbnail(side))
        elif small is not None:
            with Image.open(small) as opened:
                shown = opened.convert("RGB")
        else:
            return None
    except (SlideError, OSError):
        return None
    shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    return shown


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, with an ellipsis for its middle where it is wider than `width` pixels."""
    shown = text
    while font.getlength(shown) > width and len(text) > 4:
        text = text[: len(text) // 2 - 1] + text[len(text) // 2 + 1 :]
        shown = f"{text[: len(text) // 2]}…{text[len(text) // 2 :]}"
    return shown
