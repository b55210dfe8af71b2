"""A tile encoder from slides, without labels: which of the methods, and what is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from histossl.core.config import fingerprint, to_dict
from histossl.core.errors import TrainingError
from histossl.encoders.joint import learn_joint
from histossl.encoders.moco import learn_moco
from histossl.encoders.patch_kmeans import learn_patch_kmeans
from histossl.encoders.settings import JointSettings, PatchKMeansSettings, TileTrainSettings
from histossl.encoders.tile_encoder import save_encoder
from histossl.encoders.tile_stream import TileSource, TileStream
from histossl.execution.workers import ThreadExecutor, Workers
from histossl.training.loop import end_of_training


def pretrain_tiles(
    sources: Sequence[TileSource],
    settings: TileTrainSettings,
    folder: Path,
    logs: Path,
    workers: Workers | ThreadExecutor,
    device: str = "auto",
) -> dict[str, str]:
    """Train a tile encoder and write it to `folder`, whole or absent; `load_encoder(folder)` reads it back.

    Args:
        sources: the slides, in a fixed order.
        settings: of the training.
        folder: of the result: model.safetensors and config.json.
        logs: of moco's log.csv, TensorBoard and checkpoints, from which a killed training goes on.
        workers: processes that read tiles.
        device: auto, cpu or cuda.

    Returns:
        The slides of which tiles could not be read, and why.

    Raises:
        TrainingError: fewer than two tiles, no tile that can be read, or a loss that is not finite.
        SettingsError: tiles are too small for the method.
        FileFormatError: the places of a slide's tiles are absent or damaged.
    """
    chosen = settings.chosen
    stream = TileStream(sources, settings.plan(), workers)
    if sum(len(tiles.xy) for tiles in stream.tiles) < 2:
        raise TrainingError("fewer than two tiles to learn from", "two or more are needed")
    of = [[source.slide_id, tiles.fingerprint] for source, tiles in zip(sources, stream.tiles, strict=True)]
    made = fingerprint(chosen, of)
    if isinstance(chosen, JointSettings):
        network, architecture = learn_joint(stream, chosen), "visual words, contrast and colour"
    elif isinstance(chosen, PatchKMeansSettings):
        network, architecture = learn_patch_kmeans(stream, chosen), "visual words"
    else:
        network, architecture = learn_moco(stream, chosen, logs, made, device), "resnet18 up to layer3"
    about = {
        "architecture": architecture,
        "fingerprint": made,
        "slides": [source.slide_id for source in sources],
        "settings": to_dict(settings),
        "tile": to_dict(sources[0].tile),
    }
    save_encoder(network, folder, about)
    end_of_training(logs)
    return stream.failures
