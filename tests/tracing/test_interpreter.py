"""The interpreter carries labels through every call; what it cannot follow it pins, and what fails in a rule it raises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.operators import C, assert_pinned, codes, collected, pinned
from torch import Tensor, nn

import narrower
from narrower.tracing.constraints import ConstraintCollector
from narrower.tracing.interpreter import RuleError, run_forward
from narrower.tracing.labels import Axes
from narrower.tracing.operators import call_counter
from narrower.tracing.operators.data_dependent import AnswerListener
from narrower.tracing.operators.elementwise import elementwise
from narrower.tracing.operators.interface import Operator, Rule, UnknownForm
from narrower.tracing.operators.table import operator_of
from narrower.tracing.recorder import Unseen

UNKNOWN: dict[str, Callable[[Tensor], Any]] = {
    "triangle": lambda x: x.tril(), "gather": lambda x: x.gather(1, torch.zeros(x.shape, dtype=torch.long, device="meta")),
    "distances": lambda x: torch.cdist(x.mean(3), x.mean(3)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_operator_pins_what_it_reads(name: str) -> None:
    assert_pinned(UNKNOWN[name], "operator")


def test_an_unknown_operator_is_named_and_its_output_has_no_channels() -> None:
    collector, out = collected(lambda x: x.tril())
    assert pinned(collector) == set(range(C)) and "aten.tril is not known" in collector.pins[0][1].text
    assert not collector.of(out).labels


def test_a_pin_tells_the_module_and_the_line() -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sort(1).values

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Sorted()).to("meta")
    with torch.no_grad(), ConstraintCollector(model, Axes(), {}) as collector:
        model(torch.empty(1, 3, 2, 2, device="meta"))
    reason = collector.pins[-1][1]
    assert reason.code == "operator" and reason.where.startswith("1, tracing/test_interpreter.py:")


def with_rule(monkeypatch: pytest.MonkeyPatch, name: str, rule: Rule) -> None:
    """Give one operator another rule."""
    def changed(func: Any) -> Operator:
        row = operator_of(func)
        return replace(row, rule=rule) if row.name == name else row

    monkeypatch.setattr(call_counter, "operator_of", changed)


def test_a_form_that_a_rule_does_not_know_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(r: Any, call: Any) -> Any:
        raise UnknownForm("tanh on Sundays")

    with_rule(monkeypatch, "tanh", rule)
    collector, out = collected(lambda x: x.tanh())
    assert codes(collector) == {"operator"} and pinned(collector) == set(range(C)) and not collector.of(out).labels
    assert collector.pins[0][1].text == "tanh on Sundays"


@pytest.mark.parametrize("fault", [TypeError, IndexError, KeyError, AttributeError, ValueError, ZeroDivisionError])
def test_an_error_inside_a_rule_is_an_error(monkeypatch: pytest.MonkeyPatch, fault: type[Exception]) -> None:
    def rule(r: Any, call: Any) -> Any:
        raise fault("a slip")

    with_rule(monkeypatch, "tanh", rule)
    with pytest.raises(RuleError, match=r"aten\.tanh .*a slip.*report") as raised:
        collected(lambda x: x.tanh())
    assert isinstance(raised.value.__cause__, fault)


def test_a_parameter_carries_a_label_for_each_dimension_with_channels() -> None:
    model = nn.Conv2d(6, 4, (3, 1), groups=2).to("meta")
    collector = ConstraintCollector(model, Axes(), {})
    rows, columns = collector.of(model.weight).labels
    assert (rows.free, columns.free) == (0, 1) and rows.ids.shape == (4, 1, 1, 1) and columns.ids.shape == (4, 3, 1, 1)
    blocks = columns.ids.reshape(4, 3)
    assert np.array_equal(blocks[0], blocks[1]) and not np.intersect1d(blocks[1], blocks[2]).size, "a block reads its own"
    assert not collector.of(torch.empty(3)).labels


def test_a_write_into_a_part_of_a_tensor_pins() -> None:
    def add_into_part(x: Tensor) -> Tensor:
        canvas = torch.zeros(2, 2 * C, 4, 6, device="meta")
        canvas[:, :C] += x
        return canvas

    assert "position" in codes(collected(add_into_part)[0])


def test_memory_written_through_a_view_is_no_longer_uniform() -> None:
    def masked(x: Tensor) -> Tensor:
        mask = torch.ones(1, C, 1, 1, device="meta")
        mask[:, :3].mul_(2)
        return x * mask

    assert_pinned(masked, "operand")


def run(function: Callable[[Tensor], Any], answers: list[Any] | None) -> ConstraintCollector:
    with torch.no_grad(), ConstraintCollector(nn.Identity(), Axes(), {}, answers) as collector:
        function(torch.ones(3, 4))
    return collector


def test_answers_of_the_real_forward_are_replayed() -> None:
    seen: list[Any] = []

    def branching(x: Tensor) -> None:
        y = (x * 2).relu()
        seen.append(float(y.sum()))
        seen.append(y[y > 1].shape)

    x = torch.ones(3, 4)
    with AnswerListener() as listener:
        branching(x)
    with torch.no_grad(), ConstraintCollector(nn.Identity(), Axes(), {}, listener.answers):
        branching(torch.zeros(3, 4))
    assert seen[:2] == seen[2:] == [24.0, torch.Size([12])]


def test_a_question_that_the_real_forward_did_not_ask_is_an_error() -> None:
    with pytest.raises(Unseen):
        run(lambda x: float(x.sum()), [])
    run(lambda x: float(x.sum()), [3.0])


def test_numbers_of_a_call_are_those_that_must_not_depend_on_widths() -> None:
    def numbers(function: Callable[[Tensor], Any]) -> list[tuple[Any, ...]]:
        return [e.numbers for e in collected(function)[0].log]

    assert numbers(lambda x: x.view(2, -1)) == [()] and numbers(lambda x: x.permute(0, 2, 3, 1)) == [([0, 2, 3, 1],)]
    assert numbers(lambda x: torch.full((C,), 3.0, device="meta")) == [(3.0,)]
    assert numbers(lambda x: F.group_norm(x, 3)) == [(3, 1e-5)] and numbers(lambda x: F.layer_norm(x, (6,))) == [(1e-5,)]
    assert numbers(lambda x: torch.add(x, x, alpha=0.5)) == [(0.5,)] and numbers(lambda x: x.var(1, correction=2)) == [([1], 2)]
    assert numbers(lambda x: torch.ones(C, device="meta").sum())[1] == (C,), "a sum over as many ones as channels"


@pytest.mark.parametrize("fails_when", ["always", "narrow"])
def test_trace_passes_an_error_inside_a_rule_on(monkeypatch: pytest.MonkeyPatch, fails_when: str) -> None:
    """In the dense forward as in a probe: a group must not be pinned for a fault of narrower."""
    def rule(r: Any, call: Any) -> Any:
        if fails_when == "always" or call.out.shape[1] < 8:
            raise TypeError("a slip")
        return elementwise(r, call)

    with_rule(monkeypatch, "tanh", rule)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Conv2d(8, 4, 1))
    with pytest.raises(narrower.NarrowerError, match=r"aten\.tanh .*report") as raised:
        narrower.trace(model, torch.zeros(1, 3, 4, 4))
    assert isinstance(raised.value.__cause__, TypeError)


def test_autocast_in_a_forward_works_only_where_operands_differ_in_type() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                y = self.first(x)
                return y, self.second(y.bfloat16())

    first, second = run_forward(Mixed(), torch.randn(2, 3), AnswerListener())
    assert (first.dtype, second.dtype) == (torch.float32, torch.bfloat16)
