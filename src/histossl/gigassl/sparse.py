"""Sparse convolutions in plain torch: at the occupied sites of a map they equal the dense ones.

A slide is a map of tile vectors in which most sites are empty. Submanifold sparse convolution (Graham et al., CVPR
2018) computes only occupied sites, and treats absent neighbours as zero. A `KernelMap` lists the pairs of neighbours,
built once per batch on the CPU. A layer then is, for each of the nine offsets, one gather, one matrix product and one
ordered addition: nothing is sorted, hashed or counted on the device, and the same input gives the same bytes.

Under `torch.autocast` the factors are rounded to its dtype; sums are kept in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histossl.gigassl import sparse_buffers
from histossl.gigassl.sparse_buffers import Rows, Workspace, padded
from histossl.training.device import rounded_dtype, sent


@dataclass(frozen=True)
class KernelMap:
    """The pairs of input and output rows at each offset of the kernel.

    Attributes:
        source: (P,) int64, input rows; sorted by offset, ascending within one.
        target: (P,) int64, their output rows; within an offset each row occurs at most once.
        counts: number of pairs at each offset.
        inputs: number of input rows.
        outputs: number of output rows.
        identity: every row is also paired with itself at the middle offset; those pairs are not listed.
    """

    source: Tensor
    target: Tensor
    counts: tuple[int, ...]
    inputs: int
    outputs: int
    identity: bool = False

    @property
    def products(self) -> int:
        """Number of rows that are multiplied by a matrix: all pairs, also the unlisted ones."""
        return sum(self.counts) + self.identity * self.inputs

    @cached_property
    def blocks(self) -> tuple[tuple[int, Rows, Rows], ...]:
        """(offset, source rows, target rows) of at most `BLOCK` rows; identity pairs are slices and come first.

        The order matters: `Workspace.add_product` overwrites the rows of slices, which must still be zero.
        """
        size = sparse_buffers.BLOCK
        found: list[tuple[int, Rows, Rows]] = []
        if self.identity:
            own = [slice(low, min(low + size, self.inputs)) for low in range(0, self.inputs, size)]
            found += [(len(self.counts) // 2, rows, rows) for rows in own]
        for offset, (start, end) in enumerate(pairwise(accumulate(self.counts, initial=0))):
            for low in range(start, end, size):
                high = min(low + size, end)
                found.append((offset, self.source[low:high], self.target[low:high]))
        return tuple(found)

    def flipped(self) -> KernelMap:
        """The same pairs from output to input, as the gradient needs them."""
        return KernelMap(self.target, self.source, self.counts, self.outputs, self.inputs, self.identity)


class Grid:
    """The occupied sites of a batch of maps with their kernel maps; all layers on the same sites share one grid.

    Args:
        sites: (N, 3) integers [map, row, column], not negative, unique and in lexicographic order.
        batch_size: number of maps, including empty ones.
        device: of the kernel maps, which are built on the CPU and copied.

    Raises:
        ValueError: sites of another shape, out of range, repeated or out of order.
    """

    def __init__(self, sites: NDArray | Tensor, batch_size: int, device: torch.device | str = "cpu") -> None:
        self.sites = np.asarray(sites, np.int64)
        self.batch_size = batch_size
        self.device = torch.device(device)
        if self.sites.ndim != 2 or self.sites.shape[1] != 3:
            raise ValueError(f"sites must be (N, 3), got {self.sites.shape}")
        if len(self) and (self.sites.min() < 0 or self.sites[:, 0].max() >= batch_size):
            raise ValueError(f"sites must not be negative, and their map below the batch size {batch_size}")
        if (np.diff(self._keys) <= 0).any():
            raise ValueError("sites must be unique and in lexicographic order")

    def __len__(self) -> int:
        return len(self.sites)

    @cached_property
    def _shape(self) -> tuple[int, int]:
        """Rows and columns of a map, with an empty row and column at the end, so that neighbours never wrap around."""
        rows, columns = (self.sites[:, 1:].max(0) + 2).tolist() if len(self) else (2, 2)
        return rows, columns

    @cached_property
    def _keys(self) -> NDArray[np.int64]:
        rows, columns = self._shape
        return (self.sites[:, 0] * rows + self.sites[:, 1]) * columns + self.sites[:, 2]

    @cached_property
    def views(self) -> Tensor:
        """(N,) int64: the map of each site."""
        return self._tensor(self.sites[:, 0])

    @cached_property
    def counts(self) -> Tensor:
        """(batch_size,) int64: number of occupied sites of each map."""
        return self._tensor(np.bincount(self.sites[:, 0], minlength=self.batch_size))

    @cached_property
    def itself(self) -> KernelMap:
        """Pairs of a 1x1 convolution."""
        none = self._tensor(np.empty(0, np.int64))
        return KernelMap(none, none, (0,), len(self), len(self), identity=True)

    @cached_property
    def neighbours(self) -> KernelMap:
        """Pairs of a submanifold 3x3 convolution: output (r, c) takes input (r + dy, c + dx) at offset (dy, dx)."""
        keys, columns = self._keys, self._shape[1]
        pairs: list[Any] = [None] * 9
        pairs[4] = (np.empty(0, np.int64),) * 2
        for offset, step in enumerate((-columns - 1, -columns, -columns + 1, -1)):
            found = np.searchsorted(keys, keys + step).clip(max=len(keys) - 1)
            target = np.flatnonzero(keys[found] == keys + step)
            # Each pair also holds in the opposite direction: four of the eight offsets need no search.
            pairs[offset], pairs[8 - offset] = (found[target], target), (target, found[target])
        return self._kernel_map(pairs, len(self), identity=True)

    @cached_property
    def surroundings(self) -> KernelMap:
        """As `neighbours`, but without the site itself."""
        return replace(self.neighbours, identity=False)

    @cached_property
    def strided(self) -> tuple[Grid, KernelMap]:
        """The grid after a 3x3 layer of stride 2 without padding, and the kernel map of that layer.

        Output o covers inputs 2o to 2o + 2 in both directions, and exists where o >= 0 and one of them is occupied.
        """
        rows, columns = self._shape
        pairs, keys = [], []
        for dy in range(3):
            for dx in range(3):
                row, column = self.sites[:, 1] - dy, self.sites[:, 2] - dx
                source = np.flatnonzero((row % 2 == 0) & (column % 2 == 0) & (row >= 0) & (column >= 0))
                keys.append((self.sites[source, 0] * rows + row[source] // 2) * columns + column[source] // 2)
                pairs.append(source)
        unique, target = np.unique(np.concatenate(keys), return_inverse=True)
        targets = np.split(target.astype(np.int64), np.cumsum([len(p) for p in pairs])[:-1])
        sites = np.stack([unique // columns // rows, unique // columns % rows, unique % columns], 1)
        coarse = Grid(sites, self.batch_size, self.device)
        return coarse, self._kernel_map(list(zip(pairs, targets, strict=True)), len(coarse))

    def _kernel_map(self, pairs: list[tuple[NDArray, NDArray]], outputs: int, identity: bool = False) -> KernelMap:
        source, target = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
        counts = tuple(len(pair[0]) for pair in pairs)
        return KernelMap(self._tensor(source), self._tensor(target), counts, len(self), outputs, identity)

    def _tensor(self, values: NDArray) -> Tensor:
        return sent(torch.from_numpy(np.ascontiguousarray(values, np.int64)), self.device)


@dataclass(frozen=True)
class SparseMap:
    """A batch of maps with vectors on their occupied sites.

    Attributes:
        features: (N, C) floating, one row per site, in the grid's order.
        grid: the sites.
    """

    features: Tensor
    grid: Grid

    def with_features(self, features: Tensor) -> SparseMap:
        """Replace the vectors; kernel maps that are already built are kept.

        Args:
            features: (N, any) floating.

        Returns:
            The new map, on the same grid.
        """
        return replace(self, features=features)

    def mean(self) -> Tensor:
        """(batch_size, C): the mean over the sites of each map; zeros for an empty map."""
        return view_mean(self.features, self.grid.views, self.grid.counts)

    def centred(self) -> Tensor:
        """(N, C): the difference of each site from the mean of its map."""
        mean = self.mean()  # of one map it is broadcast, not copied to every site of a large slide
        return self.features - (mean if len(mean) == 1 else mean[self.grid.views])

    @classmethod
    def of(cls, features: Tensor, sites: NDArray | Tensor, batch_size: int) -> SparseMap:
        """Place vectors on sites; vectors on the same site are averaged.

        Args:
            features: (T, C) floating.
            sites: (T, 3) integers [map, row, column], not negative, in any order.
            batch_size: number of maps.

        Returns:
            The map.
        """
        grid, site, counts = occupied(np.asarray(sites), batch_size, features.device)
        return cls(view_mean(features, site, counts), grid)


def occupied(sites: NDArray, batch_size: int, device: torch.device | str = "cpu") -> tuple[Grid, Tensor, Tensor]:
    """Make the grid of sites that are in any order and may repeat.

    Args:
        sites: (T, 3) integers [map, row, column], not negative.
        batch_size: number of maps.
        device: of the results.

    Returns:
        The grid of the N different sites, the row of each input site in it (T,) int64, and the number of input sites
        on each row (N,) int64.
    """
    sites = np.asarray(sites, np.int64).reshape(-1, 3)
    rows, columns = (sites[:, 1:].max(0) + 1).tolist() if len(sites) else (1, 1)
    keys = (sites[:, 0] * rows + sites[:, 1]) * columns + sites[:, 2]
    _, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    grid = Grid(sites[first], batch_size, device)
    return grid, grid._tensor(inverse), grid._tensor(counts)


def view_mean(rows: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """Mean of the rows of each group.

    Args:
        rows: (N, C) floating.
        group: (N,) int64, the group of each row.
        counts: (G,) int64, number of rows of each group.

    Returns:
        (G, C); zeros for an empty group.
    """
    sums = rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, group, rows)
    return sums.div_(counts.clamp(min=1).to(rows.dtype)[:, None])


class SparseConv(nn.Module):
    """A convolution without bias on the pairs of a kernel map: 3x3 (nine offsets) or 1x1 (one).

    `weight` is (offsets, 1, in, out), offsets row-major in (y, x): the layout of published sparse encoders.

    Args:
        inputs: input channels.
        outputs: output channels.
        offsets: 9 or 1.
    """

    def __init__(self, inputs: int, outputs: int, offsets: int = 9) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(offsets, 1, inputs, outputs))
        nn.init.normal_(self.weight, std=(2 / (offsets * outputs)) ** 0.5)  # as He et al. do for ResNets
        self._rounded: tuple[tuple[Any, ...], Tensor] | None = None

    def forward(self, rows: Tensor, kernel: KernelMap) -> Tensor:
        """Convolve the rows of a map.

        Args:
            rows: (kernel.inputs, in) floating.
            kernel: the pairs.

        Returns:
            (kernel.outputs, out) in the dtype of `rows`.
        """
        return sparse_conv(rows, self._kernel(rows.device), kernel)

    def _kernel(self, device: torch.device) -> Tensor:
        """The weight; in inference under autocast a rounded copy, which is cached.

        For small batches, rounding the weight takes as long as the products.
        """
        dtype = rounded_dtype(device)
        if dtype is None or not torch.is_inference_mode_enabled():
            return self.weight.squeeze(1)
        key = (self.weight.data_ptr(), self.weight._version, dtype)
        if self._rounded is None or self._rounded[0] != key:
            self._rounded = key, self.weight.squeeze(1).to(key[-1])
        return self._rounded[1]


def sparse_conv(rows: Tensor, weight: Tensor, kernel: KernelMap) -> Tensor:
    """Convolve the rows of a map.

    Args:
        rows: (kernel.inputs, in) floating.
        weight: (offsets, in, out) floating.
        kernel: the pairs.

    Returns:
        (kernel.outputs, out) in the dtype of `rows`.
    """
    return _SparseConv.apply(rows, weight, kernel, rounded_dtype(rows.device) or rows.dtype)


def average_pool(rows: Tensor, kernel: KernelMap) -> Tensor:
    """Average pooling over 3x3 sites.

    Args:
        rows: (kernel.inputs, C) floating.
        kernel: the pairs, of `Grid.strided`.

    Returns:
        (kernel.outputs, C): sums divided by nine, as absent sites count as zeros.
    """
    return _PairSum.apply(rows, kernel) / 9


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, kernel: KernelMap, dtype: torch.dtype) -> Tensor:
        x, w = padded(rows, dtype), weight.to(dtype)
        ctx.save_for_backward(x, w)
        ctx.kernel, ctx.dtypes = kernel, (rows.dtype, weight.dtype)
        work = Workspace([source for _, source, _ in kernel.blocks], w)
        out = torch.zeros(kernel.outputs, w.shape[2], dtype=work.sums, device=x.device)
        for offset, source, target in kernel.blocks:
            work.add_product(work.take(x, source), w[offset], out, target)
        return out.to(rows.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        kernel, g, wt = ctx.kernel, padded(gradient, x.dtype), w.transpose(1, 2)
        sources = [source for _, source, _ in kernel.blocks]
        into, back = Workspace(sources, w), Workspace(sources, wt)
        to_weight = torch.zeros_like(w, dtype=into.sums)
        wanted = ctx.needs_input_grad[0]
        to_rows = torch.zeros(kernel.inputs if wanted else 0, w.shape[1], dtype=into.sums, device=x.device)
        for offset, source, target in kernel.blocks:
            g_rows = back.take(g, target)
            into.add_outer(into.take(x, source), g_rows, to_weight[offset])
            if wanted:
                back.add_product(g_rows, wt[offset], to_rows, source)
        rows_dtype, weight_dtype = ctx.dtypes
        return to_rows.to(rows_dtype) if wanted else None, to_weight.to(weight_dtype), None, None


class _PairSum(torch.autograd.Function):
    """Each output row is the sum of the input rows that it is paired with."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, kernel: KernelMap) -> Tensor:
        ctx.kernel = kernel
        out = rows.new_zeros(kernel.outputs, rows.shape[1])
        for _, source, target in kernel.blocks:
            assert not isinstance(source, slice)  # a pool has no identity pairs
            assert not isinstance(target, slice)
            out.index_add_(0, target, rows.index_select(0, source))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _PairSum.apply(gradient, ctx.kernel.flipped()), None
