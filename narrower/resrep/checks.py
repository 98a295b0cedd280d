"""What ResRep asks of an optimizer, and of the gradients that its compactors get."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import ConfigError, first_few
from ..surgery.walk import named_tensors, tensor_shapes
from .compactor import Compactor

NOT_RUN = ("run the model that ResRep was given, then backward(). If it was compiled and had run before, call "
           "torch.compiler.reset(); call SyncBatchNorm.convert_sync_batchnorm before ResRep is made, as it drops hooks")


def check_optimizer(optimizer: torch.optim.Optimizer, compactors: Mapping[str, Compactor]) -> None:
    """Raise ConfigError if an optimizer lacks a compactor, decays or dampens one, or if one is frozen."""
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    for name, c in compactors.items():
        if id(c.weight) not in group_of:
            raise ConfigError(f"the optimizer lacks the compactor of {name}: make it of resrep.param_groups(lr=...)")
        if group_of[id(c.weight)].get("weight_decay"):
            raise ConfigError(f"the optimizer decays the compactor of {name}: give the compactors weight_decay=0, "
                              "as resrep.param_groups does")
        if group_of[id(c.weight)].get("dampening"):
            raise ConfigError(f"the optimizer dampens the compactor of {name}, so its rows would shrink too slowly: give it "
                              "dampening=0 and a learning rate that is lower by as much")
    if frozen := [name for name, c in compactors.items() if not (c.frozen or c.weight.requires_grad)]:
        raise ConfigError(f"compactors do not train, as they have requires_grad=False: {first_few(frozen, 3)}; exclude= their "
                          "groups, or freeze layers before ResRep is made, which leaves compactors trainable")


def check_gradients(compactors: Iterable[Compactor], step: int) -> None:
    """Raise ConfigError if no compactor has a gradient, or one is not finite. Those that have one are marked as reached."""
    grads = []
    for c in compactors:
        if c.weight.grad is not None:
            grads.append(c.weight.grad)
            c.reached = True
    if not grads:
        raise ConfigError(f"no gradient has reached the compactors: {NOT_RUN}")
    if not bool(torch.stack([g.sum() for g in grads]).isfinite().all()):
        raise ConfigError(f"the gradients are not finite at step {step}: the step was not made, the weights are "
                          "those of the last good one; try a lower learning rate")


def check_reached(compactors: Mapping[str, Compactor]) -> None:
    """Raise ConfigError if compactors of chosen rows have never had a gradient: their rows would not shrink."""
    if missed := [name for name, c in compactors.items() if c.shrinking and not c.reached]:
        raise ConfigError(f"rows are to shrink in compactors that no gradient has reached: {first_few(missed, 3)}; {NOT_RUN}. "
                          "exclude= the groups of frozen layers")


def used_gradients(compactors: Mapping[str, Compactor]) -> dict[str, tuple[Tensor | None, int]]:
    """The gradients that a step has used, each with the number of times that it was changed in place."""
    grads = {name: c.weight.grad for name, c in compactors.items()}
    return {name: (g, 0 if g is None else g._version) for name, g in grads.items()}


def check_used(compactors: Mapping[str, Compactor], used: Mapping[str, tuple[Tensor | None, int]], model: nn.Module) -> None:
    """Raise ConfigError if gradients are there that no step has used. Of those that a GradScaler has skipped, some of the
    model's are not finite."""
    for name, (grad, version) in used_gradients(compactors).items():
        old, old_version = used.get(name, (None, 0))
        if grad is None or (grad is old and version == old_version):
            continue
        if bool(grad.any()) and all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None):
            raise ConfigError("gradients are there that no step has used, and shrink would drop them: call it after "
                              "optimizer.step(), not while gradients accumulate, or call zero_grad() first")


def averaged(model: nn.Module, average: nn.Module) -> nn.Module:
    """The copy of `model` and its compactors that an average of its weights is, or has as its `module`. Raises ConfigError."""
    shapes = tensor_shapes(named_tensors(model))
    for found in (average, getattr(average, "module", None)):
        if isinstance(found, nn.Module) and tensor_shapes(named_tensors(found)) == shapes:
            return found
    raise ConfigError(f"this {type(average).__name__} is no copy of the network with its compactors as they are now: make "
                      "averages after ResRep, and give every shrink all of them (ema=[...])")
