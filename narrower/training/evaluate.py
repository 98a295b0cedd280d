"""Top-1, top-5 and loss of a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..data.images import Images, batches
from ..data.sources import Watch, silent
from ..surgery.walk import in_eval_mode
from .accelerator import autocast, make_accelerator, shard_of, to_device
from .config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def evaluate(
    model: nn.Module, images: Images, config: TrainConfig | None = None, accelerator: Accelerator | None = None,
    watch: Watch = silent,
) -> dict[str, float]:  # fmt: skip
    """`{"top1": percent, "top5": percent, "loss": mean cross-entropy}` of `model` on `images`, in eval mode (put back after).

    With several processes each takes a part, and all get the figures of the whole.
    """
    config = config or TrainConfig()
    accelerator = accelerator or make_accelerator()
    shard = shard_of(accelerator)
    loader = batches(images, config.batch_size, shard=shard, workers=config.workers)
    model.to(accelerator.device)
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    with in_eval_mode(model), torch.inference_mode(), autocast(config, accelerator.device):
        for x, y in watch(loader, "evaluating", len(images) // shard[1]):
            x, y = to_device(x, y, config, accelerator.device)
            logits = model(x).float()
            loss = F.cross_entropy(logits, y, reduction="sum")
            first = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]
            sums += torch.stack((loss, first[:, 0].sum(), first.sum(), torch.tensor(len(y), device=x.device)))
    loss, right, among, count = accelerator.reduce(sums).tolist()
    count = max(1, count)
    return {"top1": 100 * right / count, "top5": 100 * among / count, "loss": loss / count}
