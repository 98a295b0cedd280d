"""MobileNetV1 for 32-pixel images: depthwise-separable convolutions, the stem at stride 1.

Howard et al., "MobileNets" (2017), table 1.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import conv_bn, initialise

# Width and stride of each block.
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


class CifarMobileNet(nn.Module):
    """Images `[N, in_channels, H, W]` to logits `[N, num_classes]`."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        width = 32
        parts: list[nn.Module] = [conv_bn(in_channels, width)]
        for outputs, stride in BLOCKS:
            depthwise = conv_bn(width, width, 3, stride, groups=width)
            parts.append(nn.Sequential(depthwise, conv_bn(width, outputs, 1)))
            width = outputs
        self.features = nn.Sequential(*parts)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def cifar_mobilenet_v1(num_classes: int = 10, in_channels: int = 3) -> CifarMobileNet:
    return initialise(CifarMobileNet(num_classes, in_channels))
