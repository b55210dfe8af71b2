"""Networks that learn from the labels alone: tiles of labelled slides in, classes out.

`attention`: gated attention over the tiles (Ilse et al., ICML 2018). `sparse`: convolutions on the map of the tiles,
trained end to end (SparseConvMIL; Lerousseau et al., MICCAI COMPAY 2021). `finetune`: the pretrained slide encoder,
all of it trained on. One recipe for all, fixed beforehand: few labels leave nothing to tune or to stop on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histossl.encoders.zoo import pick_device, pick_dtype
from histossl.errors import FileFormatError
from histossl.evaluate.probe import Rival
from histossl.gigassl.encoder import EncoderSettings, GatedAttention, SlideEncoder, view_sum
from histossl.gigassl.pretrain import plain_tiles
from histossl.gigassl.sparse import Grid, SiteNorm, SparseMap
from histossl.gigassl.views import ViewSettings, collate, draw_view
from histossl.train import Schedule, fit


@dataclass(frozen=True)
class Recipe:
    """How a network is trained on labelled slides.

    Attributes:
        steps: optimiser steps.
        batch: slides a step.
        tiles: of a slide in a step, drawn anew; at the test all are looked at.
        kept: tiles of a slide that are held in memory, drawn once where there are more.
        rate: AdamW's highest.
        weight_decay: decoupled.
        dropout: before the classes.
        dim: of the slide's vector in front of the classes.
    """

    steps: int = 150
    batch: int = 16
    tiles: int = 256
    kept: int = 4096
    rate: float = 5e-4
    weight_decay: float = 1e-2
    dropout: float = 0.25
    dim: int = 128


Bag = tuple[NDArray[np.float16], NDArray[np.float32]]  # (n, D) features, (n, 2) positions in tile units


def read_bags(files: Sequence[Path], recipe: Recipe = Recipe()) -> list[Bag]:
    """The tiles of slides, at most `recipe.kept` of each, in half precision.

    Raises:
        FileFormatError: a file is damaged, or the features are of different lengths.
    """
    bags: list[Bag] = []
    for k, file in enumerate(files):
        features, positions = plain_tiles(file)
        kept = np.sort(np.random.default_rng(k).permutation(len(features))[: recipe.kept])
        bags.append((features[kept].astype(np.float16), positions[kept]))
        if features.shape[1] != bags[0][0].shape[1]:
            raise FileFormatError(f"{file}: features of {features.shape[1]} numbers", "encode all with one encoder")
    return bags


class AttentionPool(nn.Module):
    """Tiles to slide vectors by a weighted mean, blind to where they lie; called as a `SlideEncoder` is."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm, self.linear = SiteNorm(in_dim, affine=False), nn.Linear(in_dim, dim)
        self.attention = GatedAttention(dim)

    def forward(self, features: Tensor, positions: NDArray, views: NDArray, size: int) -> Tensor:
        """(N, in_dim) features of the tiles of `size` views to (size, dim); `views` (N,) ascending."""
        # In one row, since the sites of a map must differ.
        sites = np.column_stack([views, np.zeros_like(views), np.arange(len(views))])
        rows = torch.relu(self.linear(self.norm(features)))
        grid = Grid(sites, size, features.device)
        return view_sum(rows * self.attention(SparseMap(rows, grid))[:, None], grid)


class BagTask(nn.Module):
    """A network over bags, the classes on top, and the loss of a batch.

    Args:
        network: (features, positions, views, size) -> (size, dim) vectors.
        dim: of these vectors.
        weights: (classes,) of the classes in the loss.
        dropout: in front of the classes.
    """

    def __init__(self, network: nn.Module, dim: int, weights: Tensor, dropout: float) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(dim, len(weights)))
        self.weights = nn.Buffer(weights)

    def logits(self, batch: tuple[Tensor, NDArray, NDArray, int]) -> Tensor:
        """(size, classes)."""
        return self.head(self.network(*batch)).float()

    def forward(self, batch: tuple[Tensor, NDArray, NDArray, int, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(features, positions, views, size, classes) -> (loss, nothing to log)."""
        return nn.functional.cross_entropy(self.logits(batch[:4]), batch[4], self.weights), {}


def trained_rival(
    kind: str, bags: Sequence[Bag], encoder: Path | None = None, recipe: Recipe = Recipe(), device: str = "auto"
) -> Rival:
    """A network that is trained anew on every set of labelled slides.

    Args:
        kind: attention, sparse or finetune.
        bags: the tiles of all slides.
        encoder: the folder of the pretrained slide encoder, for finetune.
        recipe: how it is trained.
        device: auto, cpu or cuda.
    """
    where = pick_device(device)
    dtype = str(pick_dtype("auto", where)).removeprefix("torch.")
    view = ViewSettings(recipe.tiles, windows=0 if kind == "attention" else 1)

    def predict(train: NDArray, classes: NDArray, test: NDArray, seed: int) -> NDArray[np.float64]:
        counts = np.bincount(classes)
        weights = torch.tensor(len(classes) / (len(counts) * np.maximum(counts, 1)), dtype=torch.float32)
        with (
            torch.random.fork_rng(devices=[where] if where.type == "cuda" else []),
            tempfile.TemporaryDirectory() as logs,
        ):
            torch.manual_seed(seed)
            task = BagTask(*_network(kind, bags[0][0].shape[1], encoder, recipe, seed), weights, recipe.dropout)
            schedule = Schedule(recipe.steps, recipe.rate, recipe.steps // 20, recipe.weight_decay, recipe.steps)
            fit(
                task,
                lambda step: _batch(step, bags, train, classes, view, recipe, seed),
                schedule,
                Path(logs),
                "",
                where.type,
                dtype,
            )
        task.eval()
        with torch.inference_mode():
            found = [torch.softmax(task.to(where).logits(_whole(bags[int(row)], where)), dim=1) for row in test]
        return torch.cat(found).double().cpu().numpy()

    return predict


def _network(kind: str, in_dim: int, encoder: Path | None, recipe: Recipe, seed: int) -> tuple[nn.Module, int]:
    if kind == "attention":
        return AttentionPool(in_dim, recipe.dim), recipe.dim
    if kind == "finetune":
        assert encoder is not None
        found = SlideEncoder.load(encoder)
        return found, found.settings.vector_dim
    settings = EncoderSettings(in_dim=in_dim, dim=recipe.dim, inlet="standard", tile_mean=False)
    return SlideEncoder(settings, seed=seed), settings.vector_dim


def _batch(
    step: int, bags: Sequence[Bag], train: NDArray, classes: NDArray, view: ViewSettings, recipe: Recipe, seed: int
) -> tuple[Tensor, NDArray, NDArray, int, Tensor]:
    """Slides in a shuffled order, epoch after epoch: a function of seed and step alone."""
    chosen = []
    for place in range(step * recipe.batch, (step + 1) * recipe.batch):
        epoch, k = divmod(place, len(train))
        chosen.append(int(np.random.default_rng([seed, epoch]).permutation(len(train))[k]))
    rng = np.random.default_rng([seed, 0, step])
    batch = collate([draw_view(*bags[int(train[k])], view, rng) for k in chosen])
    return batch.features, batch.positions.numpy(), batch.views.numpy(), batch.size, torch.as_tensor(classes[chosen])


def _whole(bag: Bag, where: torch.device) -> tuple[Tensor, NDArray, NDArray, int]:
    batch = collate([bag])
    return batch.features.to(where), batch.positions.numpy(), batch.views.numpy(), 1
