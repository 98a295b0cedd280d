"""plan: options that hold for budgets and rates alike, ties, and how a plan is printed and stored."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import networks, reference
from support.damage import damaged
from support.networks import IMAGES, PATTERNS, chain, unit
from support.plans import NAMES, edited, graph_of, widths

import narrower


def test_a_plan_is_reproducible_and_frozen() -> None:
    graph = graph_of("unet")
    a, b = (narrower.plan(graph, narrower.random(graph, 1), macs=0.5) for _ in range(2))
    assert a.to_json() == b.to_json()
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.macs = (1, 1)  # type: ignore[misc]


@pytest.mark.parametrize("request_", [{"remove": 0.4}, {"macs": 0.5}, {"params": 0.4}])
def test_round_to_gives_multiples(request_: dict[str, Any]) -> None:
    model = chain(unit(3, 16), unit(16, 24), networks.Residual(24, 32, 24), networks.Head(24))
    graph = narrower.trace(model, IMAGES)
    for multiple in (2, 4, 8):
        plan = narrower.plan(graph, narrower.random(graph), round_to=multiple, **request_)
        assert all(w % multiple == 0 for w in widths(plan).values()), widths(plan)
        assert sum(widths(plan).values()) < sum(g.size for g in graph.free)
    odd = narrower.plan(graph_of("plain"), narrower.random(graph_of("plain")), round_to=4, **request_)
    assert all(w % 4 == 0 or w == graph_of("plain")[n].size for n, w in widths(odd).items()), widths(odd)


def test_excluded_groups_stay_whole_and_min_channels_stay() -> None:
    graph = graph_of("residual")
    scores = narrower.random(graph)
    for exclude in ("1.*", ["1.*"], ("1.conv1.0", "0.0")):
        plan = narrower.plan(graph, scores, macs=0.8, exclude=exclude)
        assert widths(plan)["1.conv1.0"] == 6 and widths(plan)["0.0"] == 8
    del scores["1.conv1.0"]
    assert narrower.plan(graph, scores, macs=0.8, exclude=["1.conv1.0"]).keep["1.conv1.0"].tolist() == list(range(6))
    least = narrower.plan(graph, narrower.random(graph), remove=0.9, min_channels=5)
    assert set(widths(least).values()) == {5}
    least = narrower.plan(graph, narrower.random(graph), macs=0.5, min_channels=5)
    assert min(widths(least).values()) >= 5


@pytest.mark.parametrize("request_", [{"remove": 0.95}, {"macs": 0.3}])
@pytest.mark.parametrize("share", [0.3, np.float32(0.5)])
def test_below_one_min_channels_is_a_share_of_each_group_rounded_up(share: Any, request_: dict[str, Any]) -> None:
    graph = graph_of("residual")
    found = widths(narrower.plan(graph, narrower.random(graph), min_channels=share, **request_))
    least = {name: math.ceil(graph[name].size * share) for name in found}
    assert all(found[name] >= least[name] for name in found) and ("macs" in request_ or found == least)


@pytest.mark.parametrize("request_", [{"remove": 0.37}, {"macs": 0.5}, {"macs": 0.3}, {"params": 0.7}])
@pytest.mark.parametrize("name", ["grouped", "shuffle", "transposed"])
def test_parts_that_must_stay_equal_do(name: str, request_: dict[str, Any]) -> None:
    graph = graph_of(name)
    assert graph.ties
    plan = narrower.plan(graph, narrower.random(graph, 2), **request_)
    for tie in graph.ties:
        counts = {sum(int(np.isin(c, plan.keep[g]).sum()) for g, c in block.items() if graph[g].free) for block in tie.blocks}
        assert len(counts) == 1
    assert sum(widths(plan).values()) < sum(g.size for g in graph.free)


def test_a_plan_that_breaks_a_tie_is_refused() -> None:
    graph = graph_of("grouped")
    plan = narrower.plan(graph, narrower.random(graph), remove=0.5)
    with pytest.raises(narrower.PlanError, match=r"equally many"):
        edited(plan, "0.0", plan.keep["0.0"].tolist()[:-1])


def test_a_plan_prints_its_table() -> None:
    graph = graph_of("option_a")
    plan = narrower.plan(graph, narrower.random(graph), remove=0.5)
    text = str(plan)
    lines = text.splitlines()
    assert re.search(r"^0\.0 +6 +3 ", text, re.MULTILINE)
    assert "zero-padded" in text and "network output" in text
    assert len([line for line in lines if line.split() and line.split()[0] in graph.by_name]) == len(graph)
    assert f"{plan.macs[1]:,.0f}" in lines[-1] and f"{plan.params[1] / plan.params[0]:.1%}" in lines[-1]


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_of_a_plan_add_up_to_its_costs(name: str) -> None:
    """Also where a layer makes channels of several groups."""
    graph = graph_of(name)
    plan = narrower.plan(graph, narrower.random(graph), remove={"*": 0.4})
    macs = [[float(text.replace(",", "")) for text in row[3:5]] for row in plan.rows[1:]]
    assert np.sum(macs, axis=0) == pytest.approx(plan.macs, abs=0.5 * len(macs))
    assert plan._repr_html_().count("<tr>") == len(plan.rows) and plan.summary in str(plan)


@pytest.mark.parametrize("name", NAMES)
def test_json_gives_the_plan_back(name: str) -> None:
    graph = graph_of(name)
    plan = narrower.plan(graph, narrower.random(graph), remove={"*": 0.4})
    again = narrower.Plan.from_json(plan.to_json(), graph)
    assert again.macs == plan.macs and again.params == plan.params and again.request == plan.request
    assert all(np.array_equal(again.keep[n], plan.keep[n]) for n in plan.keep)
    assert again.to_json() == plan.to_json()


def test_json_of_another_network_or_version_is_refused() -> None:
    graph = graph_of("plain")
    plan = narrower.plan(graph, narrower.random(graph), remove=0.5)
    with pytest.raises(narrower.PlanError, match="another network"):
        narrower.Plan.from_json(plan.to_json(), graph_of("unet"))
    data = json.loads(plan.to_json())
    with pytest.raises(narrower.PlanError, match="format"):
        narrower.Plan.from_json(json.dumps({**data, "format": 99}), graph)


@pytest.mark.parametrize("value", [None, "6", [None], {"a": 1}, 6.5, True, -1])
@pytest.mark.parametrize("key", ["groups", "keep"])
def test_json_with_a_wrong_value_is_refused(key: str, value: Any) -> None:
    graph = graph_of("plain")
    data = json.loads(narrower.plan(graph, narrower.random(graph), remove=0.5).to_json())
    for damage in (value, {**data[key], "conv1": value}, {**data[key], "x": value}):
        with pytest.raises(narrower.PlanError):
            narrower.Plan.from_json(json.dumps({**data, key: damage}), graph)


@given(st.data())
def test_a_damaged_plan_is_a_plan_error_or_a_plan(draw: st.DataObject) -> None:
    graph = graph_of("grouped")
    valid = narrower.plan(graph, narrower.random(graph), remove=0.5).to_json()
    text = json.dumps(damaged(json.loads(valid), draw))
    if draw.draw(st.booleans()):
        cut = draw.draw(st.integers(0, len(text)))
        text = text[:cut]
    try:
        plan = narrower.Plan.from_json(text, graph)
    except narrower.PlanError as e:
        assert str(e)
        return
    for g in graph.free:
        kept = plan.keep[g.name]
        assert len(kept) and (np.diff(kept) > 0).all() and kept[0] >= 0 and kept[-1] < g.size
    reference.exact(PATTERNS["grouped"].make(), plan, IMAGES)
    json.loads(plan.to_json())
    str(plan)
