"""The page of one slide that a saved probe has judged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

import histossl
from histossl.core.atomic import whole
from histossl.view.report.charts import small_picture

if TYPE_CHECKING:
    from histossl.evaluate.saved_probe import SavedProbe
    from histossl.study.predict_stage import Judged


def write_prediction(path: Path, judged: Judged, probe: SavedProbe, coverage: float) -> None:
    """Write the page: HTML that loads nothing and runs no script; names are escaped.

    Args:
        path: the HTML file; whole or absent.
        judged: the slide and what is said of it.
        probe: the probe that said it.
        coverage: of the conformal set, in (0, 1).

    Raises:
        OSError: the file cannot be written, or a picture cannot be read.
    """
    folder, said = Path(__file__).parent, judged.prediction
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("prediction.html.j2").render(
        slide=judged.slide_id,
        target=probe.target,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        coverage=coverage,
        probabilities=said.probabilities,
        chosen=said.chosen,
        unlike=said.unlike,
        farther=said.farther,
        known=said.known,
        nearest=said.nearest,
        heatmap=small_picture(judged.heatmap, 1200) if judged.heatmap else None,
        thumbnail=small_picture(judged.thumbnail, 800) if judged.thumbnail else None,
        taught_by=probe.score.taught_by,
        calibrated_on=probe.about.get("calibrated_on", "held-out patients"),
        version=histossl.__version__,
    )
    with whole(path) as part:
        part.write_bytes(page.encode("utf-8", "replace"))
