"""Functions of one tensor, run under a collector, for the tests of the operators' rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from narrower.tracing.constraints import ConstraintCollector
from narrower.tracing.labels import Axes, Axis, Carried, Label, along
from narrower.tracing.recorder import CARRIED

C = 12


def collected(function: Callable[[Tensor], Any], shape: tuple[int, ...] = (2, C, 4, 6),
              free: int = 1) -> tuple[ConstraintCollector, Any]:
    """Run a function on a meta tensor whose channels along `free` have the ids 0..size."""
    axes = Axes()
    axes.ids(Axis("x", free), shape[free])
    collector = ConstraintCollector(nn.Identity(), axes, {})
    x = torch.empty(shape, device="meta")
    setattr(x, CARRIED, Carried((Label(along(np.arange(shape[free]), len(shape), free), free),)))
    with torch.no_grad(), collector:
        return collector, function(x)


def units(collector: ConstraintCollector) -> Callable[[int], int]:
    """A representative of all ids that have been united with an id."""
    parent = list(range(collector.axes.total))

    def find(k: int) -> int:
        while parent[k] != k:
            k = parent[k]
        return k

    for a, b in collector.pairs:
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            parent[find(x)] = find(y)
    return find


def pinned(collector: ConstraintCollector) -> set[int]:
    return {int(k) for ids, _ in collector.pins for k in ids}


def codes(collector: ConstraintCollector) -> set[str]:
    return {reason.code for _, reason in collector.pins}


def assert_moved(function: Callable[[Tensor], Tensor], shape: tuple[int, ...] = (2, C, 4, 6), free: int = 1) -> None:
    """The label of the output, written out, is the same movement of the ids, up to those that were united."""
    collector, out = collected(function, shape, free)
    x = torch.arange(shape[free]).view([-1 if d == free else 1 for d in range(len(shape))]).expand(shape)
    want = function(x.float()).long()
    carried = collector.of(out)
    find = units(collector)
    if not carried.labels:
        gone = {find(int(k)) for k in want.unique()}
        assert len(gone) == 1 or gone <= {find(k) for k in pinned(collector)}, "channels were lost without a pin"
        return
    assert tuple(out.shape) == tuple(want.shape)
    ids = np.broadcast_to(carried.labels[0].ids, tuple(want.shape)).reshape(-1)
    assert [find(int(a)) for a in ids] == [find(int(b)) for b in want.reshape(-1)]


def assert_each_for_itself(function: Callable[[Tensor], Any]) -> None:
    """Every channel comes out as it went in, and nothing is said of any of them."""
    collector, out = collected(function)
    label = collector.of(out).labels[0]
    find = units(collector)
    assert label.ids.reshape(-1).tolist() == list(range(C)) and out.shape[label.free] == C
    assert not collector.pins and not collector.mixers and not collector.ties and len({find(k) for k in range(C)}) == C


def assert_mixed(function: Callable[[Tensor], Any]) -> None:
    """All channels are mixed, and none is pinned."""
    collector, _ = collected(function)
    assert collector.mixers and {int(k) for k in collector.mixers[0][-1]} == set(range(C)) and not collector.pins


def assert_pinned(function: Callable[[Tensor], Any], code: str) -> None:
    """Channels are pinned, with a code, a text and a place."""
    collector, _ = collected(function)
    assert pinned(collector) and codes(collector) == {code}
    assert all(reason.text and reason.where for _, reason in collector.pins)
