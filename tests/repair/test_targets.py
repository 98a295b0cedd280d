"""Targets are the dense outputs, at the same positions whatever the batches are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from narrower.repair.patches import values_at
from narrower.repair.targets import dense_targets


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.twice = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
        self.mixed = nn.Linear(6, 2)
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)) + x.mean(1, keepdim=True).expand(-1, 6, -1, -1)
        y = self.twice(self.twice(y))
        return self.mixed(y.mean((0, 2, 3)).reshape(1, 6))  # one row for all images


def test_targets_are_the_kept_dense_outputs_and_sums() -> None:
    model, x = Twice().eval(), torch.randn(5, 3, 4, 4)
    keep = {"conv.weight": torch.tensor([0, 4])}
    targets, left, _ = dense_targets(model, keep, {"conv.weight": 7}, [(x[:2], 2), (x[2:], 3)])
    target = targets["conv.weight"]
    with torch.no_grad():
        out = model.conv(x)
        torch.testing.assert_close(target.out, values_at(out, target.at)[:, [0, 4]])
        total = model.norm(out) + x.mean(1, keepdim=True)
    assert target.stream is not None and target.stream.norm == "norm" and target.total is not None
    torch.testing.assert_close(target.total, values_at(total, target.at)[:, [0, 4]])
    assert len(target.out) == 5 * 7 and not left


def test_layers_that_cannot_be_seen_have_a_reason() -> None:
    every = {n: torch.arange(k) for n, k in (("twice.weight", 6), ("mixed.weight", 2), ("unused.weight", 3))}
    targets, left, _ = dense_targets(Twice().eval(), every, dict.fromkeys(every, 4), [(torch.randn(5, 3, 4, 4), 5)])
    assert not targets
    assert "more than once" in left["twice.weight"] and "rows" in left["mixed.weight"]
    assert "no convolution" in left["unused.weight"]
