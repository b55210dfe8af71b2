"""Networks that are trained on labelled slides, to compare with the linear probe: tiles in, classes or numbers out.

`attention`: gated attention over the tiles (Ilse et al., ICML 2018). `sparse`: convolutions on the map of the tiles,
trained end to end (SparseConvMIL; Lerousseau et al., MICCAI COMPAY 2021). `finetune`: the pretrained slide encoder, of
which all weights are trained further. All share one recipe, fixed beforehand: with few labels there are no slides to
tune settings or to stop early on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histossl.core.errors import FileFormatError
from histossl.evaluate.settings import Recipe, Rival
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.encoder_settings import EncoderSettings
from histossl.gigassl.layers import GatedAttention, view_sum
from histossl.gigassl.norms import OneScale
from histossl.gigassl.slide_sources import plain_tiles
from histossl.gigassl.sparse import Grid, SparseMap
from histossl.gigassl.views import ViewSettings, collate, draw_view
from histossl.training.device import pick_device, pick_dtype
from histossl.training.loop import Schedule, fit

Bag = tuple[NDArray[np.float16], NDArray[np.float32]]  # (n, D) features, (n, 2) positions in tile units


def read_bags(files: Sequence[Sequence[Path]], recipe: Recipe = Recipe()) -> list[Bag]:
    """Read the tiles of slides, a random `recipe.kept` of them at most, in half precision.

    Args:
        files: features files of each bag: one of a slide, several of a patient.
        recipe: of the networks.

    Returns:
        The bags, in the order of `files`.

    Raises:
        FileFormatError: a file is damaged, or the features are of different lengths.
    """
    bags: list[Bag] = []
    for k, some in enumerate(files):
        parts = [plain_tiles(file) for file in some]
        if len({part.shape[1] for part, _ in parts} | {bags[0][0].shape[1] if bags else parts[0][0].shape[1]}) > 1:
            raise FileFormatError(f"{some[0]}: features of another length", "encode all slides with one encoder")
        features, positions = (np.concatenate(rows) for rows in zip(*parts, strict=True))
        kept = np.sort(np.random.default_rng(k).permutation(len(features))[: recipe.kept])
        bags.append((features[kept].astype(np.float16), positions[kept]))
    return bags


class AttentionPool(nn.Module):
    """Slide vectors as a weighted mean of tiles, whatever their positions; has the signature of a `SlideEncoder`.

    Args:
        in_dim: length of the tiles' features.
        dim: length of the slide vectors.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        # As the probe and the slide encoder do: principal axes of tiles, each of variance 1, would be mostly noise.
        self.norm, self.linear = OneScale(in_dim), nn.Linear(in_dim, dim)
        self.attention = GatedAttention(dim)

    def forward(self, features: Tensor, positions: NDArray, views: NDArray, size: int) -> Tensor:
        """Pool the tiles of each view.

        Args:
            features: (N, in_dim) floating, the tiles of all views.
            positions: (N, 2), not used.
            views: (N,) int, ascending: the view of each tile.
            size: number of views.

        Returns:
            (size, dim) vectors.
        """
        # `Grid` needs distinct sites: the tiles lie in one row, one column per tile.
        sites = np.column_stack([views, np.zeros_like(views), np.arange(len(views))])
        rows = torch.relu(self.linear(self.norm(features)))
        grid = Grid(sites, size, features.device)
        return view_sum(rows * self.attention(SparseMap(rows, grid))[:, None], grid)


