"""`histossl encoder ...`: tile encoders by themselves, for other studies and other tools."""

from __future__ import annotations

import shutil
from pathlib import Path

from histossl.cli.first_look import look_for_device
from histossl.core.atomic import whole_folder
from histossl.core.console import say
from histossl.core.errors import StudyError
from histossl.encoders.settings import EncodeSettings, TileTrainSettings
from histossl.execution.workers import Workers
from histossl.study.folder import Study
from histossl.study.inspect_stage import find_slides, inspect_slides
from histossl.wsi.tiles import TileSpec
from histossl.wsi.tissue import TissueSettings


def pretrain_encoder(
    slides: Path,
    *,
    out: Path,
    mpp_default: float | None = None,
    tissue: TissueSettings = TissueSettings(),
    tile: TileSpec = TileSpec(),
    tile_encoder: TileTrainSettings = TileTrainSettings(),
    workers: int | None = None,
    device: str = "auto",
) -> int:
    """Train a tile encoder on the tiles of slides, without labels; use it with `--encoder FOLDER`.

    A study beside it, named like it with `-training`, keeps slides.csv, pictures of the tissue and the log of the
    training; a run that was stopped goes on from there.

    Args:
        slides: a folder of slides, searched with its subfolders, or one slide.
        out: the folder of the tile encoder: model.safetensors and config.json.
        mpp_default: µm per pixel of slides that carry none.
        tissue: how tissue is found.
        tile: how tiles are laid.
        tile_encoder: how it learns.
        workers: processes that read slides.
        device: auto, cpu or cuda.
    """
    if out.exists() and not (out / "config.json").is_file():
        raise StudyError(f"{out}: stands already and is no tile encoder", "choose another --out")
    look_for_device(device)
    place = out.with_name(f"{out.name}-training")
    found, study = find_slides(place, slides), Study(place)
    from histossl.study import encode_stage

    with study.lock(), Workers(workers) as pool:
        failed = inspect_slides(study, found, mpp_default, tissue, tile, pool)
        encode_stage.encoder_of(study, "self", tile_encoder, EncodeSettings(), pool, device)
    with whole_folder(out) as part:
        shutil.copytree(study.tile_encoder, part, dirs_exist_ok=True)
    say(f"done: {out}", "green")
    return 1 if failed else 0
