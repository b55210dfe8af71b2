"""Processes that train together, started by torchrun on one machine or several; without it the world size is 1."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process, and the number of processes that train together."""
    if not distributed.is_torchelastic_launched():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def is_rank_zero() -> bool:
    """Whether this process has rank 0, the one that writes."""
    return rank_and_world_size()[0] == 0


def make_fabric(device: str, precision: str) -> Fabric:
    """Give this process its device and connect it to the other processes.

    Args:
        device: cpu or cuda.
        precision: as Fabric names it, such as "32-true" or "bf16-mixed".

    Returns:
        The Fabric object, launched where torchrun started several processes.
    """
    from lightning_fabric import Fabric  # here, since it imports torch's compiler, which takes seconds

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # at INFO it repeats the settings on every start
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
    """Connect to the other processes for the `with` block.

    Args:
        device: cpu or cuda.

    Yields:
        Whether this process has rank 0, which alone writes.
    """
    if rank_and_world_size()[1] > 1:
        make_fabric(device, "32-true")
    yield is_rank_zero()
    if is_distributed():
        distributed.destroy_process_group()


_by_itself = ContextVar("by itself", default=False)


@contextmanager
def by_itself() -> Iterator[None]:
    """Within, this process computes alone: batch norms do not wait for processes that do something else."""
    before = _by_itself.set(True)
    try:
        yield
    finally:
        _by_itself.reset(before)


def is_distributed() -> bool:
    """Whether this process is connected to others, and computes together with them."""
    return distributed.is_initialized() and not _by_itself.get()


def barrier() -> None:
    """Wait until all processes have reached this call."""
    if is_distributed():
        distributed.barrier()


def rank_counts(count: int) -> list[int]:
    """How many of `count` items each process takes if rank r of W takes the items r, r + W, r + 2W, ...

    Args:
        count: number of items, >= 0.

    Returns:
        One count per rank; they sum to `count`.
    """
    _, processes = rank_and_world_size()
    return [len(range(rank, count, processes)) for rank in range(processes)]


def gather(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Concatenate the rows of all processes, with gradients.

    Every process then computes the same loss over all rows. DDP averages the gradients over the processes, and that
    mean is the gradient that one process with all rows would have.

    Args:
        rows: (n, ...) floating, of this process.
        counts: n of each process, by rank.

    Returns:
        (sum of counts, ...) in the order of the ranks; `rows` itself where one process trains alone.
    """
    if not is_distributed():
        return rows
    most = max(counts)  # all_gather needs the same shape from every process
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    every = _Gather.apply(padded)
    return torch.cat([part[:count] for part, count in zip(every, counts, strict=True)])


def moments(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance over the rows of all processes, with gradients.

    The parts are combined as in Chan et al. (1979), which avoids cancellation.

    Args:
        rows: (n, C) floating, of this process; n may be 0.

    Returns:
        The number of rows in all processes (), their mean (C,) and their population variance (C,).
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
    """Batch norm in training, with statistics over the rows of all processes.

    With fewer than two rows in all, the running statistics are used and stay as they are.

    Args:
        norm: with running statistics; they are updated in place.
        rows: (n, C) floating, of this process.

    Returns:
        (n, C) normalised rows of this process, in the dtype of `rows`.
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
    """Stacks tensors of one shape (...) from W processes to (W, ...)."""

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
