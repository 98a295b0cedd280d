"""GoogLeNet for CIFAR as in HRank: one 3x3 stem, nine inception blocks with BatchNorm, no auxiliary heads.

Szegedy et al., "Going Deeper with Convolutions" (CVPR 2015), table 1; each 5x5 convolution as two 3x3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import conv_bn, initialise

# Widths of a block: 1x1 | 3x3 reduced, 3x3 | 5x5 reduced, 5x5 | pool projection. None is a pooling between the stages.
BLOCKS = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    None,
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    None,
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)


class Inception(nn.Module):
    """Four branches side by side, concatenated."""

    def __init__(self, inputs: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pool = widths
        self.branch1 = conv_bn(inputs, one, 1)
        self.branch3 = nn.Sequential(conv_bn(inputs, reduce3, 1), conv_bn(reduce3, three))
        self.branch5 = nn.Sequential(conv_bn(inputs, reduce5, 1), conv_bn(reduce5, five), conv_bn(five, five))
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv_bn(inputs, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(x)), dim=1)


class CifarGoogLeNet(nn.Module):
    """Images `[N, in_channels, H, W]` to logits `[N, num_classes]`."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        width = 192
        self.stem = conv_bn(in_channels, width)
        blocks: list[nn.Module] = []
        for widths in BLOCKS:
            if widths is None:
                blocks.append(nn.MaxPool2d(3, stride=2, padding=1))
            else:
                blocks.append(Inception(width, widths))
                width = widths[0] + widths[2] + widths[4] + widths[5]
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def cifar_googlenet(num_classes: int = 10, in_channels: int = 3) -> CifarGoogLeNet:
    return initialise(CifarGoogLeNet(num_classes, in_channels))
