"""Judges new slides by a saved probe: from their files to their vectors, with the encoders and settings of a study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histossl.core.config import from_dict
from histossl.core.console import say
from histossl.core.embeddings import read_embeddings
from histossl.core.errors import HistosslError, StudyError
from histossl.core.tables import Row
from histossl.encoders.encode import EncodeSettings, encode_slides
from histossl.encoders.pretrain_tiles import TileTrainSettings
from histossl.evaluate.saved_probe import Prediction, SavedProbe
from histossl.execution.workers import SerialExecutor, Workers
from histossl.gigassl.embed import EmbedSettings
from histossl.gigassl.pretrain_settings import trained_as
from histossl.study.embed_stage import embed_study
from histossl.study.encode_stage import encode_study, encoder_of
from histossl.study.folder import Study
from histossl.study.heatmaps import Explainer, picture_of, thumbnail
from histossl.study.import_features import take_encoder
from histossl.study.inspect_stage import InspectSettings, inspect_slides
from histossl.study.remote_tasks import GIGA


@dataclass(frozen=True)
class Judged:
    """A new slide and what is said of it.

    Attributes:
        slide_id: the slide.
        prediction: of the probe.
        heatmap: a picture of the tiles' shares, where it could be drawn.
        thumbnail: a picture of the slide with its tiles, where there is one.
    """

    slide_id: str
    prediction: Prediction
    heatmap: Path | None
    thumbnail: Path | None


def check_encoder(study: Study, probe: SavedProbe) -> None:
    """Refuse a probe of other vectors than those that a study makes.

    Args:
        study: the study.
        probe: the saved probe.

    Raises:
        StudyError: the study has another slide encoder.
    """
    found = str(trained_as(study.slide_encoder)["fingerprint"])
    if found != probe.encoder:
        what = f"the probe of {probe.target} was made of vectors of another slide encoder than {study.slide_encoder}"
        raise StudyError(f"{what} ({probe.encoder[:8]}, not {found[:8]})", "run `histossl probe` on this study again")


def embed_new(
    study: Study, slides: Path, out: Path, encoder: str, mpp_default: float | None, device: str
) -> tuple[Study, int]:
    """Make vectors of new slides, as a study made its own.

    Args:
        study: the study that has the encoders and the settings.
        slides: a folder of slides, or one slide.
        out: the folder of a study of the new slides.
        encoder: of tiles: self for the study's own, else its name or path as of `histossl encode`.
        mpp_default: µm per pixel of slides that state none.
        device: auto, cpu or cuda.

    Returns:
        The study of the new slides, and the number of slides that failed.

    Raises:
        StudyError: the study lacks an encoder or its settings, or the new study was made with others.
    """
    told, new = study.settings(), Study(out)
    lost = [stage for stage in ("inspect", "encode", "embed") if stage not in told]
    if lost:
        raise StudyError(f"{study.folder}: settings.json tells nothing of {lost[0]}", "run `histossl run` on it")
    if encoder == "self" and not study.tile_encoder.is_dir():
        what = f"{study.folder}: has no tile-encoder/ of its own"
        raise StudyError(what, "name the tile encoder that its slides were encoded with: --encoder")
    # Areas that were drawn on the study's own slides are none of these slides'.
    laid = from_dict(InspectSettings, {name: told["inspect"][name] for name in ("tissue", "tile")})
    settings = {name: value for name, value in told["encode"].items() if name != "encoder"}
    how = replace(from_dict(EncodeSettings, settings), views=0)
    with new.lock(), Workers() as pool:
        failed = inspect_slides(new, slides, mpp_default, laid.tissue, laid.tile, pool)
        name = str(study.tile_encoder) if encoder == "self" else encoder
        network = encoder_of(new, name, TileTrainSettings(), how, pool, device)
        if network.identity != told["encode"]["encoder"]:
            raise StudyError(f"{name} is not the tile encoder of {study.folder}", "name that one: --encoder")
        failed = max(failed, encode_study(new, network, how, lambda jobs: encode_slides(jobs, network, how, pool)))
        take_encoder(new, study.slide_encoder)
        failed = max(failed, embed_study(new, from_dict(EmbedSettings, told["embed"]), device, SerialExecutor()))
    return new, failed


def judge(new: Study, probe: SavedProbe, coverage: float, device: str) -> Iterator[Judged]:
    """Apply a probe to the slides of a study, and draw where its score comes from.

    Args:
        new: the study of the new slides, with vectors.
        probe: the saved probe.
        coverage: share of new patients whose class the set should hold, in (0, 1).
        device: auto, cpu or cuda.

    Yields:
        Each slide with its prediction.
    """
    found = read_embeddings(new.embeddings)
    explainer = Explainer(new, device)
    rows = {row["slide_id"]: row for row in new.slides()}
    for name, vector in zip(map(str, found.slides.index), found.vectors[GIGA], strict=True):
        said = probe.predict(np.asarray(vector), name, coverage)
        drawn = _drawn(new, explainer, probe, rows[name], vector)
        tiles = new.qc(name)
        yield Judged(name, said, drawn, tiles if tiles.is_file() else None)


def _drawn(new: Study, explainer: Explainer, probe: SavedProbe, row: Row, vector: NDArray) -> Path | None:
    """The heatmap of a slide; None where the vector cannot be explained."""
    name = row["slide_id"]
    try:
        heatmap = explainer(name, {probe.target: probe.score}, vector)[probe.target]
    except HistosslError as error:
        say(f"{name}: no heatmap ({error})", "yellow")
        return None
    picture = new.folder / "predictions" / f"{name}.png"
    picture_of(new, heatmap, picture, thumbnail(row), probe.target)
    return picture
