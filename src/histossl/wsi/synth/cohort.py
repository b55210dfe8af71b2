"""Cohorts of synthetic slides on disk, with labels, sites and survival."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from histossl.core.atomic import whole
from histossl.core.config import check_choice
from histossl.core.console import progress_bar
from histossl.core.errors import SettingsError
from histossl.wsi.synth.recipe import CLASSES, FACTORS, SynthSettings, outcome, site_of
from histossl.wsi.synth.write import write_slide, write_truth

Sites = Literal["none", "independent", "confounded"]
_RARE = 10  # of the patients of a class one in so many is of the other class's laboratory


def write_cohort(
    folder: str | Path,
    slides: int = 48,
    width: int = 1536,
    height: int = 1792,
    mpp: float = 1.0,
    patch_um: float = 64.0,
    seed: int = 0,
    truth: bool = False,
    artefacts: Sequence[str] = (),
    sites: Sites = "none",
) -> list[SynthSettings]:
    """Write a cohort: `slides/*.tiff`, `labels.csv` with the three factors of each slide, and `survival.csv` with more.

    Each patient has two slides. The three factors belong to the patient. They are independent of each other (every
    eight patients are a full factorial design) and of the stain, and balanced for an even number of patients. Survival
    is exponential with the hazard of `recipe.log_hazard`, censored at random: `os_months` and `os_event`, the columns
    that survival.csv has beside those of labels.csv.

    Args:
        folder: folder to write.
        slides: number of slides.
        width: width of each slide in level-0 pixels.
        height: height of each slide in level-0 pixels.
        mpp: µm per level-0 pixel.
        patch_um: side of the patches of one kind, in µm.
        seed: seed of the whole cohort.
        truth: also write the nuclei as `truth/*.geojson`.
        artefacts: kinds that are painted over the tissue of each slide.
        sites: independent or confounded also write the laboratory of each slide, as the column `site`. Independent: one
            of three, whatever the tissue; confounded: nine in ten patients with more glands are of laboratory 1, nine
            in ten with more lymphocytes of laboratory 2.

    Returns:
        The settings of each slide, in the order of labels.csv.

    Raises:
        SettingsError: fewer than one slide, or a value out of the range of `SynthSettings`.
        OSError: the folder is not writable, or the disk is full.
    """
    if slides < 1:
        raise SettingsError(f"a cohort of {slides} slides", "ask for at least one")
    check_choice("sites", sites, get_args(Sites))
    folder = Path(folder)
    cohort = _cohort(slides, SynthSettings(width, height, mpp, patch_um, artefacts=tuple(artefacts)), seed)
    if sites == "confounded":
        cohort = _confounded(cohort)
    names = [f"slide-{k:03d}" for k in range(1, slides + 1)]
    with progress_bar("painting slides", slides, shown=slides > 1) as bar:
        for name, settings in zip(names, cohort, strict=True):
            write_slide(folder / "slides" / f"{name}.tiff", settings)
            if truth:
                write_truth(folder / "truth" / f"{name}.geojson", settings)
            bar.advance(1)
    patients = {p: f"patient-{k:03d}" for k, p in enumerate(dict.fromkeys(s.patient for s in cohort), 1)}
    columns = ["slide_id", "patient_id", *FACTORS, *(["site"] if sites != "none" else [])]
    rows = [
        [name, patients[s.patient], *(CLASSES[f][getattr(s, f)] for f in FACTORS), site_of(s)][: len(columns)]
        for name, s in zip(names, cohort, strict=True)
    ]
    _write(folder / "labels.csv", [columns, *rows])
    followed = ([*row, *outcome(s)] for row, s in zip(rows, cohort, strict=True))
    _write(folder / "survival.csv", [[*columns, "os_months", "os_event"], *followed])
    return cohort


def _write(path: Path, rows: Iterable[Sequence[object]]) -> None:
    with whole(path) as part, part.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows(rows)


def _confounded(cohort: Sequence[SynthSettings]) -> list[SynthSettings]:
    """The slides, those of each patient of a laboratory that nearly tells the composition."""
    of: dict[int, int] = {}
    seen = [0, 0]
    for settings in cohort:
        if settings.patient not in of:
            rank = seen[settings.composition]
            seen[settings.composition] += 1
            rare = rank % _RARE == _RARE // 2
            of[settings.patient] = 1 + (1 - settings.composition if rare else settings.composition)
    return [replace(settings, laboratory=of[settings.patient]) for settings in cohort]


def _cohort(slides: int, form: SynthSettings, seed: int) -> list[SynthSettings]:
    """The settings of each slide; patients get complementary pairs of factors from shuffled full factorials."""
    rng = np.random.default_rng([seed, 101])
    patients = math.ceil(slides / 2)
    classes: list[tuple[int, ...]] = []
    while len(classes) < patients:
        for half in rng.permutation(4):
            pair = [(0, int(half) >> 1, int(half) & 1), (1, 1 - (int(half) >> 1), 1 - (int(half) & 1))]
            classes += [pair[k] for k in rng.permutation(2)]
    keys = rng.integers(2**62, size=(slides, 2))
    made = []
    for k in range(slides):
        factors = dict(zip(FACTORS, classes[k // 2], strict=True))
        made.append(replace(form, seed=int(keys[k, 0]), patient=int(keys[k - k % 2, 1]), **factors))
    return [made[k] for k in rng.permutation(slides)]


def synth(
    out: Path,
    slides: int = 48,
    width: int = 1536,
    height: int = 1792,
    mpp: float = 1.0,
    patch_um: float = 64.0,
    seed: int = 0,
    truth: bool = False,
    artefacts: tuple[str, ...] = (),
    sites: Sites = "none",
) -> None:
    """Paint a cohort of hematoxylin-and-eosin slides with known classes and nuclei.

    Args:
        out: folder to write: slides/*.tiff, labels.csv, and survival.csv, which adds an outcome with a known hazard.
        slides: number of slides, two per patient.
        width: level-0 pixels.
        height: level-0 pixels.
        mpp: µm per level-0 pixel.
        patch_um: side of the square patches of one kind of tissue, in µm.
        seed: the same seed gives the same bytes.
        truth: also write the outline of every nucleus to truth/*.geojson.
        artefacts: kinds to paint over the tissue: fold, blur, bubble, dirt, pen-black, pen-blue, pen-green, pen-red.
        sites: also write which of three laboratories stained and scanned a slide, the column site: independent of the
            tissue, or confounded with its composition.
    """
    write_cohort(out, slides, width, height, mpp, patch_um, seed, truth, artefacts, sites)
