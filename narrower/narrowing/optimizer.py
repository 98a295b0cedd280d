"""Carry an optimizer's state over to smaller parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, first_few
from ..surgery.resize import format_of
from .step_hooks import unwrapped


class Swap(NamedTuple):
    """A new tensor in the place of an old one, and how the same part of a tensor of the old one's shape is taken."""

    old: Tensor
    new: Tensor
    part: Callable[[Tensor], Tensor]


def check_optimizer(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """Raise ConfigError if an optimizer has none of the tensors of a model, or cannot be pointed at others."""
    check_carried(optimizer)
    own = {id(t) for t in tensors}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(f"the {type(optimizer).__name__} given as optimizer= has no parameter of this model: give the one "
                          "that trains it, or none")


def check_carried(optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError for torch's LBFGS, which has its own list of parameters, and one history over all of them."""
    if isinstance(unwrapped(optimizer), torch.optim.LBFGS):
        raise ConfigError("LBFGS cannot go on with smaller parameters: it would train the old ones. Make a new one for the "
                          "narrow network, or take an optimizer such as SGD or AdamW")


def carry_optimizer(optimizer: torch.optim.Optimizer, swaps: Sequence[Swap]) -> None:
    """Point an optimizer at the new parameters; its state is cut as the parameters were."""
    new_of = {s.old: s.new for s in swaps}
    for group in optimizer.param_groups:
        group["params"] = [new_of.get(p, p) for p in group["params"]]
    for s in swaps:
        if s.old in optimizer.state:
            optimizer.state[s.new] = cut_state(optimizer.state.pop(s.old), s)


def carry_optimizers(optimizers: Iterable[torch.optim.Optimizer | None], swaps: Sequence[Swap], model: nn.Module) -> None:
    """Point the optimizers of a model at its new parameters.

    Warns of trainable ones in none of them: another optimizer may have the old ones, and trains these on without an error.
    """
    given = [optimizer for optimizer in optimizers if optimizer is not None]
    for optimizer in given:
        carry_optimizer(optimizer, swaps)
    known = {id(p) for optimizer in given for group in optimizer.param_groups for p in group["params"]}
    new = {id(s.new) for s in swaps if s.new.requires_grad} - known
    names = [name for name, p in model.named_parameters() if id(p) in new]
    if given and names:
        warnings.warn(f"new parameters are in no optimizer that was given: {first_few(names, 3)}; another that has the old "
                      "ones trains what the model no longer uses: give it to shrink(optimizers=[...]), or make it after "
                      "load_state_dict. What no optimizer trains needs requires_grad=False", stacklevel=3)


def cut_state(state: Mapping[str, Any], swap: Swap) -> dict[str, Any]:
    """The state of a smaller parameter: what has the parameter's shape is cut as the parameter was.

    Empty if other tensors depend on the shape, such as Adafactor's sums over rows and columns: the optimizer then begins anew.
    """
    alike = {k for k, v in state.items() if isinstance(v, Tensor) and v.shape == swap.old.shape}
    others = [v for k, v in state.items() if isinstance(v, Tensor) and v.numel() > 1 and k not in alike]
    if others and swap.new.shape != swap.old.shape:
        return {}
    return {k: swap.part(v).contiguous(memory_format=format_of(v)) if k in alike else v for k, v in state.items()}
