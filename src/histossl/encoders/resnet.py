"""ResNet-18 (He et al., CVPR 2016), whole or cut after `layer3`: one vector per tile."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; parameters have torchvision's names.

    Args:
        in_planes: input channels.
        planes: output channels.
        stride: of the first convolution and the shortcut.
    """

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
        """Apply the block.

        Args:
            x: (B, in_planes, H, W) floating; kept as it is.

        Returns:
            (B, planes, H / stride, W / stride), sizes rounded up.
        """
        out = self.bn2(self.conv2(torch.relu_(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu_(out.add_(shortcut))


def stage(in_planes: int, planes: int, stride: int) -> nn.Sequential:
    """Make one of ResNet-18's four stages: two basic blocks.

    Args:
        in_planes: input channels.
        planes: output channels.
        stride: of the first block.

    Returns:
        The stage.
    """
    return nn.Sequential(BasicBlock(in_planes, planes, stride), BasicBlock(planes, planes, 1))


class ResNet18(nn.Module):
    """ResNet-18 without its classifier; the output is the mean over the last feature map.

    Args:
        stages: 3 stops after `layer3` (dim = 256), as the tile encoder of Giga-SSL; 4 is the whole network (dim = 512).
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
        """Encode tiles.

        Args:
            x: (B, 3, H, W) floating, normalised by `IMAGENET_MEAN` and `IMAGENET_STD`.

        Returns:
            (B, dim) float32.
        """
        # Pooling before the ReLU gives the same numbers, and leaves a quarter of the values to the ReLU.
        x = torch.relu_(nn.functional.max_pool2d(self.bn1(self.conv1(x)), 3, 2, 1))
        for k in range(1, self.stages + 1):
            x = getattr(self, f"layer{k}")(x)
        return x.float().mean(dim=(2, 3))  # a mean in bfloat16 would have a precision of eight bits


def fold_batch_norms(model: ResNet18) -> ResNet18:
    """Merge every batch norm into the convolution before it: the same function in evaluation, but faster.

    Args:
        model: changed in place, and set to evaluation mode.

    Returns:
        `model`.
    """
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
    """Select the parameters of a ResNet from a checkpoint of torchvision, MoCo (`module.encoder_q.`) or histossl.

    Args:
        weights: the checkpoint: name -> tensor, perhaps below `state_dict` or `model`.

    Returns:
        Parameters and buffers under torchvision's names, without classifier, projector, queue and momentum encoder;
        empty where the checkpoint has no ResNet.
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
