"""Stage `probe`: embeddings and labels in; probe.csv, probe.json and predictions.csv out."""

from __future__ import annotations

from pathlib import Path

from histossl.core.console import say
from histossl.evaluate.labels import read_labels
from histossl.evaluate.probe import write_probe
from histossl.evaluate.rivals import probe_with_rivals
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.sources import read_source
from histossl.study.folder import Study
from histossl.study.times import timed


@timed("probe")
def probe_study(study: Study, labels: Path, settings: ProbeSettings) -> int:
    """Logistic regression on the vectors and on the baselines: probe.csv, probe.json, predictions.csv.

    Returns the number of complaints about the labels.
    """
    source = read_source(study.embeddings)
    table = read_labels(labels, source.ids, settings.targets, source.patients)
    for line in (*source.notes, *table.notes):
        say(f"note: {line}", "yellow")
    result = probe_with_rivals(source, table, settings, study.logs / "rivals")
    study.note("probe", settings)
    write_probe(result, study.folder)
    for line in result.audit:
        say(line)
    for line in result.complaints:
        say(f"LEFT OUT {line}", "yellow")
    return len(result.complaints)
