"""One self-contained HTML page of what a kept probe says of new slides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

import histossl
from histossl.core.atomic import whole
from histossl.evaluate.fitted import FittedProbe
from histossl.evaluate.predict import UNLIKE, Predictions
from histossl.view.report.charts import small_picture
from histossl.view.report.short import named

NOT_A_DIAGNOSIS = (
    "Not a diagnosis: these are figures of a research model, and nobody has shown that they are right for a patient."
)
ROWS, SECTIONS = 1000, 200  # of the table, and with pictures


def write_predictions(
    path: Path, title: str, probe: FittedProbe, found: Predictions, pictures: Mapping[str, Mapping[str, Path]]
) -> None:
    """Write the page: it includes its style and pictures, loads nothing and runs no script.

    Args:
        path: the HTML file; whole or absent.
        title: of the page, such as the folder of the slides.
        probe: the probe.
        found: what it says.
        pictures: slide -> target -> picture of the heatmap; absent files are left out.

    Raises:
        OSError: the file cannot be written.
    """
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined
    )
    rows = [_row(row, probe) for row in found.table.to_dict("records")]
    strange = {row["name"] for row in rows if row["strange"]}
    of: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of.setdefault(row["name"], []).append(row)
    unit = "patients" if probe.settings.unit == "patient" else "slides"
    coverage = _percent(float(found.table["coverage"].dropna().max() or 0))
    page = environment.get_template("predicted.html.j2").render(
        title=title,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        lede=_lede(probe, len(of), unit),
        cautions=_cautions(probe, found, len(strange), unit, coverage),
        coverage=coverage,
        unit=unit.removesuffix("s"),
        rows=rows[:ROWS],
        more=max(0, len(rows) - ROWS),
        each=[_section(name, of[name], found, pictures) for name in list(of)[:SECTIONS]],
        targets=[one.target for one in probe.targets],
        method=_method(probe, coverage),
        version=histossl.__version__,
    )
    with whole(path) as part:
        # File names that are not Unicode contain surrogates, which UTF-8 cannot encode.
        part.write_bytes(page.encode("utf-8", "replace"))


def _row(row: Mapping[Any, Any], probe: FittedProbe) -> dict[str, Any]:
    """One slide and target, as text."""
    one = next(one for one in probe.targets if one.target == row["target"])
    told: dict[str, Any] = {"name": str(row["slide_id"]), "target": one.target, "shares": [], "p": ""}
    if one.kind == "classes":
        kept = str(row["set"]).split(" | ")
        told |= {"predicted": row["predicted"], "set": ", ".join(kept) or "none", "told": "the likeliest class"}
        p = {name: float(row[f"p({name})"]) for name in one.names}
        told["p"] = f"{p[row['predicted']]:.2f}"
        told["shares"] = [
            {"name": name, "p": f"{value:.2f}", "width": f"{100 * value:.1f}", "kept": name in kept}
            for name, value in p.items()
        ]
    elif one.kind == "numbers":
        bounds = f"{row['low']:.4g} to {row['high']:.4g}"
        told |= {"predicted": f"{row['predicted']:.4g}", "set": bounds, "told": bounds}
    else:
        ranked = f"a higher risk than {_percent(row['rank'])} of the known ones"
        told |= {"predicted": ranked, "set": "", "told": f"log hazard ratio {row['predicted']:.2f}; no interval"}
    return told | {"unlike": _percent(row["unlike"]), "strange": row["unlike"] <= UNLIKE}


def _section(
    name: str, rows: list[dict[str, Any]], found: Predictions, pictures: Mapping[str, Mapping[str, Path]]
) -> dict[str, Any]:
    targets = []
    for row in rows:
        there = [(slide, pictures.get(slide, {}).get(row["target"])) for slide in found.members[name]]
        shown = [{"slide": slide, "uri": small_picture(path, 640)} for slide, path in there if path and path.exists()]
        targets.append(row | {"pictures": shown})
    near = [{"patient": n.patient, "distance": f"{n.distance:.2f}", "labels": n.labels} for n in found.neighbours[name]]
    known = name in found.known
    return {"name": name, "targets": targets, "near": near, "known": known} | {
        key: rows[0][key] for key in ("unlike", "strange")
    }


def _lede(probe: FittedProbe, count: int, unit: str) -> str:
    patients = len(set(probe.patients.tolist()))
    names = ", ".join(one.target for one in probe.targets)
    return f"{count:,} {unit}, judged for {names} by a linear model on vectors of {patients:,} known patients."


def _cautions(probe: FittedProbe, found: Predictions, strange: int, unit: str, coverage: str) -> Sequence[str]:
    """What a reader should know, the gravest first."""
    lines = [NOT_A_DIAGNOSIS]
    if strange:
        lines.append(
            f"{strange} of the {unit} are unlike anything seen: at most {_percent(UNLIKE)} of the known patients lie "
            "as far off. Another scanner, stain or organ does that, and then no figure here holds."
        )
    if found.known:
        lines.append(f"{len(found.known)} of the {unit} are among those that the probe was fitted with.")
    if "slide-encoder" in probe.stages:
        lines.append(
            "Where the slide encoder learned on the known slides, without labels, new ones can look less far off than "
            "they are, the more so the fewer were known."
        )
    everything = [one.target for one in probe.targets if one.kind == "classes" and _always_all(found.table, one)]
    if everything:
        lines.append(f"Every set of {', '.join(everything)} holds all classes: the probe cannot exclude any.")
    lines.append(
        f"The coverage of {coverage} is that of new patients like the known ones, all together; it need not hold for "
        "each class, nor at another hospital."
    )
    return lines


def _always_all(table: pd.DataFrame, one: Any) -> bool:
    sets = table.loc[table["target"] == one.target, "set"]
    return len(sets) > 0 and all(len(str(text).split(" | ")) == len(one.names) for text in sets)


def _method(probe: FittedProbe, coverage: str) -> str:
    counts = ", ".join(
        f"{one.target} {len(one.rows):,} of {len(set(probe.patients[one.rows].tolist())):,} patients"
        for one in probe.targets
    )
    return (
        f"A linear model on vectors ({named(probe.embedding)}), fitted on all labelled slides ({counts}). In "
        f"{probe.settings.folds} folds of whole patients each was scored by a model of the others; on these scores "
        f"the probabilities were calibrated (Platt), and the limit of the sets set so that {coverage} of patients, "
        "each counted once, lie within (split conformal prediction). Distances are Euclidean between vectors whose "
        "numbers are standardised over the known slides; how far a slide lies off is its mean distance to the nearest "
        "five patients, compared with that of every known patient to the others."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
