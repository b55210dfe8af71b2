"""Large batches on small cards: a chunk of the batch at a time in memory, the gradient that of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def encode_twice(encoder: nn.Module, *chunk: Any) -> Tensor:
    """`encoder(*chunk)`, which keeps nothing but its result: the backward pass encodes the chunk again.

    So all vectors of a batch are there for its loss, while no more than one chunk is in memory with all that its
    gradient needs (Gao et al., RepL4NLP 2021). Batch norms take the statistics of the chunk.
    """
    return checkpoint(
        encoder,
        *chunk,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), still(encoder)),
    )


@contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """Running statistics stay as they are, for a pass that only repeats an earlier one."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm1d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
