"""The schedule of ResRep: when rows are chosen, and how fast they go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Ranking = Literal["share", "norm"]


@dataclass(frozen=True)
class Forgetting:
    """How rows are chosen and sent to zero. None: it follows from the number of steps.

    strength: the penalty on every row (lambda of the paper). warmup_steps: steps before the first choice. mask_interval: steps
    between choices. rows_per_update: how many more channels each choice may take (theta). forget_steps: steps in which a
    chosen row shrinks from one to zero, whatever the learning rate; 0: by `strength` alone, as published. momentum: of the
    compactors (SGD). lr_scale: their learning rate relative to the network's; None: such that with their momentum they move
    as fast as the network's weights do (at ten times that, as published, short trainings do not recover). threshold: the
    length below which a chosen row is zero. rest: once the budget is reached, the compactors stay as they are and the network
    alone trains on (there is nothing left to forget; the paper goes on). ranking: by which channels are chosen, "norm" as
    published, or "share": as in `plan`, the smallest share of their group for the cost that they save.
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

    @staticmethod
    def published(steps_per_epoch: int) -> Forgetting:
        """The settings of the paper (section 4.1) and its code, made for 180 (ImageNet) to 480 epochs."""
        return Forgetting(1e-4, 5 * steps_per_epoch, 200, 4.0, 0, 0.99, 1.0, 1e-5, False, "norm")

    def over(self, steps: int, channels: int) -> Forgetting:
        """Every None (but `lr_scale`) filled in for that many steps and channels that must go: chosen from 5 % to 20 % of the
        steps, gone a little later, so that two thirds of the steps are left to the narrow network."""
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
        """The penalty on rows that stay, and on chosen ones, which takes them from one to zero in `forget_steps` at this
        learning rate and momentum; decoupled from the gradient: the lengths that they lose in a step."""
        lr, momentum = max(lr, 1e-12), 0.0 if decoupled else momentum
        unit = lr if decoupled else 1.0
        slow = self.strength * unit
        return slow, max(slow, unit * (1 - momentum) / (lr * self.forget_steps)) if self.forget_steps else slow


def decouples_penalty(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the penalty is applied to the weights directly, as AdamW does with weight decay: adaptive optimizers rescale
    gradients, which would undo it. SGD does not."""
    return not isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.SGD)
