"""Targets are the dense outputs, at the same positions whatever the batches are."""

from __future__ import annotations

import torch
from support.devices import APPLE, Apple
from torch import Tensor, nn

from narrower.repair.patches import Positions, values_at
from narrower.repair.targets import TargetWatch, dense_targets


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


def test_targets_are_kept_on_the_cpu() -> None:
    out, rows = torch.randn(5, 6, 4, 4), torch.tensor([1, 3])
    at = Positions(rows, (torch.tensor([0, 2]), torch.tensor([3, 3])), rows)
    watch = TargetWatch(Twice(), {"conv.weight": torch.tensor([0, 4])}, {})
    watch.sampled["conv.weight"] = [at]
    with Apple():
        found = watch.taken("conv.weight", out.to(APPLE))
    assert type(found) is Tensor and torch.equal(found, values_at(out, at)[:, [0, 4]])


def test_layers_that_cannot_be_seen_have_a_reason() -> None:
    every = {n: torch.arange(k) for n, k in (("twice.weight", 6), ("mixed.weight", 2), ("unused.weight", 3))}
    targets, left, _ = dense_targets(Twice().eval(), every, dict.fromkeys(every, 4), [(torch.randn(5, 3, 4, 4), 5)])
    assert not targets
    assert "more than once" in left["twice.weight"] and "rows" in left["mixed.weight"]
    assert "no convolution" in left["unused.weight"]


class Orders(nn.Module):
    """Rows image by image (`plain`), the left halves of all images before the right ones (`halves`), and positions first."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.halves, self.first = nn.Linear(3, 4), nn.Conv2d(3, 4, 1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        left, right = self.halves(torch.cat(x.chunk(2, 3))).chunk(2)
        return self.plain(tokens).mean(1) + (left * right).mean((2, 3)) + self.first(tokens.transpose(0, 1)).mean(0)


def test_layers_whose_rows_do_not_stand_image_by_image_have_no_targets() -> None:
    keep = {f"{name}.weight": torch.arange(4) for name in ("plain", "halves", "first")}
    for size in (1, 4):
        inputs = [(x, size) for x in torch.randn(8, 3, 4, 4).split(size)]
        targets, left, _ = dense_targets(Orders().eval(), keep, dict.fromkeys(keep, 4), inputs)
        assert list(targets) == ["plain.weight"]
        assert left == dict.fromkeys(["halves.weight", "first.weight"], "its rows do not stand image by image")
