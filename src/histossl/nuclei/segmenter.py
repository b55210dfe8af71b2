"""Learn on images, then find nuclei in images: numpy in and out."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histossl.core.config import from_dict
from histossl.core.errors import SettingsError, SlideError, TrainingError
from histossl.nuclei.export import label_image
from histossl.nuclei.instances import Nuclei
from histossl.nuclei.method import Method
from histossl.nuclei.network import read_model
from histossl.nuclei.patch_contrast import PatchContrast
from histossl.nuclei.self_training import Sample, SelfTraining, learn
from histossl.nuclei.settings import SegmentSettings, SelfTrainingSettings
from histossl.nuclei.stain_survey import StainSurvey, survey
from histossl.nuclei.threshold import Prior
from histossl.nuclei.tiled_inference import segment_slide
from histossl.wsi.array_slide import picture_slide
from histossl.wsi.geometry import Region
from histossl.wsi.slide import Slide, open_slide

Picture = NDArray[Any] | Slide | str | Path

log = logging.getLogger(__name__)

FORMER_NAMES = {"contrast": SelfTraining.name, "paper": PatchContrast.name}
"""Former names of methods -> names now, for models that were trained before."""

FIELDS = 96
"""About how many fields of 256 px at 0.5 µm a training uses, for any number of slides."""

GENERAL = Path(__file__).parent / "general"
"""The model that comes with the package: weights, settings and the model card."""


class NucleiSegmenter:
    """Finds nuclei in pictures and slides, with the model `general` or after learning on unlabelled ones.

    Every picture may be an array (H, W, 3) of uint8, uint16 or floats in [0, 1], an open slide, or the path of one.

    Example:
        `labels = NucleiSegmenter().predict(image, mpp=0.25)`
        `labels = NucleiSegmenter().fit([image], mpp=0.25).predict(image, mpp=0.25)`
        `nuclei = NucleiSegmenter().segment("a.svs")`

    Args:
        learning: settings of the training of the default method.
        running: settings of the segmentation.
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

    def __repr__(self) -> str:
        return f"NucleiSegmenter({'general' if self.method is None else self.method.name})"

    def fit(
        self, images: Sequence[Picture], mpp: float | Sequence[float] | None = None, **settings: Any
    ) -> NucleiSegmenter:
        """Train on pictures, without labels; best on those that are segmented later.

        Args:
            images: pictures of any sizes.
            mpp: µm per pixel, one for all or one for each. Files and open slides have it; arrays need it.
            **settings: of `SelfTrainingSettings`, such as `steps=400`, in place of those in `learning`.

        Returns:
            This segmenter.

        Raises:
            SlideError: an image is not one, cannot be read, or its mpp is not known.
            SettingsError: there is not one mpp for each image; an unknown setting or one out of range.
            TrainingError: no image has a sure nucleus.
        """
        learning = from_dict(SelfTrainingSettings, vars(self.learning) | settings)
        each = list(mpp) if isinstance(mpp, Sequence | np.ndarray) else [mpp] * len(images)
        if len(each) != len(images):
            raise SettingsError(f"{len(each)} mpp for {len(images)} images", "give one, or one for each")
        known = []
        for k, (image, m) in enumerate(zip(images, each, strict=True)):
            with _opened(image, m, f"image {k}") as slide:
                known.append(survey(slide, SelfTraining.mpp, self.running))
        with tempfile.TemporaryDirectory() as logs:
            self.method = learn(samples(known, learning.seed), learning, Path(logs), self.device)
        return self

    def segment(self, image: Picture, mpp: float | None = None) -> Nuclei:
        """Find the nuclei of a picture or of a whole slide, as outlines and measures.

        Args:
            image: the picture or slide.
            mpp: µm per pixel; needed for an array, and for a file that carries none.

        Returns:
            The nuclei in level-0 pixels, from top to bottom.

        Raises:
            SlideError: the image cannot be read, or its mpp is not known.
        """
        with _opened(image, mpp) as slide:
            return segment_slide(slide, self._survey(slide), self._fitted(), self.running)

    def predict(self, image: Picture, mpp: float | None = None) -> NDArray[np.int32]:
        """The label image of a picture.

        Args:
            image: the picture, as of `segment`.
            mpp: µm per pixel, as of `segment`.

        Returns:
            (H, W) int32 of the picture's own size, 0 = none, 1..n.
        """
        with _opened(image, mpp) as slide:
            return label_image(self.segment(slide), slide.size)

    def confidence(self, image: Picture, mpp: float | None = None) -> NDArray[np.float32]:
        """The maps of the method; where the slide shows sure nuclei, `segment` raises them before it separates nuclei.

        Args:
            image: the picture, as of `segment`.
            mpp: µm per pixel, as of `segment`.

        Returns:
            (2, h, w) float32 in [0, 1] at 0.5 µm per pixel, or finer where nuclei are small: nucleus, and depth
            inside it (1 in the middle). All zero where the picture has no stain.
        """
        method = self._fitted()
        with _opened(image, mpp) as slide:
            known = self._survey(slide)
            rgb = slide.read(Region.whole(slide.size), known.tile_mpp)
        if known.stains is None:
            return np.zeros((2, *rgb.shape[:2]), np.float32)
        return method.confidence(rgb, known.stains, method.prepare(known.fields, known.stains, known.sure))

    def save(self, folder: Path) -> None:
        """Write the trained model: model.safetensors and config.json.

        Args:
            folder: the folder to write.

        Raises:
            SettingsError: the method has nothing to save.
        """
        method = self._fitted()
        if not isinstance(method, SelfTraining | PatchContrast):
            raise SettingsError(f"the method {method.name} has nothing to save")
        method.save(folder)

    @classmethod
    def load(
        cls, model: str | Path, running: SegmentSettings = SegmentSettings(), device: str = "auto"
    ) -> NucleiSegmenter:
        """A segmenter that needs no `fit`.

        Args:
            model: "general", "prior", or the folder of a trained model.
            running: settings of the segmentation.
            device: where the network runs, or "auto".

        Returns:
            The segmenter.

        Raises:
            FileFormatError: the folder holds no model that can be read.
        """
        segmenter = cls(running=running, device=device)
        segmenter.method = load_method(str(model), device)
        return segmenter

    def _survey(self, slide: Slide) -> StainSurvey:
        method = self._fitted()
        return survey(slide, method.mpp, self.running, support=method.support)

    def _fitted(self) -> Method:
        if self.method is None:
            self.method = load_method("general", self.device)
        return self.method


