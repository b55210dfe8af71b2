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
from scipy.special import expit
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.nuclei.network import doubled

PIXELS = 60_000
"""About how many pixels of a slide a head is fitted to; with three times as many nuclei were no better."""

_PENALTY = 1e-3  # on the squared weights of standardised maps, where the mean loss of a pixel weighs 1
_MORE = 1.2
_HALF = 50  # sure nuclei, with which the fitted layer and the network's own weigh the same
_STEPS, _GAIN = 12, 1e-3  # of Newton's method: how many at most, and how much each must lower the mean loss
_FEW = 8  # every such pixel finds where the others begin
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
        channels, device = [one.shape[1] for one in maps], last.device
        size = target[0].size
        chosen = rng.permutation(size)[: max(1, min(size, size * PIXELS // pixels))]
        y, x = np.unravel_index(np.sort(chosen), target.shape[1:])
        # Interpolated at the chosen pixels alone, as `doubled` does it at all.
        at = torch.tensor(np.stack([x, y], -1), dtype=torch.float32, device=device)
        grid = (2 * at + 1) / torch.tensor(last.shape[:1:-1], device=device) - 1
        low = torch.cat([half, doubled(quarter)], 1)
        between = F.grid_sample(low, grid[None, None], padding_mode="border", align_corners=False)[0, :, 0]
        rows.append(torch.cat([last[0][:, y, x], between, full[0][:, y, x]]).T.cpu().numpy())
        wanted.append(target[:, y, x].T)
        shares.append((own(maps[0])[0, 0][y, x] > 0).float().cpu().numpy())
    x, (nucleus, depth, weight) = np.concatenate(rows), np.concatenate(wanted).T
    mean, spread = x.mean(0), x.std(0) + np.float32(1e-3)
    standard, weight = (x - mean) / spread, weight / weight.sum()
    found = [_logistic(standard, y, weight) for y in (nucleus, depth)]
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


def _logistic(x: NDArray[np.float32], y: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """(C + 1,) weights and intercept of a logistic regression on (N, C), for soft answers y in [0, 1].

    By Newton's method; scikit-learn's takes no soft answers and three times as long.
    """
    x = np.column_stack([x, np.ones(len(x), np.float32)])
    few = slice(None, None, _FEW)
    # Threads of the library would wait for a core that a worker has.
    with threadpool_limits(1, "blas"):
        near = _minimum(np.ascontiguousarray(x[few]), y[few], weight[few] / weight[few].sum(), np.zeros(x.shape[1]))
        return _minimum(x, y, weight, near)


def _minimum(
    x: NDArray[np.float32], y: NDArray[np.float32], weight: NDArray[np.float32], b: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The weights of the least loss, beginning at others."""
    penalty = np.append(np.full(x.shape[1] - 1, _PENALTY), 0)

    def judged(b: NDArray[np.float64]) -> tuple[float, NDArray[np.float32]]:
        logits = x @ b.astype(np.float32)
        return float(weight @ (np.logaddexp(0, logits) - y * logits) + penalty @ b**2 / 2), logits

    before, logits = judged(b)
    for _ in range(_STEPS):
        likely = expit(logits)
        slope = (x.T @ (weight * (likely - y))).astype(np.float64) + penalty * b
        curve = (x * (weight * likely * (1 - likely))[:, None]).T @ x
        step = np.linalg.solve(curve.astype(np.float64) + np.diag(penalty + 1e-9), slope)
        after, logits = judged(b - step)
        if after >= before:
            break
        gain, before, b = before - after, after, b - step
        if gain < _GAIN:
            break
    return b
