"""What slide encoders are built of: ResNet-18's fourth stage on a sparse map, attention, the head of the contrast."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from histossl.core.errors import FileFormatError
from histossl.gigassl.sparse import Grid, KernelMap, SiteNorm, SparseConv, SparseMap, average_pool


class Stage(nn.Module):
    """Two residual blocks of two convolutions: 3x3 with stride 2 at first where spatial, 1x1 otherwise."""

    def __init__(self, inputs: int, outputs: int, spatial: bool) -> None:
        super().__init__()
        self.spatial = spatial
        self.blocks = nn.ModuleList([Block(inputs, outputs, spatial, True), Block(outputs, outputs, spatial, False)])

    def forward(self, sparse: SparseMap) -> SparseMap:
        for block in self.blocks:
            sparse = block(sparse)
        return sparse

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights, in which it takes the sites' vectors."""
        return next(self.parameters()).dtype

    def pairs(self, grid: Grid) -> KernelMap:
        """Which sites of the first map each site of the last one covers."""
        return grid.strided[1] if self.spatial else grid.itself


class Block(nn.Module):
    """ResNet's basic block; where `first`, the shortcut of a spatial one is an average pool 3/2, then a 1x1."""

    def __init__(self, inputs: int, outputs: int, spatial: bool, first: bool) -> None:
        super().__init__()
        self.spatial, self.stride = spatial, spatial and first
        offsets = 9 if spatial else 1
        self.conv1, self.bn1 = SparseConv(inputs, outputs, offsets), SiteNorm(outputs)
        self.conv2, self.bn2 = SparseConv(outputs, outputs, offsets), SiteNorm(outputs)
        self.shortcut = SparseConv(inputs, outputs, 1) if first else None
        self.shortcut_bn = SiteNorm(outputs) if first else None

    def forward(self, sparse: SparseMap) -> SparseMap:
        rows, grid = sparse.features, sparse.grid
        if self.stride:
            grid, down = grid.strided
            short, same = average_pool(rows, down), grid.neighbours
        else:
            same = grid.neighbours if self.spatial else grid.itself
            short, down = rows, same
        inner = torch.relu(self.bn1(self.conv1(rows, down)))
        inner = self.bn2(self.conv2(inner, same))
        if self.shortcut is not None and self.shortcut_bn is not None:
            short = self.shortcut_bn(self.shortcut(short, grid.itself))
        return SparseMap(torch.relu(inner + short), grid)


class GatedAttention(nn.Module):
    """Weights (S,) of the sites, which sum to 1 over each map."""

    def __init__(self, inputs: int, hidden: int = 128) -> None:
        super().__init__()
        self.content, self.gate, self.score = nn.Linear(inputs, hidden), nn.Linear(inputs, hidden), nn.Linear(hidden, 1)

    def forward(self, sparse: SparseMap) -> Tensor:
        rows, views = sparse.features, sparse.grid.views
        score = self.score(torch.tanh(self.content(rows)) * torch.sigmoid(self.gate(rows))).squeeze(1).float()
        top = score.new_zeros(sparse.grid.batch_size).scatter_reduce(
            0, views, score.detach(), "amax", include_self=False
        )
        weight = torch.exp(score - top[views])
        return (weight / weight.new_zeros(len(top)).index_add(0, views, weight)[views]).to(rows.dtype)


class Projector(nn.Sequential):
    """The head behind which views are compared, dim-512-512-out with batch norm and ReLU between; it is not kept.

    Args:
        dim: length of a slide's vector.
        out: length of its projection.
        seed: of the initial weights; the global generator is neither used nor moved.
    """

    def __init__(self, dim: int = 512, out: int = 256, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for inputs in (dim, 512):
                layers += [nn.Linear(inputs, 512, bias=False), SiteNorm(512), nn.ReLU()]
            super().__init__(*layers, nn.Linear(512, out))


def view_sum(rows: Tensor, grid: Grid) -> Tensor:
    """(views, C): the sum of the rows (S, C) on each map."""
    return rows.new_zeros(grid.batch_size, rows.shape[1]).index_add(0, grid.views, rows)


def from_dense(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a spatial `Stage` from a dense ResNet-18's fourth stage (`layer4`, with or without that prefix).

    Raises:
        FileFormatError: a weight is missing, or of another shape.
    """
    names = {"downsample.0": "shortcut", "downsample.1": "shortcut_bn"}
    found: dict[str, Tensor] = {}
    for block in (0, 1):
        for part in ("conv1", "bn1", "conv2", "bn2") + (("downsample.0", "downsample.1") if block == 0 else ()):
            dense = part.startswith("conv") or part == "downsample.0"
            for name in ("weight",) if dense else ("weight", "bias", "running_mean", "running_var"):
                key = f"{block}.{part}.{name}"
                value = state.get(f"layer4.{key}", state.get(key))
                if value is None or value.shape[0] != 512 or (dense and value.ndim != 4):
                    raise FileFormatError(
                        f"layer4.{key} is missing or not ResNet-18's", "give the weights of a whole ResNet-18"
                    )
                if dense:  # (out, in, y, x) to (offsets, 1, in, out)
                    value = value.permute(2, 3, 1, 0).reshape(-1, 1, value.shape[1], 512)
                found[f"blocks.{block}.{names.get(part, part)}.{name}"] = value.detach().clone()
                if not dense:
                    found[f"blocks.{block}.{names.get(part, part)}.num_batches_tracked"] = torch.tensor(0)
    return found
