"""The stages of a study, in order; each is a command, and `run` is all of them.

Every stage reads what the one before has written into the study's folder, keeps what exists, makes what is missing,
and returns the number of slides or labels that it left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors.torch import save

from histossl.core import atomic, fingerprints
from histossl.core.config import from_dict, to_dict
from histossl.core.console import progress_bar, say
from histossl.core.errors import SlideError, StudyError
from histossl.encoders.encode import EncodeJob, EncodeSettings, encode_fingerprint
from histossl.encoders.encode_slides import Step
from histossl.encoders.pretrain_tiles import TileTrainSettings, pretrain_tiles
from histossl.encoders.tile_encoder import TileEncoder, fourth_stage, load_encoder
from histossl.encoders.tile_stream import TileSource, tiles_trained_on
from histossl.execution.failures import failure, failure_reason, give_up_on_disk, report_failures
from histossl.execution.journal import Journal, StageQueue
from histossl.execution.throughput import Throughput
from histossl.execution.workers import Workers
from histossl.study.folder import Row, Study
from histossl.study.inspect_stage import ExistingProducts, say_left_out
from histossl.study.stain_target import SAVED, change_of, study_target
from histossl.study.times import timed
from histossl.training.loop import end_of_training
from histossl.wsi.stain_norm import Look
from histossl.wsi.tile_files import read_look
from histossl.wsi.tiles import TileSpec
from histossl.wsi.tissue import TissueSettings


def encoder_of(
    study: Study,
    name: str,
    training: TileTrainSettings,
    encode: EncodeSettings,
    workers: Workers,
    device: str,
    loaded: TileEncoder | None = None,
) -> TileEncoder:
    """The tile encoder of a study: by name, or for `self` the one in tile-encoder/, trained if absent.

    The fourth stage of a whole ResNet-18 is kept in the study, for a slide encoder that begins with it.

    Args:
        study: the study.
        name: name or path of the encoder, or "self".
        training: settings of the training of `self`.
        encode: seed and precision of the encoder.
        workers: read the tiles for the training.
        device: where the encoder runs, or "auto".
        loaded: the encoder of that name, where it was loaded before.

    Returns:
        The encoder.

    Raises:
        FileFormatError, SettingsError, TrainingError: see `load_encoder` and `pretrain_tiles`.
    """
    if name == "self":
        _pretrain_tiles(study, training, encode, workers, device)
        name = str(study.tile_encoder)
    found = loaded or load_encoder(name, encode.seed, device, encode.precision)
    shown = study.settings().get("inspect", {}).get("tile", {}).get("mpp")
    if found.mpp and shown and not 0.9 < found.mpp / shown < 1.1:
        say(f"{name} was trained on tiles of {found.mpp:g} µm per pixel, these are of {shown:g} (--tile.mpp)", "yellow")
    fourth = fourth_stage(name)
    if fourth:
        with atomic.whole(study.fourth_stage) as part:
            part.write_bytes(save(fourth))
    else:
        study.fourth_stage.unlink(missing_ok=True)
    return found


def _pretrain_tiles(
    study: Study, settings: TileTrainSettings, encode: EncodeSettings, workers: Workers, device: str
) -> None:
    target = study_target(study, encode)
    colours = {"stain": encode.stain, "stain_method": encode.stain_method} if target else {}
    study.settle("tile-encoder", to_dict(settings) | colours, study.tile_encoder)
    slides = [row for row in study.slides() if row["status"] != "failed"]
    if study.tile_encoder.is_dir():
        new = len({row["slide_id"] for row in slides} - tiles_trained_on(study.tile_encoder))
        if new:
            say(f"tile-encoder/ was trained without {new} of {len(slides)} slides; remove it to train anew")
        end_of_training(study.logs / "tile-encoder")  # a kill may have come between the encoder and this
        return
    say("learning the tile encoder, without labels")
    _learn_tiles(study, slides, settings, encode, target, workers, device)


@timed("tile encoder")
def _learn_tiles(
    study: Study,
    slides: list[Row],
    settings: TileTrainSettings,
    encode: EncodeSettings,
    target: Look | None,
    workers: Workers,
    device: str,
) -> None:
    saved = study.settings().get("inspect", {}).get("tile")
    if not isinstance(saved, dict):
        what = f"{study.folder}: settings.json does not say how its tiles were laid"
        raise StudyError(what, "run `histossl inspect SLIDES --out` on it first")
    tile = from_dict(TileSpec, saved)
    sources = []
    for row in slides:
        name, path = row["slide_id"], Path(row["path"])
        if target and read_look(study.tiles(name)) is None:  # encoding says so
            continue
        change = change_of(path, study.tiles(name), encode, target)
        sources.append(TileSource(name, path, float(row["mpp"]), tile, study.tiles(name), row.get("area", ""), change))
    unread = pretrain_tiles(sources, settings, study.tile_encoder, study.logs / "tile-encoder", workers, device)
    for complaint in unread.values():
        say(f"LEFT OUT of the training of tiles: {complaint}", "yellow")


def encode_study(
    study: Study,
    encoder: TileEncoder,
    settings: EncodeSettings,
    encoded: Callable[[Iterator[EncodeJob]], Iterator[Step]],
    target: Look | None = None,
) -> int:
    """Encode every inspected slide, features and views: features/ and views/.

    Args:
        study: the study, shared or locked.
        encoder: the tile encoder.
        settings: settings of the stage.
        encoded: encodes slides with these, here or on other machines, and yields what happens to each.
        target: the colours that tiles get, of another study; None asks the settings.

    Returns:
        The number of slides that failed.

    Raises:
        StudyError: it was not inspected, or made with other settings.
    """
    saved = study.settings().get("inspect", {}).get("tile")
    if not isinstance(saved, dict):
        what = f"{study.folder}: settings.json does not say how its tiles were laid"
        raise StudyError(what, "run `histossl inspect SLIDES --out` on it first")
    tile = from_dict(TileSpec, saved)
    target = target or study_target(study, settings)
    about = {"encoder": encoder.identity, **to_dict(settings)} | ({SAVED: target.numbers()} if target else {})
    study.settle("encode", about, study.folder / "features")
    journal = Journal(study)
    rows = journal.rows
    jobs, changes = _to_encode(study, rows, tile, (encoder, settings, target))
    journal.write("check", changes)
    total = sum(int(row["tiles"]) for row, _ in jobs)
    speed = Throughput("GPU" if encoder.device.type == "cuda" else "CPU")
    with StageQueue(journal, "encode", jobs) as shift, progress_bar("tiles", total) as bar:
        for mine in shift.rounds():
            for step in encoded(mine):
                speed.add(step.waited, step.read, step.cpu)
                name = step.job.slide_id
                if step.error is not None:
                    give_up_on_disk(step.error)
                    shift.finish(name, failure(failure_reason(step.error, step.job.path)))
                elif step.finished:
                    shift.finish(name, _encoded_row(step), lost=step.lost, limit=speed.limit)
                bar.advance(step.tiles + sum(int(row["tiles"]) for row in shift.listen()))
                bar.say(f"{name}, {speed.limit}")
    say_left_out(rows)
    return report_failures(rows)


def dropped_kinds(study: Study) -> tuple[str, ...]:
    """The kinds of artefacts whose tiles are left out of a study, as it was inspected."""
    found = study.settings().get("inspect", {}).get("tissue", {})
    return TissueSettings(pens=found.get("pens", True), drop=tuple(found.get("drop", ()))).dropped


def _encoded_row(step: Step) -> Row:
    lost = f"{step.job.path.name}: {step.lost} tiles cannot be decoded and are left out: {step.why}"
    return {
        "status": "encoded",
        "error": lost if step.lost else "",
        "made": step.made,
        "artefacts": str(step.artefacts),
    }


def _to_encode(
    study: Study, rows: list[Row], tile: TileSpec, how: tuple[TileEncoder, EncodeSettings, Look | None]
) -> tuple[list[tuple[Row, EncodeJob]], list[tuple[Row, Row]]]:
    """(The slides that are not encoded, the changes of rows that contradict the files)."""
    exists, key, (_, settings, target) = ExistingProducts(study), encode_fingerprint("", *how), how
    jobs, changes, drop = [], [], dropped_kinds(study)
    for row in rows:
        if row["status"] == "failed":
            continue
        name = row["slide_id"]
        there = exists("features", f"{name}.h5") and (not settings.views or exists("views", name))
        if there and row["status"] == "encoded" and row["made"].endswith(key):
            continue
        places = study.tiles(name), study.features(name), study.views(name)
        try:
            change = change_of(Path(row["path"]), study.tiles(name), settings, target)
        except SlideError as error:
            changes.append((row, failure(str(error))))
            continue
        job = EncodeJob(name, Path(row["path"]), float(row["mpp"]), tile, *places, drop, change)
        made = _encoded(job, *how) if there else ""
        if made:
            changes.append((row, {"status": "encoded", "made": made}))
        else:
            jobs.append((row, job))
            if row["status"] == "encoded":
                changes.append((row, {"status": "inspected", "made": row["made"].partition("-")[0]}))
    return jobs, changes


def _encoded(job: EncodeJob, encoder: TileEncoder, settings: EncodeSettings, target: Look | None) -> str:
    """The fingerprint of a slide's products where they exist, of these tiles and settings; or an empty one."""
    made = encode_fingerprint(fingerprints.fingerprint_of(job.tiles_path) or "", encoder, settings, target)
    products = [job.features_path, job.views_path] if settings.views else [job.features_path]
    return made if all(fingerprints.fingerprint_of(product) == made for product in products) else ""
