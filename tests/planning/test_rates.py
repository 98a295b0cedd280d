"""Rates take their share of each group."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.networks import IMAGES, Head, chain, unit
from support.plans import graph_of, widths

import narrower
from narrower.planning.rates import rate_by_group, spread


@given(st.floats(0.01, 0.999))
def test_a_rate_takes_its_share_of_each_group_and_leaves_one(rate: float) -> None:
    graph = graph_of("unet")
    plan = narrower.plan(graph, narrower.random(graph), remove=rate)
    for g in graph.free:
        assert len(plan.keep[g.name]) == max(1, g.size - math.floor(rate * g.size + 1e-9))


@pytest.mark.parametrize("name", ["grouped", "regrouped", "shuffle", "chunked", "transposed"])
@given(rate=st.floats(0.01, 0.9), round_to=st.integers(2, 8))
def test_tied_widths_are_multiples_or_whole(name: str, rate: float, round_to: int) -> None:
    graph = graph_of(name)
    plan = narrower.plan(graph, narrower.random(graph), remove=rate, round_to=round_to)
    assert not {n: w for n, w in widths(plan).items() if w % round_to and w != graph[n].size}


def test_the_widths_of_a_grouped_convolution_are_multiples_of_both_numbers() -> None:
    graph = narrower.trace(chain(unit(3, 48), unit(48, 48, groups=6), Head(48)), IMAGES)
    for rate, width in ((0.35, 48), (0.5, 24), (0.6, 24)):
        plan = narrower.plan(graph, narrower.random(graph), remove=rate, round_to=8)
        assert widths(plan) == {"0.0": width, "1.0": width}
    assert set(widths(narrower.plan(graph, narrower.random(graph), remove=0.35, round_to=4)).values()) == {36}


def test_rates_by_pattern_apply_to_groups_and_layers() -> None:
    graph = graph_of("residual")
    scores = narrower.random(graph)
    plan = narrower.plan(graph, scores, remove={"*": 0.5, "2.*": 0.0, "2.conv1*": 0.8})
    assert widths(plan) == {"0.0": 4, "1.conv1.0": 3, "2.conv1.0": 2, "2.conv2.0": 14}
    by_layer = narrower.plan(graph, scores, remove={"1.conv2.0": 0.25})
    assert widths(by_layer) == {"0.0": 6, "1.conv1.0": 6, "2.conv1.0": 10, "2.conv2.0": 14}, "1.conv2 writes into 0.0's group"


def test_of_several_patterns_the_last_that_matches_counts() -> None:
    rates = rate_by_group(graph_of("residual"), {"*": 0.5, "2.*": 0.0, "2.conv1*": 0.8})
    assert rates == {"0.0": 0.5, "1.conv1.0": 0.5, "2.conv1.0": 0.8, "2.conv2.0": 0.0}
    assert set(rate_by_group(graph_of("residual"), 0.3).values()) == {0.3}


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2, "half"])
def test_a_rate_is_a_fraction(rate: Any) -> None:
    with pytest.raises(narrower.PlanError, match="fraction between 0 and 1"):
        rate_by_group(graph_of("plain"), {"*": rate})


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 9)), min_size=1, max_size=6), st.data())
def test_losses_are_spread_over_cells_in_proportion_to_size(cells: list[tuple[str, int]], draw: st.DataObject) -> None:
    groups, sizes = [g for g, _ in cells], np.array([n for _, n in cells])
    totals = {g: sum(n for h, n in cells if h == g) for g in groups}
    wanted = {g: draw.draw(st.integers(0, n)) for g, n in totals.items()}
    out = spread(groups, sizes, wanted)
    for g, n in wanted.items():
        assert sum(int(k) for h, k in zip(groups, out, strict=True) if h == g) == n
    exact = np.array([size * wanted[g] / totals[g] for g, size in cells])
    assert (np.abs(out - exact) < 1).all() and (out <= sizes).all()

