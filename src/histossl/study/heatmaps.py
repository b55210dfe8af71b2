"""Heatmaps of the slides of a study: STUDY/heatmaps/TARGET/SLIDE.csv, .geojson and .png."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histossl.core import atomic, tables
from histossl.core.config import from_dict
from histossl.core.console import progress_bar, say
from histossl.core.errors import HistosslError, LabelError, SlideError, StudyError
from histossl.core.tables import number
from histossl.evaluate.heatmap import Heatmap, explain, fit_scores
from histossl.evaluate.heatmap_files import write_heatmap_geojson, write_heatmap_picture, write_heatmap_table
from histossl.evaluate.linear import LinearScore
from histossl.evaluate.patients import labels_for, of_area
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.sources import read_source
from histossl.gigassl.embed import EmbedSettings
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.pretrain_settings import PretrainSettings, trained_as
from histossl.gigassl.slide_sources import plain_tiles
from histossl.study.folder import Row, Study
from histossl.training.device import pick_device
from histossl.wsi import tile_files
from histossl.wsi.slide import open_slide

# Largest difference of a vector from the one in embeddings.h5ad: another machine may round products to 16 bits.
MOVED = 1e-2


def heatmaps_study(
    study: Study, labels: Path, settings: ProbeSettings, chosen: Sequence[str] = (), device: str = "auto"
) -> int:
    """Write the heatmaps of slides, and scores.csv with their logits.

    Args:
        study: the study, with embeddings and locked.
        labels: table of labels, as of the probe.
        settings: settings of the probe.
        chosen: slide ids; empty takes all.
        device: auto, cpu or cuda.

    Returns:
        The number of slides and labels that were left out.

    Raises:
        LabelError: the labels cannot be used, or the study does not have one of the chosen slides.
        StudyError: there is no embeddings.h5ad, or the slides have several sources.
    """
    if study.sources:
        what = f"{study.folder}: its slides have tiles of {len(study.sources)} sources"
        raise StudyError(what, f"explain one of them: {study.sources[0].folder}")
    if not study.embeddings.exists():
        raise StudyError(f"{study.folder}: has no embeddings.h5ad", "run `histossl embed` first")
    source = of_area(read_source(study.embeddings), settings.area)
    unknown = [name for name in chosen if name not in source.ids]
    if unknown:
        raise LabelError(
            f"no slide {unknown[0]!r} in {study.embeddings}", f"there are {', '.join(source.ids[:3])}, ..."
        )
    table = labels_for(source, labels, settings)
    for line in (*source.notes, *table.notes):
        say(f"note: {line}", "yellow")
    probes = fit_scores(source, table, settings)
    vectors = dict(zip(source.ids, next(iter(source.vectors.values())), strict=True))
    explainer = Explainer(study, device)
    rows = {row["slide_id"]: row for row in study.slides()}
    lines, failed = [], 0
    names = list(chosen) or list(source.ids)
    with progress_bar("heatmaps", len(names)) as bar:
        for name in names:
            bar.advance(1)
            try:
                ground = thumbnail(rows[name])
                found = explainer(name, {target: probes[target][name] for target in probes}, vectors[name])
                for target, heatmap in found.items():
                    write_heatmap(study.folder / "heatmaps", study.features(name), target, heatmap, ground)
                    lines += _lines(target, heatmap, probes[target][name])
            except HistosslError as error:
                say(f"FAILED {error}", "red")
                failed += 1
    with atomic.whole(study.folder / "heatmaps" / "scores.csv") as part, part.open("w", newline="") as file:
        writer = tables.writer(file)
        writer.writerow(["target", "slide_id", "class", "logit", "trained_on"])
        writer.writerows(map(tables.cell, line) for line in lines)
    for line in table.complaints:
        say(f"LEFT OUT {line}", "yellow")
    say(f"done: {study.folder / 'heatmaps'}", "green")
    return failed + len(table.complaints)


class Explainer:
    """Computes heatmaps of the slides of a study, with its slide encoder and the settings of its embeddings.

    Args:
        study: the study, with embeddings.
        device: auto, cpu or cuda.
    """

    def __init__(self, study: Study, device: str = "auto") -> None:
        self.study = study
        self.encoder = SlideEncoder.load(study.slide_encoder).to(pick_device(device)).eval()
        self.view = from_dict(PretrainSettings, trained_as(study.slide_encoder)["pretrain"]).view
        self.embed = from_dict(EmbedSettings, study.settings().get("embed", {}))

    def __call__(self, name: str, scores: dict[str, LinearScore], vector: NDArray | None = None) -> dict[str, Heatmap]:
        """Compute the heatmaps of a slide.

        Args:
            name: the slide id.
            scores: target -> the linear probe to explain, see `fit_scores`.
            vector: (d,) the slide's vector in embeddings.h5ad; the computed vector must equal it.

        Returns:
            Target -> heatmap.

        Raises:
            FileFormatError: the features of its tiles are absent or damaged.
            StudyError: the computed vector differs from `vector`.
        """
        features, positions = plain_tiles(self.study.features(name))
        found = explain(self.encoder, features, positions, self.view, self.embed, name, scores)
        if vector is not None:
            for heatmap in found.values():
                if heatmap.vector.shape != vector.shape or np.abs(heatmap.vector - vector).max() > MOVED:
                    what = f"{name}: embeddings.h5ad was made with another encoder or other settings"
                    raise StudyError(what, "run `histossl embed` again")
        return found


def write_heatmap(folder: Path, features: Path, target: str, heatmap: Heatmap, ground: NDArray | None) -> Path:
    """Write the heatmap of a slide as a table, as GeoJSON and as a picture: FOLDER/TARGET/SLIDE.csv, ...

    Args:
        folder: of heatmaps.
        features: the file of the slide's features, which says where its tiles lie.
        target: the target.
        heatmap: of the slide.
        ground: (h, w, 3) the slide; None draws on white.

    Returns:
        The picture.
    """
    tiles, name = tile_files.read_tiles_of(features), heatmap.slide_id
    folder = folder / (re.sub(r"[^\w-]", "_", target) or "_")
    write_heatmap_table(folder / f"{name}.csv", heatmap, tiles.xy, tiles.in_um)
    picture = folder / f"{name}.png"
    write_heatmap_picture(picture, heatmap, tiles.xy, tiles.extent, tiles.size, ground, target)
    if tiles.in_um:
        say(f"{name}: its tiles are in µm, so there is no GeoJSON; write its mpp into slides.csv", "yellow")
    else:
        write_heatmap_geojson(folder / f"{name}.geojson", heatmap, tiles.xy, tiles.extent)
    return picture


def thumbnail(row: Row) -> NDArray[np.uint8] | None:
    """A thumbnail of a slide.

    Args:
        row: of slides.csv.

    Returns:
        (h, w, 3); None where the slide cannot be opened: its heatmap is then drawn on white.
    """
    path = Path(row["path"])
    if not row["path"] or not path.exists():
        return None
    try:
        with open_slide(path, number(row["mpp"]) if row["mpp"].strip() else None, 1.0) as slide:
            return slide.thumbnail(1600)
    except (SlideError, ValueError) as error:
        say(f"{row['slide_id']}: its heatmap is drawn on white ({error})", "yellow")
        return None


def _lines(target: str, heatmap: Heatmap, score: LinearScore) -> list[list[str]]:
    return [
        [target, heatmap.slide_id, name, f"{logit:.6f}", score.trained_on]
        for name, logit in zip(heatmap.names, heatmap.logits, strict=True)
    ]
