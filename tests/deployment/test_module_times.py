"""Times of layers within a forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrower.deployment import module_times
from narrower.deployment.module_times import time_modules

NOW = [0.0]  # seconds on a clock that only `Slow` moves


class Slow(nn.Linear):
    """Takes some milliseconds."""

    def __init__(self, ms: float) -> None:
        super().__init__(4, 4)
        self.ms = ms

    def forward(self, x: Tensor) -> Tensor:
        NOW[0] += self.ms / 1e3
        return super().forward(x)


class Net(nn.Module):
    def __init__(self, ms: float) -> None:
        super().__init__()
        self.slow = Slow(ms)
        self.norm = nn.BatchNorm1d(4)
        self.fast = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return self.fast(self.norm(self.slow(self.slow(x))))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_each_layer_has_the_time_of_all_its_calls_and_the_networks_stay_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module_times, "clock_named", lambda name: lambda: NOW[0])
    networks = [Net(4.0), Net(1.0)]
    dense, narrow = time_modules(networks, torch.zeros(2, 4), seconds=0.0)
    assert dense.keys() == narrow.keys() == {"slow.weight", "fast.weight"}
    assert dense["slow.weight"] == pytest.approx(8.0), "two calls in a forward"
    assert narrow["slow.weight"] == pytest.approx(2.0)
    assert dense["fast.weight"] == narrow["fast.weight"] == 0.0
    assert all(model.training and not hooks(model) for model in networks)


def test_each_layer_is_waited_for_on_apples_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have done nothing yet when a layer returns."""
    waited: list[torch.device] = []
    monkeypatch.setattr(module_times, "device_of", lambda model: torch.device("mps"))
    monkeypatch.setattr(module_times, "synchronize", waited.append)
    model = Net(0.0)
    time_modules([model], torch.zeros(2, 4), seconds=0.0)
    assert len(waited) == 6 * (module_times.WARMUP + module_times.LEAST) and {*waited} == {torch.device("mps")}


def test_hooks_go_when_a_forward_fails() -> None:
    class Failing(Net):
        def forward(self, x: Any) -> Any:
            raise ValueError("no")

    model = Failing(0.0)
    with pytest.raises(ValueError, match="no"):
        time_modules([model], torch.zeros(2, 4))
    assert not hooks(model) and model.training
