"""Elementwise operators: each channel for itself, operands united; new tensors and copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.operators import C, assert_each_for_itself, assert_pinned, collected, units
from torch import Tensor

KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    **{f.__name__: f for f in (F.relu, F.silu, F.gelu, F.mish, F.elu, F.celu, F.selu, F.softplus, F.hardtanh,
                               F.hardswish, F.hardsigmoid, F.relu6, F.leaky_relu, F.softsign, F.tanhshrink, torch.tanh,
                               torch.exp, torch.sqrt, torch.abs, torch.neg, torch.sign, torch.erf, torch.sin,
                               torch.reciprocal, torch.rsqrt, torch.log1p, torch.floor, torch.isnan, torch.square)},
    "dropout": lambda x: F.dropout2d(F.dropout(x, 0.5, True), 0.2, True),
    "scalar": lambda x: (2 - x * 3 / 4 + 1) ** 2,
    "clamp": lambda x: x.clamp(-1, 1).clamp_min(0),
    "in place": lambda x: x.clone().mul_(2).add_(1).relu_(),
    "dtype": lambda x: x.half().float().contiguous(),
    "where": lambda x: torch.where(x > 0, x, torch.zeros(())),
    "ones": lambda x: x * torch.ones_like(x) + torch.zeros(1, C, 1, 1, device="meta"),
    "maximum": lambda x: torch.maximum(x, x * 2).minimum(x),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=2.0),
    "lerp": lambda x: torch.lerp(x, 2 * x, 0.3),
    "widened": lambda x: torch.zeros_like(x) + x,
}


@pytest.mark.parametrize("name", KEPT)
def test_each_channel_for_itself(name: str) -> None:
    assert_each_for_itself(KEPT[name])


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "repeated": lambda g: g.repeat(1, C, 1, 1),
    "side by side": lambda g: torch.cat([g] * C, 1),
    "permuted": lambda g: g.expand(-1, C, -1, -1).permute(0, 2, 3, 1).transpose(1, 3).transpose(2, 3),
    "flattened": lambda g: g.expand(-1, C, -1, -1).flatten(2).unflatten(2, (4, 6)),
    "taken from a stack": lambda g: g.unsqueeze(1).expand(-1, 2, C, -1, -1)[:, 1],
    "halved": lambda g: g.expand(-1, 2 * C, -1, -1).chunk(2, 1)[1],
    "expanded again": lambda g: g[..., :1].expand(-1, C, -1, 1).expand(-1, -1, -1, 6),
    "two of them": lambda g: g.expand(-1, C, -1, -1) * g.exp().repeat(1, C, 1, 1) + g,
    "with ones": lambda g: g.expand(-1, C, -1, -1) + torch.ones(1, C, 1, 1, device="meta"),
    "pooled": lambda g: F.interpolate(F.avg_pool2d(g.expand(-1, C, -1, -1), 2), size=(4, 6)),
}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_that_is_equal_for_all_channels_is_as_wide_as_they_are(name: str) -> None:
    def gated(x: Tensor) -> Tensor:
        gate = GATES[name](torch.arange(48.0, device="meta").view(2, 1, 4, 6))
        assert gate.shape == x.shape
        return gate * x

    assert_each_for_itself(gated)


@pytest.mark.parametrize("gate", [
    lambda g: g.expand(-1, C, -1, -1) * torch.arange(C, device="meta").view(1, C, 1, 1), lambda g: g.repeat(1, C, 1, 1).roll(1),
    lambda g: torch.cat([g, *[g * 2] * (C - 1)], 1), lambda g: g.expand(-1, C, -1, -1).cumsum(1),
    lambda g: g.expand(-1, C, -1, -1).flatten(1).view(2, C, 4, 6)])
def test_a_gate_that_may_differ_between_channels_pins(gate: Callable[[Tensor], Tensor]) -> None:
    assert_pinned(lambda x: gate(torch.arange(48.0, device="meta").view(2, 1, 4, 6)) * x, "operand")


@pytest.mark.parametrize(("function", "pairs"), [
    (lambda x: x[:, :6] + x[:, 6:], [(k, k + 6) for k in range(6)]),
    (lambda x: x * x.flip(1), [(k, 11 - k) for k in range(6)]),
    (lambda x: x.clone().copy_(x.flip(1)), [(k, 11 - k) for k in range(6)]),
])
def test_operands_that_meet_are_united(function: Callable[[Tensor], Any], pairs: list[tuple[int, int]]) -> None:
    find = units(collected(function)[0])
    assert all(find(a) == find(b) for a, b in pairs)
    assert len({find(k) for k in range(C)}) == C - len(pairs)


@pytest.mark.parametrize(("code", "function"), [
    ("operand", lambda x: x + torch.arange(C, dtype=torch.float32, device="meta").view(1, C, 1, 1)),
    ("position", lambda x: torch.zeros_like(x)[:, :4].copy_(x[:, 4:8])),
])
def test_a_tensor_that_cannot_shrink_pins(code: str, function: Callable[[Tensor], Any]) -> None:
    assert_pinned(function, code)


def test_a_copy_carries_what_it_copies() -> None:
    collector, out = collected(lambda x: torch.empty(2, C, 4, 6, device="meta").copy_(x))
    assert collector.of(out).labels[0].ids.reshape(-1).tolist() == list(range(C)) and not collector.pins
