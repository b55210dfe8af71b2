"""The published patch contrast (see `patch_sampling.py`), trained and used without labels.

The authors choose run, epoch, channel and polarity by the Dice with labels. Here the run, the channel, the polarity and
a threshold for each slide are those that agree best with a threshold on hematoxylin, and the last epoch is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.color import hed_from_rgb
from skimage.filters import threshold_otsu
from torch import Tensor

from histossl.core.config import fingerprint, from_dict, to_dict
from histossl.core.errors import FileFormatError, SettingsError, TrainingError
from histossl.nuclei.network import read_model, save_model
from histossl.nuclei.patch_sampling import ConfidenceNet, PatchContrastSettings, PatchContrastTask
from histossl.nuclei.pseudo_labels import SureNuclei
from histossl.training.device import pick_device, sent
from histossl.training.loop import Schedule, end_of_training, fit
from histossl.wsi.stain import Stains, gaussian, optical_density, unmixed

_EDGE = 4  # pixels of zeros around a map, more than the discs' radii
_SIDE, _FIELDS = 400, 12  # side in pixels, and number of the fields that channels are chosen on


@dataclass(frozen=True)
class Choice:
    """The channel and polarity of the confidence, which the authors choose with labels.

    Attributes:
        channel: index of the channel.
        inverted: whether nuclei have low values.
        agreement: mean over fields of the Dice with a threshold on hematoxylin, in [0, 1].
    """

    channel: int
    inverted: bool
    agreement: float = 0.0


class PatchContrast:
    """A trained confidence network, with the channel and polarity that agree best with hematoxylin.

    Args:
        settings: the settings of its training.
        network: the trained network.
        choice: channel and polarity, as `choose` finds them.
        device: auto, cpu or cuda, where confidence is computed.
    """

    name = "patch-contrast"
    learned = False
    support = None

    def __init__(
        self, settings: PatchContrastSettings, network: ConfidenceNet, choice: Choice, device: str = "auto"
    ) -> None:
        self.settings, self.network, self.choice = settings, network.eval().to(pick_device(device)), choice

    @property
    def mpp(self) -> float:
        """µm per pixel of the input pictures."""
        return self.settings.mpp

    def prepare(self, fields: list[NDArray[np.uint8]], stains: Stains, sure: SureNuclei | None = None) -> float:
        """Find the threshold of a slide, the one that agrees best with hematoxylin.

        Args:
            fields: a sample of the slide, (H, W, 3) uint8 RGB at `mpp`.
            stains: not used.
            sure: not used.

        Returns:
            The threshold on the chosen channel.
        """
        mask = np.concatenate([one.ravel() for one in _dark(fields)])
        values = np.concatenate([self._chosen(field).ravel() for field in fields])
        return _agreement(values, mask)[0]

    def _chosen(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        one = _maps(self.network, rgb, self.settings)[self.choice.channel]
        return _cleaned(1 - one if self.choice.inverted else one, self.settings)

    def confidence(self, rgb: NDArray[np.uint8], stains: Stains, context: float) -> NDArray[np.float32]:
        """Find nuclei in a picture.

        Args:
            rgb: (H, W, 3) uint8 RGB at `mpp`.
            stains: not used.
            context: the threshold that `prepare` found.

        Returns:
            (2, H, W) float32: the mask (0 or 1), and the depth inside the nucleus, 1 from 5 µm inside the outline.
        """
        mask = self._chosen(rgb) > context
        depth = np.asarray(ndimage.distance_transform_edt(mask)) * self.mpp / 5
        return np.stack([mask, np.minimum(depth, 1)]).astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write the model as model.safetensors and config.json, whole or absent.

        Args:
            folder: folder of the model.

        Raises:
            OSError: the folder cannot be written.
        """
        save_model(folder, self.name, self.network, self.settings, choice=to_dict(self.choice))

    @classmethod
    def load(cls, folder: Path, device: str = "auto") -> PatchContrast:
        """Load a model that `save` wrote.

        Args:
            folder: folder of the model.
            device: auto, cpu or cuda, where the model runs.

        Returns:
            The model.

        Raises:
            FileFormatError: a file is missing, truncated, of another version or no model.
        """
        config, weights = read_model(folder)
        try:
            settings = from_dict(PatchContrastSettings, config["settings"])
            network = ConfidenceNet(settings.channels)
            network.load_state_dict(weights)
            choice = from_dict(Choice, config["choice"])
        except (KeyError, SettingsError, RuntimeError) as error:
            raise FileFormatError(f"no nuclei model can be read from {folder}: {error}") from error
        return cls(settings, network, choice, device)


def choose(network: ConfidenceNet, settings: PatchContrastSettings, fields: Sequence[NDArray[np.uint8]]) -> Choice:
    """Choose channel and polarity without labels: those that agree best with hematoxylin.

    Args:
        network: the trained network.
        settings: the settings of its training.
        fields: pictures (H, W, 3) uint8 RGB at the settings' mpp; each is compared at its best threshold.

    Returns:
        The choice, with its agreement.
    """
    network.eval()
    agreement = np.zeros((len(fields), settings.channels, 2))
    for k, (rgb, mask) in enumerate(zip(fields, _dark(fields), strict=True)):
        for channel, one in enumerate(_maps(network, rgb, settings)):
            for inverted, values in enumerate((one, 1 - one)):
                agreement[k, channel, inverted] = _agreement(_cleaned(values, settings), mask)[1]
    mean = agreement.mean(0)
    channel, inverted = np.unravel_index(mean.argmax(), mean.shape)
    return Choice(int(channel), bool(inverted), round(float(mean.max()), 4))


