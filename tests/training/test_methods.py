"""What trains along with a network."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from narrower import SoftPruning
from narrower.training.methods import Methods


class Counted:
    """Stands for soft pruning, and notes after which step of the optimizer it was called."""

    def __init__(self, steps: int) -> None:
        self.steps, self.at, self.now, self.hooked = steps, list[int](), 0, 0

    def hook_gradients(self) -> None:
        self.hooked += 1

    def zero_hard(self) -> None:
        self.now += 1

    def step(self) -> None:
        self.at.append(self.now)


@pytest.mark.parametrize(("steps", "updates"), [(1, 7), (3, 7), (7, 7), (20, 41)])
def test_the_steps_of_soft_pruning_spread_over_the_training_and_end_with_it(steps: int, updates: int) -> None:
    soft = Counted(steps)
    methods = Methods(soft=cast(SoftPruning, cast(Any, soft)))
    methods.attach(torch.optim.SGD([torch.zeros(1)]))
    assert soft.hooked == 1
    for number in range(1, updates + 1):
        methods.after_step(number, updates)
    assert len(soft.at) == steps and soft.at[-1] == updates
    gaps = {later - before for before, later in zip([0, *soft.at], soft.at, strict=False)}
    assert max(gaps) - min(gaps) <= 1


def test_nothing_trains_along_by_default() -> None:
    methods = Methods()
    methods.after_step(1, 1)
    assert not methods.narrows and methods.progress() == {} and methods.state_dict() == methods.notes() == {}
