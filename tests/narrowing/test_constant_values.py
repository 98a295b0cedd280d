"""What operators make of constants, against the operators themselves on tensors with constant channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from support.networks import Trick
from torch import Tensor, nn

import narrower
from narrower.narrowing.constant_propagation import propagate
from narrower.narrowing.constant_values import NAN, by_group, product, where_equal

# Two channels that change, a zero, four other constants.
SEED = torch.tensor([float("nan"), 0.0, 0.5, -1.25, float("nan"), 2.0, 0.7], dtype=torch.float64)
CHANGES = SEED.isnan()

Known = Literal["all", "zero", "none"]  # of which constants it is known what becomes of them

OPERATORS: dict[str, tuple[Callable[[Tensor], Tensor], Known]] = {
    "relu": (F.relu, "all"),
    "complex": (lambda x: (x + 1j).abs(), "none"),
    "sigmoid": (torch.sigmoid, "all"),
    "hardswish": (F.hardswish, "all"),
    "softplus": (lambda x: F.softplus(x, beta=2.0), "all"),
    "gelu": (lambda x: F.gelu(x, approximate="tanh"), "all"),
    "clamp": (lambda x: x.clamp(-0.1, 1.5), "all"),
    "scale and shift": (lambda x: 2 - x / 3, "all"),
    "swish": (lambda x: x * torch.sigmoid(x), "all"),
    "quotient": (lambda x: x / (1 + x.exp()), "all"),
    "maximum": (lambda x: torch.maximum(x, torch.tanh(x)), "all"),
    "view": (lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).unflatten(2, (8, 8)), "all"),
    "maximum pooling": (lambda x: F.max_pool2d(x, 2), "all"),
    "mean": (lambda x: x.mean((2, 3), keepdim=True), "all"),
    "average pooling": (lambda x: F.avg_pool2d(x, 2), "all"),
    "padded average pooling": (lambda x: F.avg_pool2d(x, 3, 1, 1), "zero"),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2.0), "all"),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), "all"),
    "reflection padding": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "all"),
    "sum": (lambda x: x.sum((2, 3), keepdim=True), "zero"),
    "prelu": (lambda x: F.prelu(x, torch.full((1,), 0.3, dtype=x.dtype)), "zero"),
    "cumulative sum": (lambda x: x.cumsum(3), "none"),
    "softmax": (lambda x: x.softmax(3), "none"),
    "logsumexp": (lambda x: x.logsumexp((2, 3), keepdim=True), "none"),
}


def constants(operator: Callable[[Tensor], Tensor]) -> Tensor:
    """The constants that reach the second convolution, shape (7,)."""
    model = Trick(lambda m, x: m.second(operator(m.first(x))), {"first": nn.Conv2d(3, 7, 1), "second": nn.Conv2d(7, 2, 1)})
    graph = narrower.trace(model.double().eval(), torch.randn(2, 3, 8, 8).double())
    read = propagate(graph, lambda weight: False, lambda producer: SEED if producer.module == "first" else NAN).consumers[-1]
    return read.activation.values.get("first", NAN).expand(7)


@pytest.mark.parametrize("name", OPERATORS)
def test_constants_are_those_of_the_operator_itself(name: str) -> None:
    operator, known = OPERATORS[name]
    found = constants(operator)
    torch.manual_seed(0)
    x = torch.where(CHANGES[:, None, None], torch.randn(2, 7, 8, 8).double(), SEED[:, None, None])
    out = operator(x)
    expected = {"all": ~CHANGES, "zero": SEED == 0, "none": torch.zeros(7, dtype=torch.bool)}[known]
    assert torch.equal(found.isfinite(), expected)
    for channel in found.isfinite().nonzero().flatten().tolist():
        torch.testing.assert_close(out[:, channel], found[channel].expand_as(out[:, channel]))


@pytest.mark.parametrize("filler", [0.0, 0.7])
def test_a_constant_stays_if_the_padding_is_the_same(filler: float) -> None:
    found = constants(lambda x: F.pad(x, (1, 1, 1, 1), value=filler))
    torch.testing.assert_close(found, torch.where(SEED.eq(filler), SEED, NAN), equal_nan=True)


def test_zero_times_what_changes_is_zero() -> None:
    a, b = torch.tensor([0.0, float("nan"), 2.0]), torch.tensor([float("nan"), 0.0, 3.0])
    assert product(a, b).tolist() == [0.0, 0.0, 6.0]
    assert product(a[2:], b[2:], b[1:2]).tolist() == [0.0]


def test_of_constants_side_by_side_those_stay_that_agree() -> None:
    first = {"g": torch.tensor([1.0, 2.0]), "h": torch.tensor(5.0)}
    found = where_equal([first, {"g": torch.tensor([1.0, 3.0])}])
    assert found["h"] == 5 and found["g"][0] == 1 and found["g"][1].isnan()


def test_an_operand_without_a_group_is_not_known() -> None:
    found = by_group([{"g": torch.tensor(1.0)}, {"h": torch.tensor(1.0)}], torch.add)
    assert found.keys() == {"g", "h"} and all(bool(v.isnan()) for v in found.values())


def test_operators_run_once_for_groups_that_share_a_tensor() -> None:
    calls: list[Any] = []

    def count(v: Tensor) -> Tensor:
        calls.append(v)
        return v + 1

    shared = torch.tensor(1.0)
    found = by_group([{"g": shared, "h": shared, "k": torch.tensor(2.0)}], count)
    assert len(calls) == 2 and [float(v) for v in found.values()] == [2, 2, 3]
