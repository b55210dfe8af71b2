"""The stages of a study, in order; each is a command, and `run` is all of them.

Every stage reads what the one before has written into the study's folder, keeps what stands, makes what is missing,
and returns how many things it had to leave out.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.torch import save_file

from histossl import store
from histossl.config import fingerprint, from_dict, to_dict
from histossl.console import progress_bar, say
from histossl.embeddings import read_embeddings, write_embeddings
from histossl.encode import EncodeJob, EncodeSettings, encode_fingerprint, encode_slides
from histossl.encoders.moco import TileSource, TileTrainSettings, pretrain_tiles, tiles_trained_on
from histossl.encoders.zoo import TileEncoder, fourth_stage, load_encoder, pick_device
from histossl.errors import HistosslError, StudyError
from histossl.evaluate.labels import read_labels
from histossl.evaluate.probe import ProbeSettings, write_probe
from histossl.evaluate.rivals import judge
from histossl.evaluate.sources import read_source
from histossl.gigassl.embed import EmbedSettings, embed_slide, mean_pool
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.pretrain import PretrainSettings, SlideSource, plain_tiles, pretrain_slides, trained_as
from histossl.parallel import first
from histossl.scale import Workers
from histossl.slide import find_slides
from histossl.study import COLUMNS, Row, Study, slide_names
from histossl.survey import SurveyJob, survey_fingerprint, survey_slide
from histossl.tiles import TileSpec
from histossl.tissue import TissueSettings

GIGA, MEAN, UNTRAINED = "giga-ssl", "mean pooling", "untrained encoder"


@dataclass(frozen=True)
class Laying:
    """How tissue is found and tiles are laid: the settings of `inspect`."""

    tissue: TissueSettings
    tile: TileSpec


def inspect_slides(
    study: Study, slides: Path, mpp_default: float | None, tissue: TissueSettings, tile: TileSpec, workers: Workers
) -> int:
    """Open every slide, find its tissue, lay its tiles: slides.csv, tiles/ and qc/. Returns the number of failures.

    Raises:
        SettingsError: `mpp_default` is out of range.
        StudyError: no slides, or a study made with other settings.
    """
    place = Path(os.path.abspath(slides))
    paths = [place] if place.is_file() else find_slides(place)
    if not paths:
        raise StudyError(f"{slides}: no slides in it", "give a folder of .svs, .tif, .ndpi, .mrxs, .png, .jpg, ...")
    study.settle("inspect", Laying(tissue, tile), study.folder / "tiles")
    rows = merge(study.slides(), paths)
    jobs: list[tuple[Row, SurveyJob]] = []
    for row in rows:
        mpp, wrong = _number(row["mpp"])
        if wrong:
            fail(row, f"slides.csv: mpp {row['mpp']!r} is not a number; correct it")
        elif not row["error"].startswith(NOT_OURS) and not _surveyed(study, row, mpp, tissue, tile):
            name, path = row["slide_id"], Path(row["path"])
            jobs.append((row, SurveyJob(name, path, mpp, mpp_default, tissue, tile, study.tiles(name), study.qc(name))))
    _survey(study, rows, jobs, workers)
    study.write_slides(rows)
    return report_failures(rows)


NOT_OURS = "not read: "  # how complaints begin that no opening of the slide can mend


def merge(known: list[Row], paths: list[Path]) -> list[Row]:
    """The rows of slides.csv for the slides at hand: what users wrote stays, new slides come, gone ones are marked."""
    by_path = {row["path"]: row for row in known}
    merged = []
    for path, (name, complaint) in zip(paths, slide_names(paths), strict=True):
        row = by_path.pop(str(path), dict.fromkeys(COLUMNS, "") | {"path": str(path)})
        row["slide_id"] = name
        if complaint or row["error"].startswith(NOT_OURS):
            fail(row, NOT_OURS + complaint if complaint else "")
        merged.append(row)
    for row in by_path.values():
        fail(row, f"{NOT_OURS}{Path(row['path']).name} is no longer there; put it back or delete its row")
        merged.append(row)
    return merged


def fail(row: Row, error: str) -> None:
    """Mark a slide as failed, with the reason."""
    row |= {"status": "failed", "error": error}


def _surveyed(study: Study, row: Row, mpp: float | None, tissue: TissueSettings, tile: TileSpec) -> bool:
    """Whether a slide's tiles stand, made of this very file with these settings and this mpp."""
    if mpp is None or row["status"] == "failed":
        return False
    try:
        made = survey_fingerprint(Path(row["path"]), mpp, tissue, tile)
    except HistosslError:
        return False
    return study.qc(row["slide_id"]).exists() and store.fingerprint_of(study.tiles(row["slide_id"])) == made


