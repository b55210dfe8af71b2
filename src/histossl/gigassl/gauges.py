"""Gauges that show, without labels, whether a training has collapsed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gauges(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Compute the gauges of a batch of pairs.

    `spread`: root mean square deviation of the normalised projections, times the root of d: 1 where they fill the
    sphere, 0 where they have collapsed. `matched`: share of views whose nearest other view is their partner.
    `alignment` and `uniformity` as in Wang and Isola, ICML 2020; lower is better for both.

    Args:
        a: (B, d) projections of one view of each pair, B >= 2.
        b: (B, d) projections of the other view, in the same order.

    Returns:
        Name -> scalar ().
    """
    z = nn.functional.normalize(torch.cat([a, b]).float(), dim=1)
    similarity = z @ z.T
    index = torch.arange(len(z), device=z.device)
    partner = (index + len(a)) % len(z)
    others = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -2)
    squares = (2 - 2 * similarity).clamp(min=0)
    off = (torch.exp(-2 * squares).sum() - len(z)) / (len(z) * (len(z) - 1))
    return {
        "spread": z.var(dim=0, correction=0).sum().sqrt(),
        "matched": (others.argmax(dim=1) == partner).float().mean(),
        "alignment": squares[index, partner].mean(),
        "uniformity": torch.log(off),
    }


def effective_rank(vectors: Tensor) -> Tensor:
    """The effective number of directions in which vectors differ (Roy and Vetterli, EUSIPCO 2007).

    The mean is subtracted; the result is the exponential of the entropy of the singular values, as shares of their sum.

    Args:
        vectors: (N, d) floating.

    Returns:
        () in [1, min(N, d)]; 0 where all vectors are equal.
    """
    values = torch.linalg.svdvals((vectors - vectors.mean(0)).float())
    shares = values / values.sum()
    return torch.exp(torch.special.entr(shares).sum()).nan_to_num()
