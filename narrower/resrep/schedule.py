"""The schedule of ResRep: when rows are chosen, and how fast they shrink to zero."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from ..errors import ConfigError
from ..preconditions import check_number

Ranking = Literal["share", "norm"]

JUMP = 1.1  # learning rates of one step and the next, of which no warm-up reaches the ratio once rows are chosen


@dataclass(frozen=True)
class Forgetting:
    """How compactor rows are chosen and shrunk to zero. None: derived from the number of steps.

    - strength: penalty on every row (lambda of the paper).
    - warmup_steps: steps before the first choice.
    - mask_interval: steps between choices.
    - rows_per_update: how many more channels each choice may take (theta of the paper).
    - forget_steps: steps in which a chosen row shrinks from norm one to zero, at any learning rate, also where it jumps up. 0:
      `strength` alone shrinks it, as published.
    - momentum: of the compactors, for SGD.
    - lr_scale: learning rate of the compactors relative to the network's. None: they move as fast as the network's weights
      despite their higher momentum. Ten times that, as published, is too fast for short trainings.
    - threshold: a chosen row with a smaller norm counts as zero.
    - rest: once the budget is reached, only the network trains on. In the paper the compactors train on too.
    - ranking: "norm" as published: lowest norm first. "share": smallest share of the group's sum of norms per cost saved.

    Raises ConfigError for a negative number, and for what is no whole number of steps.
    """

    strength: float = 1e-4
    warmup_steps: int | None = None
    mask_interval: int | None = None
    rows_per_update: float | None = None
    forget_steps: int | None = None
    momentum: float | None = None
    lr_scale: float | None = None
    threshold: float = 1e-5
    rest: bool = True
    ranking: Ranking = "share"

    def __post_init__(self) -> None:
        for name, low, whole in (("strength", 0, False), ("warmup_steps", 0, True), ("mask_interval", 1, True),
                                 ("rows_per_update", 0, False), ("forget_steps", 0, True), ("lr_scale", 0, False),
                                 ("threshold", 0, False), ("momentum", 0, False)):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, low, 1 if name == "momentum" else math.inf, whole=whole)
        if self.ranking not in get_args(Ranking):
            raise ConfigError(f"ranking={self.ranking!r}: give 'share' or 'norm'")

    @staticmethod
    def published(steps_per_epoch: int) -> Forgetting:
        """The settings of the paper (section 4.1) and its code, made for 180 (ImageNet) to 480 epochs."""
        return Forgetting(1e-4, 5 * steps_per_epoch, 200, 4.0, 0, 0.99, 1.0, 1e-5, False, "norm")

    def over(self, steps: int, channels: int) -> Forgetting:
        """Fill in every None (except `lr_scale`) for this many steps and this many channels to remove.

        Channels are chosen from 5 % to 20 % of the steps and zero soon after. Two thirds of the steps train the narrow network.
        """
        warmup = round(0.05 * steps) if self.warmup_steps is None else self.warmup_steps
        interval = min(200, max(1, round(0.005 * steps))) if self.mask_interval is None else self.mask_interval
        updates = max(1, (round(0.2 * steps) - warmup) / interval)
        return replace(
            self, warmup_steps=warmup, mask_interval=interval,
            rows_per_update=channels / updates if self.rows_per_update is None else self.rows_per_update,
            forget_steps=max(1, round(0.06 * steps)) if self.forget_steps is None else self.forget_steps,
            momentum=min(0.99, 1 - 1 / max(1.0, 0.02 * steps)) if self.momentum is None else self.momentum,
        )

    def pulls(self, lr: float, momentum: float, decoupled: bool = False) -> tuple[float, float]:
        """The penalties on other rows and on chosen rows.

        The second shrinks a row from norm one to zero in `forget_steps`. If `decoupled` from the gradient, both are the norm
        that a row loses in one step.
        """
        lr, momentum = max(lr, 1e-12), 0.0 if decoupled else momentum
        unit = lr if decoupled else 1.0
        slow = self.strength * unit
        return slow, max(slow, unit * (1 - momentum) / (lr * self.forget_steps)) if self.forget_steps else slow

    def share_of_momentum(self, lr: float, before: float) -> float:
        """What the momentum of chosen rows is multiplied by at a learning rate, after a step at another.

        It pulls with the strength that was due at the one before, so where rates jump up, as at a restart of a cosine, it would
        take rows to zero at once.
        """
        return max(before, 1e-12) / lr if self.forget_steps and lr > JUMP * max(before, 1e-12) else 1.0


def decouples_penalty(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the penalty is applied to the weights directly, as AdamW does with weight decay.

    Adaptive optimizers rescale gradients, which would undo the penalty. SGD does not.
    """
    return not isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.SGD)
