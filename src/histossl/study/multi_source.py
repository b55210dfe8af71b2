"""Studies of several sources, such as two tile encoders or two magnifications: STUDY/source-1, source-2, ...

Each source is itself a study, which `heatmap`, `view` and `embed` accept. The slide encoders of all sources are trained
together, and STUDY has one vector per slide.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histossl.core.config import fingerprint
from histossl.core.console import say
from histossl.core.embeddings import Embeddings, read_embeddings, write_embeddings
from histossl.core.errors import StudyError
from histossl.core.names import folded
from histossl.execution.workers import Executor
from histossl.gigassl.embed import EmbedSettings
from histossl.gigassl.pretrain_settings import PretrainSettings, trained_as
from histossl.gigassl.towers import Features, pretrain_towers
from histossl.study.embed_stage import embed_study
from histossl.study.folder import COLUMNS, Row, Study
from histossl.study.import_features import import_features, take_encoder
from histossl.study.import_file import FeatureOrigin
from histossl.study.pretrain_stage import SlideSources, features_fingerprint, is_trained
from histossl.study.remote_tasks import GIGA, MEAN, UNTRAINED
from histossl.study.times import timed
from histossl.training.distributed import is_rank_zero
from histossl.training.loop import end_of_training


def import_sources(study: Study, origins: Sequence[FeatureOrigin], spatial: bool, executor: Executor) -> int:
    """Import folders of features as the sources of a study; slides are matched by the names of their files.

    A slide need not be in all sources. Users may edit patient_id in STUDY/slides.csv, and mpp in slides.csv of the
    sources.

    Args:
        study: the study, locked; empty, or imported from the same folders before.
        origins: the features of each source, in order.
        spatial: whether the slide encoders need coordinates; if not, files without them are accepted.
        executor: reads the files.

    Returns:
        The number of files that were left out.

    Raises:
        StudyError: as of `import_features`, or the study was made from other data.
        FileFormatError: as of `import_features`.
    """
    if not study.sources and study.slides():
        raise StudyError(f"{study.folder}: made from slides or from one folder of features", "use another --out")
    folders = [os.path.abspath(origin.folder) for origin in origins]
    about = {"adopted": folders, "stride": origins[0].stride, "mpp": origins[0].mpp}
    study.settle("encode", about, study.folder / "source-1")
    failed = 0
    for number, origin in enumerate(origins, 1):
        part = study.source(number)
        with part.lock():
            failed += import_features(part, origin, spatial, executor)
    rows = _united(study)
    study.write_slides(rows)
    shown = {part.folder.name: sum(row["status"] == "encoded" for row in part.slides()) for part in study.sources}
    say(f"{len(rows)} slides: {', '.join(f'{count} in {name}' for name, count in shown.items())}")
    return failed


def _united(study: Study) -> list[Row]:
    """One row per slide, of the first source that has its features; what users wrote into the study's table is kept."""
    found: dict[str, Row] = {}
    spelt: dict[str, str] = {}
    for part in study.sources:
        for row in part.slides():
            name = spelt.setdefault(folded(row["slide_id"]), row["slide_id"])
            if name not in found or (found[name]["status"] != "encoded" and row["status"] == "encoded"):
                found[name] = dict(row) | {"slide_id": name}
    for row in study.slides():
        if row["slide_id"] in found:
            more = {name: text for name, text in row.items() if name == "patient_id" or name not in COLUMNS}
            found[row["slide_id"]] |= {name: text for name, text in more.items() if text}
    return [found[name] for name in sorted(found)]


@timed("pretrain")
def pretrain_sources(study: Study, settings: PretrainSettings, device: str) -> int:
    """Train the slide encoders of all sources together: STUDY/source-1/slide-encoder and so on.

    Args:
        study: the study, with the features of its sources.
        settings: settings of the training.
        device: auto, cpu or cuda.

    Returns:
        0, the number of failures.

    Raises:
        StudyError: the study was trained with other settings.
        TrainingError: the training fails.
    """
    parts = study.sources
    slides = [[row["slide_id"] for row in part.encoded()] for part in parts]
    if is_rank_zero():
        study.settle("pretrain", settings, parts[0].slide_encoder)
    trained = [is_trained(part, names) for part, names in zip(parts, slides, strict=True)]
    logs = study.logs / "pretrain"
    if all(trained):
        end_of_training(logs)  # a kill may have come between the encoders and this
        return 0
    sources = [
        Features(SlideSources(part, names), features_fingerprint(part), part.slide_encoder)
        for part, names in zip(parts, slides, strict=True)
    ]
    pretrain_towers(sources, settings, logs, device)
    return 0


