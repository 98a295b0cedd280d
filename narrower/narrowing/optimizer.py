"""Carry an optimizer's state over to smaller parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError


class Swap(NamedTuple):
    """A new tensor in the place of an old one, and how the same part of a tensor of the old one's shape is taken."""

    old: Tensor
    new: Tensor
    part: Callable[[Tensor], Tensor]


def check_optimizer(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """Raise ConfigError if an optimizer has none of the tensors of a model."""
    own = {id(t) for t in tensors}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(f"the {type(optimizer).__name__} given as optimizer= has no parameter of this model: give the one "
                          "that trains it, or none")


def carry_optimizer(optimizer: torch.optim.Optimizer, swaps: Sequence[Swap]) -> None:
    """Point an optimizer at the new parameters; state of a parameter's shape is cut as the parameter was."""
    new_of = {s.old: s.new for s in swaps}
    for group in optimizer.param_groups:
        group["params"] = [new_of.get(p, p) for p in group["params"]]
    for s in swaps:
        if s.old in optimizer.state:
            state = optimizer.state.pop(s.old)
            optimizer.state[s.new] = {k: s.part(v) if isinstance(v, Tensor) and v.shape == s.old.shape else v
                                      for k, v in state.items()}
