"""Costs in closed form against counting on real networks."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from support.networks import IMAGES, PATTERNS, Plain
from torch import nn

import narrower
from narrower.graph.cost import CostModel, RunningCost

NAMES = ["plain", "residual", "dense", "depthwise", "grouped", "chunked", "unet", "transposed", "flattened", "gated", "shared"]


@lru_cache
def graph_of(name: str) -> narrower.Graph:
    return narrower.trace(PATTERNS[name].make(), PATTERNS[name].inputs)


def test_by_hand() -> None:
    graph = narrower.trace(Plain(), IMAGES)
    dense = {"conv1.weight": 64 * 3 * 10 * 9, "conv2.weight": 64 * 10 * 14 * 9, "conv3.weight": 4 * 14 * 12 * 9,
             "fc.weight": 12 * 5}
    model = CostModel(graph)
    assert model.by_tensor("macs", model.dense) == pytest.approx(dense)
    assert model.cost("macs", model.dense) == sum(dense.values())
    w = np.array([4.0, 7.0, 3.0])
    assert model.names == ["conv1", "conv2", "conv3"]
    assert model.cost("macs", w) == 64 * 3 * 4 * 9 + 64 * 4 * 7 * 9 + 4 * 7 * 3 * 9 + 3 * 5
    assert model.cost("params", w) == (27 + 1 + 2) * 4 + (36 + 1) * 7 + (63 + 2) * 3 + 3 * 5 + 5


def test_macs_are_those_of_one_sample() -> None:
    few, many = (narrower.trace(Plain(), IMAGES[:n]) for n in (1, 4))
    assert few.uses == many.uses


@pytest.mark.parametrize("name", NAMES)
def test_dense_costs_are_those_counted(name: str) -> None:
    case = PATTERNS[name]
    net, model = case.make(), CostModel(graph_of(name))
    assert model.cost("params", model.dense) == reference.params(net)
    assert model.cost("macs", model.dense) == pytest.approx(reference.macs(net, case.inputs))
    for kind in ("macs", "params"):
        parts = model.by_tensor(kind, model.dense)
        assert sum(parts.values()) == pytest.approx(model.cost(kind, model.dense))


@given(st.sampled_from(NAMES), st.data())
def test_steps_add_up_to_the_whole(name: str, data: st.DataObject) -> None:
    """The running cost of any walk is the closed form at its end, and every step's saving is the difference."""
    model = CostModel(graph_of(name))
    running = RunningCost(model, ("macs", "params"))
    for _ in range(data.draw(st.integers(1, 12))):
        step = np.array([data.draw(st.integers(0, min(2, int(w) - 1))) for w in running.widths], dtype=np.float64)
        if not step.any():
            continue
        back = data.draw(st.booleans()) and (running.widths + step <= model.dense).all()
        before, saved = dict(running.now), running.saved(-step if back else step)
        running.move(-step if back else step)
        for kind in running.kinds:
            assert running.now[kind] == pytest.approx(model.cost(kind, running.widths), rel=1e-9)
            assert before[kind] - saved[kind] == pytest.approx(running.now[kind], rel=1e-9)
    assert sum(model.by_tensor("macs", running.widths).values()) == pytest.approx(running.now["macs"], rel=1e-9)


def test_a_network_without_a_free_group_still_has_a_cost() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    graph = narrower.trace(net, IMAGES)
    model = CostModel(graph)
    assert not graph.free and model.cost("macs", model.dense) == 36 * 3 * 4 * 9 == reference.macs(net, IMAGES)
    assert model.cost("params", torch.zeros(0).numpy()) == 3 * 4 * 9 + 4
