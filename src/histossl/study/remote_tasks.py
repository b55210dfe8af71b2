"""Tasks that run on other machines: they carry paths, names and settings; a worker builds encoders once."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histossl.core.config import fingerprint, from_dict
from histossl.core.errors import SettingsError
from histossl.encoders.encode import EncodeJob, EncodeSettings
from histossl.encoders.encode_slides import Step, encode_slides
from histossl.encoders.tile_encoder import TileEncoder, load_encoder
from histossl.execution.cluster import Cluster
from histossl.execution.workers import ThreadExecutor
from histossl.gigassl.embed import EmbedSettings, embed_slide, mean_pool
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.pretrain_settings import PretrainSettings, trained_as
from histossl.gigassl.slide_sources import plain_tiles
from histossl.gigassl.views import ViewSettings
from histossl.training.device import pick_device

GIGA, MEAN, UNTRAINED = "giga-ssl", "mean pooling", "untrained encoder"


@dataclass(frozen=True)
class EncoderName:
    """How a worker builds the tile encoder.

    Attributes:
        name: argument of `load_encoder`.
        seed: argument of `load_encoder`.
        device: argument of `load_encoder`.
        precision: argument of `load_encoder`.
        made: fingerprint of the encoder's identity, which the worker's encoder must have.
    """

    name: str
    seed: int
    device: str
    precision: str
    made: str


@dataclass(frozen=True)
class EncodeTask:
    """A slide to encode on any machine.

    Attributes:
        job: the slide.
        encoder: how to build the encoder.
        settings: settings of the stage.
        timeout: seconds that reading a batch of tiles may take; None waits forever.
    """

    job: EncodeJob
    encoder: EncoderName
    settings: EncodeSettings
    timeout: float | None


def encode_on(
    cluster: Cluster, jobs: Iterable[EncodeJob], encoder: EncoderName, settings: EncodeSettings
) -> Iterator[Step]:
    """Like `encode_slides`, on a cluster with one task per slide.

    Args:
        cluster: runs the tasks.
        jobs: the slides.
        encoder: how to build the encoder.
        settings: settings of the stage.

    Yields:
        One step per slide, when it is finished or has failed.

    Raises:
        SettingsError: the scheduler is lost.
    """
    tasks = (EncodeTask(job, encoder, settings, cluster.timeout) for job in jobs)
    for task, answer in cluster.spread(encode_slide, tasks):
        yield Step(task.job, error=answer) if isinstance(answer, Exception) else answer


def encode_slide(task: EncodeTask) -> Step:
    """Encode a slide in this process, which builds the encoder once and reads tiles in a thread.

    Args:
        task: the slide.

    Returns:
        One step that sums up the slide, or its error.

    Raises:
        SettingsError: the encoder of this machine is not the one of the task, for example in its number format.
    """
    steps = list(encode_slides([task.job], _built(task.encoder), task.settings, ThreadExecutor(task.timeout)))
    *_, last = steps
    if last.error is not None:
        return last
    return replace(
        last,
        tiles=sum(step.tiles for step in steps),
        waited=sum(step.waited for step in steps),
        read=sum(step.read for step in steps),
        cpu=sum(step.cpu for step in steps),
    )


@functools.lru_cache(maxsize=1)
def _built(encoder: EncoderName) -> TileEncoder:
    found = load_encoder(encoder.name, encoder.seed, encoder.device, encoder.precision)
    if fingerprint(found.identity) != encoder.made:
        what = f"a worker's tile encoder is another ({found.identity})"
        raise SettingsError(what, "name the number format: --encode.precision float32")
    return found


@dataclass(frozen=True)
class EmbedTask:
    """A slide to embed on any machine.

    Attributes:
        slide_id: name of the slide.
        features: its features file.
        folder: folder of the slide encoder.
        made: fingerprint of the slide encoder.
        settings: settings of the embedding.
        device: auto, cpu or cuda.
    """

    slide_id: str
    features: Path
    folder: Path
    made: str
    settings: EmbedSettings
    device: str


def vectors_of(task: EmbedTask) -> dict[str, NDArray[np.float32]]:
    """The vectors of a slide: of the slide encoder and of two baselines.

    Args:
        task: the slide.

    Returns:
        Name of the vector -> (d,) float32.

    Raises:
        FileFormatError: its features cannot be read.
    """
    features, positions = plain_tiles(task.features)
    found = {
        name: embed_slide(network, features, positions, view, task.settings, task.slide_id)
        for name, network, view in _networks(task.folder, task.made, task.device)
    }
    return found | {MEAN: mean_pool(features)}


@functools.lru_cache(maxsize=1)
def _networks(folder: Path, made: str, device: str) -> list[tuple[str, SlideEncoder, ViewSettings]]:
    """The networks of one fingerprint: a worker may live longer than the encoder in a folder."""
    trained = from_dict(PretrainSettings, trained_as(folder)["pretrain"])
    return networks_of(SlideEncoder.load(folder), trained, device)


def networks_of(
    encoder: SlideEncoder, trained: PretrainSettings, device: str
) -> list[tuple[str, SlideEncoder, ViewSettings]]:
    """The encoder and its untrained twin on a device.

    Args:
        encoder: the slide encoder; it is moved to the device.
        trained: how it was trained.
        device: auto, cpu or cuda.

    Returns:
        (name, network, settings of the views that it embeds) of each.
    """
    where = pick_device(device)
    encoder = encoder.to(where).eval()
    if encoder.rival:  # like for like: all that is not trained is the same
        return [(GIGA, encoder, trained.view), (UNTRAINED, encoder.rival[0].to(where).eval(), trained.view)]
    plain = replace(encoder.settings, prototypes=0, normalise=False)
    untrained = SlideEncoder(plain, seed=trained.seed).to(where).eval()
    # The untrained baseline scores best on all tiles at once.
    all_tiles = replace(trained.view, tiles=2**31, windows=0)
    return [(GIGA, encoder, trained.view), (UNTRAINED, untrained, all_tiles)]
