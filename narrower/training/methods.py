"""What trains along with a network: ResRep or soft pruning, which narrow it on the way, and distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..distillation.distill import Distillation
from ..resrep.trainer import ResRep
from ..soft.soft_pruning import SoftPruning


class Methods(NamedTuple):
    """What trains along with a network.

    Attributes:
        resrep: compactors on it. After an epoch, channels at zero leave it if that is worth it.
        soft: masks that come and go. Its steps are spread over the steps of the optimizer.
        distillation: the loss against the dense network, which takes the cross-entropy as the task.
    """

    resrep: ResRep | None = None
    soft: SoftPruning | None = None
    distillation: Distillation | None = None

    @property
    def narrows(self) -> bool:
        """Whether the network is on its way to another one, so that no value of it before the end is worth keeping."""
        return self.resrep is not None or self.soft is not None

    def progress(self) -> dict[str, float]:
        """Figures of how far it is."""
        found = self.resrep or self.soft
        return {} if found is None else {key: round(value, 6) for key, value in found.progress().items()}

    def after_step(self, number: int, of: int) -> None:
        """To be called after the optimizer's step `number`, from 1, of so many. ResRep has hooks of its own."""
        if self.soft is not None:
            self.soft.zero_hard()
            if number * self.soft.steps // of > (number - 1) * self.soft.steps // of:
                self.soft.step()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: found.state_dict() for name, found in (("resrep", self.resrep), ("soft", self.soft)) if found is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint has of `state_dict`. To be called before model and optimizer load theirs."""
        for name, found in (("resrep", self.resrep), ("soft", self.soft)):
            if found is not None:
                found.load_state_dict(state[name])
