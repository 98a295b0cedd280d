"""A training of a second: two classes of noisy images, and a network with BatchNorm and dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrower.data.images import TensorImages
from narrower.data.sources import ImageData
from narrower.training.accelerator import make_accelerator
from narrower.training.config import TrainConfig
from narrower.training.train import TrainContext, train

CONFIG = TrainConfig(epochs=3, batch_size=16, lr=0.05, warmup_epochs=0.5)


def data(count: int = 90) -> ImageData:
    """Two classes: bright above or bright below, with noise."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = torch.randint(0, 120, (count, 1, 8, 8), generator=draw)
    images[labels == 0, :, :4] += 100
    images[labels == 1, :, 4:] += 100
    both = TensorImages(images.to(torch.uint8), labels, (0.5,), (0.25,), pad=1, flip=0.5)
    return ImageData("two classes", 2, (1, 8, 8), lambda split: both)


def network() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 2)
    )


def run(model: nn.Module, checkpoint: Path | None = None, config: TrainConfig = CONFIG, **kwargs: Any) -> nn.Module:
    """Train on the CPU."""
    context = TrainContext(make_accelerator("cpu"), checkpoint=checkpoint, **kwargs)
    return train(model, data(), config, context, seed=1)
