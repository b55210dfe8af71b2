"""New slides: embedded as those of a study were, with its encoders; and heatmaps of what a kept probe says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from histossl.core.config import from_dict
from histossl.core.console import progress_bar, say
from histossl.core.errors import HistosslError, StudyError
from histossl.encoders.encode import EncodeSettings
from histossl.encoders.encode_slides import encode_slides
from histossl.encoders.pretrain_tiles import TileTrainSettings
from histossl.evaluate.fitted import FittedProbe, made_by
from histossl.evaluate.sources import Source
from histossl.execution.workers import SerialExecutor, Workers
from histossl.gigassl.embed import EmbedSettings
from histossl.study.embed_stage import embed_study
from histossl.study.encode_stage import encode_study, encoder_of
from histossl.study.folder import Study
from histossl.study.heatmaps import Explainer, thumbnail, write_heatmap
from histossl.study.import_features import take_encoder
from histossl.study.inspect_stage import InspectSettings, find_slides, inspect_slides
from histossl.study.stain_target import SAVED
from histossl.wsi.areas import AreaFolder, AreaSettings
from histossl.wsi.named_areas import GRID, CoreGrid, open_areas
from histossl.wsi.stain_norm import look_from

OTHERWISE = "embed the slides in steps, as docs/how-to/apply.md shows, and give that study"


def embed_new_slides(
    model: Path,
    stages: Mapping[str, Any],
    slides: Path,
    new: Study,
    mpp_default: float | None = None,
    encoder: str = "",
    workers: int | None = None,
    device: str = "auto",
    areas: Path | None = None,
) -> int:
    """Lay tiles on new slides, encode and embed them as a study did: embeddings.h5ad of another study.

    Nothing is trained. What stands is kept, so that an interrupted run goes on where it was.

    Args:
        model: the folder with slide-encoder/ and, unless the tile encoder has a name, tile-encoder/.
        stages: settings of the stages that made the vectors of the study.
        slides: a folder of slides, or one slide.
        new: the study of the new slides.
        mpp_default: µm per pixel of slides that carry none.
        encoder: of tiles, where it does not lie in `model`: its name, as `load_encoder` takes it.
        workers: processes that read slides.
        device: auto, cpu or cuda.
        areas: of a study whose tiles lie in areas, the folder of those of the new slides; cores are found anew.

    Returns:
        The number of slides that failed.

    Raises:
        StudyError: the vectors were not made from slides by one tile encoder, its encoders are not there, `encoder` is
            another one, or areas are given or lacking other than in the study.
        SettingsError: there is no such folder of areas.
    """
    inspect, encode = dict(stages.get("inspect", {})), dict(stages.get("encode", {}))
    identity, colours = encode.pop("encoder", None), encode.pop(SAVED, None)
    drawn = _areas(model, inspect.pop("areas", None), areas)
    if not inspect or not isinstance(identity, dict):
        raise StudyError(f"{model}: its vectors were not made from slides by a single tile encoder", OTHERWISE)
    if not (model / "slide-encoder").is_dir():
        raise StudyError(f"{model}: has no slide-encoder", "give the study, or what `histossl export` wrote")
    laid, chosen = from_dict(InspectSettings, inspect), replace(from_dict(EncodeSettings, encode), views=0)
    name, found = encoder or _encoder_in(model, identity), find_slides(new.folder, slides)
    with new.lock(), Workers(workers) as pool:
        failed = inspect_slides(new, found, mpp_default, laid.tissue, laid.tile, pool, drawn)
        network = encoder_of(new, name, TileTrainSettings(), chosen, pool, device)
        ours, theirs = (made_by({"encode": {"encoder": one}})["tile encoder"] for one in (identity, network.identity))
        if ours != theirs:
            what = f"{name} is another tile encoder than that of the probe, {identity['name']}"
            raise StudyError(what, "name that one: --encoder")
        target = look_from(colours) if colours else None  # of the slides that the probe knows
        encoded = encode_study(new, network, chosen, lambda jobs: encode_slides(jobs, network, chosen, pool), target)
        take_encoder(new, model / "slide-encoder")
        embed = from_dict(EmbedSettings, dict(stages.get("embed", {})))
        return max(failed, encoded, embed_study(new, embed, device, SerialExecutor()))


def _areas(model: Path, told: Mapping[str, Any] | None, given: Path | None) -> AreaFolder | CoreGrid | None:
    """The areas of new slides, chosen as those of the study were."""
    if told is None:
        if given is not None:
            raise StudyError(
                f"{model}: its tiles lie on all tissue, so areas would make other vectors", "without --areas"
            )
        return None
    chosen = dict(told)
    cores = chosen.pop("cores", False)
    if given is None and not cores:
        what = f"{model}: its tiles lie in areas that were drawn by hand"
        raise StudyError(what, "draw those of the new slides, too, and give their folder: --areas")
    if cores != (given is None or str(given) == GRID):
        what = "the cores of microarrays" if cores else "drawn areas"
        raise StudyError(f"{model}: its tiles lie in {what}", f"give {'grid' if cores else 'a folder'}: --areas")
    return open_areas(Path(GRID) if cores else given, from_dict(AreaSettings, chosen))


def _encoder_in(model: Path, identity: Mapping[str, str]) -> str:
    """The name or the path of the tile encoder of a study."""
    own = model / "tile-encoder"
    if own.is_dir():
        return str(own)
    if identity.get("name") == "random":
        return "random"
    what = f"{model}: has no tile-encoder; its tiles were encoded by {identity.get('name')}"
    raise StudyError(what, "name it as you did then: --encoder")


def heatmaps_of_new(
    probe: FittedProbe, source: Source, place: Study, folder: Path, device: str = "auto"
) -> dict[str, dict[str, Path]]:
    """Write the exact shares of the tiles of new slides in the scores of a probe.

    Args:
        probe: the probe; of numbers there are no heatmaps.
        source: the vectors of the slides.
        place: their study, with features and slide encoder.
        folder: of the heatmaps.
        device: auto, cpu or cuda.

    Returns:
        Slide -> target -> picture; without the slides that have no features any more, which is said.
    """
    scores = {one.target: one.score for one in probe.targets if one.kind != "numbers"}
    if not scores:
        return {}
    explainer, rows = Explainer(place, device), {row["slide_id"]: row for row in place.slides()}
    vectors = dict(zip(source.ids, next(iter(source.vectors.values())), strict=True))
    found: dict[str, dict[str, Path]] = {}
    with progress_bar("heatmaps", len(vectors)) as bar:
        for name, vector in vectors.items():
            bar.advance(1)
            try:
                shares, ground = explainer(name, scores, vector), thumbnail(rows[name])
                found[name] = {
                    target: write_heatmap(folder, place.features(name), target, heatmap, ground)
                    for target, heatmap in shares.items()
                }
            except HistosslError as error:
                say(f"no heatmap: {error}", "yellow")
    return found