class BagTask(nn.Module):
    """A network over bags with a linear layer for classes or one number, and the loss of a batch.

    Args:
        network: (features, positions, views, size) -> (size, dim) vectors.
        dim: length of these vectors.
        weights: (classes,) of the classes in the cross-entropy; None predicts one number: by the squared error, or
            where the truth is time and event by Cox's partial likelihood of the batch.
        dropout: probability in front of the last layer, in [0, 1).
    """

    def __init__(self, network: nn.Module, dim: int, weights: Tensor | None, dropout: float) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(dim, 1 if weights is None else len(weights)))
        self.weights = None if weights is None else nn.Buffer(weights)

    def outputs(self, batch: tuple[Tensor, NDArray, NDArray, int]) -> Tensor:
        """Predict the slides of a batch.

        Args:
            batch: (features, positions, views, size), as `AttentionPool.forward` takes them.

        Returns:
            (size, classes) logits, or (size, 1) numbers, float32.
        """
        return self.head(self.network(*batch)).float()

    def forward(self, batch: tuple[Tensor, NDArray, NDArray, int, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss.

        Args:
            batch: (features, positions, views, size, truth); truth is (size,) int64 classes or float32 numbers, or
                (size, 2) float32 time and event.

        Returns:
            The loss (), and an empty dictionary of gauges.
        """
        found, truth = self.outputs(batch[:4]), batch[4]
        if truth.ndim == 2:
            return cox_loss(found[:, 0], truth), {}
        if self.weights is None:
            return nn.functional.mse_loss(found[:, 0], truth), {}
        return nn.functional.cross_entropy(found, truth, self.weights), {}


def cox_loss(risk: Tensor, truth: Tensor) -> Tensor:
    """The negative log partial likelihood for each event, ties as of Breslow; without an event 0.

    Args:
        risk: (n,) log hazard ratios.
        truth: (n, 2) time and event.

    Returns:
        The loss ().
    """
    order = torch.argsort(truth[:, 0], descending=True)
    time, event = truth[order].T
    at_risk = torch.logcumsumexp(risk[order], dim=0)
    at_risk = at_risk[torch.searchsorted(-time.contiguous(), -time.contiguous(), right=True) - 1]
    return ((at_risk - risk[order]) * event).sum() / event.sum().clamp(min=1)


def trained_rival(
    kind: str, bags: Sequence[Bag], encoder: Path | None = None, recipe: Recipe = Recipe(), device: str = "auto"
) -> Rival:
    """Make a method of the probe that trains a new network on every set of labelled slides.

    Args:
        kind: attention, sparse or finetune.
        bags: the tiles of all slides.
        encoder: the folder of the pretrained slide encoder; needed for finetune.
        recipe: how the network is trained.
        device: auto, cpu or cuda.

    Returns:
        A function of (training rows, their truth, test rows, seed) that gives the predictions.

    Raises:
        SettingsError: the device is unknown or absent.
    """
    where = pick_device(device)
    dtype = str(pick_dtype("auto", where)).removeprefix("torch.")
    view = ViewSettings(recipe.tiles, windows=0 if kind == "attention" else 1)

    def predict(train: NDArray, truth: NDArray, test: NDArray, seed: int) -> NDArray[np.float64]:
        weights, middle, unit = None, 0.0, 1.0
        if truth.ndim == 2:
            truth = truth.astype(np.float32)
        elif truth.dtype.kind == "f":
            middle, unit = truth.mean(), truth.std() or 1.0
            truth = ((truth - middle) / unit).astype(np.float32)
        else:
            counts = np.bincount(truth)
            weights = torch.tensor(len(truth) / (len(counts) * np.maximum(counts, 1)), dtype=torch.float32)
        with (
            torch.random.fork_rng(devices=[where] if where.type == "cuda" else []),
            tempfile.TemporaryDirectory() as logs,
        ):
            torch.manual_seed(seed)
            task = BagTask(*_network(kind, bags[0][0].shape[1], encoder, recipe, seed), weights, recipe.dropout)
            schedule = Schedule(recipe.steps, recipe.rate, recipe.steps // 20, recipe.weight_decay, recipe.steps)
            fit(
                task,
                lambda step: _batch(step, bags, train, truth, view, recipe, seed),
                schedule,
                Path(logs),
                "",
                where.type,
                dtype,
            )
        task.eval()
        with torch.inference_mode():
            found = torch.cat([task.to(where).outputs(_whole(bags[int(row)], where)) for row in test])
            found = torch.softmax(found, dim=1) if weights is not None else found
        return found.double().cpu().numpy() * unit + middle

    return predict


def _network(kind: str, in_dim: int, encoder: Path | None, recipe: Recipe, seed: int) -> tuple[nn.Module, int]:
    if kind == "attention":
        return AttentionPool(in_dim, recipe.dim), recipe.dim
    if kind == "finetune":
        assert encoder is not None
        found = SlideEncoder.load(encoder)
        # Prototypes are fixed, not trained: without them the vector has only parts that a gradient reaches.
        found.settings = replace(found.settings, prototypes=0)
        found.prototypes = found.stage_prototypes = None
        return found, found.settings.vector_dim
    settings = EncoderSettings(in_dim=in_dim, dim=recipe.dim, inlet="standard", tile_mean=False, prototypes=0)
    return SlideEncoder(settings, seed=seed), settings.vector_dim


def _batch(
    step: int, bags: Sequence[Bag], train: NDArray, truth: NDArray, view: ViewSettings, recipe: Recipe, seed: int
) -> tuple[Tensor, NDArray, NDArray, int, Tensor]:
    """The views and truth of a step; each epoch has its own order of the slides, from seed and step alone."""
    chosen = []
    for drawn in range(step * recipe.batch, (step + 1) * recipe.batch):
        epoch, k = divmod(drawn, len(train))
        chosen.append(int(np.random.default_rng([seed, epoch]).permutation(len(train))[k]))
    rng = np.random.default_rng([seed, 0, step])
    batch = collate([draw_view(*bags[int(train[k])], view, rng) for k in chosen])
    return batch.features, batch.positions.numpy(), batch.views.numpy(), batch.size, torch.as_tensor(truth[chosen])


def _whole(bag: Bag, where: torch.device) -> tuple[Tensor, NDArray, NDArray, int]:
    batch = collate([bag])
    return batch.features.to(where), batch.positions.numpy(), batch.views.numpy(), 1
