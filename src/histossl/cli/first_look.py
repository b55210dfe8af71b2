"""What a run looks at in its first second, and what it says at its end."""

from __future__ import annotations

import shlex
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from histossl.core.console import say
from histossl.core.errors import SettingsError
from histossl.encoders.model_names import check_name
from histossl.encoders.settings import EncodeSettings
from histossl.evaluate.settings import ProbeSettings
from histossl.gigassl.pretrain_settings import PretrainSettings
from histossl.study.folder import Study

if TYPE_CHECKING:
    from histossl.encoders.tile_encoder import TileEncoder

_DEVICES = ("auto", "cpu", "cuda", "mps", "xpu", "hpu", "xla", "meta")  # that torch computes on
_DRIVERS = ("nvidia*", "kfd", "dxg", "nvmap", "nvhost*")  # files in /dev that a driver of a GPU makes: NVIDIA, AMD, WSL


def first_look(
    pretrain: PretrainSettings, encoder: str, device: str, labels: Path | None, probe: ProbeSettings
) -> None:
    """Look at every input that a later stage needs, so that a wrong one costs a second and not hours.

    It imports no torch: to load the encoder and to ask torch for the device comes after it.

    Args:
        pretrain: how the slide encoder learns.
        encoder: name of the tile encoder.
        device: auto, cpu or cuda.
        labels: the table of labels, or None.
        probe: how the vectors are probed.

    Raises:
        HistosslError: a file is absent or unusable, the device is missing, or there is no such encoder.
    """
    pretrain.check_files()
    check_name(encoder)
    look_for_device(device)
    if labels is not None:
        look_at_labels(labels, probe)


def loaded_encoder(encoder: str, encode: EncodeSettings, device: str) -> TileEncoder | None:
    """Load the tile encoder of a run before its first stage, and have torch judge the device.

    Args:
        encoder: its name.
        encode: how tiles become features.
        device: auto, cpu or cuda.

    Returns:
        The encoder; None where it is yet to be learned.

    Raises:
        HistosslError: the device is missing, or the encoder cannot be loaded.
    """
    from histossl.encoders.tile_encoder import load_encoder
    from histossl.training.device import pick_device

    pick_device(device)
    return None if encoder == "self" else load_encoder(encoder, encode.seed, device, encode.precision)


def look_at_labels(labels: Path, probe: ProbeSettings) -> None:
    """Look at a table of labels before anything is computed.

    Args:
        labels: the file.
        probe: how the vectors are probed.

    Raises:
        LabelError: it cannot be read, or lacks what the probe needs.
    """
    from histossl.evaluate.labels import check_labels

    check_labels(labels, probe.targets, probe.outcome, probe.weighing)


def look_for_device(device: str) -> None:
    """Refuse a device that surely is not here, without torch; torch has the last word later.

    Args:
        device: auto, cpu, cuda, or another name that torch knows.

    Raises:
        SettingsError: no such device, or no driver of a GPU.
    """
    kind = device.partition(":")[0]
    if kind not in _DEVICES:
        raise SettingsError(f"unknown device {device!r}", "use auto, cpu or cuda")
    if kind == "cuda" and sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _DRIVERS):
        raise SettingsError(f"device {device!r} is requested, but no GPU has a driver here", "use --device cpu")


def tell_the_end(study: Study) -> None:
    """Say what a run made, how long its stages took, and what to do next.

    Args:
        study: the study.
    """
    from histossl.study.times import stage_times

    took = ", ".join(f"{stage} {timedelta(seconds=round(seconds))}" for stage, seconds in stage_times(study).items())
    say(f"vectors: {study.embeddings}", "green")
    if took:
        say(f"took: {took} (hours:minutes:seconds)")
    say(f"done: {study.report}", "green")
    say(f"next: histossl view {shlex.quote(str(study.folder))}", "green")


def exit_code(failed: int) -> int:
    """1 where some slides failed, each with its reason; else 0.

    Args:
        failed: how many.
    """
    return 1 if failed else 0


def say_waiting(holder: str) -> None:
    """Say for whom this run waits.

    Args:
        holder: of the study's lock.
    """
    say(f"waiting for another run that needs the study for itself ({holder})", "yellow")
