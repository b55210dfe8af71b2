"""The commands that work on a study: parameters are their flags, the returned number is the exit code.

What computes is imported when a command runs, after a first look at what it was given: that look takes no second.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from histossl.cli.first_look import (
    exit_code,
    first_look,
    loaded_encoder,
    look_at_labels,
    look_for_device,
    say_waiting,
    tell_the_end,
)
from histossl.core.config import fingerprint
from histossl.core.console import begin_stage, say
from histossl.core.errors import StudyError
from histossl.core.hub import model_folder
from histossl.encoders.model_names import check_name
from histossl.encoders.settings import EncodeSettings, TileTrainSettings
from histossl.evaluate.settings import ProbeSettings
from histossl.execution.cluster import Cluster, open_workers, slide_executor
from histossl.execution.workers import Executor, SerialExecutor, Workers
from histossl.gigassl.embed_settings import EmbedSettings
from histossl.gigassl.pretrain_settings import PretrainSettings
from histossl.study.folder import Study, existing_study
from histossl.wsi.areas import AreaSettings
from histossl.wsi.tiles import TileSpec
from histossl.wsi.tissue import TissueSettings

if TYPE_CHECKING:
    from histossl.encoders.tile_encoder import TileEncoder
    from histossl.study.import_file import FeatureOrigin

IMPORTED = 600.0  # seconds after which a file of features that is still not read is given up


def run(
    slides: Path,
    *,
    out: Path,
    labels: Path | None = None,
    areas: Path | None = None,
    mpp_default: float | None = None,
    encoder: str = "self",
    area: AreaSettings = AreaSettings(),
    tissue: TissueSettings = TissueSettings(),
    tile: TileSpec = TileSpec(),
    tile_encoder: TileTrainSettings = TileTrainSettings(),
    encode: EncodeSettings = EncodeSettings(),
    pretrain: PretrainSettings = PretrainSettings(),
    embed: EmbedSettings = EmbedSettings(),
    probe: ProbeSettings = ProbeSettings(),
    workers: int | None = None,
    timeout: float = 900,
    scheduler: str = "",
    slurm: str = "",
    device: str = "auto",
) -> int:
    """A folder of slides in; one vector a slide, a probe of them and a report out.

    The stages in order: inspect, encode, pretrain, embed, probe (with labels), report. What stands is kept, so that an
    interrupted run goes on where it was; slides that fail are left out, with the reason in slides.csv.

    Args:
        slides: a folder of slides, searched with its subfolders, or one slide.
        out: the folder of the study; made where there is none.
        labels: a CSV with slide_id, optionally patient_id, and label; only the probe ever sees it.
        areas: a folder of outlines or masks of the areas that count, named as the slides; or grid, which finds the
            cores of tissue microarrays.
        mpp_default: µm per pixel of slides that have none in their file or in slides.csv.
        encoder: the tile encoder: self (learned on these slides, without labels), random (untrained, the baseline),
            imagenet, a folder that `encoder pretrain` wrote, a file of ResNet-18 weights, pickle:FILE (.pth),
            timm:NAME, hf:NAME or torchscript:FILE. Names: docs/foundation-models.md.
        area: which of the areas count, and what happens to slides without any.
        tissue: how tissue is found.
        tile: how tiles are laid.
        tile_encoder: how `--encoder self` learns.
        encode: how tiles become features and augmented views.
        pretrain: how the slide encoder learns.
        embed: how a slide's vector is made.
        probe: how the linear classifier is trained and scored.
        workers: processes that read slides; by default one a core, at most eight.
        timeout: seconds that a worker may take for a slide or a batch of tiles before it is killed.
        scheduler: work on the Dask cluster at this address, such as tcp://host:8786, instead of on this machine alone.
        slurm: work in so many SLURM jobs, as JOBS or JOBS:NAME; see docs/scale.md.
        device: auto, cpu or cuda.
    """
    first_look(pretrain, encoder, device, labels, probe)
    from histossl.study.inspect_stage import find_slides, inspect_slides
    from histossl.wsi.named_areas import open_areas

    drawn = open_areas(areas, area)
    found = find_slides(out, slides)  # before the folder of the study is made
    network = loaded_encoder(encoder, encode, device)
    study = Study(out)
    with open_workers(workers, timeout, scheduler, slurm) as pool:
        with study.share(say_waiting):
            begin_stage("1/6 inspect", str(slides))
            failed = inspect_slides(study, found, mpp_default, tissue, tile, pool, drawn)
        begin_stage("2/6 encode", f"{_count(study)} slides")
        failed = max(failed, _encode(study, encoder, tile_encoder, encode, pool, device, network))
    with study.lock(say_waiting):
        _pretrain(study, pretrain, device)
        begin_stage("4/6 embed")
        with open_workers(workers, timeout, scheduler, slurm) as pool:
            failed = max(failed, _embed(study, embed, device, slide_executor(pool)))
        failed += _judge(study, labels, probe)
        tell_the_end(study)
    return exit_code(failed)


def _pretrain(study: Study, settings: PretrainSettings, device: str) -> None:
    from histossl.study.pretrain_stage import pretrain_study

    begin_stage("3/6 pretrain")
    pretrain_study(study, settings, device)


def _judge(study: Study, labels: Path | None, probe: ProbeSettings) -> int:
    from histossl.study.probe_stage import probe_study

    with _report_in_any_case(study):
        begin_stage("5/6 probe", str(labels or "no --labels, nothing to probe"))
        return probe_study(study, labels, probe) if labels else 0


def _report_in_any_case(study: Study) -> ExitStack:
    """Labels that cannot be used cost the probe, not the report of all that was done before."""
    from histossl.view.report.study_report import report_study

    stack = ExitStack()
    stack.callback(report_study, study)
    stack.callback(begin_stage, "6/6 report")
    return stack


def encode_command(
    study: Path,
    encoder: str = "self",
    areas: Path | None = None,
    area: AreaSettings = AreaSettings(),
    tile_encoder: TileTrainSettings = TileTrainSettings(),
    encode: EncodeSettings = EncodeSettings(),
    workers: int | None = None,
    timeout: float = 900,
    scheduler: str = "",
    slurm: str = "",
    device: str = "auto",
) -> int:
    """Tiles of inspected slides to features and augmented views.

    Args:
        study: the folder that `inspect --out` made.
        encoder: the tile encoder: self (learned on these slides, without labels), random (untrained, the baseline),
            imagenet, a folder that `encoder pretrain` wrote, a file of ResNet-18 weights, pickle:FILE (.pth),
            timm:NAME, hf:NAME or torchscript:FILE. Names: docs/foundation-models.md.
        areas: as of `inspect`: the tiles of the study are first laid anew inside of these areas.
        area: which of the areas count, and what happens to slides without any.
        tile_encoder: how `--encoder self` learns.
        encode: how tiles become features and views.
        workers: processes that read slides.
        timeout: seconds that a worker process may take for a batch of tiles before it is killed and the slide given up.
        scheduler: work on the Dask cluster at this address, such as tcp://host:8786, instead of on this machine alone.
        slurm: work in so many SLURM jobs, as JOBS or JOBS:NAME; see docs/scale.md.
        device: auto, cpu or cuda.
    """
    opened = existing_study(study)
    check_name(encoder)
    look_for_device(device)
    from histossl.wsi.named_areas import open_areas

    drawn, failed = open_areas(areas, area), 0
    with open_workers(workers, timeout, scheduler, slurm) as pool:
        if drawn:
            from histossl.study.inspect_stage import lay_within

            with opened.share(say_waiting):
                failed = lay_within(opened, drawn, pool)
        return exit_code(max(failed, _encode(opened, encoder, tile_encoder, encode, pool, device)))


def pretrain_command(
    study: list[Path],
    out: Path | None = None,
    stride: float | None = None,
    mpp: float | None = None,
    slides: Path | None = None,
    pretrain: PretrainSettings = PretrainSettings(),
    embed: EmbedSettings = EmbedSettings(),
    device: str = "auto",
) -> int:
    """Train the slide encoder, without labels: on the encoded slides of a study, or on features that another tool made.

    With --out the study is made from a folder of features, of TRIDENT, CLAM (h5 and pt), STAMP or ours, and ends with
    embeddings.h5ad, as `histossl run` does. Several folders are of the same slides, by other tile encoders or at other
    magnifications: the two views of a slide come from two of them. On several devices or machines: `torchrun ... -m
    histossl pretrain ...`.

    Args:
        study: the folder of the study; with --out, folders of features, a file a slide.
        out: the folder of the study to be made from features.
        stride: level-0 pixels from a tile to the next, where the files of features do not say it.
        mpp: µm per level-0 pixel of all slides, where the files of features do not say it.
        slides: the folder of the slides that the features are of, where they are at hand, for pictures and mpp.
        pretrain: how the slide encoder learns.
        embed: how a slide's vector is made, with --out.
        device: auto, cpu or cuda.
    """
    pretrain.check_files()
    look_for_device(device)
    from histossl.study import multi_source
    from histossl.study.pretrain_stage import pretrain_study
    from histossl.training import distributed
    from histossl.training.device import pick_device

    opened, failed = _study(study, out), 0
    with distributed.process_group(pick_device(device).type) as first, opened.lock() if first else nullcontext():
        if out is not None and first:
            failed = _adopt(
                opened, _origins(study, stride, mpp, slides), spatial=pretrain.encoder.arch in ("neighbours", "sparse")
            )
        distributed.barrier()
        (multi_source.pretrain_sources if opened.sources else pretrain_study)(opened, pretrain, device)
        if out is not None and first:
            failed = max(failed, _embed(opened, embed, device, SerialExecutor()))
            say(f"done: {opened.embeddings}", "green")
    return exit_code(failed)


def embed_command(
    study: list[Path],
    out: Path | None = None,
    weights: Path | None = None,
    stride: float | None = None,
    mpp: float | None = None,
    slides: Path | None = None,
    embed: EmbedSettings = EmbedSettings(),
    timeout: float = 900,
    scheduler: str = "",
    slurm: str = "",
    device: str = "auto",
) -> int:
    """One vector a slide, with the two baselines beside it: embeddings.h5ad.

    Args:
        study: the folder of the study; with --out, folders of features, a file a slide.
        out: the folder of the study to be made from features, with --weights.
        weights: a slide encoder that was trained elsewhere: the slide-encoder folder of another study, hf:OWNER/NAME,
            or a checkpoint that Giga-SSL's authors publish; for several folders of features, another study made from as
            many.
        stride: level-0 pixels from a tile to the next, where the files of features do not say it.
        mpp: µm per level-0 pixel of all slides, where the files of features do not say it.
        slides: the folder of the slides that the features are of, where they are at hand, for pictures and mpp.
        embed: how a slide's vector is made.
        timeout: seconds for a slide on a cluster before it is given up.
        scheduler: work on the Dask cluster at this address, such as tcp://host:8786, instead of on this machine alone.
        slurm: work in so many SLURM jobs, as JOBS or JOBS:NAME; see docs/scale.md.
        device: auto, cpu or cuda.
    """
    look_for_device(device)
    from histossl.study import multi_source
    from histossl.study.import_features import take_encoder

    opened, failed = _study(study, out), 0
    with opened.lock():
        if out is not None:
            failed = _adopt(opened, _origins(study, stride, mpp, slides))
        if weights is not None:
            weights = model_folder(weights)
            multi_source.take_encoders(opened, weights) if opened.sources else take_encoder(opened, weights)
        with open_workers(1, timeout, scheduler, slurm) as pool:
            return exit_code(max(failed, _embed(opened, embed, device, slide_executor(pool))))


def _study(folders: list[Path], out: Path | None) -> Study:
    """The study that stands in the one folder, or that is to be made of folders of features."""
    if out is not None:
        return Study(out)
    if len(folders) > 1:
        raise StudyError(f"{len(folders)} folders of features make a new study", "name it: --out")
    return existing_study(folders[0])


def _origins(folders: list[Path], stride: float | None, mpp: float | None, slides: Path | None) -> list[FeatureOrigin]:
    from histossl.study.import_file import FeatureOrigin

    return [FeatureOrigin(folder, stride, mpp, slides) for folder in folders]


def _adopt(study: Study, origins: list[FeatureOrigin], spatial: bool = True) -> int:
    from histossl.study import multi_source
    from histossl.study.import_features import import_features

    if len(origins) == 1 and study.sources:
        raise StudyError(f"{study.folder}: made from several folders of features", "name them all, or another --out")
    with Workers(min(2, os.cpu_count() or 1), IMPORTED) as readers:
        if len(origins) > 1:
            return multi_source.import_sources(study, origins, spatial, readers)
        return import_features(study, origins[0], spatial, readers)


def _embed(study: Study, settings: EmbedSettings, device: str, executor: Executor) -> int:
    from histossl.study import multi_source
    from histossl.study.embed_stage import embed_study

    return (multi_source.embed_sources if study.sources else embed_study)(study, settings, device, executor)


def probe_command(study: Path, *, labels: Path, probe: ProbeSettings = ProbeSettings()) -> int:
    """A logistic regression on the slide vectors beside the baselines, grouped by patient: probe.csv, probe.json.

    Args:
        study: the folder of the study.
        labels: a CSV with slide_id, optionally patient_id, and label.
        probe: how the classifier is trained and scored.
    """
    opened = existing_study(study)
    look_at_labels(labels, probe)
    from histossl.study.probe_stage import probe_study

    with opened.lock():
        return exit_code(probe_study(opened, labels, probe))


def _encode(
    study: Study,
    encoder: str,
    training: TileTrainSettings,
    settings: EncodeSettings,
    pool: Workers | Cluster,
    device: str,
    loaded: TileEncoder | None = None,
) -> int:
    from histossl.encoders.encode_slides import encode_slides
    from histossl.study.encode_stage import encode_study, encoder_of
    from histossl.study.remote_tasks import EncoderName, encode_on

    name = str(
        study.tile_encoder if encoder == "self" else Path(encoder).absolute() if Path(encoder).exists() else encoder
    )
    with study.share(say_waiting):
        # To learn a tile encoder takes one machine, which reads tiles in order.
        with study.learning(_waiting_for_encoder) if encoder == "self" else nullcontext(), Workers() as readers:
            network = encoder_of(study, encoder, training, settings, readers, device, loaded)
        if isinstance(pool, Cluster):
            made = fingerprint(network.identity)
            built = EncoderName(name, settings.seed, device, settings.precision, made)
            return encode_study(study, network, settings, lambda jobs: encode_on(pool, jobs, built, settings))
        return encode_study(study, network, settings, lambda jobs: encode_slides(jobs, network, settings, pool))


def _waiting_for_encoder() -> None:
    say("waiting for another run that learns the tile encoder", "yellow")


def _count(study: Study) -> int:
    return sum(row["status"] != "failed" for row in study.slides())
