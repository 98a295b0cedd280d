"""Settings of the reference training."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Annotated, Any

from ..errors import ConfigError


def check(config: Any, **bounds: tuple[float, float]) -> None:
    """Raise ConfigError where a setting is out of its bounds (both included; None is not checked)."""
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            allowed = f"at least {low:g}" if high == inf else f"between {low:g} and {high:g}"
            raise ConfigError(f"--{name.replace('_', '-')} {value}: give a value of {allowed}")


@dataclass(frozen=True)
class TrainConfig:
    """training"""

    epochs: Annotated[int, "passes over the training images"] = 20
    batch_size: Annotated[int, "images per step and process", "-b"] = 128
    lr: Annotated[float, "highest learning rate (SGD, Nesterov; cosine decay to --min-lr)"] = 0.1
    momentum: Annotated[float, "of SGD"] = 0.9
    weight_decay: Annotated[float, "of all parameters"] = 0.0005
    warmup_epochs: Annotated[float, "epochs in which the learning rate grows linearly"] = 1.0
    min_lr: Annotated[float, "learning rate at the end"] = 0.0
    smoothing: Annotated[float, "label smoothing"] = 0.0
    clip_grad: Annotated[float | None, "clip the gradient to this norm"] = None
    amp: Annotated[bool, "compute in bfloat16 where that is safe (weights stay float32)"] = False
    channels_last: Annotated[bool, "channels_last memory format: faster on most machines"] = False
    sync_bn: Annotated[bool, "with several processes: BatchNorm statistics over the images of all of them in training"] = False
    model_ema: Annotated[bool, "average the weights over the steps (as timm); kept at the end if it is better"] = False
    model_ema_decay: Annotated[float, "of the average; it grows to this value over the first steps"] = 0.9998
    held_out: Annotated[
        int, "training images (5 % of them at most) that are not trained on: at the end they decide what is kept"
    ] = 1000
    recalibrate: Annotated[
        int, "training images, augmented as in training, that renew the BatchNorm statistics at the end; 0: none"
    ] = 5000
    workers: Annotated[int, "processes that read large images (small ones are in memory)", "-j"] = 2

    def __post_init__(self) -> None:
        check(self, epochs=(0, inf), batch_size=(1, inf), lr=(0, inf), momentum=(0, 1), weight_decay=(0, inf))
        check(self, warmup_epochs=(0, inf), min_lr=(0, inf), smoothing=(0, 1), clip_grad=(0, inf), workers=(0, inf))
        check(self, model_ema_decay=(0, 1), held_out=(0, inf), recalibrate=(0, inf))
