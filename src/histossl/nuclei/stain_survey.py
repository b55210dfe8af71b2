"""Surveys a slide before its nuclei are found: tissue, a sample of fields, stains."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import SlideError
from histossl.nuclei.settings import SegmentSettings
from histossl.wsi.areas import SlideAreas, restrict
from histossl.wsi.slide import Slide, open_slide
from histossl.wsi.stain import Stains, estimate_stains, sample_fields
from histossl.wsi.tissue import TissueMask, find_tissue

log = logging.getLogger(__name__)


_FIELD = 2000.0  # µm; a narrower picture is a field, all of which counts as tissue


@dataclass(frozen=True)
class StainSurvey:
    """What is known about a slide before its nuclei are found.

    Attributes:
        path: of the slide.
        mpp: µm per level-0 pixel.
        vendor: "plain" for pictures.
        mask: its tissue, which knows its size.
        fields: a sample of it, (H, W, 3) uint8 at the method's mpp.
        stains: None where there is nothing stained.
    """

    path: Path
    mpp: float
    vendor: str
    mask: TissueMask
    fields: list[NDArray[np.uint8]]
    stains: Stains | None


def survey(
    slide: Slide, mpp: float, settings: SegmentSettings = SegmentSettings(), areas: SlideAreas | None = None
) -> StainSurvey:
    """Find the tissue of a slide, read a sample of fields, and estimate the stains.

    Args:
        slide: the slide.
        mpp: µm per pixel of the fields.
        settings: number of fields, and seed of their choice.
        areas: the user's areas, outside of which no nuclei are looked for; None for all tissue.

    Returns:
        The survey; its stains are None where there is no tissue, or nothing is stained.

    Raises:
        SlideError: the slide cannot be read, is greyscale, or its areas do not fit it.
    """
    mask = _tissue(slide)
    if areas:
        mask = restrict(mask, slide, areas)
    rng = np.random.default_rng(settings.seed)
    fields = sample_fields(slide, mask, mpp, settings.fields, rng)
    if not fields:
        return StainSurvey(slide.path, slide.mpp, slide.vendor, mask, [], None)
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
    return StainSurvey(slide.path, slide.mpp, slide.vendor, mask, fields, stains)


@dataclass(frozen=True)
class SurveyTask:
    """A slide that a worker opens and surveys: its path, arguments of `open_slide`, and those of `survey`."""

    path: Path
    mpp_default: float | None
    mpp: float
    settings: SegmentSettings = SegmentSettings()
    areas: SlideAreas | None = None


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
        return survey(slide, task.mpp, task.settings, task.areas)


def _tissue(slide: Slide) -> TissueMask:
    if max(slide.size.width, slide.size.height) * slide.mpp < _FIELD:
        return TissueMask(np.ones((1, 1), bool), slide.size)
    return find_tissue(slide)
