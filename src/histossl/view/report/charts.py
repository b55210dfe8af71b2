"""The figures of the report: line charts as SVG in the colours of the page, a map of the slides, small pictures."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image

# Matplotlib writes fixed colours; these stand for variables of the page, which knows whether it is light or dark.
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
    """A line over the steps of training; a value that is not a number leaves a gap.

    Args:
        steps: n, ascending.
        values: n.
        longest: more points than this become means over equal stretches.
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
    """AUROC, or another figure, over the number of labelled slides, a line an embedding, with intervals.

    Args:
        counts: m names of the places on the x axis, "25", "all".
        lines: for each embedding m triples (figure, low, high).
        figure_of: the name of the figure, and what chance gives.
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


def key_line(k: int) -> Markup:
    """The sample of the k-th line of `shots_chart` that stands in its legend."""
    colour, dashes, _ = _STYLES[k % len(_STYLES)]
    pattern = "" if dashes == "-" else f' stroke-dasharray="{" ".join(str(2 * d) for d in dashes[1])}"'
    return Markup(
        '<svg class="key" viewBox="0 0 28 8" aria-hidden="true">'
        '<path d="M0 4H28" stroke="{}" stroke-width="2.4"{}/></svg>'
    ).format(_PAGE[colour], Markup(pattern))


@dataclass(frozen=True)
class MapPoint:
    """A slide on the map: its place in the viewBox, its class (None: no label) and what a pointer over it shows."""

    x: float
    y: float
    kind: int | None
    title: str


def slide_map(vectors: np.ndarray, width: float = 640, margin: float = 14) -> tuple[np.ndarray, float, float]:
    """The first two principal components, one scale for both, fitted into a picture of the given width.

    Args:
        vectors: (N, d) finite floats, N ≥ 3.
        width: of the picture.
        margin: kept free around the slides.

    Returns:
        (N, 2) x and y in the picture, its height, and the share of the variance that it shows, in [0, 1].
    """
    from sklearn.decomposition import PCA

    model = PCA(min(2, *vectors.shape), svd_solver="full")
    with np.errstate(invalid="ignore"):  # all alike: no variance to have a share of
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
    """A picture file as a data URI: JPEG of at most `longest` pixels a side.

    Args:
        path: of the picture.
        longest: pixels.
        part: show, unscaled, the part that differs most in itself.

    Raises:
        OSError: not a picture, or not there.
    """
    with Image.open(path) as image:
        if not part:
            image.draft("RGB", (longest * 2, longest * 2))
        small = image.convert("RGB")
    if part:
        small = small.crop(_richest(np.asarray(small.convert("L")), longest))
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=72, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _richest(grey: np.ndarray, side: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the square of a picture whose pixels differ most, among half-overlapping ones."""
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
    """The figure as an inline SVG that scales with the page and takes its colours and letters from it."""
    import matplotlib

    buffer = io.StringIO()
    # The salt makes the names of clip paths a function of their content: the same figure is the same bytes.
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
