"""VGG-16 with BatchNorm for CIFAR: one hidden linear layer of 512, as in HRank.

Simonyan and Zisserman, "Very Deep Convolutional Networks" (ICLR 2015), configuration D.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import conv_bn, initialise

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class CifarVGG(nn.Module):
    """Images `[N, in_channels, H, W]` to logits `[N, num_classes]`."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in STAGES:
            if layers:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))  # ceil: a 1x1 map stays 1x1 on small images
            for width in stage:
                layers.append(conv_bn(in_channels, width))
                in_channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def cifar_vgg16_bn(num_classes: int = 10, in_channels: int = 3) -> CifarVGG:
    return initialise(CifarVGG(num_classes, in_channels))
