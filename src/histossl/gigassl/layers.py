"""Layers of slide encoders: ResNet-18's fourth stage on a sparse map, attention, and the projector."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from histossl.core.errors import FileFormatError
from histossl.gigassl.norms import SiteNorm
from histossl.gigassl.sparse import Grid, KernelMap, SparseConv, SparseMap, average_pool


class Stage(nn.Module):
    """Two residual blocks of two convolutions each.

    Args:
        inputs: input channels.
        outputs: output channels.
        spatial: convolutions are 3x3, the first with stride 2; otherwise 1x1, which sees every site alone.
    """

    def __init__(self, inputs: int, outputs: int, spatial: bool) -> None:
        super().__init__()
        self.spatial = spatial
        self.blocks = nn.ModuleList([Block(inputs, outputs, spatial, True), Block(outputs, outputs, spatial, False)])

    def forward(self, sparse: SparseMap) -> SparseMap:
        """Apply the stage.

        Args:
            sparse: a map with `inputs` channels.

        Returns:
            A map with `outputs` channels, on the strided grid where the stage is spatial.
        """
        for block in self.blocks:
            sparse = block(sparse)
        return sparse

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which the stage takes the sites' vectors."""
        return next(self.parameters()).dtype

    def pairs(self, grid: Grid) -> KernelMap:
        """Pair the sites of the input map with the sites of the output map that cover them.

        Args:
            grid: of the input map.

        Returns:
            The kernel map of the first layer.
        """
        return grid.strided[1] if self.spatial else grid.itself


class Block(nn.Module):
    """ResNet's basic block.

    Args:
        inputs: input channels.
        outputs: output channels.
        spatial: convolutions are 3x3; otherwise 1x1.
        first: the shortcut is a 1x1 convolution; where spatial, the block has stride 2, and the shortcut starts with an
            average pool of 3x3 sites with stride 2.
    """

    def __init__(self, inputs: int, outputs: int, spatial: bool, first: bool) -> None:
        super().__init__()
        self.spatial, self.stride = spatial, spatial and first
        offsets = 9 if spatial else 1
        self.conv1, self.bn1 = SparseConv(inputs, outputs, offsets), SiteNorm(outputs)
        self.conv2, self.bn2 = SparseConv(outputs, outputs, offsets), SiteNorm(outputs)
        self.shortcut = SparseConv(inputs, outputs, 1) if first else None
        self.shortcut_bn = SiteNorm(outputs) if first else None

    def forward(self, sparse: SparseMap) -> SparseMap:
        """Apply the block.

        Args:
            sparse: a map with `inputs` channels.

        Returns:
            A map with `outputs` channels.
        """
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
    """Gated attention (Ilse et al., ICML 2018): weights of the sites, which sum to 1 over each map.

    Args:
        inputs: channels of the map.
        hidden: width of the hidden layer.
    """

    def __init__(self, inputs: int, hidden: int = 128) -> None:
        super().__init__()
        self.content, self.gate, self.score = nn.Linear(inputs, hidden), nn.Linear(inputs, hidden), nn.Linear(hidden, 1)

    def forward(self, sparse: SparseMap) -> Tensor:
        """Compute the weights.

        Args:
            sparse: a map of S sites with `inputs` channels.

        Returns:
            (S,) in (0, 1], in the dtype of the map.
        """
        rows, views = sparse.features, sparse.grid.views
        score = self.score(torch.tanh(self.content(rows)) * torch.sigmoid(self.gate(rows))).squeeze(1).float()
        # The maximum of each map is subtracted, so that the exponential cannot overflow.
        top = score.new_zeros(sparse.grid.batch_size).scatter_reduce(
            0, views, score.detach(), "amax", include_self=False
        )
        weight = torch.exp(score - top[views])
        return (weight / weight.new_zeros(len(top)).index_add(0, views, weight)[views]).to(rows.dtype)


class Projector(nn.Sequential):
    """Projects slide vectors for the loss: layers dim-512-512-out with batch norm and ReLU; dropped after training.

    Args:
        dim: length of a slide's vector.
        out: length of its projection.
        seed: of the initial weights; the state of the global generator does not change.
    """

    def __init__(self, dim: int = 512, out: int = 256, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for inputs in (dim, 512):
                layers += [nn.Linear(inputs, 512, bias=False), SiteNorm(512), nn.ReLU()]
            super().__init__(*layers, nn.Linear(512, out))


def view_sum(rows: Tensor, grid: Grid) -> Tensor:
    """Sum the rows of each map.

    Args:
        rows: (S, C) floating, one per site.
        grid: of the sites.

    Returns:
        (grid.batch_size, C); zeros for an empty map.
    """
    return rows.new_zeros(grid.batch_size, rows.shape[1]).index_add(0, grid.views, rows)


def from_dense(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the fourth stage of a dense ResNet-18 to the state of a spatial `Stage`.

    Args:
        state: name -> tensor; names with or without the prefix `layer4.`, others are ignored.

    Returns:
        The state, for `Stage.load_state_dict`.

    Raises:
        FileFormatError: a weight is missing or has another shape.
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
                        f"layer4.{key} is missing or not of ResNet-18's shape", "give the weights of a whole ResNet-18"
                    )
                if dense:  # (out, in, y, x) to (offsets, 1, in, out)
                    value = value.permute(2, 3, 1, 0).reshape(-1, 1, value.shape[1], 512)
                found[f"blocks.{block}.{names.get(part, part)}.{name}"] = value.detach().clone()
                if not dense:
                    found[f"blocks.{block}.{names.get(part, part)}.num_batches_tracked"] = torch.tensor(0)
    return found
