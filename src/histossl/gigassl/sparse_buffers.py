"""Buffers for the matrix products of sparse convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

BLOCK = 4096  # rows per matrix product: limits the buffers, which then stay in the cache
Rows = Tensor | slice  # selects rows: indices (n,) int64, or a range


class Workspace:
    """The buffers of one layer's matrix products: allocated once, used for every block.

    16-bit factors are padded with zero rows to one of few sizes, because the CPU library compiles a kernel for each new
    shape, which takes longer than the product. float32 and float64 factors are not padded.

    Args:
        sources: the selections of rows that will be multiplied, one per block.
        weight: (offsets, in, out), of which the products are computed.
    """

    def __init__(self, sources: Iterable[Rows], weight: Tensor) -> None:
        _, inputs, outputs = weight.shape
        self.sums = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.mixed = weight.dtype != self.sums
        largest = max((_rounded(_count(source), weight.dtype) for source in sources), default=0)
        self.rows = weight.new_empty(largest, inputs)
        self.product = weight.new_empty(largest, outputs)
        self.outer = weight.new_empty(inputs, outputs) if self.mixed else None
        self.wide = self.product.to(self.sums)  # the same tensor where the types agree

    def take(self, x: Tensor, rows: Rows) -> Tensor:
        """Select rows of a factor.

        Args:
            x: (N, in), from `padded`.
            rows: the selection, at most `BLOCK` rows.

        Returns:
            The rows, padded to the rounded number; valid until the next call.
        """
        count = _count(rows)
        if isinstance(rows, slice):
            return x[rows.start : rows.start + _rounded(count, x.dtype)]
        head = self.rows[: _rounded(count, x.dtype)]
        torch.index_select(x, 0, rows, out=head[:count])
        head[count:].zero_()
        return head

    def add_product(self, factor: Tensor, weight: Tensor, out: Tensor, rows: Rows) -> None:
        """Add factor @ weight to rows of `out`.

        Args:
            factor: (n, in), from `take`.
            weight: (in, out).
            out: (M, out) in the dtype `sums`.
            rows: the rows of `out`; those of a slice must still be zero, they are overwritten.
        """
        if isinstance(rows, slice) and not self.mixed:
            torch.mm(factor, weight, out=out[rows])
            return
        count = _count(rows)
        product, wide = self.product[: len(factor)], self.wide[:count]
        torch.mm(factor, weight, out=product)
        if isinstance(rows, slice):
            out[rows].copy_(product[:count])
            return
        if self.mixed:
            wide.copy_(product[:count])
        out.index_add_(0, rows, wide)

    def add_outer(self, x: Tensor, g: Tensor, out: Tensor) -> None:
        """Add x^T @ g to `out`.

        Args:
            x: (n, in), from `take`.
            g: (n, out), from `take` of another workspace, so that both are valid at once.
            out: (in, out) in the dtype `sums`.
        """
        if self.outer is None:
            out.addmm_(x.t(), g)
        else:
            out += torch.mm(x.t(), g, out=self.outer)


def _count(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _rounded(count: int, dtype: torch.dtype) -> int:
    """`count` for wide types; for 16-bit types the next larger of about sixteen sizes per octave."""
    if dtype.itemsize > 2:
        return count
    whole, rest = divmod(count, BLOCK)
    step = max(16, 2 ** (rest.bit_count() - 5))
    return whole * BLOCK + -(-rest // step) * step


def padded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Prepare a factor of matrix products.

    Args:
        x: (n, C) floating.
        dtype: of the products.

    Returns:
        `x` in `dtype`, contiguous, with zero rows up to the rounded number.
    """
    rounded = _rounded(len(x), dtype)
    if rounded == len(x):
        return x.to(dtype).contiguous()
    out = x.new_empty(rounded, x.shape[1], dtype=dtype)
    out[: len(x)].copy_(x)
    out[len(x) :].zero_()
    return out
