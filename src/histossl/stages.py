"""The stages of a study, in order; each is a command, and `run` is all of them.

Every stage reads what the one before has written into the study's folder, keeps what stands, makes what is missing,
and returns how many things it had to leave out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from histossl import store
from histossl.config import fingerprint, from_dict, to_dict
from histossl.console import progress_bar, say
from histossl.embeddings import read_embeddings, write_embeddings
from histossl.encode import EncodeJob, EncodeSettings, encode_fingerprint, encode_slides
from histossl.encoders.zoo import TileEncoder, pick_device
from histossl.errors import HistosslError, StudyError
from histossl.evaluate.labels import read_labels
from histossl.evaluate.probe import ProbeSettings, probe, write_probe
from histossl.gigassl.embed import EmbedSettings, embed_slide, mean_pool
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.pretrain import PretrainSettings, SlideSource, plain_tiles, pretrain_slides, trained_as
from histossl.scale import Workers
from histossl.slide import find_slides
from histossl.study import Study, slide_names
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
    paths = find_slides(Path(os.path.abspath(slides)))
    if not paths:
        raise StudyError(f"{slides}: no slides in it", "give a folder of .svs, .tif, .ndpi, .mrxs, .png, .jpg, ...")
    study.settle("inspect", Laying(tissue, tile), study.folder / "tiles")
    table = merge(study.slides(), paths)
    done = set(_standing(study, table, tissue, tile))
    table.loc[[k for k in table.index if k not in done and table.at[k, "status"] != "failed"], "status"] = "failed"
    jobs = {}
    for k in table.index.difference(list(done)):
        row = table.loc[k]
        if row["error"].startswith(NOT_OURS):
            continue
        mpp, wrong = _number(row["mpp"])
        if wrong:
            table.loc[k, ["status", "error"]] = "failed", f"slides.csv: mpp {row['mpp']!r} is not a number; correct it"
            continue
        name = row["slide_id"]
        jobs[k] = SurveyJob(name, Path(row["path"]), mpp, mpp_default, tissue, tile, study.tiles(name), study.qc(name))
    _survey(study, table, jobs, workers)
    study.write_slides(table)
    return report_failures(table)


NOT_OURS = "not read: "  # how complaints begin that no opening of the slide can mend


def merge(known: pd.DataFrame, paths: list[Path]) -> pd.DataFrame:
    """The rows of slides.csv for the slides at hand: what users wrote stays, new slides come, gone ones are marked."""
    rows = {row["path"]: row.to_dict() for _, row in known.iterrows()}
    merged = []
    for path, (name, complaint) in zip(paths, slide_names(paths), strict=True):
        row = rows.pop(str(path), dict.fromkeys(known.columns, "") | {"path": str(path)})
        row["slide_id"] = name
        if complaint:
            row |= {"status": "failed", "error": NOT_OURS + complaint}
        elif row["error"].startswith(NOT_OURS):
            row |= {"status": "failed", "error": ""}
        merged.append(row)
    for row in rows.values():
        gone = f"{NOT_OURS}{Path(row['path']).name} is no longer there; put it back or delete its row"
        merged.append(row | {"status": "failed", "error": gone})
    return pd.DataFrame(merged, columns=known.columns).astype(str)


def _standing(study: Study, table: pd.DataFrame, tissue: TissueSettings, tile: TileSpec) -> Iterable[int]:
    """Rows whose tiles stand, made of this very file with these settings and this mpp."""
    for k, row in table.iterrows():
        mpp, _ = _number(row["mpp"])
        if mpp is None or row["error"].startswith(NOT_OURS):
            continue
        try:
            made = survey_fingerprint(Path(row["path"]), mpp, tissue, tile)
        except HistosslError:
            continue
        if store.fingerprint_of(study.tiles(row["slide_id"])) == made:
            yield int(str(k))


def _survey(study: Study, table: pd.DataFrame, jobs: dict[int, SurveyJob], workers: Workers) -> None:
    order = list(jobs)
    written = time.monotonic()
    with progress_bar("slides", len(jobs)) as bar:
        for k, (_, answer) in zip(order, workers.map(survey_slide, jobs.values()), strict=True):
            if isinstance(answer, Exception):
                table.loc[k, ["status", "error"]] = "failed", reason(answer)
            else:
                values = (repr(answer.mpp), str(answer.width), str(answer.height), str(answer.tiles))
                table.loc[k, ["mpp", "width", "height", "tiles"]] = values
                table.loc[k, ["status", "error"]] = "inspected", ""
            bar.advance(1)
            if time.monotonic() - written > 5:
                study.write_slides(table)
                written = time.monotonic()


def reason(error: Exception) -> str:
    """An error as one line of slides.csv."""
    if isinstance(error, HistosslError):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())


def report_failures(table: pd.DataFrame) -> int:
    """One line on the screen for every failed slide; returns their number."""
    failed = table[table["status"] == "failed"]
    for _, row in failed.iterrows():
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


def encode_study(study: Study, encoder: TileEncoder, settings: EncodeSettings, workers: Workers) -> int:
    """Features and views of every inspected slide: features/ and views/. Returns the number of failures."""
    tile = from_dict(TileSpec, study.settings()["inspect"]["tile"])
    study.settle("encode", encoding(encoder, settings), study.folder / "features")
    table = study.slides()
    jobs, rows = [], {}
    for k in table.index[table["status"] != "failed"]:
        job = _encode_job(study, table.loc[k], tile)
        rows[job.slide_id] = k
        if _encoded(job, encoder, settings):
            table.loc[k, "status"] = "encoded"
        else:
            table.loc[k, "status"] = "inspected"
            jobs.append(job)
    tiles = sum(int(table.at[rows[job.slide_id], "tiles"]) for job in jobs)
    start = written = time.monotonic()
    done = 0
    with progress_bar("tiles", tiles * (1 + settings.views if settings.views else 1)) as bar:
        for job, count, error in encode_slides(jobs, encoder, settings, workers):
            k = rows[job.slide_id]
            done += count
            bar.advance(count)
            bar.say(f"{done / (time.monotonic() - start):.0f} tiles/s, {job.slide_id}")
            if error is not None:
                table.loc[k, ["status", "error"]] = "failed", reason(error)
            elif _encoded(job, encoder, settings):
                table.loc[k, "status"] = "encoded"
            if time.monotonic() - written > 5:
                study.write_slides(table)
                written = time.monotonic()
    study.write_slides(table)
    return report_failures(table)


def encoding(encoder: TileEncoder, settings: EncodeSettings) -> dict:
    """What features depend on, for settings.json."""
    return {"encoder": encoder.identity, **to_dict(settings)}


def _encode_job(study: Study, row: pd.Series, tile: TileSpec) -> EncodeJob:
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
    slides = study.encoded()
    study.settle("pretrain", settings, study.slide_encoder)
    of = fingerprint(study.settings().get("inspect"), study.settings().get("encode"))
    if study.slide_encoder.is_dir():
        about = trained_as(study.slide_encoder)
        if about["features"] != of:
            raise StudyError(
                f"{study.slide_encoder}: trained on other features than those that stand",
                f"use another --out, or remove {study.slide_encoder} to train anew",
            )
        new = len(set(slides["slide_id"]) - set(about["slides"]))
        if new:
            say(f"slide-encoder/ was trained without {new} of {len(slides)} slides; remove it to train anew")
        return 0
    sources = [SlideSource(s, study.features(s), study.views(s)) for s in slides["slide_id"]]
    pretrain_slides(sources, settings, study.slide_encoder, study.logs / "pretrain", of, device)
    return 0


def embed_study(study: Study, settings: EmbedSettings, device: str) -> int:
    """One vector a slide, beside it the two baselines: embeddings.h5ad. Returns the number of failures."""
    where = pick_device(device)
    table = study.slides()
    encoder = SlideEncoder.load(study.slide_encoder).to(where).eval()
    about = trained_as(study.slide_encoder)
    trained = from_dict(PretrainSettings, about["pretrain"])
    untrained = SlideEncoder(encoder.settings, seed=trained.seed).to(where).eval()
    vectors: dict[str, list[np.ndarray]] = {GIGA: [], MEAN: [], UNTRAINED: []}
    kept = []
    rows = table.index[table["status"] == "encoded"]
    with progress_bar("vectors", len(rows)) as bar:
        for k in rows:
            name = table.at[k, "slide_id"]
            try:
                features, positions = plain_tiles(study.features(name))
                for key, network in ((GIGA, encoder), (UNTRAINED, untrained)):
                    vectors[key].append(embed_slide(network, features, positions, trained.view, settings, name))
                vectors[MEAN].append(mean_pool(features))
                kept.append(k)
            except HistosslError as error:
                table.loc[k, ["status", "error"]] = "failed", reason(error)
            bar.advance(1)
    study.write_slides(table)
    if not kept:
        raise StudyError(f"{study.folder}: no slide could be embedded", "see slides.csv")
    study.note("embed", settings)
    made = fingerprint(settings, about["fingerprint"], list(table.loc[kept, "slide_id"]))
    write_embeddings(
        study.embeddings, table.loc[kept], {n: np.stack(v) for n, v in vectors.items()}, study.settings(), made
    )
    return report_failures(table)


def probe_study(study: Study, labels: Path, settings: ProbeSettings) -> int:
    """Logistic regression on the vectors and on the baselines: probe.csv, probe.json, predictions.csv.

    Returns the number of complaints about the labels.
    """
    vectors = read_embeddings(study.embeddings)
    ids = [str(name) for name in vectors.slides.index]
    patients = {name: str(value) for name, value in vectors.slides["patient_id"].items()}
    table = read_labels(labels, ids, settings.targets, patients)
    result = probe(vectors.vectors, ids, table, settings)
    study.note("probe", settings)
    write_probe(result, study.folder)
    for line in result.audit:
        say(line)
    for line in result.complaints:
        say(f"LEFT OUT {line}", "yellow")
    return len(result.complaints)


def report_study(study: Study) -> None:
    """One page of all that stands: report.html."""
