"""Convolutions that visit only the occupied sites of a map, equal there to the dense ones, in plain torch.

A slide is a map of tile vectors with far more empty places than full ones. Submanifold sparse convolution (Graham et
al., CVPR 2018) computes only where a site is occupied, and takes absent neighbours as zero. Who meets whom is written
down once a batch, on the CPU, in a `KernelMap`; a layer then is, for each of the nine offsets, one gather, one matrix
product and one ordered addition, so that nothing is sorted, hashed or counted on the device, and the same input
gives the same bytes.

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

from histossl.training.distributed import is_distributed, norm_together

BLOCK = 4096  # rows a matrix product takes at once: bounds the buffers, and they stay in the cache
Rows = Tensor | slice  # a choice of rows


@dataclass(frozen=True)
class KernelMap:
    """Which input row meets which output row, at which offset of the kernel.

    Attributes:
        source: (P,) int64, input rows; by offset, ascending within one.
        target: (P,) int64, the output rows they go to; within an offset no row comes twice.
        counts: pairs at each offset.
        inputs: number of input rows.
        outputs: number of output rows.
        identity: rows also meet themselves at the middle offset; those pairs are not listed.
    """

    source: Tensor
    target: Tensor
    counts: tuple[int, ...]
    inputs: int
    outputs: int
    identity: bool = False

    @property
    def products(self) -> int:
        """Rows that are multiplied by a matrix: the pairs, with the unlisted ones."""
        return sum(self.counts) + self.identity * self.inputs

    @cached_property
    def blocks(self) -> tuple[tuple[int, Rows, Rows], ...]:
        """(offset, source rows, target rows), at most `BLOCK` rows each; where rows meet themselves, a slice of them,
        and those come first.
        """
        found: list[tuple[int, Rows, Rows]] = []
        if self.identity:
            own = [slice(low, min(low + BLOCK, self.inputs)) for low in range(0, self.inputs, BLOCK)]
            found += [(len(self.counts) // 2, rows, rows) for rows in own]
        for offset, (start, end) in enumerate(pairwise(accumulate(self.counts, initial=0))):
            for low in range(start, end, BLOCK):
                high = min(low + BLOCK, end)
                found.append((offset, self.source[low:high], self.target[low:high]))
        return tuple(found)

    def flipped(self) -> KernelMap:
        """The same pairs, from output to input: the way of a gradient."""
        return KernelMap(self.target, self.source, self.counts, self.outputs, self.inputs, self.identity)


class Grid:
    """The occupied sites of a batch of maps, and who neighbours whom; shared by all maps and layers that lie on it.

    Args:
        sites: (N, 3) integers [map, row, column], not negative, unique and in lexicographic order.
        batch_size: number of maps, empty ones counted.
        device: where the kernel maps are wanted; they are built on the CPU.

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
        """Rows and columns of a map, with an empty one of each as a fence: neighbours never wrap around."""
        rows, columns = (self.sites[:, 1:].max(0) + 2).tolist() if len(self) else (2, 2)
        return rows, columns

    @cached_property
    def _keys(self) -> NDArray[np.int64]:
        rows, columns = self._shape
        return (self.sites[:, 0] * rows + self.sites[:, 1]) * columns + self.sites[:, 2]

    @cached_property
    def views(self) -> Tensor:
        """(N,) int64: the map that each site lies on."""
        return self._tensor(self.sites[:, 0])

    @cached_property
    def counts(self) -> Tensor:
        """(batch_size,) int64: occupied sites of each map."""
        return self._tensor(np.bincount(self.sites[:, 0], minlength=self.batch_size))

    @cached_property
    def itself(self) -> KernelMap:
        """Of a 1x1 convolution."""
        none = self._tensor(np.empty(0, np.int64))
        return KernelMap(none, none, (0,), len(self), len(self), identity=True)

    @cached_property
    def neighbours(self) -> KernelMap:
        """Of a submanifold 3x3 convolution: output (r, c) takes input (r + dy, c + dx) at offset (dy, dx)."""
        keys, columns = self._keys, self._shape[1]
        pairs: list[Any] = [None] * 9
        pairs[4] = (np.empty(0, np.int64),) * 2
        for offset, step in enumerate((-columns - 1, -columns, -columns + 1, -1)):
            found = np.searchsorted(keys, keys + step).clip(max=len(keys) - 1)
            target = np.flatnonzero(keys[found] == keys + step)
            # Who is above me has me below.
            pairs[offset], pairs[8 - offset] = (found[target], target), (target, found[target])
        return self._kernel_map(pairs, len(self), identity=True)

    @cached_property
    def strided(self) -> tuple[Grid, KernelMap]:
        """The grid after a 3x3 layer of stride 2 without padding, and its pairs.

        Output o covers inputs 2o to 2o + 2 in either direction, and exists where o >= 0 and any of them is occupied.
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
        tensor = torch.from_numpy(np.ascontiguousarray(values, np.int64))
        if self.device.type == "cuda":  # from pinned memory the copy does not hold up the host
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class SparseMap:
    """A batch of maps with vectors on their occupied sites.

    Attributes:
        features: (N, C) floating, one row a site in the grid's order.
        grid: where the rows lie.
    """

    features: Tensor
    grid: Grid

    def with_features(self, features: Tensor) -> SparseMap:
        """Other vectors on the same sites, with the kernel maps that are already known."""
        return replace(self, features=features)

    def mean(self) -> Tensor:
        """(batch_size, C): the mean over the sites of each map; zeros where a map is empty."""
        return view_mean(self.features, self.grid.views, self.grid.counts)

    def centred(self) -> Tensor:
        """(N, C): in what each site differs from the mean of its map."""
        mean = self.mean()
        # Of one large map, the mean is not copied to every site.
        return self.features - (mean if len(mean) == 1 else mean[self.grid.views])

    @classmethod
    def of(cls, features: Tensor, sites: NDArray | Tensor, batch_size: int) -> SparseMap:
        """A map of vectors (T, C) placed on sites (T, 3) [map, row, column] in any order; those that fall on one site
        are averaged.
        """
        grid, site, counts = occupied(np.asarray(sites), batch_size, features.device)
        return cls(view_mean(features, site, counts), grid)


def occupied(sites: NDArray, batch_size: int, device: torch.device | str = "cpu") -> tuple[Grid, Tensor, Tensor]:
    """The grid of places in any order and with repeats, the row (T,) int64 of each place in it, and how many places
    (N,) int64 fell on each row.

    Args:
        sites: (T, 3) integers [map, row, column], not negative.
    """
    sites = np.asarray(sites, np.int64).reshape(-1, 3)
    rows, columns = (sites[:, 1:].max(0) + 1).tolist() if len(sites) else (1, 1)
    keys = (sites[:, 0] * rows + sites[:, 1]) * columns + sites[:, 2]
    _, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    grid = Grid(sites[first], batch_size, device)
    return grid, grid._tensor(inverse), grid._tensor(counts)


def view_mean(rows: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """Mean of the rows (N, C) of each group (N,) of `counts` (G,) members; zeros for an empty one. (G, C)."""
    sums = rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, group, rows)
    return sums.div_(counts.clamp(min=1).to(rows.dtype)[:, None])


class SparseConv(nn.Module):
    """A convolution without bias on the pairs of a kernel map: 3x3 (nine offsets) or 1x1 (one).

    `weight` is (offsets, 1, in, out), offsets row-major in (y, x): the layout of published sparse encoders.
    """

    def __init__(self, inputs: int, outputs: int, offsets: int = 9) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(offsets, 1, inputs, outputs))
        nn.init.normal_(self.weight, std=(2 / (offsets * outputs)) ** 0.5)  # as He et al. do for ResNets
        self._rounded: tuple[tuple[Any, ...], Tensor] | None = None

    def forward(self, rows: Tensor, kernel: KernelMap) -> Tensor:
        """(kernel.inputs, in) to (kernel.outputs, out), in the dtype of `rows`."""
        return sparse_conv(rows, self._kernel(rows.device.type), kernel)

    def _kernel(self, device: str) -> Tensor:
        """The weight; in inference under autocast a rounded copy, made once: small batches would round it as long as
        they multiply by it.
        """
        if not (torch.is_inference_mode_enabled() and torch.is_autocast_enabled(device)):
            return self.weight.squeeze(1)
        key = (self.weight.data_ptr(), self.weight._version, torch.get_autocast_dtype(device))
        if self._rounded is None or self._rounded[0] != key:
            self._rounded = key, self.weight.squeeze(1).to(key[-1])
        return self._rounded[1]


class SiteNorm(nn.BatchNorm1d):
    """Batch norm over the sites of all processes that train together; where fewer than two sites give no statistics,
    the running ones serve in training too.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and is_distributed():
            return norm_together(self, input)
        if self.training and len(input) < 2:
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps
            )
        return super().forward(input)


