"""A replayed forward gives what a whole forward gives, from whatever call it starts."""

from __future__ import annotations

import pytest
import torch
from support.networks import PATTERNS
from support.resrep_training import randomised
from torch import Tensor, nn

from narrower.allocation.replay import Record, Replay
from narrower.tracing.interpreter import run_forward


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
        return y.flatten(1)


@pytest.mark.parametrize("name", ["in_place", "residual", "inception", "shuffle"])
def test_every_start_gives_the_same_output_again_and_again(name: str) -> None:
    model = (InPlace() if name == "in_place" else randomised(PATTERNS[name].make())).eval()
    x = torch.randn(2, 4 if name == "in_place" else 3, 16, 16)
    record = Record(model)
    want = run_forward(model, x, record).clone()
    end = len(record.outputs)
    jumps = [start for middle in range(end + 1) for start in (0, middle, end)]
    for start in [*range(end + 1), *jumps]:
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
