"""What a run looks at in its first second, and what it says at its end."""

from __future__ import annotations

import shlex
from datetime import timedelta
from pathlib import Path

from histossl.core.console import say
from histossl.encoders.encode import EncodeSettings
from histossl.encoders.tile_encoder import TileEncoder, load_encoder
from histossl.evaluate.labels import check_labels
from histossl.evaluate.settings import ProbeSettings
from histossl.gigassl.pretrain_settings import PretrainSettings
from histossl.study.folder import Study
from histossl.study.times import stage_times
from histossl.training.device import pick_device


def first_look(
    pretrain: PretrainSettings,
    encoder: str,
    encode: EncodeSettings,
    device: str,
    labels: Path | None,
    probe: ProbeSettings,
) -> TileEncoder | None:
    """Look at every input that a later stage needs, so that a wrong one costs a second and not hours.

    Args:
        pretrain: how the slide encoder learns.
        encoder: name of the tile encoder.
        encode: how tiles become features.
        device: auto, cpu or cuda.
        labels: the table of labels, or None.
        probe: how the vectors are probed.

    Returns:
        The tile encoder; None where it is yet to be learned.

    Raises:
        HistosslError: a file is absent or unusable, the device is missing, or the encoder cannot be loaded.
    """
    pretrain.check_files()
    pick_device(device)
    if labels is not None:
        check_labels(labels, probe.targets, probe.outcome)
    return None if encoder == "self" else load_encoder(encoder, encode.seed, device, encode.precision)


def tell_the_end(study: Study) -> None:
    """Say what a run made, how long its stages took, and what to do next.

    Args:
        study: the study.
    """
    took = ", ".join(f"{stage} {timedelta(seconds=round(seconds))}" for stage, seconds in stage_times(study).items())
    say(f"vectors: {study.embeddings}", "green")
    say(f"done: {study.report}" + (f" (hours:minutes:seconds: {took})" if took else ""), "green")
    say(f"next: histossl view {shlex.quote(str(study.folder))}", "green")
