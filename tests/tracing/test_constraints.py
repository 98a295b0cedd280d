"""What the collector notes of a dense forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.operators import C, collected
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from narrower.tracing import constraints
from narrower.tracing.constraints import ConstraintCollector
from narrower.tracing.labels import Axes, Axis
from narrower.tracing.recorder import CARRIED


def forward(*layers: nn.Module) -> ConstraintCollector:
    model = nn.Sequential(*layers).to("meta").eval()
    with torch.no_grad(), ConstraintCollector(model, Axes(), {}) as collector:
        model(torch.empty(2, 3, 8, 8, device="meta"))
    return collector


def test_steps_name_parameters_and_number_activations() -> None:
    collector = forward(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1, bias=False))
    steps = [s for s in collector.steps if s.name != "empty"]
    convolution, relu, last = steps
    assert convolution.inputs[1:3] == ("0.weight", "0.bias") and last.inputs[1:3] == ("2.weight", None)
    assert relu.inputs == convolution.outputs and last.inputs[0] == relu.outputs[0] and all(s.labelled for s in steps)


def test_the_module_that_returns_an_activation_is_known() -> None:
    collector = forward(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.ReLU())
    convolution, relu = (s for s in collector.steps if s.name != "empty")
    assert collector.returned[convolution.outputs[0]] == "0.0" and collector.returned[relu.outputs[0]] == "1"
    assert [e.module for e in collector.log if e.name != "empty"] == ["0.0", "1"]


def test_hooks_are_removed_even_if_the_forward_fails() -> None:
    before = len(_global_forward_hooks), len(_global_forward_pre_hooks)
    with pytest.raises(RuntimeError):
        forward(nn.Conv2d(5, 4, 1))
    assert (len(_global_forward_hooks), len(_global_forward_pre_hooks)) == before


def test_ids_that_meet_are_noted_in_pairs() -> None:
    collector, _ = collected(lambda x: x[:, :6] + x[:, 6:])
    [(a, b)] = collector.pairs
    assert {*a.tolist(), *b.tolist()} == set(range(C)) and np.array_equal(np.abs(a - b), np.full(6, 6))


def test_a_view_that_splits_channels_shrinks_in_the_dimension_that_was_chosen() -> None:
    def split(x: Tensor) -> Tensor:
        return x.view(2, 3, 4, 4, 6)

    collector, out = collected(split)
    [(dims, _, where)] = collector.splits.values()
    assert dims == (1, 2) and collector.of(out).labels[0].free == 2
    axes = Axes()
    axes.ids(Axis("x", 1), C)
    other = ConstraintCollector(nn.Identity(), axes, {where: 1})
    x = torch.empty(2, C, 4, 6, device="meta")
    setattr(x, CARRIED, collector.log[0].inputs[0])
    with torch.no_grad(), other:
        assert other.of(split(x)).labels[0].free == 1


def test_numbers_that_no_layer_has_as_channels_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "MANY", C - 1)
    collector, _ = collected(lambda x: x.view(2, 3, 4, 4, 6))
    assert not collector.ties and [r.code for _, r in collector.pins] == ["position"]


def maps(*layers: nn.Module) -> list[tuple[int | None, int]]:
    return [(number, pool) for number, pool, _ in forward(*layers).maps.values()]


def test_a_map_is_seen_at_the_convolution_that_reads_it() -> None:
    assert maps(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1)) == [(1, -1)]


def test_behind_a_pooling_the_map_is_the_one_that_enters_it() -> None:
    assert maps(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(4, 5, 1)) == [(None, 0)]
    assert maps(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)) == [(None, 0)]


def test_where_poolings_follow_each_other_the_map_enters_the_last() -> None:
    first, last = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
    assert maps(nn.Conv2d(3, 4, 1), first, nn.ReLU(), last, nn.Conv2d(4, 5, 1)) == [(None, 1)]


def test_a_pooling_of_single_pixels_leaves_the_maps_those_of_the_pooling_before() -> None:
    first, last = nn.AdaptiveMaxPool2d(1), nn.AdaptiveAvgPool2d(1)
    assert maps(nn.Conv2d(3, 4, 1), first, nn.ReLU(), last, nn.Conv2d(4, 5, 1)) == [(None, 0)]
