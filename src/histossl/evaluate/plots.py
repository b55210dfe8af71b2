"""Figures of the probe's results, one per target: few labels, ROC, calibration, confusion; as PNG and SVG."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from sklearn.metrics import roc_curve

from histossl.core.atomic import whole_buffer
from histossl.evaluate.risk_groups import p_text, risk_groups
from histossl.evaluate.score import reliability
from histossl.evaluate.summary import named

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from histossl.evaluate.settings import ProbeResult

# The palette of Okabe and Ito, which colour-blind readers can distinguish; the first embedding has the strongest one.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"
FEW = 3  # slides; a point of the calibration curve with fewer is noise, and is left out


def write_figures(result: ProbeResult, folder: Path) -> list[Path]:
    """Write `probe-TARGET.png` and `.svg` for every target; the same results give the same bytes.

    Targets with classes get four panels: AUROC over the number of labels, with its 95 % interval; ROC with all labels,
    from predictions pooled over folds and averaged over repeats, with more than two classes the mean of one against
    the rest; calibration of the same predictions, the dots larger for more slides; the confusion matrix of the first
    embedding. Targets with numbers get two: Spearman's correlation over the number of labels, and the predictions of
    the first embedding. Survival gets the C-index over the number of labels, and Kaplan and Meier's curves of the
    halves of the patients by the risk that the first embedding predicts.

    Args:
        result: of `probe`.
        folder: for the files.

    Returns:
        The paths of the files, PNG before SVG for each target.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []
    names = file_names([str(name) for name in result.predictions["target"].unique()])
    for target, name in names.items():
        found = _where(result.predictions, "target", target)
        tables = {"classes": result.table, "numbers": result.numbers, "survival": result.survival}
        kind = next(kind for kind, t in tables.items() if not t.empty and target in set(t["target"]))
        rows = _where(tables[kind], "target", target)
        rows = pd.DataFrame(rows[rows["embedding"].isin(found["embedding"])])  # whole sites held out have no curve
        figure = Figure(figsize=(16, 4.2) if kind == "classes" else (10, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        unit = result.settings.shots_of
        draw = {"classes": _draw_classes, "numbers": _draw_numbers, "survival": _draw_survival}[kind]
        draw(figure, rows, found.dropna(axis=1, how="all"), unit)
        first = rows.iloc[0]
        figure.suptitle(
            _escaped(f"{target}: {first['n_slides']} slides of {first['n_patients']} patients"), fontsize=11
        )
        # Text stays text in the SVG, and a fixed salt makes the names of clip paths the same in every run.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "histossl"}):
            for kind, metadata in (("png", {}), ("svg", {"Date": None})):
                with whole_buffer(folder / f"probe-{name}.{kind}") as file:
                    figure.savefig(file, format=kind, dpi=150, metadata=metadata)
                written.append(folder / f"probe-{name}.{kind}")
    return written


def _draw_classes(figure: Figure, rows: pd.DataFrame, found: pd.DataFrame, unit: str) -> None:
    shots, roc, calibration, confusion = figure.subplots(1, 4)
    embeddings = list(dict.fromkeys(rows["embedding"]))
    _shots(shots, rows, embeddings, "auroc", f"labelled {unit} in training")
    shots.set_ylabel("AUROC, 95 % interval over patients")
    _rocs(roc, found, embeddings)
    _calibration(calibration, found, embeddings)
    _confusion(confusion, _where(found, "embedding", embeddings[0]), embeddings[0])


def _draw_numbers(figure: Figure, rows: pd.DataFrame, found: pd.DataFrame, unit: str) -> None:
    shots, against = figure.subplots(1, 2)
    embeddings = list(dict.fromkeys(rows["embedding"]))
    _shots(shots, rows, embeddings, "spearman", f"labelled {unit} in training")
    shots.set_ylabel("Spearman's correlation, 95 % interval over patients")
    shots.legend(frameon=False, fontsize=8, loc="best")
    own = _where(found, "embedding", embeddings[0])
    truth, predicted = own["truth"].to_numpy(float), own["predicted"].to_numpy(float)
    ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
    against.plot(ends, ends, color="#999999", linewidth=0.8, linestyle=":")
    against.scatter(truth, predicted, s=14, color=COLOURS[0], alpha=0.6, linewidths=0)
    against.set(xlabel="truth", ylabel="predicted, of patients held out")
    against.set_title(_shown(embeddings[0]), fontsize=9)
    against.spines[["top", "right"]].set_visible(False)


def _draw_survival(figure: Figure, rows: pd.DataFrame, found: pd.DataFrame, unit: str) -> None:
    shots, curves = figure.subplots(1, 2)
    embeddings = list(dict.fromkeys(rows["embedding"]))
    _shots(shots, rows, embeddings, "c_index", f"labelled {unit} in training")
    shots.set_ylabel("Harrell's C, 95 % interval over patients")
    shots.legend(frameon=False, fontsize=8, loc="best")
    parted = risk_groups(_where(found, "embedding", embeddings[0]))
    at_risk = []
    for group, colour in zip(parted["groups"], (COLOURS[0], COLOURS[1]), strict=True):
        name = f"{group['name']}: {group['events']} events of {group['patients']}"
        if group["patients"]:
            curves.step(group["time"], group["survival"], where="post", color=colour, linewidth=2, label=name)
        at_risk.append(f"{group['name']}: " + ", ".join(map(str, group["at_risk"])))
    curves.set(ylim=(0, 1.02), xlim=(0, None), ylabel="without an event", xticks=parted["ticks"])
    curves.set_xticklabels([f"{tick:.3g}" for tick in parted["ticks"]])
    time = _escaped(rows["unit"].iloc[0] or "time")
    curves.set_xlabel(f"{time}; at risk at these times: " + "\n".join(at_risk), fontsize=8)
    curves.set_title(_escaped(f"{named(embeddings[0])}, patients held out; {p_text(parted['p'])}"), fontsize=9)
    curves.legend(frameon=False, fontsize=8, loc="best")
    curves.spines[["top", "right"]].set_visible(False)


def file_names(targets: list[str]) -> dict[str, str]:
    """Choose a file name for every target, of letters, digits, - and _; numbered where two would be the same.

    Args:
        targets: any text.

    Returns:
        Target -> file name without ending, at most 60 characters and a number.
    """
    names: dict[str, str] = {}
    for target in targets:
        name = re.sub(r"[^\w-]+", "-", target).strip("-")[:60] or "target"
        taken = {other.casefold() for other in names.values()}  # some file systems ignore the case
        names[target] = next(n for n in (name, *(f"{name}-{k}" for k in range(2, 10**6))) if n.casefold() not in taken)
    return names


def _where(table: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    return pd.DataFrame(table[table[column] == value])


def _escaped(text: str) -> str:
    """Escape dollar signs, which begin a formula in matplotlib: names are data."""
    return text.replace("$", r"\$")


def _shown(embedding: str) -> str:
    return _escaped(named(embedding))


def _shots(axes: Axes, rows: pd.DataFrame, embeddings: list[str], figure: str, what: str) -> None:
    counts = list(rows["n_labelled"].unique())
    for k, name in enumerate(embeddings):
        line = rows[rows["embedding"] == name].set_index("n_labelled").loc[counts]
        # Side by side, so that the intervals of different embeddings do not cover each other.
        at = np.arange(len(counts)) + (k - (len(embeddings) - 1) / 2) * 0.5 / max(len(embeddings), 4)
        colour = COLOURS[k % len(COLOURS)]
        axes.vlines(at, line["low"], line["high"], color=colour, linewidth=1.2, alpha=0.6)
        marker = MARKERS[k % len(MARKERS)]
        width = 2 if k == 0 else 1.2
        axes.plot(at, line[figure], color=colour, marker=marker, markersize=5, linewidth=width, label=_shown(name))
    chance = 0.0 if figure == "spearman" else 0.5
    axes.axhline(chance, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(counts)), counts)
    axes.set_xlim(-0.5, len(counts) - 0.5)
    bottom = float(np.nanmin([*rows["low"], *rows[figure], chance]))
    axes.set_ylim(max(2 * chance - 1, min(chance - 0.05, bottom - 0.02)), 1.01)
    axes.set_xlabel(what)
    axes.grid(axis="y", linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)


def _rocs(axes: Axes, found: pd.DataFrame, embeddings: list[str]) -> None:
    grid = np.linspace(0, 1, 201)
    classes = sorted(found["truth"].unique())
    for k, name in enumerate(embeddings):
        own = found[found["embedding"] == name]
        curves = []
        for kind in classes[1:] if len(classes) == 2 else classes:
            false, true, _ = roc_curve(own["truth"] == kind, own[f"p({kind})"])
            curves.append(np.interp(grid, false, true))
        curve = np.mean(curves, axis=0)
        curve[0] = 0
        axes.plot(grid, curve, color=COLOURS[k % len(COLOURS)], linewidth=2 if k == 0 else 1.2, label=_shown(name))
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal", xlim=(0, 1), ylim=(0, 1.005))
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)


def _calibration(axes: Axes, found: pd.DataFrame, embeddings: list[str]) -> None:
    classes = sorted(found["truth"].unique())
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":")
    for k, name in enumerate(embeddings):
        own = _where(found, "embedding", name)
        shown = classes[1:] if len(classes) == 2 else classes
        p = np.concatenate([own[f"p({kind})"].to_numpy(float) for kind in shown])
        true = np.concatenate([own["truth"].to_numpy() == kind for kind in shown])
        at, share, counts = (part[reliability(p, true)[2] >= FEW] for part in reliability(p, true))
        colour = COLOURS[k % len(COLOURS)]
        axes.plot(at, share, color=colour, linewidth=2 if k == 0 else 1.2)
        axes.scatter(at, share, s=200 * counts / len(p) + 4, color=colour, alpha=0.7, linewidths=0)
    axes.set(xlabel="predicted probability", ylabel="share that is of the class", aspect="equal")
    axes.set(xlim=(0, 1), ylim=(0, 1.005))
    axes.spines[["top", "right"]].set_visible(False)


def _confusion(axes: Axes, found: pd.DataFrame, name: str) -> None:
    classes = sorted(found["truth"].unique())
    counts = pd.crosstab(found["truth"], found["predicted"]).reindex(index=classes, columns=classes, fill_value=0)
    shares = counts.to_numpy() / counts.sum(axis=1).to_numpy()[:, None]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i in range(len(classes)):
        for j in range(len(classes)):
            text = f"{counts.iat[i, j]}" + (f"\n{shares[i, j]:.0%}" if len(classes) < 8 else "")
            axes.text(
                j, i, text, ha="center", va="center", fontsize=8, color="white" if shares[i, j] > 0.6 else "black"
            )
    ticks = [_escaped(kind if len(kind) <= 14 else kind[:13] + "…") for kind in classes]
    axes.set_xticks(range(len(classes)), ticks, rotation=30 if max(map(len, ticks)) > 6 else 0)
    axes.set_yticks(range(len(classes)), ticks)
    axes.set(xlabel="predicted", ylabel="truth")
    axes.set_title(_shown(name), fontsize=9)
