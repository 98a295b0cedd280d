"""Settings of the reference training."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch

from ..errors import ConfigError


def flag(name: str, value: object = None) -> str:
    """A setting as it is typed: `--no-distill` where it is switched off."""
    return f"--{'no-' if value is False else ''}{name.replace('_', '-')}"


def check(config: Any, **bounds: tuple[float, float]) -> None:
    """Raise ConfigError where a setting is out of its bounds (both included; None is not checked)."""
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            allowed = f"at least {low:g}" if high == inf else f"between {low:g} and {high:g}"
            raise ConfigError(f"{flag(name)} {value}: give a value of {allowed}")


def check_choices(config: Any) -> None:
    """Raise ConfigError where a setting is none of the values of its `Literal` annotation."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal and (value := getattr(config, name)) not in get_args(hint):
            raise ConfigError(f"{flag(name)} {value}: take one of {', '.join(get_args(hint))}")


@dataclass(frozen=True)
class TrainConfig:
    """training"""

    epochs: Annotated[int, "passes over the training images"] = 20
    batch_size: Annotated[int, "images per batch and process", "-b"] = 128
    grad_accum_steps: Annotated[int, "batches whose gradients are added up for one step of the optimizer"] = 1
    opt: Annotated[str, "optimizer, by timm's name: sgd (with Nesterov momentum), adamw, lamb, ..."] = "sgd"
    opt_kwargs: Annotated[dict[str, Any], "its further settings, as JSON: '{\"betas\": [0.9, 0.95]}'"] = field(
        default_factory=dict
    )
    lr: Annotated[float, "highest learning rate"] = 0.1
    momentum: Annotated[float, "of the optimizer, where it has one"] = 0.9
    weight_decay: Annotated[float, "of all parameters"] = 0.0005
    sched: Annotated[str, "learning rate over time, by timm's name: cosine, step, multistep, poly, wsd, ..."] = "cosine"
    warmup_epochs: Annotated[float, "epochs in which the learning rate grows linearly, from --warmup-lr"] = 1.0
    warmup_lr: Annotated[float, "learning rate at the start"] = 1e-5
    min_lr: Annotated[float, "learning rate at the end"] = 0.0
    decay_epochs: Annotated[float | None, "step: epochs from one fall to the next; wsd: epochs of the fall"] = None
    decay_milestones: Annotated[list[int], "multistep: epochs after which the learning rate falls"] = field(
        default_factory=lambda: [90, 180, 270]
    )
    decay_rate: Annotated[float, "by what it falls, in step and multistep"] = 0.1
    smoothing: Annotated[float, "label smoothing"] = 0.0
    mixup: Annotated[float, "alpha of mixup; 0: none"] = 0.0
    cutmix: Annotated[float, "alpha of cutmix; 0: none"] = 0.0
    reprob: Annotated[float, "probability that a part of an image is erased"] = 0.0
    clip_grad: Annotated[float | None, "clip the gradient to this norm"] = None
    amp: Annotated[bool, "compute in --amp-dtype where that is safe (weights stay float32)"] = False
    amp_dtype: Annotated[Literal["bfloat16", "float16"], "bfloat16, or float16 (its gradients are scaled)"] = "bfloat16"
    torchcompile: Annotated[str | None, "train through torch.compile with this backend, such as inductor"] = None
    channels_last: Annotated[bool, "channels_last memory format: faster on most machines"] = False
    sync_bn: Annotated[bool, "with several processes: BatchNorm statistics over the images of all of them in training"] = False
    model_ema: Annotated[bool, "average the weights over the steps (as timm); kept at the end if it is better"] = False
    model_ema_decay: Annotated[float, "of the average; it grows to this value over the first steps"] = 0.9998
    held_out: Annotated[
        int, "training images (5 % of them at most) that are not trained on: at the end they decide what is kept"
    ] = 1000
    recalibrate: Annotated[
        int, "training images, augmented as in training, that renew the BatchNorm statistics at the end, if that is better on "
        "images held out; 0: none"
    ] = 5000
    workers: Annotated[int, "processes that read large images (small ones are in memory)", "-j"] = 2

    def __post_init__(self) -> None:
        check(self, epochs=(0, inf), batch_size=(1, inf), lr=(0, inf), momentum=(0, 1), weight_decay=(0, inf))
        check(self, grad_accum_steps=(1, inf), mixup=(0, inf), cutmix=(0, inf), reprob=(0, 1), warmup_lr=(0, inf))
        check(self, decay_epochs=(1e-9, inf), decay_rate=(0, 1))
        check_choices(self)
        check(self, warmup_epochs=(0, inf), min_lr=(0, inf), smoothing=(0, 1), clip_grad=(1e-9, inf), workers=(0, inf))
        check(self, model_ema_decay=(0, 1), held_out=(0, inf), recalibrate=(0, inf))
        if self.sched == "step" and self.decay_epochs is None:
            raise ConfigError("--sched step: give --decay-epochs, the epochs from one fall of the learning rate to the next")
        if self.batch_size == 1 and (found := next((name for name in ("mixup", "cutmix") if getattr(self, name)), None)):
            raise ConfigError(f"{flag(found)} {getattr(self, found):g} mixes images in pairs: give --batch-size 2 or more")
        if self.torchcompile and self.torchcompile not in torch.compiler.list_backends(()):
            known = ", ".join(torch.compiler.list_backends())
            raise ConfigError(f"--torchcompile {self.torchcompile}: torch knows {known} here")
        if self.model_ema and not self.held_out:
            raise ConfigError("--model-ema with --held-out 0: without images held out nothing decides whether it is kept")
