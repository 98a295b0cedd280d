"""Convolutions: what they read meets the weight's read channels; what they make comes from the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import reference
from support.networks import IMAGES, Trap
from support.operators import C, assert_pinned, collected
from torch import Tensor, nn

import narrower
from narrower.tracing.constraints import ConstraintCollector
from narrower.tracing.labels import Axes, Axis


def run(*layers: nn.Module, channels: int = 4) -> tuple[ConstraintCollector, Any]:
    """A forward through layers, under a collector."""
    model = nn.Sequential(*layers).to("meta").eval()
    collector = ConstraintCollector(model, Axes(), {})
    with torch.no_grad(), collector:
        return collector, model(torch.empty(2, channels, 8, 8, device="meta"))


def ids(collector: ConstraintCollector, tensor: str, dim: int) -> list[int]:
    start, size = collector.axes.start[Axis(tensor, dim)], collector.axes.size[Axis(tensor, dim)]
    return list(range(start, start + size))


def united(collector: ConstraintCollector) -> set[tuple[int, int]]:
    return {(min(a, b), max(a, b)) for x, y in collector.pairs for a, b in zip(x.tolist(), y.tolist(), strict=True) if a != b}


def test_a_convolution_unites_what_it_reads_with_its_weight() -> None:
    collector, out = run(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 5, 1, bias=False))
    made, read = ids(collector, "0.weight", 0), ids(collector, "1.weight", 1)
    assert united(collector) >= set(zip(made, read, strict=True))
    assert collector.of(out).labels[0].ids.reshape(-1).tolist() == ids(collector, "1.weight", 0)
    assert {(Axis("1.weight", 1), "in"), (Axis("1.weight", 0), "out")} <= collector.roles


def test_macs_are_those_of_the_closed_form() -> None:
    collector, _ = run(nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 5, 1), nn.ConvTranspose2d(5, 3, 2, stride=2))
    assert collector.macs == {"0.weight": 2 * 64 * 6 * 4 * 9, "1.weight": 2 * 64 * 5 * 6, "2.weight": 2 * 64 * 5 * 3 * 4}


def test_depthwise_filters_go_with_what_they_read() -> None:
    collector, _ = run(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, groups=6, bias=False))
    assert united(collector) >= set(zip(ids(collector, "0.weight", 0), ids(collector, "1.weight", 0), strict=True))
    assert not collector.ties and collector.depthwise_calls


def test_groups_keep_equally_many() -> None:
    collector, _ = run(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 8, 3, groups=2))
    assert [t.shape for t in collector.ties] == [(2, 3), (2, 4)]


@pytest.mark.parametrize("function", [
    lambda x: F.conv2d(x, torch.zeros(5, C, 1, 1, device="meta")),
    lambda x: F.conv2d(x, torch.arange(9.0 * C, device="meta").view(C, 1, 3, 3), groups=C),
])
def test_a_weight_that_cannot_shrink_pins(function: Callable[[Tensor], Any]) -> None:
    assert_pinned(function, "operand")


@pytest.mark.parametrize("filters", [
    lambda kernel: kernel.expand(C, 1, 3, 3), lambda kernel: kernel.repeat(C, 1, 1, 1),
    lambda kernel: torch.ones(C, 1, 3, 3, device="meta")])
def test_the_same_filter_for_every_channel_is_as_wide_as_they_are(filters: Callable[[Tensor], Tensor]) -> None:
    collector, out = collected(lambda x: F.conv2d(x, filters(torch.zeros(1, 1, 3, 3, device="meta")), groups=C))
    assert collector.of(out).labels[0].ids.reshape(-1).tolist() == list(range(C)) and not collector.pins


def test_the_same_filters_for_every_channel_make_several_of_each() -> None:
    collector, out = collected(lambda x: F.conv2d(x, torch.zeros(1, 1, 3, 3, device="meta").expand(2 * C, 1, 3, 3), groups=C))
    assert collector.of(out).labels[0].ids.reshape(-1).tolist() == [k // 2 for k in range(2 * C)]


def test_filters_of_which_some_are_written_are_not_the_same() -> None:
    def written(x: Tensor) -> Tensor:
        kernel = torch.zeros(1, 1, 3, 3, device="meta").expand(C, 1, 3, 3).clone()
        kernel[:4] *= 2
        return F.conv2d(x, kernel, groups=C)

    assert_pinned(written, "operand")


def test_a_convolution_along_the_channels_pins() -> None:
    assert_pinned(lambda x: F.conv2d(x.transpose(1, 2), torch.zeros(5, 4, 3, 3, device="meta")), "position")


def test_a_kernel_of_one_row_over_the_channels_mixes_them() -> None:
    """As in efficient channel attention, where channels are laid along space."""
    collector, _ = collected(lambda x: F.conv1d(x.mean((2, 3)).unsqueeze(1), torch.zeros(1, 1, 3, device="meta"), padding=1))
    assert [m[0] for m in collector.mixers] == ["convolution"] and not collector.pins


def deformed(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.conv(x, m.offset(x), torch.sigmoid(m.mask(x)) if hasattr(m, "mask") else None))


@pytest.mark.parametrize(("out", "groups", "offset_groups", "masked", "ties"), [
    (7, 1, 1, True, []), (8, 4, 2, False, [(2, 6), (4, 3), (4, 2)]), (12, 12, 3, True, [(3, 4)]), (24, 12, 1, True, [])])
def test_deformable_convolutions_read_as_others_and_keep_their_offsets(
        out: int, groups: int, offset_groups: int, masked: bool, ties: list[tuple[int, int]]) -> None:
    ops = pytest.importorskip("torchvision.ops")
    held = {"conv": ops.DeformConv2d(12, out, 3, padding=1, groups=groups), "offset": nn.Conv2d(12, 18 * offset_groups, 1)}
    if masked:
        held["mask"] = nn.Conv2d(12, 9 * offset_groups, 1)
    model = Trap(deformed, out, **held).eval()
    graph = narrower.trace(model, IMAGES)
    fixed = {g.name: g.pinned.code for g in graph if g.pinned and g.pinned.code != "output"}
    assert fixed == {f"trick.{n}": "position" for n in held if n != "conv"}
    made = {} if groups == 12 else {"trick.conv": out}
    assert {g.name: g.size for g in graph.free} == {"stem.0": 12, **made, "next.0": 9}
    assert sorted((len(t.blocks), sum(map(len, t.blocks[0].values()))) for t in graph.ties) == sorted(ties)
    for seed in range(2):
        plan = narrower.plan(graph, narrower.random(graph, seed=seed), remove=0.5)
        reference.exact(model, plan, IMAGES)
        narrower.verify(model, narrower.narrow(model, plan), plan, IMAGES)


def test_a_deformable_convolution_along_the_channels_pins() -> None:
    ops = pytest.importorskip("torchvision.ops")
    assert_pinned(lambda x: ops.deform_conv2d(x.transpose(1, 2), torch.zeros(2, 18, C, 6, device="meta"),
                                              torch.zeros(5, 4, 3, 3, device="meta"), padding=1), "operator")
