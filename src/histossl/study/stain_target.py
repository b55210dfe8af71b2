"""The colours that the tiles of a study get: of its median slide or of one slide, fixed once they are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from histossl.core.errors import SettingsError, SlideError
from histossl.encoders.encode import EncodeSettings
from histossl.encoders.tile_stream import TileSource
from histossl.study.folder import Study
from histossl.wsi.stain_norm import Change, Look, look_from, usual_look
from histossl.wsi.tile_files import read_look

SAVED = "stain_target"  # among the settings of `encode`
_LOOK_HINT = "leave --encode.stain at none, or leave the slide out"


def target_of(settings: EncodeSettings, tiles: Mapping[str, Path]) -> Look | None:
    """The colours that tiles get.

    Args:
        settings: whose `stain` says which.
        tiles: slide_id -> the file of its tiles, of all slides.

    Returns:
        The colours; None where tiles keep theirs.

    Raises:
        SettingsError: there is no such slide, or no slide's colours are known.
    """
    if settings.stain == "none":
        return None
    if settings.stain != "median":
        if settings.stain not in tiles:
            what = f"encode.stain is {settings.stain!r}, and no slide is called so"
            raise SettingsError(what, f"give none, median or a slide_id, such as {next(iter(tiles), '')}")
        look = read_look(tiles[settings.stain])
        if look is None:
            raise SettingsError(f"encode.stain: no stains could be estimated on {settings.stain}", "give another slide")
        return look
    looks = [look for look in map(read_look, tiles.values()) if look is not None]
    if not looks:
        raise SettingsError("encode.stain: no stains could be estimated on any slide", "leave it at none")
    return usual_look(looks)


def study_target(study: Study, settings: EncodeSettings) -> Look | None:
    """The colours that a study's tiles get: those that were written down, else of its slides as they are now.

    Args:
        study: the study, inspected.
        settings: of the encoding.

    Raises:
        SettingsError: see `target_of`.
    """
    saved = study.settings().get("encode", {})
    same = (saved.get("stain"), saved.get("stain_method")) == (settings.stain, settings.stain_method)
    if same and saved.get(SAVED):
        return look_from(saved[SAVED])
    names = [row["slide_id"] for row in study.slides() if row["status"] != "failed"]
    return target_of(settings, {name: study.tiles(name) for name in names})


def change_of(path: Path, tiles: Path, settings: EncodeSettings, target: Look | None) -> Change | None:
    """How the colours of a slide's tiles change.

    Args:
        path: the slide.
        tiles: the file of its tiles.
        settings: of the encoding.
        target: the colours that they get; None for their own.

    Raises:
        SlideError: the slide's own colours are not known.
    """
    if target is None:
        return None
    look = read_look(tiles)
    if look is None:
        raise SlideError(path, "no stains could be estimated, so its colours cannot be normalised", _LOOK_HINT)
    return Change(settings.stain_method, look, target)


def recoloured(
    cut: Sequence[TileSource], failed: Mapping[str, str], settings: EncodeSettings
) -> tuple[list[TileSource], dict[str, str], Look | None]:
    """Have the tiles of slides get other colours.

    Args:
        cut: the slides.
        failed: slide_id -> why others are left out.
        settings: of the encoding, whose `stain` says which colours.

    Returns:
        The slides whose colours are known; those that are left out and why; and the colours that tiles get.

    Raises:
        SettingsError: see `target_of`.
    """
    target = target_of(settings, {source.slide_id: source.tiles_path for source in cut})
    found, lost = [], dict(failed)
    for source in cut:
        try:
            found.append(replace(source, change=change_of(source.path, source.tiles_path, settings, target)))
        except SlideError as error:
            lost[source.slide_id] = str(error)
    return found, lost, target