def _survey(study: Study, rows: list[Row], jobs: list[tuple[Row, SurveyJob]], workers: Workers) -> None:
    keeper = Keeper(study, rows)
    answers = workers.map(survey_slide, (job for _, job in jobs))
    with progress_bar("slides", len(jobs)) as bar:
        for (row, _), (_, answer) in zip(jobs, answers, strict=True):
            if isinstance(answer, Exception):
                fail(row, reason(answer))
            else:
                row |= {name: repr(value) for name, value in vars(answer).items()}
                row |= {"status": "inspected", "error": ""}
            bar.advance(1)
            keeper.tick()


class Keeper:
    """Writes slides.csv while a stage goes on, not more often than every few seconds: it may have 100,000 rows."""

    def __init__(self, study: Study, rows: list[Row], seconds: float = 5) -> None:
        self.study, self.rows, self.seconds = study, rows, seconds
        self.start = self.written = time.monotonic()

    def tick(self) -> float:
        """Write if it is time; returns the seconds since the start."""
        now = time.monotonic()
        if now - self.written > self.seconds:
            self.study.write_slides(self.rows)
            self.written = now
        return now - self.start


def reason(error: Exception) -> str:
    """An error as one line of slides.csv."""
    if isinstance(error, HistosslError):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())


def report_failures(rows: list[Row]) -> int:
    """One line on the screen for every failed slide; returns their number."""
    failed = [row for row in rows if row["status"] == "failed"]
    for row in failed:
        say(f"FAILED {row['error']}", "red")
    return len(failed)


def _number(text: str) -> tuple[float | None, bool]:
    """The number in a cell, None where it is empty; and whether it is not a number."""
    if not text.strip():
        return None, False
    try:
        return float(text), False
    except ValueError:
        return None, True


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
    fourth = fourth_stage(name)
    if fourth:
        with store.whole(study.fourth_stage) as part:
            save_file(fourth, part)
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


def encode_study(study: Study, encoder: TileEncoder, settings: EncodeSettings, workers: Workers) -> int:
    """Features and views of every inspected slide: features/ and views/. Returns the number of failures."""
    tile = from_dict(TileSpec, study.settings()["inspect"]["tile"])
    study.settle("encode", {"encoder": encoder.identity, **to_dict(settings)}, study.folder / "features")
    rows = study.slides()
    by_name = {row["slide_id"]: row for row in rows if row["status"] != "failed"}
    jobs = []
    for row in by_name.values():
        job = _encode_job(study, row, tile)
        row["status"] = "encoded" if _encoded(job, encoder, settings) else "inspected"
        if row["status"] == "inspected":
            jobs.append(job)
    total = sum(int(by_name[job.slide_id]["tiles"]) for job in jobs)
    done, keeper = 0, Keeper(study, rows)
    with progress_bar("tiles", total) as bar:
        for job, count, error in encode_slides(jobs, encoder, settings, workers):
            if error is not None:
                fail(by_name[job.slide_id], reason(error))
            elif _encoded(job, encoder, settings):
                by_name[job.slide_id]["status"] = "encoded"
            done += count
            bar.advance(count)
            bar.say(f"{done / keeper.tick():.0f} tiles/s, {job.slide_id}")
    study.write_slides(rows)
    return report_failures(rows)


def _encode_job(study: Study, row: Row, tile: TileSpec) -> EncodeJob:
    name = row["slide_id"]
    return EncodeJob(
        name, Path(row["path"]), float(row["mpp"]), tile, study.tiles(name), study.features(name), study.views(name)
    )


def _encoded(job: EncodeJob, encoder: TileEncoder, settings: EncodeSettings) -> bool:
    made = encode_fingerprint(store.fingerprint_of(job.tiles_path) or "", encoder, settings)
    products = [job.features_path, job.views_path] if settings.views else [job.features_path]
    return all(store.fingerprint_of(product) == made for product in products)


