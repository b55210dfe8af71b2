"""The stages of a study, in order; each is a command, and `run` is all of them.

Every stage reads what the one before has written into the study's folder, keeps what stands, makes what is missing,
and returns how many things it had to leave out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import overload

import numpy as np
import pandas as pd
from safetensors.torch import save

from histossl import store
from histossl.cohort import Standing, failure, give_up_on_disk, reason, report_failures
from histossl.config import fingerprint, from_dict, to_dict
from histossl.console import progress_bar, say
from histossl.embeddings import read_embeddings, write_embeddings
from histossl.encode import EncodeJob, EncodeSettings, Step, encode_fingerprint
from histossl.encoders.learn import TileTrainSettings, pretrain_tiles
from histossl.encoders.stream import TileSource, tiles_trained_on
from histossl.encoders.zoo import TileEncoder, fourth_stage, load_encoder
from histossl.errors import SettingsError, StudyError
from histossl.evaluate.labels import read_labels
from histossl.evaluate.probe import ProbeSettings, write_probe
from histossl.evaluate.rivals import judge
from histossl.evaluate.sources import read_source
from histossl.gigassl.embed import EmbedSettings
from histossl.gigassl.encoder import made_before, parts_of
from histossl.gigassl.pretrain import PretrainSettings, SlideSource, pretrain_slides, trained_as
from histossl.ledger import Ledger, Shift
from histossl.pace import Pace
from histossl.parallel import first
from histossl.scale import Place, Workers
from histossl.study import COLUMNS, Row, Study
from histossl.tasks import GIGA, MEAN, UNTRAINED, EmbedTask, vectors_of
from histossl.tiles import TileSpec
from histossl.times import stage_times, timed


def encoder_of(
    study: Study, name: str, training: TileTrainSettings, encode: EncodeSettings, workers: Workers, device: str
) -> TileEncoder:
    """The tile encoder of a study: by name, or for `self` the one in tile-encoder/, trained if it is not there.

    Of a whole ResNet-18 the fourth stage is kept in the study, for a slide encoder that begins with it.

    Raises:
        FileFormatError, SettingsError, TrainingError: see `load_encoder` and `pretrain_tiles`.
    """
    if name == "self":
        _pretrain_tiles(study, training, workers, device)
        name = str(study.tile_encoder)
    found = load_encoder(name, encode.seed, device, encode.precision)
    shown = study.settings().get("inspect", {}).get("tile", {}).get("mpp")
    if found.mpp and shown and not 0.9 < found.mpp / shown < 1.1:
        say(f"{name} was trained on tiles of {found.mpp:g} µm per pixel, these are of {shown:g} (--tile.mpp)", "yellow")
    fourth = fourth_stage(name)
    if fourth:
        with store.whole(study.fourth_stage) as part:
            part.write_bytes(save(fourth))
    else:
        study.fourth_stage.unlink(missing_ok=True)
    return found


def _pretrain_tiles(study: Study, settings: TileTrainSettings, workers: Workers, device: str) -> None:
    study.settle("tile-encoder", settings, study.tile_encoder)
    slides = [row for row in study.slides() if row["status"] != "failed"]
    if study.tile_encoder.is_dir():
        new = len({row["slide_id"] for row in slides} - tiles_trained_on(study.tile_encoder))
        if new:
            say(f"tile-encoder/ was trained without {new} of {len(slides)} slides; remove it to train anew")
        return
    tile = from_dict(TileSpec, study.settings()["inspect"]["tile"])
    sources = [
        TileSource(row["slide_id"], Path(row["path"]), float(row["mpp"]), tile, study.tiles(row["slide_id"]))
        for row in slides
    ]
    unread = pretrain_tiles(sources, settings, study.tile_encoder, study.logs / "tile-encoder", workers, device)
    for complaint in unread.values():
        say(f"LEFT OUT of the training of tiles: {complaint}", "yellow")


def encode_study(
    study: Study,
    encoder: TileEncoder,
    settings: EncodeSettings,
    encoded: Callable[[Iterator[EncodeJob]], Iterator[Step]],
) -> int:
    """Features and views of every inspected slide: features/ and views/. Returns the number of failures.

    Args:
        study: shared or held alone.
        encoder: of tiles.
        settings: of the stage.
        encoded: encodes slides with these, somewhere: what happens to each.
    """
    tile = from_dict(TileSpec, study.settings()["inspect"]["tile"])
    study.settle("encode", {"encoder": encoder.identity, **to_dict(settings)}, study.folder / "features")
    ledger = Ledger(study)
    rows = ledger.rows
    jobs, changes = _to_encode(study, rows, tile, encoder, settings)
    ledger.write("check", changes)
    total = sum(int(row["tiles"]) for row, _ in jobs)
    pace = Pace("GPU" if encoder.device.type == "cuda" else "CPU")
    with Shift(ledger, "encode", jobs) as shift, progress_bar("tiles", total) as bar:
        for mine in shift.rounds():
            for step in encoded(mine):
                pace.add(step.tiles, step.waited, step.read, step.cpu)
                name = step.job.slide_id
                if step.error is not None:
                    give_up_on_disk(step.error)
                    shift.finish(name, failure(reason(step.error, step.job.path)))
                elif step.finished:
                    shift.finish(name, _encoded_row(step), lost=step.lost, limit=pace.limit)
                bar.advance(step.tiles + sum(int(row["tiles"]) for row in shift.listen()))
                bar.say(f"{pace.rate:.0f} tiles/s, {name}, {pace.limit}")
    return report_failures(rows)


def _encoded_row(step: Step) -> Row:
    lost = f"{step.job.path.name}: {step.lost} tiles cannot be decoded and are left out: {step.why}"
    return {"status": "encoded", "error": lost if step.lost else "", "made": step.made}


def _to_encode(
    study: Study, rows: list[Row], tile: TileSpec, encoder: TileEncoder, settings: EncodeSettings
) -> tuple[list[tuple[Row, EncodeJob]], list[tuple[Row, Row]]]:
    """(The slides that are not encoded, the changes of rows that are not true of what stands)."""
    stand, key = Standing(study), encode_fingerprint("", encoder, settings)
    jobs, changes = [], []
    for row in rows:
        if row["status"] == "failed":
            continue
        name = row["slide_id"]
        there = stand("features", f"{name}.h5") and (not settings.views or stand("views", name))
        if there and row["status"] == "encoded" and row["made"].endswith(key):
            continue
        job = EncodeJob(
            name, Path(row["path"]), float(row["mpp"]), tile, study.tiles(name), study.features(name), study.views(name)
        )
        made = _encoded(job, encoder, settings) if there else ""
        if made:
            changes.append((row, {"status": "encoded", "made": made}))
        else:
            jobs.append((row, job))
            if row["status"] == "encoded":
                changes.append((row, {"status": "inspected", "made": row["made"].partition("-")[0]}))
    return jobs, changes


def _encoded(job: EncodeJob, encoder: TileEncoder, settings: EncodeSettings) -> str:
    """The fingerprint of a slide's products where they stand, of these tiles and settings; or an empty one."""
    made = encode_fingerprint(store.fingerprint_of(job.tiles_path) or "", encoder, settings)
    products = [job.features_path, job.views_path] if settings.views else [job.features_path]
    return made if all(store.fingerprint_of(product) == made for product in products) else ""


