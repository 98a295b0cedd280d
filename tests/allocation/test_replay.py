"""A replayed forward gives what a whole forward gives, from whatever call it starts."""

from __future__ import annotations

import pytest
import torch
from support.networks import PATTERNS
from support.resrep_training import randomised
from torch import Tensor, nn

from narrower.allocation.replay import Record, Replay
from narrower.tracing.interpreter import run_forward
from narrower.tracing.operators.interface import address


class InPlace(nn.Module):
    """Writes into what earlier calls have made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        y.add_(x).mul_(2)
        x.relu_()
        y += self.c(x)
        y[:, :2] += x[:, 2:]
        y.mul_(0.5)
        y[:, 1:] += self.c(y)[:, 1:]
        return y.flatten(1)


@pytest.mark.parametrize("name", ["in_place", "residual", "inception", "shuffle"])
def test_every_start_gives_the_same_output_again_and_again(name: str) -> None:
    model = (InPlace() if name == "in_place" else randomised(PATTERNS[name].make())).eval()
    x = torch.randn(2, 4 if name == "in_place" else 3, 16, 16)
    record = Record(model)
    want = run_forward(model, x, record).clone()
    end = len(record.outputs)
    for start in range(end, -1, -1):
        for _ in range(2):
            assert torch.equal(run_forward(model, x, Replay(record, start, {})), want), start
    with pytest.raises(ValueError, match="a replay from call 1 after one from call 0"):
        Replay(record, 1, {})


def test_a_replay_is_not_disturbed_by_one_with_other_weights() -> None:
    model, x = InPlace().eval(), torch.randn(2, 4, 3, 3)
    record = Record(model)
    run_forward(model, x, record)
    starts = {name: record.start([address(model.get_parameter(f"{name}.weight"))], None) for name in "abc"}
    for name in sorted(starts, key=lambda name: -starts[name]):
        weight = model.get_parameter(f"{name}.weight")
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(3)
            want = model(x)
            assert torch.equal(run_forward(model, x, Replay(record, starts[name], {})), want), name
            weight.copy_(before)


def test_a_forward_may_write_into_its_input() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1), nn.Flatten())
    x = torch.randn(2, 3, 3, 3)
    want = model(x.clone())
    record = Record(model)
    run_forward(model, x, record)
    for start in range(len(record.outputs), -1, -1):
        assert torch.equal(run_forward(model, x, Replay(record, start, {})), want), start


def test_a_changed_weight_changes_the_output_as_in_a_whole_forward() -> None:
    model, x = InPlace().eval(), torch.randn(2, 4, 3, 3)
    record = Record(model)
    run_forward(model, x, record)
    with torch.no_grad():
        model.b.weight.mul_(3)
        want = model(x)
    start = record.first_read[model.b.weight.untyped_storage()._cdata]
    assert start > 0 and torch.equal(run_forward(model, x, Replay(record, start, {})), want)


def test_intercepts_are_added_to_the_layers_that_read_a_weight() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(36, 2)).eval()
    x, added = torch.randn(2, 3, 3, 3), torch.rand(2)
    record = Record(model)
    want = run_forward(model, x, record) + added
    weight = model.get_parameter("2.weight")
    found = run_forward(model, x, Replay(record, 0, {weight.untyped_storage()._cdata: added}))
    torch.testing.assert_close(found, want)
