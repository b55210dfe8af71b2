"""Large batches on small GPUs: one chunk of the batch in memory at a time, with the gradient of the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def encode_twice(encoder: nn.Module, *chunk: Any) -> Tensor:
    """Compute `encoder(*chunk)` and keep only the result: the backward pass encodes the chunk again.

    The loss then has all vectors of a batch, while the activations of only one chunk are in memory (Gao et al.,
    RepL4NLP 2021). Batch norms use the statistics of the chunk.

    Args:
        encoder: a slide encoder, or several.
        chunk: its arguments.

    Returns:
        The vectors, with gradients.
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
    """Keep running statistics unchanged, for a pass that repeats an earlier one.

    Args:
        module: whose batch norms are concerned.

    Yields:
        Nothing; the momenta are restored at the end.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm1d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
