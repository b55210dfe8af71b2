"""The contrastive loss: one form for slides and for patches, which choose positives and candidates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def contrast(similarity: Tensor, positives: Tensor, candidates: Tensor) -> Tensor:
    """Mean over the positive pairs (i, j) of logsumexp over the candidates k of i of s[i, k], minus s[i, j].

    Args:
        similarity: (A, N) floating, of anchors with all things; already divided by a temperature.
        positives: (A, N) bool, broadcastable; the pairs to be alike.
        candidates: (A, N) bool, broadcastable; what each anchor is told from. Whether the positive is among them is
            the caller's choice: it is in NT-Xent, it is not in patch contrast.

    Returns:
        () in the dtype of `similarity`. Anchors without a candidate do not count; 0 where no pair counts.
    """
    candidates = candidates.expand_as(similarity)
    counted = positives & candidates.any(1, keepdim=True)
    # A row that is all -inf would give nan gradients even where it is not counted.
    masked = similarity.masked_fill(~candidates & candidates.any(1, keepdim=True), -torch.inf)
    terms = torch.logsumexp(masked, 1, keepdim=True) - similarity
    return torch.where(counted, terms, 0).sum() / counted.sum().clamp(min=1)


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """The normalised, temperature-scaled cross-entropy of SimCLR (Chen et al., ICML 2020).

    The positives of a view are its partner, its candidates all the 2B - 1 other views. On several processes give it
    the views of all (gathered with gradients): every process then has the whole batch's loss, and averaging the
    processes' gradients gives the whole batch's gradient.

    Args:
        a, b: (B, d) floating; row i of one and row i of the other show the same slide. Any length: normalised here.
        temperature: positive; 0.05 in the paper.

    Returns:
        () float32 (float64 for such input), also under autocast: at this temperature 16 bits are too few.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"two views must be of one shape (B, d), got {tuple(a.shape)} and {tuple(b.shape)}")
    with torch.autocast(a.device.type, enabled=False):
        views = torch.cat([a, b])
        views = F.normalize(views if views.dtype == torch.float64 else views.float(), dim=1)
        similarity = views @ views.t() / temperature
        index = torch.arange(len(views), device=views.device)
        partner = (index + len(a)) % len(views)
        return contrast(similarity, index == partner[:, None], index != index[:, None])
