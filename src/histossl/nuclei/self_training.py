"""Self-training: a small network learns from unlabelled slides what their surest nuclei have in common.

The pseudo-labels come from hematoxylin alone (`pseudo_labels.py`): objects that are round, sharp and of a nucleus's
size are sure nuclei, what is pale is sure background, the rest is doubtful and has a low weight. The network cannot
copy them, because it sees them under changing stain, size and noise; what it finds beyond them (pale nuclei, touching
ones) and drops from them (dark stroma) is what they have in common. It shares with Boserup and Selvan (NLDL 2023) its
aim alone; docs/nuclei.md says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.core.config import fingerprint, from_dict
from histossl.core.errors import FileFormatError, SettingsError, TrainingError
from histossl.nuclei.augment import crowd, paled
from histossl.nuclei.network import REACH, STRIDE, NucleusNet, read_model, save_model
from histossl.nuclei.pseudo_labels import (
    FIELDS,
    MPP,
    SOME,
    PseudoLabel,
    PseudoLabelSettings,
    SureNuclei,
    sure_nuclei,
    targets,
)
from histossl.nuclei.settings import SelfTrainingSettings
from histossl.nuclei.slide_head import SlideHead, fit_head
from histossl.training.device import pick_device, pick_dtype, sent
from histossl.training.loop import Schedule, end_of_training, fit
from histossl.wsi.stain import Stains, optical_density


class SelfTraining:
    """A trained network with its settings.

    Args:
        settings: settings that it was trained with.
        network: on any device, with its batch norms.
        device: auto, cpu or cuda, where confidence is computed.
    """

    name = "self-training"
    mpp = MPP
    learned = True

    def __init__(self, settings: SelfTrainingSettings, network: NucleusNet, device: str = "auto") -> None:
        self.settings, self.network = settings, network.eval()
        self.support = settings.pseudo_labels if settings.support else None
        self.device = pick_device(device)
        self.dtype = pick_dtype(settings.precision, self.device)
        fast = network.folded().to(device=self.device, dtype=self.dtype).requires_grad_(False)
        self._fast = fast.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def prepare(
        self, fields: list[NDArray[np.uint8]], stains: Stains, sure: SureNuclei | None = None
    ) -> SlideHead | None:
        """Fit the last layer to a slide, where the settings say that its sure nuclei support the network.

        Args:
            fields: not used.
            stains: not used.
            sure: the slide's sure nuclei, with the pseudo-labels of some fields at `mpp`.

        Returns:
            The layer; None where the network keeps its own, also where there are hardly any sure nuclei.
        """
        if self.support is None or sure is None:
            return None
        known = sure.labels[:FIELDS]
        nuclei = sum(len(one.quality) - 1 for one in known)
        if nuclei < SOME:
            return None
        both = ((self._maps(one.density), targets(one, self.settings.pseudo_labels)) for one in known)
        return fit_head(self._fast.head, both, sum(one.labels.size for one in known), nuclei)

    @torch.inference_mode()
    def _maps(self, density: NDArray[np.float32]) -> list[Tensor]:
        """The maps of a field, of its own size but for what the strides need more."""
        x = self._padded(density).to(self.dtype).contiguous(memory_format=torch.channels_last)
        strides = (1, 2, 4, 1)
        return [
            one[:, :, REACH // k : -REACH // k, REACH // k : -REACH // k]
            for one, k in zip(self._fast.maps(x), strides, strict=True)
        ]

    def _padded(self, density: NDArray[np.float32]) -> Tensor:
        """(1, 3, h, w) on the device, mirrored by the receptive field and up to a multiple of the strides."""
        # A nucleus at the picture's edge should not look like one beside glass.
        pad = [(REACH, REACH + -size % STRIDE) for size in density.shape[:2]]
        x = torch.from_numpy(np.pad(density, (*pad, (0, 0)), mode="symmetric")).permute(2, 0, 1)[None]
        return sent(x, self.device)

    def confidence(
        self, rgb: NDArray[np.uint8], stains: Stains, context: SlideHead | None = None
    ) -> NDArray[np.float32]:
        """Find nuclei in a picture.

        Args:
            rgb: (H, W, 3) uint8 RGB at `mpp`.
            stains: stains of the slide.
            context: the last layer that `prepare` fitted to the slide; None for the network's own.

        Returns:
            (2, H, W) float32 in [0, 1]: confidence that a pixel is nucleus, and depth inside the nucleus (1 in the
            middle).
        """
        height, width = rgb.shape[:2]
        x = self._padded(optical_density(rgb, stains.white) / np.float32(stains.scale))
        mean = self.confidence_torch(x, context)
        return mean[0, :, REACH : REACH + height, REACH : REACH + width].cpu().numpy()

    @torch.inference_mode()
    def confidence_torch(self, density: Tensor, head: SlideHead | None = None) -> Tensor:
        """Run the network, in each of the settings' directions.

        Args:
            density: (B, 3, H, W) floating, on the device; H and W multiples of `STRIDE`.
            head: the last layer of the slide, on the device; None for the network's own.

        Returns:
            (B, 2, H, W) float32 on the device, the mean over the directions; right from `REACH` px inside the edge.
        """
        x = density.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return torch.stack([self._turned(x, turn, head) for turn in range(0, 4, 4 // self.settings.turns)]).mean(0)

    def _turned(self, x: Tensor, turn: int, head: SlideHead | None) -> Tensor:
        maps = self._fast.maps(torch.rot90(x, turn, (2, 3)).contiguous(memory_format=torch.channels_last))
        logits = head(maps) if head else self._fast.head(maps[0])
        return torch.rot90(logits.float().sigmoid(), -turn, (2, 3))

    def save(self, folder: Path) -> None:
        """Write model.safetensors and config.json, whole or not at all.

        Args:
            folder: the folder to write.
        """
        save_model(folder, self.name, self.network, self.settings)

    @classmethod
    def load(cls, folder: Path, device: str = "auto") -> SelfTraining:
        """Load the model that `save` wrote.

        Args:
            folder: the folder of the model.
            device: where the network runs, or "auto".

        Returns:
            The model.

        Raises:
            FileFormatError: a file is missing, cut short, of another version or of something else.
        """
        config, weights = read_model(folder)
        try:
            settings = from_dict(SelfTrainingSettings, config["settings"])
            network = NucleusNet(settings.widths)
            network.load_state_dict(weights)
        except (KeyError, SettingsError, RuntimeError) as error:
            raise FileFormatError(f"no nuclei model can be read from {folder}: {error}") from error
        return cls(settings, network, device)


@dataclass(frozen=True)
class Sample:
    """Fields of one slide, (H, W, 3) uint8 at 0.5 µm, or finer where nuclei are small; and the slide's stains."""

    fields: list[NDArray[np.uint8]]
    stains: Stains


