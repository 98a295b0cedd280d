"""verify: it accepts every right narrowing and notices every damage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import networks, reference
from support.networks import IMAGES, Plain
from torch import Tensor, nn

import narrower
from narrower.narrowing.verify import largest_difference


def damage(small: Any, what: str) -> None:
    with torch.no_grad():
        if what == "weight":
            small.conv2.weight[3, 1, 0, 0] += 1e-3
        elif what == "statistics":
            small.bn3.running_mean[1] += 1e-3
        elif what == "swapped":
            small.conv3.weight.data = small.conv3.weight.flip(1)
        elif what == "infinite":
            small.conv1.weight[0] = float("nan")


def test_verify_with_a_tolerance() -> None:
    model = Plain().eval()
    small, plan = reference.pair(model)
    damage(small, "weight")
    assert narrower.verify(model, small, plan, IMAGES, tolerance=1.0).error > 1e-9
    with pytest.raises(narrower.VerifyError, match="1e-06"):
        narrower.verify(model, small, plan, IMAGES, tolerance=1e-6)


@pytest.mark.parametrize("what", ["weight", "statistics", "swapped", "infinite"])
def test_verify_notices(what: str) -> None:
    model = Plain().eval()
    small, plan = reference.pair(model)
    narrower.verify(model, small, plan, IMAGES)
    damage(small, what)
    with pytest.raises(narrower.VerifyError):
        narrower.verify(model, small, plan, IMAGES)


def test_verify_notices_another_plan_and_another_shape() -> None:
    model = Plain().eval()
    small, plan = reference.pair(model)
    other = reference.halved(model, IMAGES, seed=5)
    with pytest.raises(narrower.VerifyError, match="differs"):
        narrower.verify(model, small, other, IMAGES)
    small.fc = nn.Linear(6, 4)
    with pytest.raises(narrower.VerifyError, match="shapes"):
        narrower.verify(model, small, plan, IMAGES)


def test_verify_says_its_precision_and_leaves_everything_as_it_was() -> None:
    model = Plain()
    small, plan = reference.pair(model)
    before, after = reference.state(model), reference.state(small)
    result = narrower.verify(model, small, plan, IMAGES)
    assert result.dtype == torch.float64 and 0 <= result.error <= result.tolerance == 1e-9
    assert "float64" in str(result) and "1e-09" in str(result)
    own = narrower.verify(model, small, plan, IMAGES, dtype=None)
    assert own.dtype == torch.float32 and own.tolerance > result.tolerance
    assert reference.same_state(before, reference.state(model)) and reference.same_state(after, reference.state(small))
    assert model.training and small.training


def test_verify_refuses_inputs_that_show_nothing() -> None:
    model = Plain()
    small, plan = reference.pair(model)
    with pytest.raises(narrower.VerifyError, match="finite"):
        narrower.verify(model, small, plan, IMAGES * float("inf"))


class Attention(nn.Module):
    """Places attend to places: a product of activations sums over channels that no weight reads; two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.query, self.key = networks.unit(3, 8), nn.Conv2d(8, 12, 1), nn.Conv2d(8, 12, 1)
        self.linear, self.head = nn.Linear(8, 10, bias=False), networks.Head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k = (conv(x).view(len(x), 2, -1, x.shape[2] * x.shape[3]) for conv in (self.query, self.key))
        weights = (q.transpose(2, 3) @ k).softmax(3).mean(1)
        y = self.linear(x.flatten(2).transpose(1, 2))
        return self.head((weights @ y).transpose(1, 2).unflatten(2, x.shape[2:]))


@pytest.mark.parametrize("many", [1, 2, 5])
def test_verify_sees_no_removed_channels_in_products_of_activations(many: int) -> None:
    model, x = Attention().eval(), networks.images(batch=many)
    graph = narrower.trace(model, IMAGES)
    assert {"stem.0", "query", "linear"} <= {g.name for g in graph.free}
    plan = narrower.plan(graph, narrower.random(graph), remove=0.5)
    small: Any = narrower.narrow(model, plan)
    assert narrower.verify(model, small, plan, x).error < 1e-12
    small.query.weight.data[0, 1] += 1e-2
    with pytest.raises(narrower.VerifyError, match="differs"):
        narrower.verify(model, small, plan, x)


def test_verify_takes_rounding_of_large_outputs_for_what_it_is() -> None:
    """Boxes in pixels of an untrained detector hardly depend on the images."""
    model = Plain().eval()
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        last.weight *= 1e-4
        last.bias.fill_(640.0)
    small, plan = reference.pair(model)
    assert narrower.verify(model, small, plan, IMAGES).error < 1e-12
    damage(small, "swapped")
    with pytest.raises(narrower.VerifyError, match="differs"):
        narrower.verify(model, small, plan, IMAGES)


def test_a_difference_of_rounding_is_relative_to_the_largest_output_and_any_other_to_the_spread() -> None:
    out = 640 + 1e-2 * torch.randn(4, 5, dtype=torch.float64)
    spread = float((out - out[:1]).abs().max())
    assert largest_difference([out], [out + 1e-10]) == pytest.approx(1e-10 / float(out.max()), rel=1e-2)
    assert largest_difference([out], [out + 1e-8]) == pytest.approx(1e-8 / spread, rel=1e-4)
    assert largest_difference([out.long()], [out.long() + 1]) == 0, "integers are not compared"


def test_verify_says_where_rounding_alone_changes_the_output() -> None:
    model = networks.Trap(lambda m, x: torch.sin(1e13 * x)).eval()
    small, plan = reference.pair(model)
    small.stem[0].weight.data *= 1.01
    with pytest.raises(narrower.VerifyError, match="rounded"):
        narrower.verify(model, small, plan, IMAGES)
