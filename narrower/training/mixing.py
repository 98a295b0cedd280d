"""What happens to a whole batch in training: mixup, cutmix and random erasing, by timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data.images import Batch
from ..data.seeding import seed_all
from ..extras import optional
from .config import TrainConfig


class Mixing:
    """mixup (Zhang et al., ICLR 2018), cutmix (Yun et al., ICCV 2019) and random erasing (Zhong et al., AAAI 2020) of a batch.

    All that is random is drawn from the seed of the call, so that a resumed training equals an uninterrupted one.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        """Raises MissingExtraError if timm is missing and something is to be mixed or erased."""
        self.mixup: Any = None
        self.erasing: Any = None
        if not (config.mixup or config.cutmix or config.reprob):
            return
        if config.mixup or config.cutmix:
            self.mixup = optional("timm.data.mixup").Mixup(config.mixup, config.cutmix, label_smoothing=0.0)  # the loss smooths
        if config.reprob:
            self.erasing = optional("timm.data.random_erasing").RandomErasing(config.reprob, mode="pixel", device=str(device))

    def __call__(self, x: Tensor, y: Any, classes: int | None, seed: int) -> Batch:
        """The batch, and its targets: as they are, or, where images are mixed, the share of each class, `[N, classes]`.

        Images are mixed in pairs, so one of an odd number is left out; a single one stays as it is. The images given may be
        changed. `classes`: None for those of the batch.
        """
        seed_all(seed)
        if self.erasing is not None:
            x = self.erasing(x)
        if self.mixup is not None and len(y) > 1:
            self.mixup.num_classes = int(y.max()) + 1 if classes is None else classes
            even = len(y) - len(y) % 2
            x, y = self.mixup(x[:even], y[:even])
        return x, y
