"""The last layer of the network, fitted to each slide without labels and without training steps.

What the network has learned elsewhere, its maps, carries over to another stain better than how its last layer weighs
them. So that layer, and nothing else, is fitted to the pseudo-labels of the slide: two logistic regressions, for
confidence and for depth, whose optimum does not depend on where they begin.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.nuclei.network import doubled

PIXELS = 60_000
"""About how many pixels of a slide a head is fitted to; with three times as many nuclei were no better."""

_PENALTY = 1e-3  # on the squared weights of standardised maps, where the mean loss of a pixel weighs 1
_MORE = 1.2
_HALF = 50  # sure nuclei, with which the fitted layer and the network's own weigh the same
_ROUNDING = 4096  # weights are rounded to a fraction of it: sums in another order then give the same head


@dataclass(frozen=True)
class SlideHead:
    """Weights of one slide.

    Attributes:
        kernels: (2, C, 1, 1) float32 for each of the maps of `NucleusNet.maps`.
        bias: (2,) float32.
    """

    kernels: tuple[Tensor, ...]
    bias: Tensor

    def __call__(self, maps: list[Tensor]) -> Tensor:
        """Compute confidence and depth from the maps of the network.

        Args:
            maps: as `NucleusNet.maps` gives them, in any precision, on the device of the weights.

        Returns:
            (B, 2, H, W) float32 logits of confidence and depth.
        """
        last, half, quarter, full = (
            F.conv2d(one.float(), kernel) for one, kernel in zip(maps, self.kernels, strict=True)
        )
        # A weighted sum and an interpolation may change places, and at low resolution the sum costs less.
        return last + full + doubled(half + doubled(quarter)) + self.bias[:, None, None]


def fit_head(
    own: nn.Conv2d, fields: Iterable[tuple[list[Tensor], NDArray[np.float32]]], pixels: int, nuclei: int
) -> SlideHead:
    """Fit confidence and depth to pseudo-labels.

    The confidence is then moved so that no less of the fields is nucleus than the network's own layer says, and at most
    `_MORE` times as much: where nuclei are crowded, few of them are sure, and where tissue is pale, some are none.

    Args:
        own: the last layer of the network, which takes the first of the maps.
        fields: for each field of the slide the maps of the network, (1, C, ...), and the targets (3, H, W) as of
            `targets`: nucleus, depth and weight. At least one pixel is nucleus and one is not.
        pixels: of all fields together.
        nuclei: sure ones of all fields together. The fewer they are, the more of `own` is mixed in.

    Returns:
        The head, on the device of the maps.
    """
    trust = nuclei / (nuclei + _HALF)
    rng = np.random.default_rng(0)
    rows, wanted, shares, channels, device = [], [], [], [], None
    for maps, target in fields:
        last, half, quarter, full = (one.float() for one in maps)
        whole = torch.cat([last, doubled(half), doubled(doubled(quarter)), full], 1)[0]
        channels, device = [one.shape[1] for one in maps], whole.device
        size = target[0].size
        chosen = rng.permutation(size)[: max(1, min(size, size * PIXELS // pixels))]
        y, x = np.unravel_index(np.sort(chosen), target.shape[1:])
        rows.append(whole[:, y, x].T.cpu().numpy())
        wanted.append(target[:, y, x].T)
        shares.append((own(maps[0])[0, 0][y, x] > 0).float().cpu().numpy())
    x, (nucleus, depth, weight) = np.concatenate(rows).astype(np.float64), np.concatenate(wanted).T.astype(np.float64)
    mean, spread = x.mean(0), x.std(0) + 1e-3
    found = [_logistic((x - mean) / spread, y, weight / weight.sum()) for y in (nucleus, depth)]
    kernel = np.stack([w[:-1] / spread for w in found])
    bias = np.array([w[-1] for w in found]) - kernel @ mean
    # Two layers on the same maps are mixed by their weights; `own` has none for the other maps.
    assert own.bias is not None
    kernel, bias = trust * kernel, trust * bias + (1 - trust) * own.bias.detach().float().cpu().numpy()
    kernel[:, : channels[0]] += (1 - trust) * own.weight.detach()[:, :, 0, 0].float().cpu().numpy()
    kernel = np.rint(kernel * _ROUNDING) / _ROUNDING
    bias[0] += _shift(x @ kernel[0] + bias[0], float(np.concatenate(shares).mean()))
    parts = pairwise(accumulate(channels, initial=0))
    return SlideHead(
        tuple(torch.tensor(kernel[:, a:b, None, None], dtype=torch.float32, device=device) for a, b in parts),
        torch.tensor(np.rint(bias * _ROUNDING) / _ROUNDING, dtype=torch.float32, device=device),
    )


def _shift(logits: NDArray[np.float64], share: float) -> float:
    """What to add to the logits so that `share` to `_MORE` times as much of them is positive."""
    wanted = min(max(float((logits > 0).mean()), share), _MORE * share)
    return -float(np.quantile(logits, 1 - wanted)) if wanted != (logits > 0).mean() else 0.0


def _logistic(x: NDArray, y: NDArray, weight: NDArray) -> NDArray[np.float64]:
    """(C + 1,) weights and intercept of a logistic regression on (N, C), for soft answers y in [0, 1]."""
    # A pixel of depth .3 counts as .3 of a pixel that is inside and .7 of one that is not.
    ones, nones = weight * y, weight * (1 - y)
    some, rest = ones > 0, nones > 0
    model = LogisticRegression(C=1 / _PENALTY, solver="newton-cholesky", max_iter=30, tol=1e-3)
    answers = np.repeat([1, 0], [some.sum(), rest.sum()])
    model.fit(np.concatenate([x[some], x[rest]]), answers, np.concatenate([ones[some], nones[rest]]))
    return np.concatenate([np.ravel(model.coef_), np.ravel(model.intercept_)])
