"""What trains along with a network: ResRep, soft pruning or centripetal SGD, which narrow it, and distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..centripetal.centripetal_sgd import CentripetalSGD
from ..distillation.distill import Distillation
from ..resrep.history import NormHistory
from ..resrep.trainer import ResRep
from ..soft.soft_pruning import SoftPruning


class Methods(NamedTuple):
    """What trains along with a network.

    Attributes:
        resrep: compactors on it. After an epoch, channels at zero leave it if that is worth it.
        soft: masks that come and go. Its steps are spread over the steps of the optimizer.
        centripetal: filters that become identical.
        distillation: the loss against the dense network, which takes the cross-entropy as the task.
        norms: notes how the row norms of `resrep` go.
    """

    resrep: ResRep | None = None
    soft: SoftPruning | None = None
    centripetal: CentripetalSGD | None = None
    distillation: Distillation | None = None
    norms: NormHistory | None = None

    @property
    def named(self) -> dict[str, ResRep | SoftPruning | CentripetalSGD]:
        """Those that narrow, by name."""
        found = {"resrep": self.resrep, "soft": self.soft, "centripetal": self.centripetal}
        return {name: method for name, method in found.items() if method is not None}

    @property
    def narrows(self) -> bool:
        """Whether the network is on its way to another one, so that no value of it before the end is worth keeping."""
        return bool(self.named)

    def progress(self) -> dict[str, float]:
        """Figures of how far it is."""
        return {key: round(value, 6) for method in self.named.values() for key, value in method.progress().items()}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """The hooks of those that act in each step. To be called once, with the optimizer of the training."""
        for method in (self.resrep, self.centripetal):
            if method is not None:
                method.attach(optimizer)
        if self.soft is not None:
            self.soft.hook_gradients()

    def notes(self) -> dict[str, Any]:
        """What was noted since the last time, for a row of the metrics."""
        return {} if self.norms is None else self.norms.take()

    def after_step(self, number: int, of: int) -> None:
        """To be called after the optimizer's step `number`, from 1, of so many."""
        if self.norms is not None:
            self.norms.after_step(number, of)
        if self.soft is not None:
            self.soft.zero_hard()
            if number * self.soft.steps // of > (number - 1) * self.soft.steps // of:
                self.soft.step()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        found = {name: method.state_dict() for name, method in self.named.items()}
        return found if self.norms is None else {**found, "norms": self.norms.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint has of `state_dict`. To be called before model and optimizer load theirs."""
        for name, method in self.named.items():
            method.load_state_dict(state[name])
        if self.norms is not None and "norms" in state:  # checkpoints of older versions have none
            self.norms.load_state_dict(state["norms"])
