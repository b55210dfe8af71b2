"""Slides without labels in, a slide encoder out: learned from what neighbouring tiles share, or by contrast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from histossl.core.config import fingerprint, to_dict
from histossl.core.console import say
from histossl.core.errors import FileFormatError
from histossl.encoders.external import hash_of
from histossl.encoders.resnet import state_of
from histossl.encoders.tile_encoder import read_weights
from histossl.gigassl.complete import complete
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.pretrain_settings import PretrainSettings
from histossl.gigassl.pretrain_task import (
    NeighbourTask,
    PretrainTask,
    draw_batch,
    draw_chunk,
    draw_windows,
    sites_of_step,
    steps_of_an_epoch,
)
from histossl.gigassl.slide_sources import SlideSource, sample_slides, some_slides
from histossl.training.device import pick_device, pick_dtype
from histossl.training.distributed import is_rank_zero
from histossl.training.loop import end_of_training, fit


def pretrain_slides(
    sources: Sequence[SlideSource],
    settings: PretrainSettings,
    folder: Path,
    logs: Path,
    made_of: str,
    device: str = "auto",
    tile_encoder: Path | None = None,
    sites: Sequence[str] = (),
) -> None:
    """Train a slide encoder and write it to `folder`, whole or absent.

    Args:
        sources: the slides, in a fixed order.
        settings: of the training; `settings.encoder.in_dim` is replaced by the dimension of the features.
        folder: of the result: model.safetensors, config.json and made.json.
        logs: of log.csv, TensorBoard and checkpoints.
        made_of: fingerprint of the features.
        device: auto, cpu or cuda.
        tile_encoder: the fourth stage of the ResNet-18 whose first three made the features, as `fourth_stage` gives
            it, where there is one; for `settings.start`.
        sites: of the slides, where only slides of one site are contrasted.

    Raises:
        TrainingError: fewer than two slides, or a loss that is not finite.
        FileFormatError: damaged features or features of different encoders; weights to start with of another network.
    """
    names = [source.slide_id for source in sources]
    per_epoch = steps_of_an_epoch(names, settings)
    settings = of_length(settings, sources)
    encoder = SlideEncoder(settings.encoder, seed=settings.seed)
    started = start_from(encoder, settings.start, tile_encoder)
    where, dtype = hardware(device, settings.precision)
    made = fingerprint(settings, made_of, names, dtype, started, *([list(sites)] if sites else []))
    about = {"fingerprint": made, "features": made_of, "slides": names, "pretrain": to_dict(settings), "start": started}
    alone = settings.encoder.arch == "neighbours"
    draw = draw_windows if alone else draw_chunk
    task = NeighbourTask(encoder) if alone else PretrainTask(settings, encoder)
    outcome = fit(
        task,
        lambda step: (
            *draw_batch(step, per_epoch, sources, settings, draw),
            *sites_of_step(sites, step, per_epoch, settings),
        ),
        settings.schedule(len(sources)),
        logs,
        made,
        where,
        dtype,
        about=about | {"slides": len(names)},
        measure=task.measure,
        best=settings.keep == "best",
    )
    if is_rank_zero():
        sample = sample_slides(sources, settings.seed)
        rival = complete(encoder, sample, partial(some_slides, sources, settings.seed), settings.seed)
        encoder.save(folder, about | {"training": vars(outcome)}, rival)
        end_of_training(logs)


def of_length(settings: PretrainSettings, sources: Sequence[SlideSource]) -> PretrainSettings:
    """Settings of an encoder that takes the features of these slides.

    Args:
        settings: whose `encoder.in_dim` is replaced.
        sources: the slides, at least one.

    Returns:
        A copy with the length of the slides' features.

    Raises:
        FileFormatError: damaged features, or features of different encoders.
    """
    dims = {source.slide_id: source.dim() for source in sources}
    if len(set(dims.values())) > 1:
        odd = min(dims, key=lambda name: list(dims.values()).count(dims[name]))
        raise FileFormatError(f"{odd}: features of {dims[odd]} numbers among others", "encode it with the same encoder")
    return replace(settings, encoder=replace(settings.encoder, in_dim=next(iter(dims.values()))))


def hardware(device: str, precision: str) -> tuple[str, str]:
    """The kind of device and the number format that a training uses, as `fit` names them.

    Args:
        device: `auto` or a device of torch.
        precision: `auto`, `float32` or `bfloat16`.

    Returns:
        For example (`cuda`, `bfloat16`).

    Raises:
        SettingsError: an unknown device or precision, or a GPU that torch does not see.
    """
    where = pick_device(device)
    return where.type, str(pick_dtype(precision, where)).removeprefix("torch.")


def start_from(encoder: SlideEncoder, start: str, tile_encoder: Path | None) -> str:
    """Give the encoder the weights that it begins with.

    Args:
        encoder: changed in place.
        start: `random`, `tile-encoder`, or the name of ResNet-18 weights as of `read_weights`.
        tile_encoder: folder or file of the tile encoder; without it, or where it cannot serve, `tile-encoder` means
            `random`, with a message.

    Returns:
        `random`, or the hash of the stage's weights.

    Raises:
        FileFormatError: the weights cannot be read, or are of another network.
        SettingsError: named weights for an encoder that is not of the sparse kind with 512 outputs.
    """
    fits = encoder.settings.arch == "sparse" and encoder.settings.dim == 512
    if start == "tile-encoder" and not (fits and tile_encoder is not None and tile_encoder.exists()):
        why = "the tile encoder has no fourth stage to begin with" if fits else "only `sparse` of dim 512 can do so"
        if is_rank_zero():
            say(f"the slide encoder begins at random: {why}", "yellow")
        return "random"
    if start == "random":
        return start
    name = str(tile_encoder) if start == "tile-encoder" else start
    encoder.load_dense(state_of(read_weights(name)))
    return hash_of(encoder.stage)
