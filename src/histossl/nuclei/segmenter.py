"""Learn on images, then find nuclei in images: numpy in and out."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import SettingsError, TrainingError
from histossl.nuclei.export import label_image
from histossl.nuclei.method import Method
from histossl.nuclei.network import read_model
from histossl.nuclei.patch_contrast import PatchContrast
from histossl.nuclei.pseudo_labels import SelfTrainingSettings
from histossl.nuclei.self_training import Sample, SelfTraining, learn
from histossl.nuclei.stain_survey import SegmentSettings, StainSurvey, survey
from histossl.nuclei.threshold import Prior
from histossl.nuclei.tiled_inference import segment_slide
from histossl.wsi.array_slide import picture_slide
from histossl.wsi.slide import Slide

log = logging.getLogger(__name__)

FORMER_NAMES = {"contrast": SelfTraining.name, "paper": PatchContrast.name}
"""Of methods, in models that were trained before they were renamed."""

FIELDS = 96
"""About so many fields of 256 px at 0.5 µm are learned from, whatever the number of slides."""


class NucleiSegmenter:
    """Finds nuclei in pictures, after learning on unlabelled ones.

    Example:
        `labels = NucleiSegmenter().fit([image], mpp=0.25).predict(image, mpp=0.25)`

    Args:
        learning: how the default method learns.
        running: how pictures are gone over.
        device: auto, cpu or cuda.
    """

    def __init__(
        self,
        learning: SelfTrainingSettings = SelfTrainingSettings(),
        running: SegmentSettings = SegmentSettings(),
        device: str = "auto",
    ) -> None:
        self.learning, self.running, self.device = learning, running, device
        self.method: Method | None = None

    def fit(self, images: Sequence[NDArray[Any]], mpp: float | Sequence[float] = 0.25) -> NucleiSegmenter:
        """Learn on pictures, without labels: the ones to be segmented, best of all.

        Args:
            images: (H, W, 3) each, of any sizes; uint8, uint16 or floats in [0, 1].
            mpp: µm per pixel of all, or of each; 0.25 is a 40x objective's.

        Raises:
            SlideError: an image is not one.
            TrainingError: in none of them is there a sure nucleus.
        """
        each = [mpp] * len(images) if isinstance(mpp, int | float) else list(mpp)
        if len(each) != len(images):
            raise SettingsError(f"{len(each)} mpp for {len(images)} images", "give one, or one for each")
        slides = (picture_slide(image, m, f"image {k}") for k, (image, m) in enumerate(zip(images, each, strict=True)))
        known = [survey(slide, SelfTraining.mpp, self.running) for slide in slides]
        with tempfile.TemporaryDirectory() as logs:
            self.method = learn(samples(known, self.learning.seed), self.learning, Path(logs), self.device)
        return self

    def predict(self, image: NDArray[Any], mpp: float) -> NDArray[np.int32]:
        """The nuclei of a picture as (H, W) int32 of its own size, 0 = none, 1..n; see `fit` for the arguments."""
        slide = picture_slide(image, mpp)
        return label_image(segment_slide(slide, self._survey(slide), self._fitted(), self.running), slide.size)

    def confidence(self, image: NDArray[Any], mpp: float) -> NDArray[np.float32]:
        """(2, h, w) in [0, 1] at 0.5 µm per pixel: nucleus, and depth inside of it (1 in the middle).

        All zero where the picture has no stain.
        """
        slide, method = picture_slide(image, mpp), self._fitted()
        known = self._survey(slide)
        from histossl.wsi.geometry import Region

        rgb = slide.read(Region.whole(slide.size), method.mpp)
        if known.stains is None:
            return np.zeros((2, *rgb.shape[:2]), np.float32)
        return method.confidence(rgb, known.stains, method.prepare(known.fields, known.stains))

    def save(self, folder: Path) -> None:
        """Write the trained model: model.safetensors and config.json."""
        method = self._fitted()
        if not isinstance(method, SelfTraining | PatchContrast):
            raise SettingsError(f"the method {method.name} has nothing to save")
        method.save(folder)

    @classmethod
    def load(
        cls, model: str | Path, running: SegmentSettings = SegmentSettings(), device: str = "auto"
    ) -> NucleiSegmenter:
        """A segmenter that needs no `fit`: "prior", or the folder of a trained model."""
        segmenter = cls(running=running, device=device)
        segmenter.method = load_method(str(model), device)
        return segmenter

    def _survey(self, slide: Slide) -> StainSurvey:
        return survey(slide, self._fitted().mpp, self.running)

    def _fitted(self) -> Method:
        if self.method is None:
            raise SettingsError("this segmenter has not learned yet", "call fit, or take NucleiSegmenter.load")
        return self.method


def load_method(model: str, device: str = "auto") -> Method:
    """The training-free `prior`, or a trained model from its folder."""
    if model == "prior":
        return Prior()
    config, _ = read_model(Path(model))
    name = str(config.get("method", ""))
    if name in FORMER_NAMES:
        log.warning("%s: its method `%s` is now called `%s`", model, name, FORMER_NAMES[name])
        name = FORMER_NAMES[name]
    return (PatchContrast if name == PatchContrast.name else SelfTraining).load(Path(model), device)


def samples(known: Iterable[StainSurvey], seed: int) -> list[Sample]:
    """What is learned from: fields of all slides, or of some of very many, about FIELDS in all.

    Raises:
        TrainingError: no slide shows hematoxylin.
    """
    usable = [k for k in known if k.stains is not None]
    if not usable:
        raise TrainingError("none of the images shows hematoxylin", "nuclei cannot be learned from them")
    if len(usable) > FIELDS:
        chosen = np.random.default_rng(seed).choice(len(usable), FIELDS, replace=False)
        usable = [usable[k] for k in sorted(chosen)]
    each = max(1, FIELDS // len(usable))
    return [Sample(k.fields[:each], k.stains) for k in usable if k.stains is not None]
