"""ResNet-18, whole or cut after `layer3`: a tile in, one vector out (He et al., CVPR 2016)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; parameters named as torchvision names them."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or in_planes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu_(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu_(out.add_(shortcut))


def stage(in_planes: int, planes: int, stride: int) -> nn.Sequential:
    """One of ResNet-18's four stages: two basic blocks."""
    return nn.Sequential(BasicBlock(in_planes, planes, stride), BasicBlock(planes, planes, 1))


class ResNet18(nn.Module):
    """ResNet-18 without its classifier, (B, 3, H, W) float -> (B, D) float: the mean over the last map.

    Args:
        stages: 3 stops after `layer3` (D = 256), which is the tile encoder of Giga-SSL; 4 is the whole (D = 512).
    """

    def __init__(self, stages: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        planes = (64, 64, 128, 256, 512)
        for k in range(1, stages + 1):
            self.add_module(f"layer{k}", stage(planes[k - 1], planes[k], 1 if k == 1 else 2))
        self.stages = stages
        self.dim = planes[stages]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        # Pooled first: the same numbers, and a quarter of the work for the ReLU.
        x = torch.relu_(nn.functional.max_pool2d(self.bn1(self.conv1(x)), 3, 2, 1))
        for k in range(1, self.stages + 1):
            x = getattr(self, f"layer{k}")(x)
        return x.float().mean(dim=(2, 3))  # a mean in bfloat16 would keep eight bits


def fold_batch_norms(model: ResNet18) -> ResNet18:
    """Merge every batch norm into the convolution before it, in place: the same function in evaluation, faster."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    model.eval()
    pairs: list[tuple[nn.Module, str, str]] = [(model, "conv1", "bn1")]
    for block in (m for m in model.modules() if isinstance(m, BasicBlock)):
        pairs += [(block, "conv1", "bn1"), (block, "conv2", "bn2")]
        if block.downsample is not None:
            pairs.append((block.downsample, "0", "1"))
    for parent, conv, norm in pairs:
        setattr(parent, conv, fuse_conv_bn_eval(getattr(parent, conv), getattr(parent, norm)))
        setattr(parent, norm, nn.Identity())
    return model


def state_of(weights: dict[str, Any]) -> OrderedDict[str, Tensor]:
    """ResNet parameters under torchvision's names, from torchvision, MoCo (`module.encoder_q.`) or our own files.

    Everything that is not a parameter of a stage (classifier, projector, queue, momentum encoder) is left out.
    """
    state = weights.get("state_dict", weights.get("model", weights))
    prefixes = ("module.encoder_q.", "encoder_q.", "module.backbone.", "backbone.", "module.", "")
    prefix = next((p for p in prefixes if f"{p}conv1.weight" in state), "")
    kept = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
    return OrderedDict(
        (name[len(prefix) :], value)
        for name, value in state.items()
        if name.startswith(prefix) and name[len(prefix) :].startswith(kept) and isinstance(value, Tensor)
    )