class SlideSources(Sequence[SlideSource]):
    """Where the tiles of a study's slides come from, told when it is asked for: a million of them would fill memory."""

    def __init__(self, study: Study, names: Sequence[str]) -> None:
        self.study, self.names = study, names

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, at: int) -> SlideSource: ...
    @overload
    def __getitem__(self, at: slice) -> SlideSources: ...
    def __getitem__(self, at: int | slice) -> SlideSource | SlideSources:
        if isinstance(at, slice):
            return SlideSources(self.study, self.names[at])
        name = self.names[at]
        return SlideSource(name, self.study.features(name), self.study.views(name))


@timed("pretrain")
def pretrain_study(study: Study, settings: PretrainSettings, device: str) -> int:
    """Train the slide encoder on all encoded slides: slide-encoder/."""
    slides = [row["slide_id"] for row in study.encoded()]
    if first():
        study.settle("pretrain", settings, study.slide_encoder)
    if stands_trained(study, slides):
        return 0
    sources, of, logs = SlideSources(study, slides), learned_from(study), study.logs / "pretrain"
    pretrain_slides(sources, settings, study.slide_encoder, logs, of, device, study.fourth_stage)
    return 0


def learned_from(study: Study) -> str:
    """The fingerprint of the features of a study, as far as its settings make them."""
    return fingerprint(study.settings().get("inspect"), study.settings().get("encode"))


def stands_trained(study: Study, slides: Sequence[str]) -> bool:
    """Whether a slide encoder stands; says how many of the encoded slides it was trained without.

    Raises:
        StudyError: it was trained on other features.
    """
    if not study.slide_encoder.is_dir():
        return False
    about = trained_as(study.slide_encoder)
    if about["features"] != learned_from(study):
        raise StudyError(
            f"{study.slide_encoder}: trained on other features than those that stand",
            f"use another --out, or remove {study.slide_encoder} to train anew",
        )
    new = len(set(slides) - set(about["slides"]))
    if new:
        say(f"slide-encoder/ was trained without {new} of {len(slides)} slides; remove it to train anew")
    return True


