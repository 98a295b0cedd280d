"""Outlines: forwards that do the same to channels have the same, whatever noise they add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrower.tracing.labels import Axes
from narrower.tracing.outline import outline
from narrower.tracing.recorder import Recorder


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other, self.bn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.register_buffer("scale", torch.rand(1, 3, 1, 1))
        self.to("meta")


def of(function: Callable[[Any, Tensor], Any], training: bool = False) -> Any:
    net = Net().train(training)
    recorder = Recorder(net, Axes())
    x = torch.empty(2, 3, 4, 4, device="meta")
    recorder.numbered(x)
    with torch.no_grad(), recorder:
        out = function(net, x)
    return outline(recorder, out if isinstance(out, tuple) else (out,))


def dropped_path(m: Net, x: Tensor) -> Tensor:
    return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.5).div_(0.5) if m.training else x


SAME: dict[str, Callable[[Any, Tensor], Any]] = {
    "batch norm": lambda m, x: m.bn(m.conv(x)),
    "dropout": lambda m, x: m.conv(F.dropout(F.relu(m.conv(x)), 0.1, m.training)),
    "dropped channels": lambda m, x: m.conv(F.dropout2d(m.conv(x), 0.1, m.training)),
    "dropped path": lambda m, x: x + dropped_path(m, m.conv(x)),
    "noise": lambda m, x: m.conv(x + torch.randn_like(x) * 0.1 if m.training else x),
    "noise on the input": lambda m, x: m.conv(x if not m.training else x * torch.rand(3, 1, 1, device="meta").floor()),
    "a constant": lambda m, x: m.conv(x) * torch.tensor(0.5),
    "indices": lambda m, x: m.conv(x[:, torch.tensor([2, 1, 0])]),
}
OTHER: dict[str, Callable[[Any, Tensor], Any]] = {
    "returns more": lambda m, x: (y := m.conv(x), y) if m.training else m.conv(x),
    "returns another": lambda m, x: ((y := m.conv(x)), F.relu(y))[0 if m.training else 1],
    "reads a buffer": lambda m, x: m.conv(x) * m.scale if m.training else m.conv(x),
    "another layer": lambda m, x: m.other(x) if m.training else m.conv(x),
    "another input": lambda m, x: (y := m.conv(x), m.other(y if m.training else x))[1],
    "other numbers": lambda m, x: m.conv(x).mean((2, 3) if m.training else (1, 2)),
    "other indices": lambda m, x: m.conv(x[:, torch.tensor([2, 1, 0] if m.training else [0, 1, 2])]),
    "other options": lambda m, x: torch.add(x, m.conv(x), alpha=2 if m.training else 1),
}


@pytest.mark.parametrize("name", SAME)
def test_noise_and_counters_are_left_out(name: str) -> None:
    assert of(SAME[name]) == of(SAME[name], training=True)


@pytest.mark.parametrize("name", OTHER)
def test_all_else_is_told_apart(name: str) -> None:
    assert of(OTHER[name]) == of(OTHER[name])
    assert of(OTHER[name]) != of(OTHER[name], training=True)