def pretrain_study(study: Study, settings: PretrainSettings, device: str) -> int:
    """Train the slide encoder on all encoded slides: slide-encoder/."""
    slides = [row["slide_id"] for row in study.encoded()]
    if first():
        study.settle("pretrain", settings, study.slide_encoder)
    of = fingerprint(study.settings().get("inspect"), study.settings().get("encode"))
    if study.slide_encoder.is_dir():
        about = trained_as(study.slide_encoder)
        if about["features"] != of:
            raise StudyError(
                f"{study.slide_encoder}: trained on other features than those that stand",
                f"use another --out, or remove {study.slide_encoder} to train anew",
            )
        new = len(set(slides) - set(about["slides"]))
        if new:
            say(f"slide-encoder/ was trained without {new} of {len(slides)} slides; remove it to train anew")
        return 0
    sources = [SlideSource(s, study.features(s), study.views(s)) for s in slides]
    pretrain_slides(sources, settings, study.slide_encoder, study.logs / "pretrain", of, device, study.fourth_stage)
    return 0


def embed_study(study: Study, settings: EmbedSettings, device: str) -> int:
    """One vector a slide, beside it the two baselines: embeddings.h5ad. Returns the number of failures."""
    where = pick_device(device)
    rows = study.slides()
    encoded = [row for row in rows if row["status"] == "encoded"]
    about = trained_as(study.slide_encoder)
    made = fingerprint(settings, about["fingerprint"], _features_made(study, encoded))
    if study.embeddings.exists() and read_embeddings(study.embeddings).fingerprint == made:
        return report_failures(rows)
    encoder = SlideEncoder.load(study.slide_encoder).to(where).eval()
    trained = from_dict(PretrainSettings, about["pretrain"])
    untrained = SlideEncoder(replace(encoder.settings, prototypes=0), seed=trained.seed).to(where).eval()
    # The strongest form of that rival: all tiles at once.
    all_tiles = replace(trained.view, tiles=2**31, windows=0)
    vectors: dict[str, list[np.ndarray]] = {GIGA: [], MEAN: [], UNTRAINED: []}
    with progress_bar("vectors", len(encoded)) as bar:
        for row in encoded:
            name = row["slide_id"]
            bar.advance(1)
            try:
                features, positions = plain_tiles(study.features(name))
            except HistosslError as error:
                fail(row, reason(error))
                continue
            for key, network, view in ((GIGA, encoder, trained.view), (UNTRAINED, untrained, all_tiles)):
                vectors[key].append(embed_slide(network, features, positions, view, settings, name))
            vectors[MEAN].append(mean_pool(features))
    study.write_slides(rows)
    kept = [row for row in encoded if row["status"] == "encoded"]
    if not kept:
        raise StudyError(f"{study.folder}: no slide could be embedded", "see slides.csv")
    study.note("embed", settings)
    write_embeddings(study.embeddings, kept, {n: np.stack(v) for n, v in vectors.items()}, study.settings(), made)
    return report_failures(rows)


def _features_made(study: Study, rows: list[Row]) -> list[list[str]]:
    """What the vectors depend on beside the encoder: each slide, its features, and what users wrote about it."""
    return [
        [row["slide_id"], row["patient_id"], str(store.fingerprint_of(study.features(row["slide_id"])))] for row in rows
    ]


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
    """One page of all that stands: report.html. The same study gives the same bytes, so no times stand in it."""
    from histossl.report.page import ReportInput, write_report
    from histossl.report.sheets import heatmaps_sheet, hits_sheet, nuclei_sheet

    slides = study.slides()
    vectors = read_embeddings(study.embeddings) if study.embeddings.exists() else None
    encoded = [row for row in slides if row["status"] == "encoded"]
    qc = {row["slide_id"]: study.qc(row["slide_id"]) for row in encoded}
    ids = [] if vectors is None else [str(name) for name in vectors.slides.index]
    patients = {row["slide_id"]: row["patient_id"] for row in slides}
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
            sheets=[sheet for sheet in sheets if sheet],
        ),
    )


def _probed_labels(study: Study) -> pd.DataFrame | None:
    """The labels that the probe used, one column a target, to colour the map of slides."""
    path = study.folder / "predictions.csv"
    if not path.exists():
        return None
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return table.drop_duplicates(["target", "slide_id"]).pivot(index="slide_id", columns="target", values="truth")
