"""Models at work elsewhere: `histossl predict` judges new slides by a saved probe, `export` hands models on."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from histossl.core import atomic, tables
from histossl.core.console import say
from histossl.core.errors import SettingsError


def predict(
    study: Path,
    slides: Path,
    *,
    probe: Path,
    out: Path,
    coverage: float = 0.9,
    encoder: str = "self",
    mpp_default: float | None = None,
    device: str = "auto",
) -> int:
    """Judge new slides by a saved probe: predictions.csv and a page a slide. For research: it makes no diagnosis.

    The slides are tiled, encoded and embedded as those of the study were. Each gets calibrated probabilities, a set of
    classes that holds the true one at the stated coverage, the nearest known patients, and a warning where it is
    unlike anything in the cohort.

    Args:
        study: the study whose encoders made the vectors that the probe learned from.
        slides: a folder of new slides, or one slide.
        probe: the saved probe of a target: STUDY/probe-model/TARGET, or a folder that `histossl export` wrote.
        out: the folder of a study of the new slides.
        coverage: share of new patients whose class the set should hold, in (0, 1).
        encoder: of tiles, where the study's is not its own: its name or path as of `histossl encode`.
        mpp_default: µm per pixel of slides that carry none.
        device: auto, cpu or cuda.
    """
    from histossl.evaluate.saved_probe import SavedProbe
    from histossl.study.folder import existing_study
    from histossl.study.predict_stage import check_encoder, embed_new, judge
    from histossl.view.report.prediction_page import write_prediction

    if not 0 < coverage < 1:
        raise SettingsError(f"--coverage {coverage}", "give a share between 0 and 1, such as 0.9")
    known, model = existing_study(study), SavedProbe.load(probe)
    check_encoder(known, model)
    new, failed = embed_new(known, slides, out, encoder, mpp_default, device)
    rows = []
    for found in judge(new, model, coverage, device):
        write_prediction(new.folder / "predictions" / f"{found.slide_id}.html", found, model, coverage)
        said = found.prediction
        row = {"slide_id": found.slide_id, "target": model.target, "set": " or ".join(said.chosen)}
        row |= {f"p({name})": p for name, p in said.probabilities.items()}
        row |= {"farther": said.farther, "unlike": said.unlike, "known": said.known}
        rows.append(row | {"nearest": said.nearest[0][0] if said.nearest else ""})
        if said.unlike:
            say(f"{found.slide_id} is unlike the cohort: do not rely on its prediction", "yellow")
    with atomic.whole(new.folder / "predictions" / "predictions.csv") as part:
        tables.write_frame(part, pd.DataFrame(rows))
    say(f"done: {new.folder / 'predictions'}, for research, no diagnosis", "green")
    return 1 if failed else 0


def export(study: Path, out: Path, *, what: str, target: str = "", licence: str = "") -> int:
    """Write a model with a card into a folder that other groups give by its path; names of slides are left out.

    Args:
        study: the folder of the study; for nuclei, the folder that `histossl nuclei train` wrote.
        out: the new folder.
        what: slide-encoder, tile-encoder, probe or nuclei.
        target: of a probe, its folder in probe-model/, where there are several.
        licence: under which the model is given, for the card.
    """
    from histossl.study.export_model import export_model

    digest = export_model(study, what, out, target, licence)
    say(f"done: {out}, SHA-256 {digest[:16]}…", "green")
    return 0
