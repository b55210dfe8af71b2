"""Trains slide encoders and embeds slides in Python, without a study: `pretrain`, `embed`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from histossl.core.argument_names import names_arguments
from histossl.core.config import fingerprint, from_dict, overridden, to_dict
from histossl.core.console import progress_bar
from histossl.core.embeddings import embeddings_table
from histossl.core.interchange import TileFeatures
from histossl.encoders.external import hash_of
from histossl.gigassl.embed import EmbedSettings, embed_slide, mean_pool
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.pretrain import pretrain_slides
from histossl.gigassl.pretrain_settings import PretrainSettings
from histossl.gigassl.slide_sources import plain_tiles
from histossl.study.folder import Study
from histossl.study.remote_tasks import GIGA, MEAN, UNTRAINED, networks_of
from histossl.study.tile_features import read_features

if TYPE_CHECKING:
    from anndata import AnnData

Features = str | Path | Study | Mapping[str, TileFeatures]


@names_arguments
def pretrain(
    features: Features, *, out: str | Path | None = None, device: str = "auto", **settings: Any
) -> SlideEncoder:
    """Train a slide encoder on the features of slides, without labels: two views of a slide should agree.

    Args:
        features: features of two slides or more, from `encode`; or anything that `read_features` opens.
        out: a folder for the encoder, which `SlideEncoder.load` reads back; a training that was interrupted resumes
            from the checkpoints in `logs` beside it. None writes no file.
        device: auto, cpu or cuda.
        **settings: of `PretrainSettings`, such as `epochs=200`, `batch=256`, `seed=0`; those in groups as
            dictionaries, such as `encoder={"dim": 128}`.

    Returns:
        The encoder on the CPU, in evaluation mode.

    Raises:
        TrainingError: there are fewer than two slides, or the loss is not finite.
        FileFormatError: features are damaged, or of different tile encoders.
        SettingsError: an unknown setting or one out of range.
    """
    cohort = read_features(features)
    chosen = from_dict(PretrainSettings, overridden(to_dict(PretrainSettings()), settings))
    with tempfile.TemporaryDirectory(prefix="histossl-") as place:
        folder = Path(out or Path(place) / "slide-encoder").absolute()
        logs = folder.parent / "logs" / folder.name
        pretrain_slides(cohort.sources, chosen, folder, logs, cohort.made, device, cohort.start)
        return SlideEncoder.load(folder)


@names_arguments
def embed(
    features: Features,
    encoder: SlideEncoder | str | Path,
    *,
    baselines: bool = True,
    device: str = "auto",
    **settings: Any,
) -> AnnData:
    """Embed slides: one vector per slide.

    Args:
        features: from `encode`, of the tile encoder that `encoder` was trained on; or as `read_features` opens.
        encoder: from `pretrain`, or the folder of one, such as STUDY/slide-encoder.
        baselines: whether the vectors of the two baselines are made too.
        device: auto, cpu or cuda.
        **settings: of `EmbedSettings`, such as `views=50`, `seed=0`.

    Returns:
        X: (slides, d) float32, of length 1 each. obs: one row per slide, index slide_id. obsm: with `baselines`
        `mean_pooling`, the mean of the tiles' features, and `untrained_encoder`. uns: all settings.

    Raises:
        SettingsError: the encoder takes features of another length, or an unknown setting.
        FileFormatError: features or the encoder cannot be read.
    """
    chosen, cohort = from_dict(EmbedSettings, settings), read_features(features)
    network = encoder if isinstance(encoder, SlideEncoder) else SlideEncoder.load(Path(encoder))
    about = network.about.get("pretrain") or {}
    trained = from_dict(PretrainSettings, about) if about else PretrainSettings()
    networks = networks_of(network, trained, device)[: None if baselines else 1]
    names = [GIGA, MEAN, UNTRAINED] if baselines else [GIGA]
    vectors: dict[str, list[np.ndarray]] = {name: [] for name in names}
    with progress_bar("vectors", len(cohort)) as bar:
        for source in cohort.sources:
            tiles, positions = plain_tiles(source.features)
            if baselines:
                vectors[MEAN].append(mean_pool(tiles))
            for name, one, view in networks:
                vectors[name].append(embed_slide(one, tiles, positions, view, chosen, source.slide_id))
            bar.advance(1)
    weights = hash_of(network)
    all_settings = {**cohort.settings, "pretrain": about, "embed": to_dict(chosen)}
    all_settings["slide-encoder"] = {"sha256": weights}
    made = fingerprint(chosen, weights, cohort.made)
    table = {name: np.stack(rows) for name, rows in vectors.items()}
    return embeddings_table(cohort.rows, table, all_settings, made, network.settings.part_names)
