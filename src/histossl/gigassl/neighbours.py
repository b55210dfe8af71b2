"""A stage that learns what neighbouring tiles share: no slide is contrasted with another.

What a tile has in common with the tiles around it is its tissue; what it does not share is chance. So the stage has two
sides, one that looks at a tile and one that looks at the tiles around it, without the tile itself. They learn the
functions of a tile that its surroundings foretell best, in which slides of all kinds differ: the maximal correlation of
Hirschfeld, Gebelein and Rényi, in the soft form of Wang et al. (AAAI 2019). Only differences within a view count, so
that the stain, which all tiles of a slide share, is nothing to be foretold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from histossl.gigassl.norms import SiteNorm
from histossl.gigassl.sparse import Grid, KernelMap, SparseConv, SparseMap
from histossl.training.device import unrounded

HIDDEN = 128
NARROW = 64  # channels of the map that the surroundings are seen on


class Neighbours(nn.Module):
    """A map of tiles in, of each site what it is and how far its surroundings say the same.

    Args:
        inputs: input channels.
        outputs: output channels, even: the first half are functions of the tile alone.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.narrow = SparseConv(inputs, NARROW, 1)
        self.around = SparseConv(NARROW, HIDDEN, 9)
        self.tile = SparseConv(inputs, HIDDEN, 1)
        self.heads = nn.ModuleList([Head(outputs // 2), Head(outputs // 2)])

    def forward(self, sparse: SparseMap) -> SparseMap:
        """Both sides of every site.

        Args:
            sparse: a map with `inputs` channels.

        Returns:
            A map on the same sites with `outputs` channels: functions of the tile, then the product of what is above
            the view's mean in them and in what the surroundings foretell of them.
        """
        own, foretold = self.sides(sparse)
        both = [torch.relu(sparse.with_features(side).centred()) for side in (own, foretold)]
        return sparse.with_features(torch.cat([own, both[0] * both[1]], 1))

    def sides(self, sparse: SparseMap) -> tuple[Tensor, Tensor]:
        """Functions of each tile, and of the tiles around it.

        Args:
            sparse: a map with `inputs` channels.

        Returns:
            (S, outputs // 2) of the tile, and as many of its surroundings.
        """
        rows, grid = sparse.features, sparse.grid
        narrow = sparse.with_features(self.narrow(rows, grid.itself)).centred()
        own, around = self.heads
        return own(self.tile(rows, grid.itself), grid), around(self.around(narrow, grid.surroundings), grid)

    def moments(self, sparse: SparseMap) -> Tensor:
        """What the loss of `foretelling` is made of; moments of parts of a batch add up to its own.

        Args:
            sparse: a map with `inputs` channels.

        Returns:
            (2 + 2 k²,) float32: of k functions the sum over sites of own times foretold, the sums of the products of
            the own with one another, and of the foretold; and the number of sites.
        """
        with unrounded(sparse.features.device):
            own, foretold = (sparse.with_features(side.float()).centred() for side in self.sides(sparse))
            count = own.new_full((1,), len(own))
            sums = (own * foretold).sum().reshape(1), (own.T @ own).flatten(), (foretold.T @ foretold).flatten()
            return torch.cat([*sums, count])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which the stage takes the sites' vectors."""
        return self.narrow.weight.dtype

    def pairs(self, grid: Grid) -> KernelMap:
        """Pair the sites of the input map with those of the output map: each with itself.

        Args:
            grid: of the input map.

        Returns:
            The kernel map.
        """
        return grid.itself


class Head(nn.Module):
    """A residual block on every site alone, and a linear layer.

    Args:
        outputs: output channels.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([SiteNorm(HIDDEN), SiteNorm(HIDDEN)])
        self.inner, self.last = SparseConv(HIDDEN, HIDDEN, 1), SparseConv(HIDDEN, outputs, 1)
        nn.init.normal_(self.last.weight, std=0.4 / HIDDEN**0.5)  # the loss grows with the fourth power of the outputs

    def forward(self, rows: Tensor, grid: Grid) -> Tensor:
        """Apply the block.

        Args:
            rows: (S, HIDDEN).
            grid: of the sites.

        Returns:
            (S, outputs).
        """
        first, second = self.norms
        rows = torch.relu(first(rows))
        return self.last(rows + torch.relu(second(self.inner(rows, grid.itself))), grid.itself)


def foretelling(moments: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, least where one side foretells the other in as many different ways as there are.

    Minus the mean of own times foretold, plus half the trace of the product of both covariances: without the second
    term all functions would be one and the same, and grow. At its least the loss is minus half the sum of the squared
    canonical correlations of the best functions that there are.

    Args:
        moments: of `Neighbours.moments`, over all sites of a batch.

    Returns:
        The loss (), and the gauge `agreement`: the correlation of both sides over all functions, 0 at the start.
    """
    shared, own, foretold = _means(moments)
    loss = 0.5 * (own * foretold).sum() - shared
    with torch.no_grad():
        agreed = shared / (own.trace() * foretold.trace()).sqrt().clamp(min=1e-12)
    return loss, {"agreement": agreed}


def functions(moments: Tensor) -> Tensor:
    """The effective number of functions of a tile that differ, as `effective_rank` counts directions.

    Args:
        moments: as of `foretelling`.

    Returns:
        () in [1, k]; 0 where all are constant.
    """
    lengths = torch.linalg.eigvalsh(_means(moments)[1]).clamp(min=0).sqrt()
    return torch.exp(torch.special.entr(lengths / lengths.sum()).sum()).nan_to_num()


def _means(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Over the sites: of own times foretold (), of own with own (k, k), and of foretold with foretold (k, k)."""
    k = math.isqrt(len(moments) // 2 - 1)
    means = moments[:-1] / moments[-1].clamp(min=1)
    own, foretold = means[1:].view(2, k, k)
    return means[0], own, foretold
