"""The small network of the default method: optical density in, confidence and depth out; most of its work is done at
half and quarter resolution, which is what makes it fast."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

STRIDE = 4
"""Height and width of the input must be multiples of it."""
REACH = 40
"""Pixels: further away than this nothing changes a pixel's result (the receptive field is 75 px wide)."""


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Module:
    pad = dilation * (size // 2)
    conv = nn.Conv2d(inputs, outputs, size, stride, pad, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class NucleusNet(nn.Module):
    """A U-shaped network of three resolutions, 41,934 parameters with the default widths.

    Args:
        widths: channels at full, half and quarter resolution.
        seed: of the initial weights.
    """

    def __init__(self, widths: tuple[int, int, int] = (12, 24, 32), seed: int = 0) -> None:
        super().__init__()
        a, b, c = widths
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = _conv(3, a)
            self.halved = nn.Sequential(_conv(a, b, stride=2), _conv(b, b))
            self.quartered = nn.Sequential(_conv(b, c, stride=2), _conv(c, c, dilation=2))
            self.context = nn.Sequential(
                nn.Conv2d(c, c, 3, padding=4, dilation=4, groups=c, bias=False), _conv(c, c, size=1)
            )
            self.to_half = _conv(c + b, b)
            self.to_full = _conv(b + a, a)
            self.head = nn.Conv2d(a, 2, 1)

    def folded(self) -> NucleusNet:
        """A copy in evaluation mode, its batch norms merged into the convolutions: the same function, faster."""
        twin = copy.deepcopy(self).eval()
        for block in [m for m in twin.modules() if isinstance(m, nn.Sequential)]:
            children = list(block.named_children())
            for (name, conv), (after, norm) in pairwise(children):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(block, name, fuse_conv_bn_eval(conv, norm))
                    setattr(block, after, nn.Identity())
        return twin

    def forward(self, density: Tensor) -> Tensor:
        """(B, 3, H, W) optical density in units of the slide's scale -> (B, 2, H, W) logits of confidence and depth."""
        full = self.stem(density)
        half = self.halved(full)
        quarter = self.quartered(half)
        quarter = quarter + self.context(quarter)
        half = self.to_half(torch.cat([_doubled(quarter), half], 1))
        return self.head(self.to_full(torch.cat([_doubled(half), full], 1)))


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
