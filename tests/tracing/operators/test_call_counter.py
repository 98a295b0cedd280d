"""Calls have the same numbers under every dispatch mode."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from narrower.surgery.walk import named_tensors
from narrower.tracing.constraints import ConstraintCollector
from narrower.tracing.interpreter import run_forward
from narrower.tracing.labels import Axes
from narrower.tracing.operators.call_counter import CallCounter


class Numbers(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.counter = CallCounter(named_tensors(model).values())
        self.seen: list[tuple[str, int, int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = self.counter.count(func, args, kwargs)
        self.seen.append((call.name, call.number, call.place, call.pool, call.product))
        return func(*args, **(kwargs or {}))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(self.conv(x), 2)
        tokens = self.linear(y.flatten(2).transpose(1, 2))
        return (tokens @ tokens.transpose(1, 2) @ tokens + self.linear.weight[:1]).mean(1) + y.mean((2, 3))


def test_calls_poolings_and_products_are_numbered() -> None:
    model = Attention().eval()
    with torch.no_grad(), Numbers(model) as mode:
        model(torch.randn(2, 3, 8, 8))
    assert [place for _, _, place, _, _ in mode.seen] == list(range(len(mode.seen)))
    assert [(name, pool) for name, _, _, pool, _ in mode.seen if pool >= 0] == [("max_pool2d_with_indices", 0), ("mean", 1)]
    assert [product for _, _, _, _, product in mode.seen if product >= 0] == [0, 1]
    assert [number for name, number, *_ in mode.seen if name == "bmm"] == [0, 1]


def test_a_product_with_a_view_of_a_parameter_has_no_number() -> None:
    w = torch.zeros(4, 4)
    counter, mm = CallCounter([w]), torch.ops.aten.mm.default
    assert counter.count(mm, (torch.zeros(2, 4), w.t()), {}).product == -1
    assert counter.count(mm, (torch.zeros(2, 4), torch.zeros(4, 4)), {}).product == 0
    assert counter.count(torch.ops.aten.addmm.default, (w[0], torch.zeros(2, 4), torch.zeros(4, 4)), {}).product == 1


def test_the_trace_on_meta_tensors_numbers_calls_as_a_real_forward_does() -> None:
    model = Attention().eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), Numbers(model) as mode:
        model(x)
    meta = Attention().eval().to("meta")
    collector = ConstraintCollector(meta, Axes(), {})
    run_forward(meta, x.to("meta"), collector)
    assert [e.name for e in collector.log] == [name for name, *_ in mode.seen]
