"""The figures of a network on images: those of their task, and the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.images import Images, batches
from ..data.sources import Watch, silent
from ..data.task import ByClass, Classification
from ..errors import DataError
from ..inputs import precise
from ..surgery.walk import in_eval_mode
from .accelerator import autocast, make_accelerator, shard_of, to_device
from .agreement import added
from .checking import check_figures, check_loss, check_statistic, in_float32
from .config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def evaluate(model: nn.Module, images: Images, config: TrainConfig | None = None,
             accelerator: Accelerator | None = None) -> dict[str, float]:
    """`{"top1": percent, "top5": percent, "loss": mean cross-entropy}` of `model` on `images`, in eval mode (put back after).

    Of a user's task: its figures, the headline first, and the mean of its loss. With several processes each takes a part, and
    all get the figures of the whole.
    """
    return evaluate_classes(model, images, config, accelerator)[0]


def evaluate_classes(
    model: nn.Module, images: Images, config: TrainConfig | None = None, accelerator: Accelerator | None = None,
    watch: Watch = silent,
) -> tuple[dict[str, float], dict[str, ByClass]]:  # fmt: skip
    """As `evaluate`, and `{"by_class": counts}`: empty for a user's task, also one that is derived from classification."""
    config = config or TrainConfig()
    accelerator = accelerator or make_accelerator()
    shard, task = shard_of(accelerator), images.task
    model.to(accelerator.device)
    loader = batches(images, config.batch_size, shard=shard, workers=config.workers)
    losses = precise(torch.zeros(2, device=accelerator.device))
    total: Tensor | None = None
    with in_eval_mode(model), torch.inference_mode(), autocast(config, accelerator.device):
        for x, y in watch(loader, "evaluating", len(images) // shard[1]):
            x, y = to_device(x, y, config, accelerator.device)
            outputs = in_float32(model(x))
            losses += torch.stack((precise(check_loss(task.loss(outputs, y))) * len(x), losses.new_full((), len(x))))
            statistic = precise(check_statistic(task.measure(outputs, y), total))
            total = statistic if total is None else total + statistic
    loss, count = accelerator.reduce(losses).tolist()
    total = added(total)
    if total is None:
        raise DataError("there are no images to evaluate on")
    by_class = {"by_class": task.by_class(total)} if type(task) is Classification else {}
    return {**check_figures(task.figures(total)), "loss": loss / count}, by_class


def headline(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The first of the figures, and its name as "headline": for a row of the metrics. Of a row that has them, the same.

    With them goes what they are class by class, where it is there.
    """
    name = figures.get("headline", next(iter(figures)))
    return {"headline": name, **{key: figures[key] for key in (name, "by_class") if key in figures}}