@contextmanager
def _opened(image: Picture, mpp: float | None, name: str = "image") -> Iterator[Slide]:
    """The slide of a picture, closed afterwards where it was a path; `mpp` overrides what a file says.

    Raises:
        SlideError: an array without mpp, or what cannot be opened.
    """
    if isinstance(image, Slide):
        yield image
    elif isinstance(image, str | Path):
        with open_slide(image, mpp) as slide:
            yield slide
    elif mpp is None:
        raise SlideError(name, "an array does not say how wide its pixels are", "pass mpp in µm, such as 0.25 for 40x")
    else:
        yield picture_slide(image, mpp, name)


def load_method(model: str, device: str = "auto") -> Method:
    """Load a method by its name or from the folder of a trained model.

    Args:
        model: "general" (the model of the package), "prior" (without training), or a folder. A name is taken before a
            folder of the same name; write ./general or ./prior for the folder.
        device: where the network runs, or "auto".

    Returns:
        The method.

    Raises:
        FileFormatError: the folder holds no model that can be read.
    """
    if model == "prior":
        return Prior()
    folder = GENERAL if model == "general" else Path(model)
    config, _ = read_model(folder)
    name = str(config.get("method", ""))
    if name in FORMER_NAMES:
        log.warning("%s: its method `%s` is now called `%s`", model, name, FORMER_NAMES[name])
        name = FORMER_NAMES[name]
    return (PatchContrast if name == PatchContrast.name else SelfTraining).load(folder, device)


def samples(known: Iterable[StainSurvey], seed: int) -> list[Sample]:
    """The fields to learn from: about FIELDS in all, from every slide, or from a random choice where slides are many.

    Args:
        known: the surveys of the slides.
        seed: seed of the choice of slides.

    Returns:
        Fields and stains, one sample per slide that shows hematoxylin.

    Raises:
        TrainingError: no slide shows hematoxylin.
    """
    usable = [k for k in known if k.stains is not None and k.stains.has_hematoxylin]
    if not usable:
        raise TrainingError("none of the images shows hematoxylin", "nuclei cannot be learned from them")
    if len(usable) > FIELDS:
        chosen = np.random.default_rng(seed).choice(len(usable), FIELDS, replace=False)
        usable = [usable[k] for k in sorted(chosen)]
    each = max(1, FIELDS // len(usable))
    return [Sample(k.fields[:each], k.stains) for k in usable if k.stains is not None]
