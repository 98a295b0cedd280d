"""Hooks around the steps of an optimizer, for methods that train a network towards a narrow one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError

Hook = Callable[[torch.optim.Optimizer], None]


def hook_steps(optimizer: torch.optim.Optimizer, *, before: Hook | None = None, after: Hook) -> None:
    """Call `before` and `after` around every step of an optimizer.

    `before` finds the gradients of the step. A closure given to `step(closure)` therefore runs ahead of it, and the optimizer
    is handed its loss. The hooks are those of the optimizer inside a wrapper such as accelerate's.

    Raises:
        ConfigError: the optimizer is torch's LBFGS, or its step calls no hooks. With a `before`, three others fail so in their
            first step: those that call their closure more than once, that change weights or clear gradients ahead of it (as
            sharpness-aware minimisation does), or that unscale gradients within the step.
    """
    optimizer = unwrapped(optimizer)
    if not getattr(type(optimizer).step, "hooked", False):  # set where torch makes `step` call the hooks
        raise ConfigError(f"the step of {type(optimizer).__name__} calls no hooks, so the rule would never be applied: train "
                          "with the optimizer that it wraps alone, or with another of torch's kind")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(several_calls(optimizer))
    if before is not None:
        def gradients_first(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if getattr(optimizer, "found_inf", None) is not None:  # GradScaler's word to a fused optimizer
                raise ConfigError(f"{type(optimizer).__name__} with fused=True unscales gradients inside its step, where the "
                                  "rule cannot see them: make it with fused=False to use a GradScaler")
            return run_closure(optimizer, args, kwargs, before)
        optimizer.register_step_pre_hook(gradients_first)
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: after(optimizer))


def not_done(optimizer: torch.optim.Optimizer | None, step: int, steps: int) -> str:
    """Why a method whose hooks count the steps has not reached its end. `optimizer`: the attached one."""
    if step:
        return f"train longer (step {step} of {steps})"
    return "attach(optimizer) was never called" if optimizer is None else "the attached optimizer has made no step"


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that makes the steps, where another wraps it as its attribute `optimizer`."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def group_of(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Any]:
    """The parameter group that a parameter is in."""
    return next(g for g in reversed(optimizer.param_groups) if any(p is q for q in g["params"]))


def run_closure(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any],
                before: Hook) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run the closure among the arguments of `step`, the first of which is the optimizer, and then `before`. Returns the
    arguments with another closure in its place, which gives the same loss once, for the same weights and gradients."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        before(optimizer)
        return args, kwargs
    with torch.enable_grad():
        losses = [closure()]
    before(optimizer)
    left = versions(optimizer)

    def again() -> Any:
        if not losses:
            raise ConfigError(several_calls(optimizer))
        now = versions(optimizer)
        if len(now) != len(left) or any(t is not u or v != w for (t, v), (u, w) in zip(now, left, strict=True)):
            raise ConfigError(f"{type(optimizer).__name__} changes weights or clears gradients inside its step before it calls "
                              "its closure, which was called already: attach to its base optimizer (optimizer.base_optimizer)")
        return losses.pop()

    return (args, {**kwargs, "closure": again}) if "closure" in kwargs else ((args[0], again, *args[2:]), kwargs)


def versions(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, int]]:
    """The parameters of an optimizer and their gradients, each with the number of times that it was changed in place."""
    return [(t, t._version) for group in optimizer.param_groups for p in group["params"] for t in (p, p.grad) if t is not None]


def several_calls(optimizer: torch.optim.Optimizer) -> str:
    return (f"{type(optimizer).__name__} calls its closure several times in a step, and there is no rule for the gradients in "
            "between: take an optimizer that needs them once, such as SGD or AdamW")
