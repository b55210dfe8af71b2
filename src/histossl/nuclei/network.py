"""The small network of self-training: optical density in, confidence and depth out.

Most of its operations are at half and quarter resolution, which makes it fast.
"""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from histossl.core.atomic import whole_folder
from histossl.core.config import to_dict
from histossl.core.errors import FileFormatError
from histossl.training.device import unrounded

FORMAT = "histossl nuclei 1"

STRIDE = 4
"""Height and width of the input must be multiples of it."""
REACH = 40
"""Pixels; the output of a pixel does not depend on input beyond this distance (the receptive field is 75 px wide)."""


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Module:
    pad = dilation * (size // 2)
    conv = nn.Conv2d(inputs, outputs, size, stride, pad, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class _Depthwise(nn.Conv2d):
    """A depthwise convolution that ignores autocast and computes in the precision of its weights.

    The bfloat16 gradient of a dilated depthwise kernel in oneDNN reads uninitialised memory (seen with torch 2.13: the
    result differs from run to run, and sometimes is NaN).
    """

    def forward(self, input: Tensor) -> Tensor:
        with unrounded(input.device):
            return super().forward(input.to(self.weight.dtype))


class NucleusNet(nn.Module):
    """A U-shaped network of three resolutions, 41,934 parameters with the default widths.

    Args:
        widths: channels at full, half and quarter resolution.
        seed: seed of the initial weights.
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
                _Depthwise(c, c, 3, padding=4, dilation=4, groups=c, bias=False), _conv(c, c, size=1)
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

    def maps(self, density: Tensor) -> list[Tensor]:
        """Compute the features from which confidence and depth are read.

        Args:
            density: (B, 3, H, W) optical density in units of the slide's scale; H and W multiples of STRIDE.

        Returns:
            With the default widths (B, 12, H, W), which `head` takes; (B, 24, H / 2, W / 2); (B, 32, H / 4, W / 4);
            and (B, 12, H, W), which has seen 3 x 3 pixels alone.
        """
        full = self.stem(density)
        half = self.halved(full)
        quarter = self.quartered(half)
        quarter = quarter + self.context(quarter)
        half = self.to_half(torch.cat([doubled(quarter), half], 1))
        return [self.to_full(torch.cat([doubled(half), full], 1)), half, quarter, full]

    def forward(self, density: Tensor) -> Tensor:
        """Compute confidence and depth.

        Args:
            density: (B, 3, H, W) optical density in units of the slide's scale; H and W multiples of STRIDE.

        Returns:
            (B, 2, H, W) logits of confidence and depth.
        """
        return self.head(self.maps(density)[0])


def doubled(x: Tensor) -> Tensor:
    """Interpolate a map to twice its size, bilinearly.

    Args:
        x: (B, C, h, w).

    Returns:
        (B, C, 2 h, 2 w).
    """
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def save_model(folder: Path, method: str, network: nn.Module, settings: Any, **more: Any) -> None:
    """Write a model as model.safetensors and config.json, whole or absent.

    Args:
        folder: folder of the model.
        method: name of the method, which selects the class that loads it.
        network: network whose weights are written.
        settings: a settings dataclass.
        more: further JSON values for config.json.

    Raises:
        OSError: the folder cannot be written.
    """
    with whole_folder(folder) as part:
        state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
        # Unlike `save_file` of safetensors, this raises an OSError where the disk is full.
        (part / "model.safetensors").write_bytes(save(state))
        config = {"format": FORMAT, "method": method, "settings": to_dict(settings), **more}
        (part / "config.json").write_text(json.dumps(config, indent=2), "utf-8")


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a model that `save_model` wrote.

    Args:
        folder: folder of the model.

    Returns:
        The content of config.json, and the weights by name.

    Raises:
        FileFormatError: a file is missing, truncated, of another version or no model.
    """
    hint = "give the folder that `histossl nuclei train` wrote, with model.safetensors and config.json"
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise FileFormatError(f"no nuclei model can be read from {folder}: {error}", hint) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise FileFormatError(f"{folder / 'config.json'} is of no nuclei model: it does not say {FORMAT!r}", hint)
    return config, weights
