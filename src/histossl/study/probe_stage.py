"""Stage `probe`: embeddings and labels in; probe.csv, probe.json, predictions.csv and probe/ out."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from histossl.core.console import say
from histossl.core.embeddings import write_labels
from histossl.evaluate.fitted import keep_probe
from histossl.evaluate.patients import labels_for, of_area
from histossl.evaluate.probe import write_probe
from histossl.evaluate.rivals import probe_with_rivals
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.sources import read_source
from histossl.evaluate.summary import show_probe
from histossl.study.folder import Study
from histossl.study.times import timed


@timed("probe")
def probe_study(study: Study, labels: Path, settings: ProbeSettings) -> int:
    """Logistic regression on the vectors and on the baselines: probe.csv, probe.json, predictions.csv, probe/.

    Args:
        study: the study, with embeddings.
        labels: the table of labels.
        settings: settings of the probe.

    Returns:
        The number of complaints about the labels.

    Raises:
        FileFormatError: the study has no embeddings.
        LabelError: the labels cannot be used, see `read_labels`.
    """
    source = of_area(read_source(study.embeddings), settings.area)
    table = labels_for(source, labels, settings)
    for line in (*source.notes, *table.notes):
        say(f"note: {line}", "yellow")
    for line in table.suspicions:
        say(f"SUSPECT {line}", "yellow")
    result = probe_with_rivals(source, table, settings, study.logs / "rivals")
    study.note("probe", settings)
    write_probe(result, study.folder)
    keep_probe(source, table, settings, study.probe)
    people = {str(slide): str(name) for slide, name in table.table["patient_id"].items() if name != slide}
    write_labels(study.embeddings, people, pd.DataFrame(table.table, columns=pd.Index(table.targets)))
    show_probe((result.table, result.numbers, result.survival), result.audit, study.folder)
    for line in result.complaints:
        say(f"LEFT OUT {line.removeprefix('left out: ')}", "yellow")
    return len(result.complaints)
