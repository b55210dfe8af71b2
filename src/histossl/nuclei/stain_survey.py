"""Surveys a slide before its nuclei are found: tissue, a sample of fields, stains."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import SlideError
from histossl.nuclei.pseudo_labels import SureNuclei, sure_nuclei
from histossl.nuclei.settings import PseudoLabelSettings, SegmentSettings
from histossl.nuclei.usual import USUAL
from histossl.wsi.areas import SlideAreas, restrict
from histossl.wsi.slide import Slide, open_slide
from histossl.wsi.stain import Stains, estimate_stains, sample_fields
from histossl.wsi.tissue import TissueMask, find_tissue

log = logging.getLogger(__name__)


_FIELD = 2000.0  # µm; a narrower picture is a field, all of which counts as tissue
_FINEST = 4  # steps of a fourth root of two, by which pictures are read finer at most


@dataclass(frozen=True)
class StainSurvey:
    """What is known about a slide before its nuclei are found.

    Attributes:
        path: of the slide.
        mpp: µm per level-0 pixel.
        vendor: "plain" for pictures.
        mask: its tissue, which knows its size.
        fields: a sample of it, (H, W, 3) uint8 at `tile_mpp`.
        stains: None where there is nothing stained.
        tile_mpp: µm per pixel of the pictures in which nuclei are looked for: the method's mpp, or finer where the
            slide's nuclei are small and the method is told so.
        sure: the slide's sure nuclei, where they were asked for; else None.
    """

    path: Path
    mpp: float
    vendor: str
    mask: TissueMask
    fields: list[NDArray[np.uint8]]
    stains: Stains | None
    tile_mpp: float
    sure: SureNuclei | None = None


def survey(
    slide: Slide,
    mpp: float,
    settings: SegmentSettings = SegmentSettings(),
    areas: SlideAreas | None = None,
    support: PseudoLabelSettings | None = None,
) -> StainSurvey:
    """Find the tissue of a slide, read a sample of fields, and estimate the stains.

    Args:
        slide: the slide.
        mpp: µm per pixel of the fields.
        settings: number of fields, and seed of their choice.
        areas: the user's areas, outside of which no nuclei are looked for; None for all tissue.
        support: how the sure nuclei are found that support the method; pictures are then read finer where the slide's
            nuclei are small, see `finer`. None for a method without.

    Returns:
        The survey; its stains are None where there is no tissue, or nothing is stained.

    Raises:
        SlideError: the slide cannot be read, is greyscale, or its areas do not fit it.
    """
    mask = _tissue(slide)
    if areas:
        mask = restrict(mask, slide, areas)
    fields = _fields(slide, mask, mpp, settings)
    if not fields:
        return StainSurvey(slide.path, slide.mpp, slide.vendor, mask, [], None, mpp)
    try:
        stains = estimate_stains(np.concatenate([f.reshape(-1, 3)[:: max(1, len(fields))] for f in fields]))
    except SlideError as error:
        raise SlideError(slide.path, error.what.partition(": ")[2], error.hint) from error
    if stains is None:
        log.warning("%s: nothing on it is stained, so it has no nuclei", slide.path.name)
    elif stains.is_eosin_alone:
        log.warning("%s: no hematoxylin, so no nuclei are looked for", slide.path.name)
        stains = None
    elif not stains.has_hematoxylin:
        what = "hardly any red is absorbed, as if there were no hematoxylin: look whether what is found are nuclei"
        log.warning("%s: %s", slide.path.name, what)
    elif stains.has_brown:
        what = "a brown stain, as of immunohistochemistry or tan collagen: of brown nuclei hardly any are found"
        log.warning("%s: %s", slide.path.name, what)
    sure = sure_nuclei(fields, stains, mpp, support) if stains and support else None
    tile_mpp = finer(mpp, sure.tree.objects.usual) if sure else mpp
    if stains and support and tile_mpp != mpp:
        fields = _fields(slide, mask, tile_mpp, settings)
        sure = sure_nuclei(fields, stains, mpp, support)
    return StainSurvey(slide.path, slide.mpp, slide.vendor, mask, fields, stains, tile_mpp, sure)


def _fields(slide: Slide, mask: TissueMask, mpp: float, settings: SegmentSettings) -> list[NDArray[np.uint8]]:
    return sample_fields(slide, mask, mpp, settings.fields, np.random.default_rng(settings.seed))


def finer(mpp: float, usual: float) -> float:
    """Where nuclei are small, read pictures finer: a network that learned on usual nuclei finds them then.

    Half way in the logarithm of the width was better than all the way, and coarser for large nuclei no better than as
    they are (docs/nuclei.md).

    Args:
        mpp: µm per pixel for nuclei of usual size.
        usual: µm² of the slide's usual nucleus; 0 where it is unknown.

    Returns:
        µm per pixel, in steps of a fourth root of two; `mpp` from 28 µm² on, and half of it at the least.
    """
    steps = round(math.log2(USUAL / usual)) if usual else 0
    return mpp * 2 ** (-min(max(steps, 0), _FINEST) / 4)


@dataclass(frozen=True)
class SurveyTask:
    """A slide that a worker opens and surveys: its path, arguments of `open_slide`, and those of `survey`."""

    path: Path
    mpp_default: float | None
    mpp: float
    settings: SegmentSettings = SegmentSettings()
    areas: SlideAreas | None = None
    support: PseudoLabelSettings | None = None


def survey_there(task: SurveyTask) -> StainSurvey:
    """`survey` in a worker.

    Args:
        task: path of the slide, mpp and settings.

    Returns:
        The survey.

    Raises:
        SlideError: the slide cannot be opened or read, or is greyscale.
    """
    with open_slide(task.path, mpp_default=task.mpp_default) as slide:
        return survey(slide, task.mpp, task.settings, task.areas, task.support)


def _tissue(slide: Slide) -> TissueMask:
    if max(slide.size.width, slide.size.height) * slide.mpp < _FIELD:
        return TissueMask(np.ones((1, 1), bool), slide.size)
    return find_tissue(slide)
