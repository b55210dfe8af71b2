"""Figures of the report: line charts as SVG in the colours of the page, a map of the slides, small pictures."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

# Matplotlib writes fixed colours. `_svg` replaces these unlikely ones by variables of the page, light or dark.
_PAGE = {"#010203": "var(--ink)", "#040506": "var(--muted)", "#070809": "var(--line)", "#0a0b0c": "var(--accent)"}
_INK, _MUTED, _LINE, _ACCENT = _PAGE
_STYLES = (
    (_ACCENT, "-", "o"),
    (_INK, (0, (5, 2)), "s"),
    (_MUTED, (0, (1, 1.5)), "D"),
    (_INK, (0, (5, 2, 1, 2)), "^"),
    (_MUTED, "-", "v"),
)


def curve(steps: Sequence[float], values: Sequence[float], longest: int = 300) -> Markup:
    """A line over the steps of training; a NaN leaves a gap.

    Args:
        steps: n steps, ascending.
        values: n values.
        longest: most points drawn; more points become means over equal intervals.

    Returns:
        Inline SVG.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(3.3, 1.9)
    x, y = np.asarray(steps, float), np.asarray(values, float)
    if len(x) > longest:
        edges = np.linspace(0, len(x), longest + 1).astype(int)
        x, y = (np.add.reduceat(line, edges[:-1]) / np.diff(edges) for line in (x, y))
    axes.plot(x, y, color=_ACCENT, linewidth=1.6, marker="o" if len(x) == 1 else "")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    return _svg(figure)


def shots_chart(
    counts: Sequence[str],
    lines: Sequence[Sequence[tuple[float, float, float]]],
    figure_of: tuple[str, float] = ("AUROC", 0.5),
) -> Markup:
    """A score over the number of labelled slides, with intervals; one line per embedding.

    Args:
        counts: m labels of the x axis, such as "25" and "all".
        lines: for each embedding m triples (score, low, high); NaN where unknown.
        figure_of: the name of the score, and its value at chance.

    Returns:
        Inline SVG.
    """
    name, chance = figure_of
    figure, axes = _axes(4.6, 2.9)
    axes.axhline(chance, color=_MUTED, linewidth=0.8)
    for k, line in enumerate(lines):
        colour, dashes, marker = _STYLES[k % len(_STYLES)]
        at = np.arange(len(counts)) + (k - (len(lines) - 1) / 2) * 0.09
        y, low, high = np.array(line, float).T
        axes.vlines(at, low, high, color=colour, linewidth=1, alpha=0.55)
        axes.plot(at, y, color=colour, linestyle=dashes, marker=marker, markersize=4.5, linewidth=1.6)
    axes.set_xticks(range(len(counts)), counts)
    axes.set_xlim(-0.4, len(counts) - 0.6)
    axes.set_xlabel("labelled slides in training")
    axes.set_ylabel(name)
    bottom = min(chance - 0.05, np.nanmin([point for line in lines for point in line]) - 0.02) if lines else 0
    axes.set_ylim(max(bottom, 2 * chance - 1), 1.01)
    return _svg(figure)


def survival_chart(groups: Sequence[Mapping[str, Any]], ticks: Sequence[float], unit: str = "time") -> Markup:
    """Kaplan and Meier's curves.

    Args:
        groups: with `time` and `survival`, the corners of each curve; the first in the second style, the last in the
            first.
        ticks: times of the x axis.
        unit: its title.

    Returns:
        Inline SVG.
    """
    figure, axes = _axes(4.6, 2.9)
    for k, group in enumerate(reversed(groups)):
        colour, dashes, _ = _STYLES[k]
        if group["patients"]:
            axes.step(group["time"], group["survival"], where="post", color=colour, linestyle=dashes, linewidth=1.6)
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_xlim(0)
    axes.set_ylim(0, 1.01)
    axes.set_xlabel(unit)
    axes.set_ylabel("without an event")
    return _svg(figure)


