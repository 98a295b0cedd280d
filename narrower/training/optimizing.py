"""The optimizer, the learning rate over time and the average of the weights: timm's, by the names of its `train.py`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..extras import optional
from ..resrep.trainer import ResRep
from .config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig, resrep: ResRep | None = None) -> torch.optim.Optimizer:
    """timm's optimizer by name (`sgd` has Nesterov momentum); with ResRep on its parameter groups.

    Weight decay is of all parameters.

    Raises:
        MissingExtraError: timm is missing.
        ConfigError: timm has no such optimizer, its settings are wrong, or ResRep cannot work with it.
    """
    timm = optional("timm.optim")
    if resrep is not None and config.opt != "sgd":
        raise ConfigError(f"--opt {config.opt}: ResRep moves its compactors by SGD with momentum, as published: take --opt sgd")
    given: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    groups = list(model.parameters()) if resrep is None else resrep.param_groups(**given)
    own = {"nesterov": config.momentum > 0} if config.opt == "sgd" else {}
    if config.opt not in (names := timm.list_optimizers()) or timm.get_optimizer_info(config.opt).second_order:
        known = [name for name in names if not name.startswith("bnb") and not timm.get_optimizer_info(name).second_order]
        raise ConfigError(f"--opt {config.opt}: of timm's, take one of {', '.join(known)} (none that needs second derivatives "
                          "is among them)")
    try:
        return timm.create_optimizer_v2(groups, config.opt, **given, **{**own, **config.opt_kwargs})
    except (TypeError, ValueError, RuntimeError, ImportError, AssertionError) as error:  # each has its own checks
        raise ConfigError(f"--opt {config.opt} --opt-kwargs {config.opt_kwargs}: {error}") from error


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, updates: int) -> Any:
    """timm's schedule of the learning rate, of `updates` steps of the optimizer in each epoch; None for `--sched none`.

    It has no state: `step_update(n)` sets the rates of step n. All groups begin at `config.lr`, times their `lr_scale`.

    Raises:
        MissingExtraError: timm is missing.
        ConfigError: timm has no such schedule without state.
    """
    timm = optional("timm.scheduler")
    for group in optimizer.param_groups:
        group["initial_lr"], group["lr"] = config.lr, config.lr * group.get("lr_scale", 1.0)
    if config.sched == "plateau":
        raise ConfigError("--sched plateau looks at results, so a run that goes on would differ: take another schedule")
    try:
        schedule, _ = timm.create_scheduler_v2(
            optimizer, config.sched, num_epochs=config.epochs, warmup_epochs=config.warmup_epochs,
            warmup_lr=min(config.warmup_lr, config.lr), min_lr=config.min_lr, decay_epochs=config.decay_epochs,
            decay_milestones=config.decay_milestones, decay_rate=config.decay_rate, step_on_epochs=False,
            updates_per_epoch=updates,
        )  # fmt: skip
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--sched {config.sched}: {error or 'timm refuses these settings'}") from error
    if schedule is None and config.sched != "none":
        raise ConfigError(f"--sched {config.sched}: take cosine, tanh, step, multistep, poly, wsd, rsqrt, constant or none")
    return schedule


def updates_per_epoch(batches: int, config: TrainConfig) -> int:
    """Steps of the optimizer in an epoch of so many batches. The last may be of fewer batches."""
    return math.ceil(batches / config.grad_accum_steps)


def make_average(model: nn.Module, config: TrainConfig, narrows: bool = False) -> Any:
    """timm's moving average of the weights, where `config.model_ema` asks for it.

    Raises:
        MissingExtraError: timm is missing.
        ConfigError: the network narrows in the training: what is averaged would be another one.
    """
    if not config.model_ema:
        return None
    if narrows:
        raise ConfigError("--model-ema: the network becomes narrower in the training, so its weights cannot be averaged")
    return optional("timm.utils").ModelEmaV3(model, decay=config.model_ema_decay, use_warmup=True)