def _dark(fields: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.bool_]]:
    """Masks of hematoxylin, by Ruifrok and Johnston's vectors, above Otsu's threshold of all fields."""
    amounts = [gaussian(unmixed(optical_density(field), hed_from_rgb[:, 0]), 1) for field in fields]
    threshold = threshold_otsu(np.concatenate([amount.ravel() for amount in amounts]))
    return [amount > threshold for amount in amounts]


def _agreement(values: NDArray[np.float32], mask: NDArray[np.bool_]) -> tuple[float, float]:
    """The threshold at which `values` agree best with `mask`, and the Dice there."""
    values, mask = values.ravel(), mask.ravel()
    order = np.argsort(-values, kind="stable")
    ranked = values[order]
    dice = 2 * np.cumsum(mask[order]) / (np.arange(1, len(ranked) + 1) + max(1, mask.sum()))
    last = np.append(ranked[1:] < ranked[:-1], True)  # a threshold cannot separate equal values
    best = int(np.where(last, dice, -1).argmax())
    return float(ranked[best + 1] if best + 1 < len(ranked) else -1.0), float(dice[best])


def _cleaned(values: NDArray[np.float32], settings: PatchContrastSettings) -> NDArray[np.float32]:
    """Opened and closed with discs in grey levels, which equals opening and closing the mask of any threshold."""
    opened = ndimage.grey_opening(np.pad(values, _EDGE), footprint=_disc(settings.opening))
    closed = np.asarray(ndimage.grey_closing(opened, footprint=_disc(settings.closing)), np.float32)
    return closed[_EDGE:-_EDGE, _EDGE:-_EDGE]


def _maps(network: ConfidenceNet, rgb: NDArray[np.uint8], settings: PatchContrastSettings) -> NDArray[np.float32]:
    with torch.inference_mode():
        image = sent(_image(rgb, settings)[None], next(network.parameters()).device)
        return network(image)[0].cpu().numpy()


def _disc(radius: int) -> NDArray[np.bool_]:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return np.hypot(y, x) <= radius


def _image(rgb: NDArray[np.uint8], settings: PatchContrastSettings) -> Tensor:
    """(3, H, W) float32 in [lowest, 1]."""
    part = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1).float() / 255
    return settings.lowest + (1 - settings.lowest) * part


def learn_patch_contrast(
    fields: Sequence[NDArray[np.uint8]], settings: PatchContrastSettings, logs: Path, device: str = "auto"
) -> PatchContrast:
    """Train as published, on unlabelled fields, with one crop of each field per epoch.

    Args:
        fields: pictures (H, W, 3) uint8 RGB at the settings' mpp.
        settings: the published numbers.
        logs: folder for the logs and checkpoints.
        device: auto, cpu or cuda.

    Returns:
        The run of `settings.runs` that agrees best with hematoxylin.

    Raises:
        TrainingError: no field is as large as a crop.
    """
    large = [rgb for rgb in fields if min(rgb.shape[:2]) >= settings.crop]
    if not large:
        raise TrainingError(
            f"no image is {settings.crop} px wide and high at {settings.mpp} µm", "use --method self-training"
        )
    crops = Crops([_image(rgb, settings) for rgb in large], settings)
    steps = settings.epochs * crops.a_round
    schedule = Schedule(steps, settings.rate, 0, settings.weight_decay, 25, plain=True)
    some = [rgb[:_SIDE, :_SIDE] for rgb in large[:: -(-len(large) // _FIELDS)]]
    found: list[tuple[ConfidenceNet, Choice]] = []
    for run in range(settings.runs):
        task = PatchContrastTask(settings, settings.seed * settings.runs + run)
        key = fingerprint(settings, run, crops.digest())
        fit(task, crops, schedule, logs / str(run), key, str(pick_device(device)))
        found.append((task.network, choose(task.network, settings, some)))
    # Only after the last run: a training that is killed before continues with the checkpoints of all runs.
    for run in range(settings.runs):
        end_of_training(logs / str(run))
    return PatchContrast(settings, *max(found, key=lambda one: one[1].agreement), device)


class Crops:
    """Batches of crops, one crop of every image per epoch, in shuffled order; a pure function of the step.

    Args:
        images: (3, H, W) float32 each.
        settings: batch, crop, channels, places, seed.
    """

    def __init__(self, images: Sequence[Tensor], settings: PatchContrastSettings) -> None:
        self.images, self.settings = images, settings
        self.a_round = -(-len(images) // settings.batch)

    def digest(self) -> list[float]:
        """The sum of each image, to identify the set of images."""
        return [round(float(image.sum(dtype=torch.float64)), 3) for image in self.images]

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step.

        Args:
            step: number of the step, from 0.

        Returns:
            Images (B, 3, crop, crop) float32, and uniform random numbers (2, B, C, places) float32 in [0, 1).
        """
        settings = self.settings
        epoch, part = divmod(step, self.a_round)
        order = np.random.default_rng((settings.seed, 1, epoch)).permutation(len(self.images))
        rng = np.random.default_rng((settings.seed, 2, step))
        crops = []
        for k in order[part * settings.batch : (part + 1) * settings.batch]:
            image = self.images[k]
            top, left = (int(rng.integers(0, side - settings.crop + 1)) for side in image.shape[1:])
            crops.append(image[:, top : top + settings.crop, left : left + settings.crop])
        drawn = rng.random((2, len(crops), settings.channels, settings.places), np.float32)
        return torch.stack(crops), torch.from_numpy(drawn)
