"""plan: budgets are met and used up, requests are followed, and what cannot be is said."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import networks, reference
from support.damage import damaged
from support.networks import IMAGES, PATTERNS, chain, unit

import narrower
from narrower.graph.equal_counts import components

NAMES = ["plain", "residual", "dense", "depthwise", "grouped", "regrouped", "squeeze_excite", "shuffle", "chunked", "unet",
         "transposed", "volume", "tokens", "shared"]
GRAPHS: dict[str, narrower.Graph] = {}


def graph_of(name: str) -> narrower.Graph:
    if name not in GRAPHS:
        GRAPHS[name] = narrower.trace(PATTERNS[name].make(), PATTERNS[name].inputs)
    return GRAPHS[name]


def widths(plan: narrower.Plan) -> dict[str, int]:
    return {g.name: len(plan.keep[g.name]) for g in plan.graph.free}


def asked(kind: str, value: float) -> dict[str, Any]:
    return {kind: value}


def edited(plan: narrower.Plan, name: str, kept: list[int]) -> narrower.Plan:
    """The plan with other channels kept in one group, its costs counted anew."""
    data = json.loads(plan.to_json())
    data["keep"][name] = kept
    return narrower.Plan.from_json(json.dumps(data), plan.graph)


# ------------------------------------------------------------------------------------------------ budgets


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_met_and_the_prediction_is_what_is_counted(name: str, kind: str) -> None:
    case = PATTERNS[name]
    model = case.make()
    graph = graph_of(name)
    for fraction in (0.35, 0.5, 0.87):
        plan = narrower.plan(graph, narrower.random(graph), **asked(kind, fraction))
        dense, narrow = getattr(plan, kind)
        assert narrow <= fraction * dense
        small = narrower.narrow(model, plan)
        assert (reference.params(model), reference.params(small)) == plan.params
        counted = reference.macs(model, case.inputs), reference.macs(small, case.inputs)
        assert counted == pytest.approx(plan.macs, rel=1e-12)


@pytest.mark.parametrize("round_to", [1, 2])
@pytest.mark.parametrize("name", ["plain", "residual", "dense", "depthwise", "squeeze_excite", "unet", "volume"])
def test_nothing_that_was_removed_fits_back(name: str, round_to: int) -> None:
    graph = graph_of(name)
    for fraction in (0.4, 0.6, 0.8):
        scores = narrower.random(graph, seed=int(10 * fraction))
        plan = narrower.plan(graph, scores, macs=fraction, params=0.9, round_to=round_to)
        tried = 0
        for g in graph.free:
            kept = set(plan.keep[g.name].tolist())
            gone = sorted(set(range(g.size)) - kept, key=lambda c: -float(scores[g.name][c]))
            step = round_to if len(kept) % round_to == 0 else 1
            if step <= len(gone):
                more = edited(plan, g.name, sorted(kept | set(gone[:step])))
                assert more.macs[1] > fraction * more.macs[0] or more.params[1] > 0.9 * more.params[0], g.name
                tried += 1
        assert tried


@pytest.mark.parametrize("name", ["grouped", "regrouped", "shuffle", "chunked", "transposed", "selective"])
def test_nothing_fits_back_where_parts_stay_equal(name: str) -> None:
    """The smallest steps that keep the parts equal, each tried with the best of the channels that are gone."""
    graph = graph_of(name)
    for fraction in (0.4, 0.55, 0.7, 0.85):
        scores = narrower.random(graph, seed=int(100 * fraction))
        plan = narrower.plan(graph, scores, macs=fraction)
        for part in components(graph):
            gone = [[c for c in cell.channels.tolist() if c not in plan.keep[cell.group]] for cell in part.cells]
            for move in part.moves():
                if any(n > len(g) for n, g in zip(move, gone, strict=True)):
                    continue
                data = json.loads(plan.to_json())
                for cell, n, lost in zip(part.cells, move.tolist(), gone, strict=True):
                    back = sorted(lost, key=lambda c: -float(scores[cell.group][c]))[:n]
                    data["keep"][cell.group] = sorted(data["keep"][cell.group] + back)
                more = narrower.Plan.from_json(json.dumps(data), graph)
                assert more.macs[1] > fraction * more.macs[0], (part.cells[0].group, fraction)


@pytest.mark.parametrize("name", ["plain", "residual", "unet"])
def test_the_highest_scores_stay(name: str) -> None:
    graph = graph_of(name)
    scores = narrower.random(graph, seed=3)
    for request in ({"macs": 0.5}, {"remove": 0.6}):
        plan = narrower.plan(graph, scores, **request)  # type: ignore[arg-type]
        for g in graph.free:
            gone = np.setdiff1d(np.arange(g.size), plan.keep[g.name])
            if len(gone):
                assert scores[g.name][gone].max() < scores[g.name][plan.keep[g.name]].min()


def test_absolute_numbers_are_fractions_of_the_dense_network() -> None:
    graph = graph_of("unet")
    scores = narrower.random(graph)
    by_fraction = narrower.plan(graph, scores, macs=0.5)
    by_number = narrower.plan(graph, scores, macs=0.5 * by_fraction.macs[0])
    assert widths(by_fraction) == widths(by_number)
    both = narrower.plan(graph, scores, macs=0.7, params=0.3)
    assert both.macs[1] <= 0.7 * both.macs[0] and both.params[1] <= 0.3 * both.params[0]


@given(st.floats(0.25, 0.99), st.sampled_from(["macs", "params"]), st.sampled_from(NAMES), st.integers(0, 99),
       st.sampled_from([1, 1, 2, 4]), st.integers(1, 3))
def test_any_budget(fraction: float, kind: str, name: str, seed: int, round_to: int, least: int) -> None:
    graph = graph_of(name)
    try:
        scores = narrower.random(graph, seed)
        plan = narrower.plan(graph, scores, round_to=round_to, min_channels=least, **asked(kind, fraction))
    except narrower.BudgetError:
        return
    dense, narrow = getattr(plan, kind)
    assert 0 < narrow <= fraction * dense * (1 + 1e-12)
    for g in graph.free:
        kept = plan.keep[g.name]
        assert len(kept) >= min(least, g.size) and (np.diff(kept) > 0).all() and kept[0] >= 0 and kept[-1] < g.size


def test_units_of_the_scores_do_not_matter() -> None:
    graph = graph_of("residual")
    scores = narrower.random(graph)
    scaled = narrower.Scores({n: s * 10.0 ** k for k, (n, s) in enumerate(scores.items())})
    a, b = (narrower.plan(graph, s, macs=0.5) for s in (scores, scaled))
    assert widths(a) == widths(b)


def test_a_group_of_equally_important_channels_loses_less_than_one_with_idle_ones() -> None:
    graph = graph_of("plain")
    scores = narrower.Scores({g.name: torch.ones(g.size) for g in graph.free})
    scores["conv2"] = torch.cat([torch.full((7,), 1e-6), torch.ones(7)])
    plan = narrower.plan(graph, scores, macs=0.55)
    assert plan.keep["conv2"].tolist() == list(range(7, 14))


@pytest.mark.parametrize("values", ["zero", "negative", "equal", "integers"])
def test_odd_but_legal_scores(values: str) -> None:
    graph = graph_of("plain")
    make: Any = {"zero": torch.zeros, "negative": lambda n: -torch.arange(n).float(), "equal": torch.ones,
            "integers": lambda n: torch.arange(n)}[values]
    scores = narrower.Scores({g.name: make(g.size) for g in graph.free})
    plan = narrower.plan(graph, scores, macs=0.5)
    assert plan.macs[1] <= 0.5 * plan.macs[0]
    if values == "negative":
        assert plan.keep["conv2"].tolist() == list(range(len(plan.keep["conv2"])))


def test_a_plan_is_reproducible_and_frozen() -> None:
    graph = graph_of("unet")
    a, b = (narrower.plan(graph, narrower.random(graph, 1), macs=0.5) for _ in range(2))
    assert a.to_json() == b.to_json()
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.macs = (1, 1)  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------ rates


@given(st.floats(0.01, 0.999))
def test_a_rate_takes_its_share_of_each_group_and_leaves_one(rate: float) -> None:
    graph = graph_of("unet")
    plan = narrower.plan(graph, narrower.random(graph), remove=rate)
    for g in graph.free:
        assert len(plan.keep[g.name]) == max(1, g.size - math.floor(rate * g.size + 1e-9))


def test_rates_by_pattern() -> None:
    graph = graph_of("residual")
    scores = narrower.random(graph)
    plan = narrower.plan(graph, scores, remove={"*": 0.5, "2.*": 0.0, "2.conv1*": 0.8})
    assert widths(plan) == {"0.0": 4, "1.conv1.0": 3, "2.conv1.0": 2, "2.conv2.0": 14}
    by_layer = narrower.plan(graph, scores, remove={"1.conv2.0": 0.25})
    assert widths(by_layer) == {"0.0": 6, "1.conv1.0": 6, "2.conv1.0": 10, "2.conv2.0": 14}, "1.conv2 writes into 0.0's group"


@pytest.mark.parametrize("request_", [{"remove": 0.4}, {"macs": 0.5}, {"params": 0.4}])
def test_round_to(request_: dict[str, Any]) -> None:
    model = chain(unit(3, 16), unit(16, 24), networks.Residual(24, 32, 24), networks.Head(24))
    graph = narrower.trace(model, IMAGES)
    for multiple in (2, 4, 8):
        plan = narrower.plan(graph, narrower.random(graph), round_to=multiple, **request_)
        assert all(w % multiple == 0 for w in widths(plan).values()), widths(plan)
        assert sum(widths(plan).values()) < sum(g.size for g in graph.free)
    odd = narrower.plan(graph_of("plain"), narrower.random(graph_of("plain")), round_to=4, **request_)
    assert all(w % 4 == 0 or w == graph_of("plain")[n].size for n, w in widths(odd).items()), widths(odd)


def test_exclude_and_min_channels() -> None:
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


# ------------------------------------------------------------------------------------------------ ties


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


# ------------------------------------------------------------------------------------------------ out of reach


LEAST = re.compile(r"the least is ([\d,]+)")


@pytest.mark.parametrize("options", [{}, {"min_channels": 3}, {"round_to": 4}, {"exclude": "first"}])
@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("name", ["plain", "residual", "grouped", "unet", "shuffle", "option_a"])
def test_an_unreachable_budget_names_the_least_and_that_can_be_reached(name: str, kind: str, options: dict[str, Any]) -> None:
    graph = graph_of(name)
    if "exclude" in options:
        options = {"exclude": graph.free[0].name}
    scores = narrower.random(graph)
    with pytest.raises(narrower.BudgetError) as error:
        narrower.plan(graph, scores, **asked(kind, 1e-6), **options)
    found = LEAST.search(str(error.value))
    assert found, str(error.value)
    least = float(found[1].replace(",", ""))
    assert kind in str(error.value) and "mostly" in str(error.value)
    plan = narrower.plan(graph, scores, **asked(kind, least * 1.001 + 1), **options)
    assert getattr(plan, kind)[1] == pytest.approx(least, rel=2e-3, abs=2)
    with pytest.raises(narrower.BudgetError):
        narrower.plan(graph, scores, **asked(kind, least * 0.98), **options)


def test_what_stands_in_the_way_is_named() -> None:
    graph = graph_of("option_a")
    with pytest.raises(narrower.BudgetError, match=r"1\.conv2\.0.*zero-padded"):
        narrower.plan(graph, narrower.random(graph), macs=0.01)


# ------------------------------------------------------------------------------------------------ bad requests


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "macs"),
    ({"macs": 0.5, "remove": 0.5}, "either"),
    ({"macs": 0}, "macs"), ({"macs": 1}, "macs"), ({"macs": 1.0}, "macs"), ({"macs": -0.5}, "macs"),
    ({"macs": float("nan")}, "macs"), ({"macs": float("inf")}, "macs"), ({"macs": "half"}, "macs"), ({"macs": True}, "macs"),
    ({"macs": 1e15}, "macs"), ({"params": 0}, "params"), ({"params": 2.0**60}, "params"), ({"params": [0.5]}, "params"),
    ({"remove": 0}, "remove"), ({"remove": 1}, "remove"), ({"remove": 1.5}, "remove"), ({"remove": -0.1}, "remove"),
    ({"remove": float("nan")}, "remove"), ({"remove": "a lot"}, "remove"), ({"remove": [0.5]}, "remove"),
    ({"remove": {"conv1": 1.0}}, "conv1"), ({"remove": {"conv1": "x"}}, "conv1"),
    ({"remove": {"nothing*": 0.5}}, "nothing"), ({"remove": {3: 0.5}}, "3"), ({"remove": True}, "remove"),
    ({"macs": 0.5, "exclude": ["nothing"]}, "nothing"), ({"macs": 0.5, "exclude": "fc"}, "fc"),
    ({"macs": 0.5, "exclude": [3]}, "3"), ({"macs": 0.5, "exclude": "*"}, "the least is"),
    ({"macs": 0.5, "round_to": 0}, "round_to"), ({"macs": 0.5, "round_to": -4}, "round_to"),
    ({"macs": 0.5, "round_to": 2.5}, "round_to"), ({"macs": 0.5, "round_to": "8"}, "round_to"),
    ({"macs": 0.5, "min_channels": 0}, "min_channels"), ({"macs": 0.5, "min_channels": 1.5}, "min_channels"),
    ({"remove": 0.5, "min_channels": None}, "min_channels"),
]


@pytest.mark.parametrize(("request_", "word"), BAD, ids=[str(r) for r, _ in BAD])
def test_a_bad_request_is_a_clear_error(request_: dict[str, Any], word: str) -> None:
    graph = graph_of("plain")
    with pytest.raises(narrower.PlanError, match=word):
        narrower.plan(graph, narrower.random(graph), **request_)


def test_a_pattern_without_a_match_suggests_names() -> None:
    graph = graph_of("plain")
    with pytest.raises(narrower.PlanError, match="conv2"):
        narrower.plan(graph, narrower.random(graph), remove={"cnv2": 0.5})


@pytest.mark.parametrize("what", ["missing", "short", "long", "matrix", "nan", "infinite", "string", "none"])
def test_bad_scores_are_named(what: str) -> None:
    graph = graph_of("plain")
    scores: dict[str, Any] = dict(narrower.random(graph))
    if what == "missing":
        del scores["conv2"]
    else:
        scores["conv2"] = {"short": torch.ones(3), "long": torch.ones(15), "matrix": torch.ones(14, 1), "string": "many",
                           "nan": torch.full((14,), float("nan")), "infinite": torch.full((14,), float("inf")),
                           "none": None}[what]
    with pytest.raises(narrower.PlanError, match="conv2"):
        narrower.plan(graph, scores, macs=0.5)


# ------------------------------------------------------------------------------------------------ printed and stored


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
def test_json_round_trip(name: str) -> None:
    graph = graph_of(name)
    plan = narrower.plan(graph, narrower.random(graph), remove={"*": 0.4})
    again = narrower.Plan.from_json(plan.to_json(), graph)
    assert again.macs == plan.macs and again.params == plan.params and again.request == plan.request
    assert all(np.array_equal(again.keep[n], plan.keep[n]) for n in plan.keep)
    assert again.to_json() == plan.to_json()


def test_json_of_another_network_or_version() -> None:
    graph = graph_of("plain")
    plan = narrower.plan(graph, narrower.random(graph), remove=0.5)
    with pytest.raises(narrower.PlanError, match="another network"):
        narrower.Plan.from_json(plan.to_json(), graph_of("unet"))
    data = json.loads(plan.to_json())
    with pytest.raises(narrower.PlanError, match="format"):
        narrower.Plan.from_json(json.dumps({**data, "format": 99}), graph)


@pytest.mark.parametrize("value", [None, "6", [None], {"a": 1}, 6.5, True, -1])
@pytest.mark.parametrize("key", ["groups", "keep"])
def test_json_with_a_wrong_value(key: str, value: Any) -> None:
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
