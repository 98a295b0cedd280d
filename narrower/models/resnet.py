"""ResNets for CIFAR with zero-padded shortcuts (option A), as HRank and ResRep prune them.

He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2: three stages of 16, 32
and 64 channels with n blocks each, 6n + 2 layers. Parameter names are those of the checkpoints in common use
(`conv1`, `layer1.0.conv1`, `linear`).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import initialise


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut that subsamples and pads with zero channels where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        extra = outputs - inputs
        self.pad = (0, 0, 0, 0, extra // 2, extra - extra // 2) if extra else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.pad is not None:
            x = F.pad(x, self.pad)
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """Images `[N, in_channels, H, W]` to logits `[N, num_classes]`; `blocks` per stage."""

    def __init__(self, blocks: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def cifar_resnet20(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    return initialise(CifarResNet(3, num_classes, in_channels))


def cifar_resnet32(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    return initialise(CifarResNet(5, num_classes, in_channels))


def cifar_resnet44(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    return initialise(CifarResNet(7, num_classes, in_channels))


def cifar_resnet56(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    return initialise(CifarResNet(9, num_classes, in_channels))


def cifar_resnet110(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    return initialise(CifarResNet(18, num_classes, in_channels))