def learn(
    samples: Sequence[Sample],
    settings: SelfTrainingSettings,
    logs: Path,
    device: str = "auto",
    begin: SelfTraining | None = None,
) -> SelfTraining:
    """Train a network on unlabelled fields of slides.

    Args:
        samples: fields and stains, one sample per slide.
        settings: settings of the training.
        logs: folder for the log and the checkpoint; a run that was killed resumes from there.
        device: auto, cpu or cuda.
        begin: a trained model whose weights training begins at. Its widths override those of `settings`.

    Returns:
        The trained model.

    Raises:
        TrainingError: no field shows a single sure nucleus.
    """
    where = pick_device(device)
    if begin is not None:
        settings = replace(settings, widths=begin.settings.widths)
    network = NucleusNet(settings.widths, settings.seed)
    if begin is not None:
        network.load_state_dict(begin.network.state_dict())
    task = SelfTrainingTask(network)
    batches = Batches(samples, settings)
    key = fingerprint(settings, [field.shape for s in samples for field in s.fields], batches.digest())
    schedule = Schedule(settings.steps, settings.rate, max(1, settings.steps // 10), settings.weight_decay, 50)
    precision = "bfloat16" if pick_dtype(settings.precision, where) == torch.bfloat16 else "float32"
    fit(task, batches, schedule, logs, key, str(where), precision)
    end_of_training(logs)
    return SelfTraining(settings, task.network.cpu(), device)


class SelfTrainingTask(nn.Module):
    """The network and its loss."""

    def __init__(self, network: NucleusNet) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch.

        Args:
            batch: densities (B, 3, h, w) and targets (B, 3, h, w): nucleus, depth and weight, see `targets`.

        Returns:
            The loss (a scalar), and its parts "nucleus" and "depth", detached.
        """
        density, target = batch
        logits = self.network(density.contiguous(memory_format=torch.channels_last)).float()
        weight = target[:, 2]
        nucleus, depth = (
            (F.binary_cross_entropy_with_logits(logits[:, k], target[:, k], reduction="none") * weight).sum()
            / weight.sum().clamp(min=1)
            for k in range(2)
        )
        return nucleus + depth, {"nucleus": nucleus.detach(), "depth": depth.detach()}


class Batches:
    """Crops of pseudo-labels under changing stain, size and direction; a pure function of the step.

    Args:
        samples: fields and stains, one sample per slide.
        settings: settings of the training.
    """

    def __init__(self, samples: Sequence[Sample], settings: SelfTrainingSettings) -> None:
        self.settings = settings
        self.fields: list[Tensor] = []
        rng = np.random.default_rng(settings.seed)
        for sample in samples:
            known = sure_nuclei(sample.fields, sample.stains, MPP, settings.pseudo_labels, most=None).labels
            for labelled in known:
                for copy in _copies(labelled, settings.pseudo_labels, rng):
                    both = np.concatenate([copy.density.transpose(2, 0, 1), targets(copy, settings.pseudo_labels)])
                    self.fields.append(torch.from_numpy(both).half())
        if not any(bool((field[3] > 0).any()) for field in self.fields):
            raise TrainingError(
                "no nucleus is sure enough to learn from",
                "check the mpp and that the images show hematoxylin, or segment with -m prior",
            )
        area = np.array([field.shape[1] * field.shape[2] for field in self.fields], float)
        self.share = area / area.sum()

    def digest(self) -> list[float]:
        """A few sums that identify the set of fields."""
        return [round(float(field.sum(dtype=torch.float64)), 3) for field in self.fields]

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """(densities (B, 3, h, w), targets (B, 3, h, w)): nucleus, depth, weight."""
        settings = self.settings
        rng = np.random.default_rng((settings.seed, step))
        crops = torch.cat([self._crop(int(k), rng) for k in rng.choice(len(self.fields), settings.batch, p=self.share)])
        return _restained(crops[:, :3], settings, rng), crops[:, 3:]

    def _crop(self, k: int, rng: np.random.Generator) -> Tensor:
        """(1, 6, crop, crop): a turned, mirrored, scaled piece of a field, mirrored beyond its edges."""
        field, side = self.fields[k], self.settings.crop
        height, width = field.shape[1:]
        angle, mirror = rng.uniform(0, 2 * np.pi), rng.choice([-1.0, 1.0])
        scale = np.exp(rng.uniform(-1, 1) * self.settings.zoom)
        half = side * scale / 2
        y, x = (rng.uniform(half, n - half) if n > 2 * half else n / 2 for n in (height, width))
        # Only a window around the crop is resampled: fields may be large.
        reach = int(np.ceil(half * 1.5)) + 2
        top, left = max(0, int(y) - reach), max(0, int(x) - reach)
        window = field[None, :, top : int(y) + reach, left : int(x) + reach].float()
        h, w = window.shape[2:]
        cos, sin = np.cos(angle) * side * scale, np.sin(angle) * side * scale
        matrix = [
            [cos * mirror / w, -sin / w, 2 * (x - left) / w - 1],
            [sin * mirror / h, cos / h, 2 * (y - top) / h - 1],
        ]
        grid = F.affine_grid(torch.tensor([matrix], dtype=torch.float32), [1, 1, side, side], align_corners=False)
        return F.grid_sample(window, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _copies(labelled: PseudoLabel, settings: PseudoLabelSettings, rng: np.random.Generator) -> list[PseudoLabel]:
    """The pseudo-labels, a crowded copy of them, and a paled copy of that."""
    copies = [labelled]
    if len(labelled.quality) > 1 and settings.pasted:
        square = labelled.labels.size * MPP**2 / 1e6
        copies.append(crowd(labelled, round(settings.pasted * square), rng))
    if len(labelled.quality) > 1 and settings.paled:
        copies.append(paled(copies[-1], rng))
    return copies


def _restained(density: Tensor, settings: SelfTrainingSettings, rng: np.random.Generator) -> Tensor:
    """Each crop with its own change of stain: channels mixed, scaled and shifted, then noise."""
    count = len(density)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape, np.float32))

    mix = torch.eye(3) + normal(count, 3, 3) * settings.stain * 0.35
    stained = torch.einsum("bij,bjhw->bihw", mix, density)
    stained = stained * (1 + normal(count, 3, 1, 1) * settings.stain) + normal(count, 3, 1, 1) * settings.stain * 0.15
    if settings.strength:
        stained = stained * (normal(count, 1, 1, 1) * settings.strength).exp()
    return stained + normal(*density.shape) * settings.noise
