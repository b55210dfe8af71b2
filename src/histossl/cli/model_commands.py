"""The commands on what a study learned: applied to new slides, and given to others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from histossl.cli.first_look import look_for_device
from histossl.core import answers, atomic, tables
from histossl.core.console import say
from histossl.core.errors import SettingsError, StudyError
from histossl.core.hub import PREFIX, model_folder, push
from histossl.core.names import listed
from histossl.study.folder import Study

if TYPE_CHECKING:
    from histossl.evaluate.fitted import FittedProbe
    from histossl.evaluate.predict import Predictions
    from histossl.evaluate.sources import Source

VECTORS = (".h5ad", ".npy", ".csv", ".tsv", ".txt", ".parquet")  # files that are vectors already


def predict_command(
    study: Path,
    slides: Path,
    *,
    out: Path,
    areas: Path | None = None,
    coverage: float = 0.9,
    mpp_default: float | None = None,
    encoder: str = "",
    workers: int | None = None,
    device: str = "auto",
) -> int:
    """What the probe of a study says of new slides, never a diagnosis: predicted.csv, predicted.html, heatmaps.

    Of each slide the calibrated probability of every class, the set of classes that conforms, how far it lies off all
    that was seen, and the nearest known patients. The slides pass the stages of the study, with its encoders.

    Args:
        study: a study after `histossl probe`, or what `histossl export` wrote of its probe; or hf:OWNER/NAME.
        slides: a folder of new slides, or one slide; or their vectors: a study, or an .h5ad of the same encoders.
        out: the folder of the results; of slides their study, where an interrupted run goes on.
        areas: where the tiles of the study lie in areas, the folder of those of the new slides.
        coverage: the share of new patients like the known ones whose true class is in the set.
        mpp_default: µm per pixel of slides that carry none.
        encoder: of tiles, where the study has none of its own, such as timm:NAME.
        workers: processes that read slides.
        device: auto, cpu or cuda.
    """
    look_for_device(device)
    if not slides.exists():
        raise SettingsError(f"there is no {slides}", "give a folder of slides, a slide, or their vectors")
    from histossl.evaluate.fitted import load_probe
    from histossl.evaluate.predict import predict_source
    from histossl.evaluate.sources import read_source
    from histossl.study.new_slides import embed_new_slides
    from histossl.view.report.predicted import write_predictions

    study = model_folder(study)
    probe = load_probe(study / "probe" if (study / "probe").is_dir() else study)
    if out.resolve() in (study.resolve(), slides.resolve()):
        raise StudyError(f"{out}: holds other results", "name another folder: --out")
    if areas is not None and _are_vectors(slides):
        raise SettingsError(f"{slides}: are vectors already, which have no areas", "leave --areas out")
    failed, place = 0, slides if slides.is_dir() else slides.parent
    if not _are_vectors(slides):
        place = out
        failed = embed_new_slides(study, probe.stages, slides, Study(out), mpp_default, encoder, workers, device, areas)
    source = read_source(place if place is out else slides)
    for line in source.notes:
        say(f"note: {line}", "yellow")
    if probe.settings.unit == "patient" and probe.settings.combine not in ("mean", "tiles"):
        say(f"note: new slides have no {probe.settings.combine}: those of a patient count equally", "yellow")
    found = predict_source(probe, source, coverage)
    with atomic.whole(out / "predicted.csv") as part:
        tables.write_frame(part, found.table)
    pictures = _heatmaps(probe, source, place, out, device)
    write_predictions(out / "predicted.html", slides.resolve().name, probe, found, pictures)
    _tell(found)
    say(f"done: {out / 'predicted.html'}", "green")
    return 1 if failed or source.passed else 0


def export(study: Path, out: Path, *, what: str, onnx: bool = False, to: str = "") -> int:
    """A model of a study as a folder for others: weights, settings and a model card, README.md.

    Args:
        study: the study; of nuclei the folder that `histossl nuclei train` wrote.
        out: the new folder.
        what: slide-encoder, tile-encoder, nuclei, or probe, with which go the encoders that made its vectors.
        onnx: also write model.onnx, of tile-encoder and nuclei, and check that it gives the same.
        to: also put it on Hugging Face, as OWNER/NAME: a private repository where there is none of that name.
    """
    from histossl.study.export_model import USES, export_model

    export_model(study, what, out, onnx)
    place = str(out)
    if to:
        place = f"{PREFIX}{to.removeprefix(PREFIX)}"
        say(f"uploaded: {push(out, to)}")
    say(f"done: {out}; {USES[what].replace('FOLDER', place)}", "green")
    return 0


def _are_vectors(path: Path) -> bool:
    return path.suffix.lower() in VECTORS or any((path / name).exists() for name in ("embeddings.h5ad", "ids.npy"))


def _heatmaps(probe: FittedProbe, source: Source, place: Path, out: Path, device: str) -> dict[str, dict[str, Path]]:
    """Of a study the heatmaps; of vectors alone none."""
    if source.encoder is None or not source.tiles or not (place / "slides.csv").exists():
        return {}
    if Study(place).sources:
        say("note: no heatmaps: the slides have tiles of several sources", "yellow")
        return {}
    from histossl.study.new_slides import heatmaps_of_new

    return heatmaps_of_new(probe, source, Study(place), out / "heatmaps", device)


def _tell(found: Predictions) -> None:
    from histossl.evaluate.predict import UNLIKE
    from histossl.view.report.predicted import NOT_A_DIAGNOSIS

    shown = ["slide_id", "target", "predicted", *(name for name in ("set", "low", "high") if name in found.table)]
    columns = found.table.reindex(columns=[*shown, "unlike"]).to_dict("records")
    rows = [{str(name): "" if value != value else value for name, value in row.items()} for row in columns]
    answers.give_rows("predictions", rows, value=found.table.to_dict("records"))
    strange = found.table.loc[found.table["unlike"] <= UNLIKE, "slide_id"].unique()
    if len(strange):
        say(f"UNLIKE anything seen: {listed(map(str, strange), quote=False)}", "yellow")
    if found.known:
        say(f"note: {len(found.known)} of these slides the probe was fitted with, first {found.known[0]!r}", "yellow")
    say(NOT_A_DIAGNOSIS, "yellow")
