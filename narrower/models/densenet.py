"""DenseNet-40 for CIFAR: growth 12, no bottlenecks, no compression, as in HRank.

Huang et al., "Densely Connected Convolutional Networks" (CVPR 2017), section 4.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import initialise


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution whose output is appended to its input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.conv(F.relu(self.bn(x)))), dim=1)


class Transition(nn.Module):
    """BatchNorm, ReLU, a 1x1 convolution and 2x2 average pooling."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class CifarDenseNet(nn.Module):
    """Images `[N, in_channels, H, W]` to logits `[N, num_classes]`; three blocks of `layers` dense layers."""

    def __init__(self, layers: int = 12, growth: int = 12, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        width = 2 * growth
        parts: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1, bias=False)]
        for block in range(3):
            if block:
                parts.append(Transition(width))
            parts.append(nn.Sequential(*(DenseLayer(width + i * growth, growth) for i in range(layers))))
            width += layers * growth
        self.features = nn.Sequential(*parts)
        self.bn = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.features(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def cifar_densenet40(num_classes: int = 10, in_channels: int = 3) -> CifarDenseNet:
    return initialise(CifarDenseNet(12, 12, num_classes, in_channels))