def key_line(k: int) -> Markup:
    """The legend's sample of a line of `shots_chart`.

    Args:
        k: index of the line, from 0.

    Returns:
        Inline SVG.
    """
    colour, dashes, _ = _STYLES[k % len(_STYLES)]
    pattern = "" if dashes == "-" else f' stroke-dasharray="{" ".join(str(2 * d) for d in dashes[1])}"'
    return Markup(
        '<svg class="key" viewBox="0 0 28 8" aria-hidden="true">'
        '<path d="M0 4H28" stroke="{}" stroke-width="2.4"{}/></svg>'
    ).format(_PAGE[colour], Markup(pattern))


@dataclass(frozen=True)
class MapPoint:
    """A slide on the map.

    Attributes:
        x: to the right, in units of the viewBox.
        y: down, in units of the viewBox.
        kind: index of its class, None for no label.
        title: text that a pointer over it shows.
    """

    x: float
    y: float
    kind: int | None
    title: str


def slide_map(vectors: np.ndarray, width: float = 640, margin: float = 14) -> tuple[np.ndarray, float, float]:
    """The first two principal components, one scale for both, fitted into a picture of the given width.

    Args:
        vectors: (N, d) finite floats, N ≥ 3.
        width: width of the picture, in units of the viewBox.
        margin: empty border around the slides, in the same units.

    Returns:
        (N, 2) x to the right and y down in the picture, its height, and the share of the variance that it shows, in
        [0, 1].
    """
    from sklearn.decomposition import PCA

    model = PCA(min(2, *vectors.shape), svd_solver="full")
    with np.errstate(invalid="ignore"):  # where all vectors are equal, the share of the variance is 0 / 0
        xy = model.fit_transform(np.asarray(vectors, np.float64))
    if xy.shape[1] == 1:
        xy = np.column_stack([xy, np.zeros(len(xy))])
    low, span = xy.min(axis=0), np.ptp(xy, axis=0)
    scale = (width - 2 * margin) / (span[0] or 1)
    height = float(np.clip(span[1] * scale + 2 * margin, 0.35 * width, 0.7 * width))
    scale = min(scale, (height - 2 * margin) / (span[1] or 1))
    placed = (xy - low - span / 2) * scale
    share = np.nan_to_num(model.explained_variance_ratio_).sum()
    return np.column_stack([placed[:, 0] + width / 2, height / 2 - placed[:, 1]]), height, float(share)


def small_picture(path: Path, longest: int = 320, part: bool = False) -> str:
    """A picture file as a data URI.

    Args:
        path: the picture file.
        longest: most pixels of a side.
        part: whether to cut out the most detailed part at full resolution, instead of scaling the picture down.

    Returns:
        JPEG as a data URI.

    Raises:
        OSError: the file is absent or not a picture.
    """
    with Image.open(path) as image:
        if not part:  # JPEGs are decoded at reduced size, which is much faster
            image.draft("RGB", (longest * 2, longest * 2))
        small = image.convert("RGB")
    if part:
        small = small.crop(_richest(np.asarray(small.convert("L")), longest))
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=72, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _richest(grey: np.ndarray, side: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the square with the largest standard deviation, among half-overlapping squares."""
    top, left = (range(0, max(length - side, 0) + 1, side // 2) for length in grey.shape)
    corners = [(y, x) for y in top for x in left]
    y, x = max(corners, key=lambda corner: grey[corner[0] :, corner[1] :][:side, :side].std())
    return x, y, min(x + side, grey.shape[1]), min(y + side, grey.shape[0])


def _axes(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_LINE)
    axes.grid(axis="y", color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=9, length=0, pad=4)
    axes.xaxis.label.set(color=_MUTED, size=9)
    axes.yaxis.label.set(color=_MUTED, size=9)
    return figure, axes


def _svg(figure) -> Markup:
    """The figure as inline SVG that scales with the page and uses its colours and fonts."""
    import matplotlib

    buffer = io.StringIO()
    # With a fixed salt the names of clip paths depend on their content only: the same figure gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "histossl"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None
    for fixed, variable in _PAGE.items():
        rest = rest.replace(fixed, variable)
    rest = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", rest, flags=re.DOTALL)
    rest = re.sub(r"\n *", " ", rest)
    return Markup(f'<svg {box[0]} role="img">{rest}')
