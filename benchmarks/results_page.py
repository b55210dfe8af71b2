"""What was found, as the text and the pictures of docs/results.md; every figure follows from the tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from histossl.core.atomic import whole
from histossl.evaluate.methods import describe
from histossl.evaluate.plots import COLOURS, MARKERS
from histossl.evaluate.settings import ProbeResult, ProbeSettings
from histossl.evaluate.summary import named

SUPERVISED = ("attention MIL", "SparseConvMIL")  # by labels alone; fine-tuning begins with what was learned
BAR = 0.063  # by how much the paper is ahead at 50 labelled slides
COHORTS = {
    "lymphoma": "Malignant lymphoma: CLL, FL, MCL",
    "synthetic": "Painted slides with known truth",
}
ABOUT = {
    "lymphoma": "Fields of 840 × 840 px at 20x (Shamir et al., NIA), taken as 0.5 µm per pixel. The kind of tile "
    "encoder was chosen on these fields, by mean pooling ([encoders](encoders.md#learned-on-your-own-slides)).",
    "synthetic": "Painted by `histossl synth` with a seed that no setting was chosen on, though earlier versions were "
    "measured on it, too; three independent labels. *Composition*: what the tissue is made of. "
    "*Lesion*: a focus of 4 % of the tiles. *Arrangement*: the same patches of tissue, scattered or clustered.",
}

ABOUT_TILES = (
    "Slides composed of cells of 112 px of real tiles (LC25000, CC BY 4.0). Each cell is brought to its slide's own "
    "stain, so that colour tells no class. There are three labels, independent of each other, and folds that share no "
    "source picture. "
    "*Composition*: much or little adenocarcinoma; *fraction* is its share. *Needle*: a focus of squamous carcinoma in "
    "3 to 6 % of the cells. *Arrangement*: adenocarcinoma in blobs or scattered. A logistic regression (L2, C = 10) "
    "on rows of length 1 or standardised, the better of the two, for every vector alike; R² of a ridge regression for "
    "the fraction. 25 / 50 / all labels. What chose the settings, and what each is worth: [ablation](ablation.md)."
)
TILE_TASKS = {
    "composition": "share of tumour",
    "needle": "a few tiles of another tissue",
    "arrangement": "tumour in one place or scattered",
}
TARGETS = {"label": "CLL, FL or MCL"}
README = {"lymphoma": "374 real lymphoma fields, 30 patients ²", "synthetic": "96 painted slides ³"}


@dataclass(frozen=True)
class Found:
    """A cohort and what the probe found: size of its slide files in bytes, shape of its vectors."""

    cohort: str
    result: ProbeResult
    slide_bytes: int
    vectors: tuple[int, int]


def page(found: list[Found], split: pd.DataFrame, settings: ProbeSettings, command: str, tiles: str = "") -> str:
    """docs/results.md; `tiles` is the section of slides composed of real tiles."""
    parts = [
        "# Results",
        "Made by one command, which trains and judges everything again (`make results`):",
        f"```sh\n{command}\n```",
        "AUROC, patients never on both sides, 95 % interval over patients in brackets. All methods have the same tile "
        "features, labels, folds and draws of few labels. The features are of the [default tile "
        "encoder](encoders.md#learned-on-your-own-slides), learned on the same slides without labels, where `--flags` "
        "names no other.",
        "![AUROC over the number of labelled slides, for each target](results.png)",
        "## Few labels: against learning from the labels alone",
        lead(found),
    ]
    parts += [tiles] if tiles else []
    for one in found:
        parts += [f"## {COHORTS[one.cohort]}", ABOUT[one.cohort]]
        for target in one.result.table["target"].unique():
            rows = one.result.table[one.result.table["target"] == target]
            parts += [f"### {target}", table(pd.DataFrame(rows)), verdict(pd.DataFrame(rows))]
    parts += ["## Slides and vectors", sizes(found), "## Split by field, a score is too high", pretence(split)]
    parts += ["![AUROC of the same vectors, split by field and by patient](split.png)"]
    return ("\n\n".join([*parts, "## Method", describe(settings)]) + "\n").replace("giga-ssl", "this method")


def tiles_section(tiles: tuple[pd.DataFrame, list[str]] | None) -> str:
    """Slides composed of real tiles: a row a vector, AUROC (R² of the fraction) with 25 / 50 / all labels."""
    if tiles is None:
        return ""
    shown, lines = tiles
    tasks = list(dict.fromkeys(task for task, _ in shown.columns))
    rows = [f"| vector | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for name, row in shown.iterrows():
        cells = (" / ".join(share3(row[task, n]) for n in (25, 50, "all")) for task in tasks)
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return (
        "## Slides composed of real lung tiles\n\n" + ABOUT_TILES + "\n\n" + "\n".join(rows)
        + "\n\nThe first vector minus its rivals, 95 % interval over patients:\n\n```\n" + "\n".join(lines) + "\n```"
    )  # fmt: skip


def readme(text: str, found: list[Found], tiles: tuple[pd.DataFrame, list[str]] | None) -> str:
    """README with the rows between its two marks made again; as it is where it has no marks."""
    start, end = "<!-- results -->\n", "<!-- /results -->"
    if start not in text or end not in text:
        return text
    rows = ["| slides | target | labelled | **this method** | untrained | mean pooling |", "|---|---|---|---|---|---|"]
    methods = ("untrained encoder", "mean pooling")
    if tiles is not None:
        shown = tiles[0]
        for k, (task, told) in enumerate(TILE_TASKS.items()):
            cells = [share(shown.loc[name, (task, 25)]) for name in (shown.index[0], *methods)]
            slides = "120 slides composed of real lung tiles ¹" if not k else ""
            rows.append(f"| {slides} | {told} | 25 | **{cells[0]}** | {cells[1]} | {cells[2]} |")
    for one in found:
        for k, (target, few) in enumerate(one.result.table.groupby("target", sort=False)):
            few = few[few["n_labelled"] == "50"].set_index("embedding")
            cells = [cell(few.iloc[0], bold=True), *(cell(few.loc[name]) for name in methods)]
            told, slides = TARGETS.get(str(target), target), README[one.cohort] if not k else ""
            rows.append(f"| {slides} | {told} | 50 | {' | '.join(cells)} |")
    return text[: text.index(start) + len(start)] + "\n".join(rows) + "\n" + text[text.index(end) :]


def lead(found: list[Found]) -> str:
    """Giga-SSL with the probe against the best network that learns from the labels alone, at 50 labelled slides."""
    lines = ["| target | giga-ssl | best of the supervised | giga-ssl is ahead by |", "|---|---|---|---|"]
    ahead = []
    for one in found:
        for target, rows in one.result.table.groupby("target", sort=False):
            few = rows[rows["n_labelled"] == ("50" if "50" in set(rows["n_labelled"]) else "all")].set_index(
                "embedding"
            )
            rivals = few[few.index.isin(SUPERVISED)]
            if rivals.empty:
                continue
            best = rivals.loc[rivals["auroc"].idxmax()]
            ahead.append(float(best["difference"]))
            lines.append(
                f"| {one.cohort}: {target} | {cell(few.iloc[0])} | {cell(best)} {best.name} | {difference(best)} |"
            )
    if not ahead:
        return "No network was trained on the labels for this page (`--rivals`)."
    mean = float(np.mean(ahead))
    against = "meets" if mean >= BAR else "does not meet"
    return (
        "\n".join(lines)
        + f"\n\nOn average {points(mean)} points, which {against} the +6.3 that the paper reports on its "
        "own cohorts. The best rival was picked after the fact, target by target, which favours the rivals; 50 of the "
        "slides are labelled, all where a cohort has fewer."
    )


def table(rows: pd.DataFrame) -> str:
    """A row a method, a column a number of labelled slides, and how far the first is ahead with all labels."""
    counts = list(dict.fromkeys(rows["n_labelled"]))
    heads = [f"{n} labelled" if n != "all" else "all" for n in counts]
    lines = [f"| method | {' | '.join(heads)} | giga-ssl is ahead by |", "|---" * (len(counts) + 2) + "|"]
    for k, name in enumerate(dict.fromkeys(rows["embedding"])):
        own = rows[rows["embedding"] == name].set_index("n_labelled")
        cells = [cell(own.loc[n], bold=k == 0) for n in counts]
        last = "" if k == 0 else difference(own.loc[counts[-1]])
        lines.append(f"| {f'**{name}**' if k == 0 else name} | {' | '.join(cells)} | {last} |")
    return "\n".join(lines)


def verdict(rows: pd.DataFrame) -> str:
    """Where the first method is ahead, behind, or neither, by whether the interval of the difference excludes 0."""
    sentences = []
    for n in dict.fromkeys(["50" if "50" in set(rows["n_labelled"]) else "all", "all"]):
        groups: dict[str, list[str]] = {"ahead of": [], "behind": [], "not clearly different from": []}
        for _, row in rows[(rows["n_labelled"] == n) & rows["difference"].notna()].iterrows():
            word = (
                "ahead of"
                if row["difference_low"] > 0
                else "behind"
                if row["difference_high"] < 0
                else "not clearly different from"
            )
            groups[word].append(row["embedding"])
        said = [f"{word} {', '.join(names)}" for word, names in groups.items() if names]
        labels = "all labels" if n == "all" else f"{n} labelled slides"
        sentences.append(f"With {labels} giga-ssl is {'; '.join(said)}." if said else "")
    first = rows.iloc[-len(set(rows["embedding"]))]
    if not first["low"] > 0.5:
        sentences.append("Its interval reaches chance: nothing was shown here.")
    return " ".join(filter(None, sentences))


def sizes(found: list[Found]) -> str:
    """How much smaller the vectors are than the slides."""
    lines = ["| cohort | slides | their files | their vectors | smaller by a factor of |", "|---|---|---|---|---|"]
    for one in found:
        count, dim = one.vectors
        held = count * dim * 4
        factor = f"{one.slide_bytes / held:,.0f}" if one.slide_bytes else "–"
        lines.append(
            f"| {one.cohort} | {count} | {one.slide_bytes / 1e6:.1f} MB | {held / 1e6:.2f} MB "
            f"({dim} numbers a slide, float32) | {factor} |"
        )
    return "\n".join(lines) + "\n\nThese slides are small; the vector of a slide is as long whatever the slide's size."


def pretence(split: pd.DataFrame) -> str:
    """The same vectors of the same lymphoma fields, split in two ways."""
    lines = ["| vectors | split by field | split by patient | too high by |", "|---|---|---|---|"]
    wide = {way: split[split["split"] == way].set_index("embedding") for way in ("by field", "by patient")}
    for name in wide["by field"].index:
        one, other = (rows.loc[name] for rows in wide.values())
        lines.append(f"| {name} | {cell(one)} | {cell(other)} | {points(one['auroc'] - other['auroc'])} |")
    return (
        f"The {split['n_slides'].iloc[0]} lymphoma fields are of {split['n_patients'].iloc[-1]} patients. Where a "
        "patient has fields on both sides of a split, a model may know the patient, by the stain, instead of the "
        "disease. *Colour and texture*: means, deviations, percentiles and differences of neighbours of five colour "
        "planes, and local binary patterns; no learning at all.\n\n"
        + "\n".join(lines)
        + "\n\nThe intervals by field are narrow for the same reason: they take each field for a patient of its own. "
        "`histossl probe` holds out whole patients, and `histossl audit` finds such a leak in any split."
    )


def cell(row: pd.Series, bold: bool = False) -> str:
    """.90 (.76–.99)"""
    value = f"**{share(row['auroc'])}**" if bold else share(row["auroc"])
    return f"{value} ({share(row['low'])}–{share(row['high'])})"


def difference(row: pd.Series) -> str:
    """+.05 (−.01 to +.11)"""
    low, high = (share(row[name], True) for name in ("difference_low", "difference_high"))
    return f"{share(row['difference'], True)} ({low} to {high})"


def share(value: float, sign: bool = False) -> str:
    if value != value:
        return "–"
    text = f"{abs(value):.2f}".removeprefix("0")
    return (("−" if value < 0 else "+") if sign else "") + text


def share3(value: float) -> str:
    """.975"""
    return f"{value:.3f}".replace("0.", ".", 1)


def points(value: float) -> str:
    return f"{'−' if value < 0 else '+'}{abs(100 * value):.1f}"


def draw_shots_picture(found: list[Found], path: Path) -> None:
    """AUROC over the number of labelled slides, a panel a target."""
    panels = [
        (f"{one.cohort}: {name}", rows)
        for one in found
        for name, rows in one.result.table.groupby("target", sort=False)
    ]
    figure = _figure(9.6, 3.2 * -(-len(panels) // 2))
    axes = figure.subplots(-(-len(panels) // 2), 2, sharey=True, squeeze=False).ravel()
    names = list(dict.fromkeys(name for _, rows in panels for name in rows["embedding"]))
    for ax, (title, rows) in zip(axes, panels, strict=False):
        counts = list(dict.fromkeys(rows["n_labelled"]))
        for k, name in enumerate(names):
            own = rows[rows["embedding"] == name]
            at = np.arange(len(own)) + (k - len(names) / 2) * 0.4 / len(names)
            # The eight colours that all eyes can tell apart are for the eight that come first.
            colour, strong = COLOURS[k] if k < len(COLOURS) else "#8B5A2B", 2.2 if k == 0 else 1.1
            ax.vlines(at, own["low"], own["high"], color=colour, linewidth=0.8, alpha=0.5)
            ax.plot(at, own["auroc"], color=colour, marker=MARKERS[k % len(MARKERS)], markersize=4, linewidth=strong,
                    linestyle="-" if k < len(COLOURS) else "--", label=named(name))  # fmt: skip
        ax.axhline(0.5, color="#999999", linewidth=0.8, linestyle=":")
        ax.set_xticks(range(len(counts)), counts)
        ax.set_xlim(-0.4, len(counts) - 0.6)
        ax.set(title=title, xlabel="labelled slides")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[::2]:
        ax.set_ylabel("AUROC")
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    _save(figure, path)


def draw_split_picture(split: pd.DataFrame, path: Path) -> None:
    """AUROC with its interval, by field and by patient, a row a kind of vectors."""
    names = list(dict.fromkeys(split["embedding"]))
    figure = _figure(7.5, 1.2 + 0.6 * len(names))
    ax = figure.subplots()
    for way, colour, marker, up in (("by field", "#D55E00", "o", -0.13), ("by patient", "#0072B2", "s", 0.13)):
        rows = split[split["split"] == way].set_index("embedding").loc[names]
        at = np.arange(len(names)) + up
        ax.hlines(at, rows["low"], rows["high"], color=colour, linewidth=1.6, alpha=0.6)
        ax.plot(rows["auroc"], at, color=colour, marker=marker, linestyle="", label=f"split {way}")
    ax.axvline(0.5, color="#999999", linewidth=0.8, linestyle=":")
    ax.text(0.5, -0.62, "chance", color="#777777", fontsize=8, ha="center")
    ax.set_yticks(range(len(names)), [named(name) for name in names])
    ax.set(xlabel="AUROC, 95 % interval", xlim=(min(0.4, split["low"].min() - 0.02), 1), ylim=(len(names) - 0.5, -0.7))
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    _save(figure, path)


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: Path) -> None:
    with whole(path) as part:
        figure.savefig(part, format="png", dpi=110)
