"""Stage `embed`: encoded slides in, embeddings.h5ad out."""

from __future__ import annotations

import numpy as np

from histossl.core import fingerprints
from histossl.core.config import fingerprint
from histossl.core.console import progress_bar, say
from histossl.core.embeddings import read_embeddings, write_embeddings
from histossl.core.errors import SettingsError, StudyError
from histossl.encoders.external import hash_of
from histossl.execution.failures import failure, failure_reason, give_up_on_disk, report_failures
from histossl.execution.journal import Journal
from histossl.execution.workers import Executor
from histossl.gigassl.embed import EmbedSettings
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.encoder_settings import made_before
from histossl.gigassl.pretrain_settings import trained_as
from histossl.study.folder import COLUMNS, Row, Study
from histossl.study.remote_tasks import GIGA, MEAN, UNTRAINED, EmbedTask, vectors_of
from histossl.study.times import timed


@timed("embed")
def embed_study(study: Study, settings: EmbedSettings, device: str, executor: Executor) -> int:
    """Embed every slide, with two baselines: embeddings.h5ad.

    Args:
        study: the study, locked.
        settings: settings of the stage.
        device: auto, cpu or cuda.
        executor: runs the embedding of single slides.

    Returns:
        The number of slides that failed.
    """
    journal = Journal(study)
    rows = journal.rows
    encoded = {row["slide_id"]: row for row in rows if row["status"] == "encoded"}
    encoder = str(trained_as(study.slide_encoder)["fingerprint"])
    if old := made_before(study.slide_encoder):
        say(f"slide-encoder/ is used as it is; {old}; remove it and run `histossl pretrain` to train anew", "yellow")
    made = fingerprint(settings, encoder, _features_made(study, list(encoded.values())))
    if study.embeddings.exists() and read_embeddings(study.embeddings).fingerprint == made:
        return report_failures(rows)
    tasks = (EmbedTask(s, study.features(s), study.slide_encoder, encoder, settings, device) for s in encoded)
    vectors: dict[str, dict[str, np.ndarray]] = {}
    with progress_bar("vectors", len(encoded)) as bar:
        for task, answer in executor.map(vectors_of, tasks):
            bar.advance(1)
            if isinstance(answer, SettingsError):  # an encoder of other features: an error of the study, not of a slide
                raise answer
            if isinstance(answer, Exception):
                give_up_on_disk(answer)
                journal.write("embed", [(encoded[task.slide_id], failure(failure_reason(answer, task.features)))])
            else:
                vectors[task.slide_id] = answer
    journal.flush()
    kept = [name for name in encoded if name in vectors]
    if not kept:
        raise StudyError(f"{study.folder}: no slide could be embedded", "see slides.csv")
    study.note("embed", settings)
    table = {kind: np.stack([vectors[name][kind] for name in kept]) for kind in (GIGA, MEAN, UNTRAINED)}
    network = SlideEncoder.load(study.slide_encoder)
    stages = study.settings() | {"slide-encoder": {"sha256": hash_of(network)}}
    slides = [encoded[name] for name in kept]
    write_embeddings(study.embeddings, slides, table, stages, made, network.settings.part_names)
    return report_failures(rows)


def _features_made(study: Study, rows: list[Row]) -> list[list[str]]:
    """What the vectors depend on besides the encoder: each slide, its features, and what users wrote about it."""
    return [
        [row["slide_id"], row["patient_id"], str(fingerprints.fingerprint_of(study.features(row["slide_id"])))]
        + [f"{name}={text}" for name, text in row.items() if name not in COLUMNS and text]
        for row in rows
    ]