@timed("embed")
def embed_study(study: Study, settings: EmbedSettings, device: str, place: Place) -> int:
    """One vector a slide, beside it the two baselines: embeddings.h5ad. Returns the number of failures.

    Args:
        study: held alone.
        settings: of the stage.
        device: auto, cpu or cuda.
        place: where slides are embedded.
    """
    ledger = Ledger(study)
    rows = ledger.rows
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
        for task, answer in place.map(vectors_of, tasks):
            bar.advance(1)
            if isinstance(answer, SettingsError):  # an encoder of other features: no slide is to blame
                raise answer
            if isinstance(answer, Exception):
                give_up_on_disk(answer)
                ledger.write("embed", [(encoded[task.slide_id], failure(reason(answer, task.features)))])
            else:
                vectors[task.slide_id] = answer
    ledger.flush()
    kept = [name for name in encoded if name in vectors]
    if not kept:
        raise StudyError(f"{study.folder}: no slide could be embedded", "see slides.csv")
    study.note("embed", settings)
    table = {kind: np.stack([vectors[name][kind] for name in kept]) for kind in (GIGA, MEAN, UNTRAINED)}
    parts = parts_of(study.slide_encoder)
    write_embeddings(study.embeddings, [encoded[name] for name in kept], table, study.settings(), made, parts)
    return report_failures(rows)


def _features_made(study: Study, rows: list[Row]) -> list[list[str]]:
    """What the vectors depend on beside the encoder: each slide, its features, and what users wrote about it."""
    return [
        [row["slide_id"], row["patient_id"], str(store.fingerprint_of(study.features(row["slide_id"])))] for row in rows
    ]


@timed("probe")
def probe_study(study: Study, labels: Path, settings: ProbeSettings) -> int:
    """Logistic regression on the vectors and on the baselines: probe.csv, probe.json, predictions.csv.

    Returns the number of complaints about the labels.
    """
    source = read_source(study.embeddings)
    table = read_labels(labels, source.ids, settings.targets, source.patients)
    result = judge(source, table, settings, study.logs / "rivals")
    study.note("probe", settings)
    write_probe(result, study.folder)
    for line in result.audit:
        say(line)
    for line in result.complaints:
        say(f"LEFT OUT {line}", "yellow")
    return len(result.complaints)


def report_study(study: Study) -> None:
    """One page of all that stands: report.html. The same study gives the same bytes, but for the times of its runs."""
    from histossl.report.page import ReportInput, write_report
    from histossl.report.sheets import heatmaps_sheet, hits_sheet, nuclei_sheet

    patients = study.patients()
    slides = [row | {"patient_id": patients.get(row["slide_id"], "")} for row in study.slides()]
    vectors = read_embeddings(study.embeddings) if study.embeddings.exists() else None
    encoded = [row for row in slides if row["status"] == "encoded"]
    qc = {row["slide_id"]: study.qc(row["slide_id"]) for row in encoded}
    ids = [] if vectors is None else [str(name) for name in vectors.slides.index]
    alike = None if vectors is None else hits_sheet(vectors.vectors[GIGA], ids, patients, qc)
    sheets = alike, heatmaps_sheet(study.folder), nuclei_sheet(study.folder)
    probed = study.folder / "probe.json"
    log = study.logs / "pretrain" / "log.csv"
    write_report(
        study.report,
        ReportInput(
            title=study.folder.resolve().name,
            slides=pd.DataFrame(slides, columns=pd.Index(COLUMNS)),
            qc=qc,
            training=pd.read_csv(log) if log.exists() else None,
            vectors=None if vectors is None else vectors.vectors[GIGA],
            ids=ids,
            labels=_probed_labels(study),
            probe=json.loads(probed.read_text(encoding="utf-8")) if probed.exists() else None,
            slide_bytes=sum(os.path.getsize(row["path"]) for row in encoded if os.path.exists(row["path"])),
            settings=study.settings(),
            versions={
                name: metadata.version(name) for name in ("histossl", "torch", "scikit-learn", "openslide-python")
            },
            durations=stage_times(study),
            sheets=[sheet for sheet in sheets if sheet],
        ),
    )


def _probed_labels(study: Study) -> pd.DataFrame | None:
    """The labels that the probe used, one column a target, to colour the map of slides."""
    path = study.folder / "predictions.csv"
    if not path.exists():
        return None
    table = pd.DataFrame(store.read_rows(path))
    return table.drop_duplicates(["target", "slide_id"]).pivot(index="slide_id", columns="target", values="truth")
