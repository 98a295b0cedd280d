"""A task in training and evaluation: which settings suit it, and whether it gives what it should."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ..data.images import Batch
from ..data.task import Classification, Task
from ..errors import ConfigError, in_one_line
from ..inputs import map_tensors, precise
from .config import TrainConfig

CLASSES_ONLY = ("mixup", "cutmix", "smoothing")
OURS = ("stage", "epoch", "epochs", "lr", "loss", "val_loss", "held_loss", "seconds", "images_per_second", "headline", "text",
        "error", "macs", "params", "size_mb", "latency_ms", "kept", "images", "losses", "method", "groups", "free", "folded",
        "held_out", "best_epoch", "network", "data", "time", "by_class",
        "steps", "norms",
        "masked", "reached", "chosen", "zero", "least_norm", "mean_norm", "channels", "hard", "merged", "spread")
"""Names in the rows of the metrics that no figure may have."""


def task_in_training(task: Task, config: TrainConfig) -> Task:
    """The task, with the label smoothing of the settings.

    Raises:
        ConfigError: classes are to be mixed or smoothed, and the task is not classification.
    """
    if isinstance(task, Classification):
        return replace(task, smoothing=config.smoothing)
    if found := next((name for name in CLASSES_ONLY if getattr(config, name)), None):
        raise ConfigError(f"--{found} {getattr(config, found):g} is for images with classes; with --task leave it out, and do "
                          "in its data and loss what is wanted")
    return task


def in_float32(outputs: Any) -> Any:
    """The outputs of a network, with float32 in place of the lower precisions of autocast."""
    low = (torch.float16, torch.bfloat16)
    return map_tensors(outputs, lambda t: t.float() if t.dtype in low else t)


def check_loss(loss: Any) -> Tensor:
    """The loss. Raises ConfigError unless it is a scalar."""
    if not isinstance(loss, Tensor) or loss.ndim:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(f"loss() of the task must give a scalar tensor, the mean over the batch, not {found}")
    return loss


def check_statistic(statistic: Any, before: Tensor | None) -> Tensor:
    """What `measure` gave. Raises ConfigError unless it is a tensor, of the shape of the one before."""
    if not isinstance(statistic, Tensor):
        raise ConfigError(f"measure() of the task must give a tensor, not {type(statistic).__name__}")
    if before is not None and statistic.shape != before.shape:
        raise ConfigError(f"measure() of the task gave shape {tuple(statistic.shape)} after {tuple(before.shape)}: what is "
                          "added over batches must have one shape (sums and counts, not values of each image)")
    return statistic


def check_figures(figures: Any) -> dict[str, float]:
    """What `figures` gave. Raises ConfigError unless they are numbers by name, with names that are free."""
    if not isinstance(figures, Mapping) or not figures:
        raise ConfigError("figures() of the task must give a dict of numbers by name, the headline first, such as "
                          "{'miou': 61.2}")
    for name, value in figures.items():
        if not isinstance(name, str) or name in OURS:
            raise ConfigError(f"figures() of the task: the name {name!r} has another meaning in metrics.jsonl, take another")
        if not isinstance(value, (int, float)):
            raise ConfigError(f"figures() of the task: {name} must be a number, not {type(value).__name__}: use float(...)")
    return {name: float(value) for name, value in figures.items()}


def try_task(task: Task, outputs: Any, batch: Batch) -> None:
    """Take the loss and the figures of one batch.

    Raises:
        ConfigError: a method fails, or gives something else than it should.
    """
    outputs = in_float32(outputs)
    try:
        found = task.loss(outputs, batch[1])
        statistic = task.measure(outputs, batch[1])
        figures = task.figures(precise(check_statistic(statistic, None)))
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's methods raise
        raise ConfigError(f"the task fails on a batch of its data: {in_one_line(error)}") from error
    if not isfinite(value := float(check_loss(found).detach())):
        raise ConfigError(f"loss() of the task gives {value} on the first batch of its data: it must be finite")
    check_figures(figures)
