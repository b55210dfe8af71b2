"""The contrastive loss for slides, tiles and patches; callers choose the positives and the candidates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from histossl.training.device import unrounded


def contrast(similarity: Tensor, positives: Tensor, candidates: Tensor) -> Tensor:
    """The mean over all positive pairs (i, j) of: logsumexp of s[i, k] over the candidates k of i, minus s[i, j].

    Args:
        similarity: (A, N) floating, of A anchors with N items; already divided by a temperature.
        positives: (A, N) bool, broadcastable; the pairs that should be similar.
        candidates: (A, N) bool, broadcastable; the items that each anchor is compared with. The caller decides whether
            the positive is one of them: in NT-Xent it is, in patch contrast it is not.

    Returns:
        () in the dtype of `similarity`. Anchors without a candidate do not count; 0 where no pair counts.
    """
    candidates = candidates.expand_as(similarity)
    counted = positives & candidates.any(1, keepdim=True)
    # Rows without candidates stay unmasked: a row of -inf alone would give nan gradients although it does not count.
    masked = similarity.masked_fill(~candidates & candidates.any(1, keepdim=True), -torch.inf)
    terms = torch.logsumexp(masked, 1, keepdim=True) - similarity
    return torch.where(counted, terms, 0).sum() / counted.sum().clamp(min=1)


def nt_xent(a: Tensor, b: Tensor, temperature: float, groups: Tensor | None = None) -> Tensor:
    """The normalised, temperature-scaled cross-entropy of SimCLR (Chen et al., ICML 2020).

    The positive of a view is its partner, its candidates are the 2B - 1 other views. With several processes, pass the
    views of all of them (see `gather`): every process then computes the loss of the whole batch, and the mean of their
    gradients is the gradient of the whole batch.

    Args:
        a: (B, d) floating, one view of each slide; rows of any length, they are normalised here.
        b: (B, d) floating, the other view of each slide, in the same order.
        temperature: positive; 0.05 in the paper.
        groups: (B,) int; a view is then compared with its partner and with views of its own group alone, so that what
            sets groups apart is no help. A slide alone in its group is compared with nothing, and adds 0.

    Returns:
        () float32 (float64 for float64 input), also under autocast: at this temperature 16 bits are too few.

    Raises:
        ValueError: `a` and `b` differ in shape or are not (B, d).
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"two views must be of one shape (B, d), got {tuple(a.shape)} and {tuple(b.shape)}")
    with unrounded(a.device):
        views = torch.cat([a, b])
        views = F.normalize(views if views.dtype == torch.float64 else views.float(), dim=1)
        similarity = views @ views.t() / temperature
        index = torch.arange(len(views), device=views.device)
        partner = (index + len(a)) % len(views)
        candidates = index != index[:, None]
        if groups is not None:
            both = torch.cat([groups, groups])
            candidates &= both == both[:, None]
        return contrast(similarity, index == partner[:, None], candidates)
