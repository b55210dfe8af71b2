"""Processes that train together, on one machine or several, as torchrun starts them; a process alone is one of one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, distributed, nn


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process, and how many train together."""
    if not distributed.is_torchelastic_launched():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def is_rank_zero() -> bool:
    """Whether this is the process that writes."""
    return rank_and_world_size()[0] == 0


def make_fabric(device: str, precision: str) -> Fabric:
    """A device for this process, and the way to the others.

    Args:
        device: cpu or cuda.
        precision: as Fabric names it.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces what was asked for
    kind = "cuda" if device.startswith("cuda") else "cpu"
    if rank_and_world_size()[1] == 1:
        return Fabric(accelerator=kind, devices=1, precision=precision)  # type: ignore[arg-type]
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = rank_and_world_size()[1] // here
    fabric = Fabric(accelerator=kind, strategy="ddp", devices=here, num_nodes=nodes, precision=precision)  # type: ignore[arg-type]
    fabric.launch()
    return fabric


@contextmanager
def process_group(device: str) -> Iterator[bool]:
    """Meet the other processes; yields whether this is the first, which alone writes.

    Args:
        device: cpu or cuda.
    """
    if rank_and_world_size()[1] > 1:
        make_fabric(device, "32-true")
    yield is_rank_zero()
    if is_distributed():
        distributed.destroy_process_group()


def is_distributed() -> bool:
    """Whether other processes have been met."""
    return distributed.is_initialized()


def barrier() -> None:
    """Until all processes have come here."""
    if is_distributed():
        distributed.barrier()


def rank_counts(count: int) -> list[int]:
    """How many of so many things each process takes, where process r takes those at r, r + W, r + 2W, ..."""
    _, processes = rank_and_world_size()
    return [len(range(rank, count, processes)) for rank in range(processes)]


def gather(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows (n, ...) of all processes, in the order of their ranks, with gradients.

    Every process then computes the same loss of all rows; the mean over the processes of the gradients, which DDP
    takes, is the gradient of one process that has all rows.

    Args:
        rows: of this process.
        counts: rows of each process.
    """
    if not is_distributed():
        return rows
    most = max(counts)
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    every = _Gather.apply(padded)
    return torch.cat([part[:count] for part, count in zip(every, counts, strict=True)])


def moments(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the rows (n, C) of all processes: their number (), mean and variance (C,), with gradients.

    The variance is that of the population; the parts are combined as Chan et al. (1979) do, so that nothing cancels.
    """
    count = rows.new_full((1,), len(rows))
    own = rows.sum(0) / count.clamp(min=1)
    every = _Gather.apply(torch.cat([count, own, ((rows - own) ** 2).sum(0)]))
    counts, (means, squares) = every[:, :1], every[:, 1:].chunk(2, dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total.clamp(min=1)
    variance = (squares + counts * (means - mean) ** 2).sum(0) / total.clamp(min=1)
    return total, mean, variance


def norm_together(norm: nn.BatchNorm1d, rows: Tensor) -> Tensor:
    """What a batch norm in training makes of the rows (n, C) of all processes, for those of this one.

    Where there are fewer than two rows, the running statistics serve.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    wide = rows.to(norm.running_mean.dtype)
    count, mean, variance = moments(wide)
    enough = count > 1
    with torch.no_grad():
        share = norm.momentum * enough
        norm.running_mean.lerp_(mean, share)
        norm.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)), share)
    mean, variance = torch.where(enough, mean, norm.running_mean), torch.where(enough, variance, norm.running_var)
    found = (wide - mean) * torch.rsqrt(variance + norm.eps)
    return (found * norm.weight + norm.bias if norm.affine else found).to(rows.dtype)


class _Gather(torch.autograd.Function):
    """(W, ...) from the same shape (...) in each of W processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        return gradient[distributed.get_rank()]