def sparse_conv(rows: Tensor, weight: Tensor, kernel: KernelMap) -> Tensor:
    """Convolve rows (kernel.inputs, in) with weight (offsets, in, out) to (kernel.outputs, out)."""
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
    return _SparseConv.apply(rows, weight, kernel, dtype)


def average_pool(rows: Tensor, kernel: KernelMap) -> Tensor:
    """Average pooling of (kernel.inputs, C) to (kernel.outputs, C); absent sites count as zeros in all nine places."""
    return _PairSum.apply(rows, kernel) / 9


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, kernel: KernelMap, dtype: torch.dtype) -> Tensor:
        x, w = _factor(rows, dtype), weight.to(dtype)
        ctx.save_for_backward(x, w)
        ctx.kernel, ctx.dtypes = kernel, (rows.dtype, weight.dtype)
        work = _Workspace(kernel, w)
        out = torch.zeros(kernel.outputs, w.shape[2], dtype=work.sums, device=x.device)
        for offset, source, target in kernel.blocks:
            work.add_product(work.take(x, source), w[offset], out, target)
        return out.to(rows.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        kernel, g, wt = ctx.kernel, _factor(gradient, x.dtype), w.transpose(1, 2)
        into, back = _Workspace(kernel, w), _Workspace(kernel, wt)
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
    """Each output row the sum of the input rows that it meets."""

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


class _Workspace:
    """The buffers of one layer's matrix products: allocated once, used for every block.

    Factors of 16 bits come in few numbers of rows, filled up with zeros, since the CPU library compiles a kernel for
    each new shape, which takes longer than the product. float32 and float64 are taken as they are.
    """

    def __init__(self, kernel: KernelMap, weight: Tensor) -> None:
        _, inputs, outputs = weight.shape
        self.sums = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.mixed = weight.dtype != self.sums
        largest = max((_rounded(_length(source), weight.dtype) for _, source, _ in kernel.blocks), default=0)
        self.rows = weight.new_empty(largest, inputs)
        self.product = weight.new_empty(largest, outputs)
        self.outer = weight.new_empty(inputs, outputs) if self.mixed else None
        self.wide = self.product.to(self.sums)  # the same tensor where the types agree

    def take(self, x: Tensor, rows: Rows) -> Tensor:
        """The chosen rows of x and zeros up to the rounded number; valid until the next call."""
        count = _length(rows)
        if isinstance(rows, slice):
            return x[rows.start : rows.start + _rounded(count, x.dtype)]
        head = self.rows[: _rounded(count, x.dtype)]
        torch.index_select(x, 0, rows, out=head[:count])
        head[count:].zero_()
        return head

    def add_product(self, factor: Tensor, weight: Tensor, out: Tensor, rows: Rows) -> None:
        """Add factor @ weight to the chosen rows of `out`, which are still zero where they are a slice."""
        if isinstance(rows, slice) and not self.mixed:
            torch.mm(factor, weight, out=out[rows])
            return
        count = _length(rows)
        product, wide = self.product[: len(factor)], self.wide[:count]
        torch.mm(factor, weight, out=product)
        if isinstance(rows, slice):
            out[rows].copy_(product[:count])
            return
        if self.mixed:
            wide.copy_(product[:count])
        out.index_add_(0, rows, wide)

    def add_outer(self, x: Tensor, g: Tensor, out: Tensor) -> None:
        """Add x^T @ g to `out`."""
        if self.outer is None:
            out.addmm_(x.t(), g)
        else:
            out += torch.mm(x.t(), g, out=self.outer)


def _length(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _rounded(count: int, dtype: torch.dtype) -> int:
    """`count` for wide types; for 16-bit ones the next of about sixteen sizes an octave."""
    if dtype.itemsize > 2:
        return count
    whole, rest = divmod(count, BLOCK)
    step = max(16, 2 ** (rest.bit_length() - 5))
    return whole * BLOCK + -(-rest // step) * step


def _factor(x: Tensor, dtype: torch.dtype) -> Tensor:
    """X in `dtype`, contiguous, with zero rows up to the rounded number."""
    rounded = _rounded(len(x), dtype)
    if rounded == len(x):
        return x.to(dtype).contiguous()
    out = x.new_empty(rounded, x.shape[1], dtype=dtype)
    out[: len(x)].copy_(x)
    out[len(x) :].zero_()
    return out
