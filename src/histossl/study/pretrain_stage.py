"""Stage `pretrain`: encoded slides in, the slide encoder of the study out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from histossl.core.config import fingerprint
from histossl.core.console import say
from histossl.core.errors import StudyError
from histossl.core.names import barcode, listed, spellings
from histossl.evaluate.classes import known_name
from histossl.evaluate.labels import SITE_COLUMNS, find_column
from histossl.gigassl.pretrain import pretrain_slides
from histossl.gigassl.pretrain_settings import PretrainSettings, trained_as
from histossl.gigassl.slide_sources import SlideSource
from histossl.study.folder import Study
from histossl.study.times import timed
from histossl.training.distributed import is_rank_zero
from histossl.training.loop import end_of_training


class SlideSources(Sequence[SlideSource]):
    """The sources of the tiles of a study's slides, looked up on access: a million of them would fill memory."""

    def __init__(self, study: Study, names: Sequence[str]) -> None:
        self.study, self.names = study, names

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, at: int) -> SlideSource: ...
    @overload
    def __getitem__(self, at: slice) -> SlideSources: ...
    def __getitem__(self, at: int | slice) -> SlideSource | SlideSources:
        if isinstance(at, slice):
            return SlideSources(self.study, self.names[at])
        name = self.names[at]
        return SlideSource(name, self.study.features(name), self.study.views(name))


@timed("pretrain")
def pretrain_study(study: Study, settings: PretrainSettings, device: str) -> int:
    """Train the slide encoder on all encoded slides: slide-encoder/.

    Args:
        study: the study.
        settings: settings of the training.
        device: where it runs, or "auto".

    Returns:
        0, as the number of failures.

    Raises:
        StudyError: the study was made with other settings, or slide-encoder/ was trained on other features.
    """
    slides = [row["slide_id"] for row in study.encoded()]
    if is_rank_zero():
        study.settle("pretrain", settings, study.slide_encoder)
    logs = study.logs / "pretrain"
    if is_trained(study, slides):
        end_of_training(logs)  # a kill may have come between the encoder and this
        return 0
    sources, of = SlideSources(study, slides), features_fingerprint(study)
    sites = sites_of(study) if settings.negatives == "site" else []
    pretrain_slides(sources, settings, study.slide_encoder, logs, of, device, study.fourth_stage, sites)
    return 0


def sites_of(study: Study) -> list[str]:
    """The site of each encoded slide, by a column of slides.csv or a TCGA barcode.

    Args:
        study: the study.

    Returns:
        As many as there are encoded slides, in one spelling each.

    Raises:
        StudyError: the site of a slide is not known.
    """
    rows = study.encoded()
    column = find_column(list(rows[0]), SITE_COLUMNS)
    sites = {row["slide_id"]: known_name(row.get(column or "") or "") or barcode(row["slide_id"])[1] for row in rows}
    lost = [slide for slide, site in sites.items() if not site]
    if lost:
        what = f"{study.table}: pretrain.negatives is site, and no site is known of {listed(lost, 3)}"
        raise StudyError(what, "add a column site to slides.csv")
    spelt = spellings(sites.values())
    return [spelt[site] for site in sites.values()]


def features_fingerprint(study: Study) -> str:
    """The fingerprint of the features of a study, as far as its settings determine them.

    Args:
        study: the study.

    Returns:
        The fingerprint of the settings of `inspect` and `encode`.
    """
    return fingerprint(study.settings().get("inspect"), study.settings().get("encode"))


def is_trained(study: Study, slides: Sequence[str]) -> bool:
    """Whether a slide encoder exists; reports how many of the encoded slides it was trained without.

    Args:
        study: the study.
        slides: the slide_ids of the encoded slides.

    Returns:
        True where slide-encoder/ exists.

    Raises:
        StudyError: it was trained on other features.
    """
    if not study.slide_encoder.is_dir():
        return False
    about = trained_as(study.slide_encoder)
    if about["features"] != features_fingerprint(study):
        raise StudyError(
            f"{study.slide_encoder}: trained on other features than those of the study",
            f"use another --out, or remove {study.slide_encoder} to train anew",
        )
    new = len(set(slides) - set(about["slides"]))
    if new:
        say(f"slide-encoder/ was trained without {new} of {len(slides)} slides; remove it to train anew")
    return True