def take_encoders(study: Study, weights: Path) -> None:
    """Use the slide encoders of another study of several sources.

    Args:
        study: the study, with its sources.
        weights: folder of the other study, with as many sources in the same order.

    Raises:
        StudyError: the numbers of sources differ, or this study already has other slide encoders.
        FileFormatError: a slide encoder cannot be read.
    """
    others = [folder / "slide-encoder" for folder in sorted(weights.glob("source-*"), key=lambda p: (len(p.name), p))]
    if len(others) != len(study.sources):
        what = f"{weights}: slide encoders of {len(others)} sources for {len(study.sources)} folders of features"
        raise StudyError(what, "give the folder of a study that was made from as many, in the same order")
    for part, other in zip(study.sources, others, strict=True):
        take_encoder(part, other)


@timed("embed")
def embed_sources(study: Study, settings: EmbedSettings, device: str, executor: Executor) -> int:
    """Embed each source, and merge the vectors to one per slide: embeddings.h5ad; see `merge_vectors`.

    Args:
        study: the study, with trained sources.
        settings: settings of the embedding.
        device: auto, cpu or cuda.
        executor: runs the embedding of single slides.

    Returns:
        The number of slides that failed, over all sources.

    Raises:
        StudyError: the slide encoders were not trained together, or a source is in use by another run.
    """
    parts, failed = study.sources, 0
    with ExitStack() as held:
        for part in parts:
            held.enter_context(part.lock())
            failed += embed_study(part, settings, device, executor)
    study.note("embed", settings)
    rows = _united(study)
    study.write_slides(rows)
    found = [read_embeddings(part.embeddings) for part in parts]
    shown = {str(name) for one in found for name in one.slides.index}
    rows = [row for row in rows if row["slide_id"] in shown]
    made = fingerprint([one.fingerprint for one in found], [[row["slide_id"], row["patient_id"]] for row in rows])
    if study.embeddings.exists() and read_embeddings(study.embeddings).fingerprint == made:
        return failed
    dims = {trained_as(part.slide_encoder)["pretrain"]["encoder"]["dim"] for part in parts}
    if len(dims) > 1:
        raise StudyError(f"{study.folder}: its slide encoders were not trained together", "remove their folders")
    ids = [row["slide_id"] for row in rows]
    table = {
        kind: merge_vectors(found, kind, ids, 0 if kind == MEAN else min(dims)) for kind in (GIGA, MEAN, UNTRAINED)
    }
    shared = ("stage",) * min(dims)
    names = shared + tuple(f"{name} {k}" for k, one in enumerate(found, 1) for name in one.parts[len(shared) :])
    names = names if all(one.parts for one in found) else ()
    weights = [one.settings.get("slide-encoder", {}).get("sha256") for one in found]
    stages = study.settings() | {"slide-encoder": {"sha256": weights}}
    write_embeddings(study.embeddings, rows, table, stages, made, names)
    return failed


def merge_vectors(sources: Sequence[Embeddings], kind: str, ids: Sequence[str], shared: int) -> NDArray[np.float32]:
    """Merge the vectors of several sources to one vector per slide.

    The first `shared` numbers are comparable between sources: their mean is taken over the sources that have the slide.
    The further numbers of all sources follow, zeros where a source does not have the slide. If numbers are shared, the
    vectors are scaled to length 1.

    Args:
        sources: the embeddings of each source.
        kind: name of the vectors to merge.
        ids: slide ids; each is in at least one source.
        shared: how many leading numbers all sources share.

    Returns:
        (len(ids), d) float32.
    """
    at = {name: row for row, name in enumerate(ids)}
    common, count, own = np.zeros((len(ids), shared)), np.zeros((len(ids), 1)), []
    for source in sources:
        names = [str(name) for name in source.slides.index]
        rows, kept = np.array([(at[n], k) for k, n in enumerate(names) if n in at], int).reshape(-1, 2).T
        values = source.vectors[kind][kept]
        common[rows] += values[:, :shared]
        count[rows] += 1
        alone = np.zeros((len(ids), values.shape[1] - shared))
        alone[rows] = values[:, shared:]
        own.append(alone)
    vectors = np.hstack([common / count, *own])
    if shared:
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors.astype(np.float32)
