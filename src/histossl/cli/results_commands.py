"""The commands that show what a study found, as pictures and as a page."""

from __future__ import annotations

from pathlib import Path

from histossl.cli.first_look import exit_code, look_at_labels, look_for_device
from histossl.core.console import say
from histossl.evaluate.settings import ProbeSettings
from histossl.study.folder import existing_study


def heatmap(
    study: Path,
    *,
    labels: Path,
    slides: tuple[str, ...] = (),
    probe: ProbeSettings = ProbeSettings(),
    device: str = "auto",
) -> int:
    """Every tile's exact share of a linear probe's score: heatmaps/TARGET/SLIDE.csv, .geojson for QuPath and .png.

    The shares of a slide's tiles add up to its logit. Each slide is judged by a probe that no slide of its patient
    taught, those without a label by one that all others did.

    Args:
        study: the folder of the study.
        labels: a CSV with slide_id, optionally patient_id, and label.
        slides: slide ids; by default all.
        probe: how the classifier is trained; its first repeat is explained.
        device: auto, cpu or cuda.
    """
    opened = existing_study(study)
    look_at_labels(labels, probe)
    look_for_device(device)
    from histossl.study.heatmaps import heatmaps_study

    with opened.lock():
        return exit_code(heatmaps_study(opened, labels, probe, slides, device))


def report(study: Path) -> int:
    """One self-contained page of all that stands in the study: report.html.

    Args:
        study: the folder of the study.
    """
    opened = existing_study(study)
    from histossl.view.report.study_report import report_study

    with opened.lock():
        report_study(opened)
    say(f"done: {opened.report}", "green")
    return 0
