"""Budgets are met and used up; what cannot be reached is said."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.networks import PATTERNS
from support.plans import NAMES, asked, edited, graph_of, widths

import narrower
from narrower.graph.cost import CostKind, CostModel, RunningCost
from narrower.graph.equal_counts import components
from narrower.planning.damage import Curve
from narrower.planning.greedy import ComponentDescent, Step, descend, fits


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
def test_any_budget_is_met_or_refused(fraction: float, kind: str, name: str, seed: int, round_to: int, least: int) -> None:
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


def test_only_the_order_within_a_group_matters() -> None:
    graph = graph_of("residual")
    plans = [narrower.plan(graph, narrower.random(graph, seed), macs=0.55) for seed in (0, 1)]
    assert widths(plans[0]) == widths(plans[1])
    assert any((plans[0].keep[g.name] != plans[1].keep[g.name]).any() for g in graph.free)


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_without_measurement_all_groups_lose_the_same_share(name: str, round_to: int) -> None:
    """At the end of the descent nobody has lost more than any other would have lost after one more step."""
    graph = graph_of(name)
    model = CostModel(graph)
    descents = [ComponentDescent(p, model, round_to, 1) for p in components(graph)]
    running = RunningCost(model, ("macs",))
    target: dict[CostKind, float] = {"macs": 0.5 * running.now["macs"]}
    descend(descents, running, target, lambda d: d.even_step(running, {"macs": 1.0}))
    most = max((d.lost / d.part.sizes).max() for d in descents)
    after = [found[0] for d in descents if (found := d.even_step(running, {"macs": 1.0}))]
    assert most > 0 and all(share >= most for share in after)


@given(st.floats(0.4, 0.9), st.sampled_from(["macs", "params"]), st.sampled_from(["plain", "residual", "unet"]),
       st.integers(0, 99), st.sampled_from([1, 2]), st.booleans())
@settings(max_examples=15)
def test_every_step_of_the_descent_is_the_best_of_all(
    fraction: float, kind: CostKind, name: str, seed: int, round_to: int, measured: bool,
) -> None:
    """As found by looking at all of them each time."""
    graph = graph_of(name)
    model = CostModel(graph)
    rng = np.random.default_rng(seed)
    damage = narrower.Sensitivity(tuple(Curve(tuple(c.group for c in p.cells), (0.25, 0.5, 0.75), tuple(np.sort(rng.random(3))))
                                        for p in components(graph)), "kl", 1)
    descents, again = ([ComponentDescent(p, model, round_to, 1) for p in components(graph)] for _ in range(2))

    def best(d: ComponentDescent, now: RunningCost) -> Step | None:
        loss = partial(d.damage, sensitivity=damage)
        return d.best_step(now, {kind: 1.0}, loss) if measured else d.even_step(now, {kind: 1.0})

    running, looked = RunningCost(model, (kind,)), RunningCost(model, (kind,))
    targets = {kind: fraction * running.now[kind]}
    taken = descend(descents, running, targets, lambda d: best(d, running))
    want = []
    while not fits(looked.now, targets):
        found = {k: step for k, d in enumerate(again) if (step := best(d, looked))}
        if not found:
            break
        k = min(found, key=lambda k: found[k][0])
        looked.move(again[k].per_group(found[k][1]))
        again[k].take(found[k][1])
        want.append(k)
    assert taken == want


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
    held = [f"{name}=" for name in options]
    assert (f"; held by {' '.join(held)}" in str(error.value)) if held else ("held by" not in str(error.value))
    plan = narrower.plan(graph, scores, **asked(kind, least * 1.001 + 1), **options)
    assert getattr(plan, kind)[1] == pytest.approx(least, rel=2e-3, abs=2)
    with pytest.raises(narrower.BudgetError):
        narrower.plan(graph, scores, **asked(kind, least * 0.98), **options)


@pytest.mark.parametrize("macs, meant", [(50, True), (0.1, False), (1e-4, False), (101, False)])
def test_a_percentage_that_was_taken_for_a_number_is_seen(macs: float, meant: bool) -> None:
    graph = graph_of("plain")
    with pytest.raises(narrower.BudgetError) as error:
        narrower.plan(graph, narrower.random(graph), macs=macs, min_channels=4)
    assert str(error.value).endswith("; for 50 % give 0.5") == ("; for" in str(error.value)) == meant


def test_what_stands_in_the_way_is_named() -> None:
    graph = graph_of("option_a")
    with pytest.raises(narrower.BudgetError, match=r"1\.conv2\.0.*zero-padded"):
        narrower.plan(graph, narrower.random(graph), macs=0.01)


def descent_of(group: str, round_to: int = 1) -> ComponentDescent:
    """The descent of the component that holds one group."""
    graph = graph_of("plain")
    (part,) = [p for p in components(graph) if {c.group for c in p.cells} == {group}]
    return ComponentDescent(part, CostModel(graph), round_to, 1)


def test_the_last_channel_of_a_group_is_no_step() -> None:
    d = descent_of("conv2")
    running = RunningCost(d.model, ("macs",))
    for _ in range(13):
        found = d.even_step(running, {"macs": 1.0})
        assert found is not None
        running.move(d.per_group(found[1]))
        d.take(found[1])
    assert d.even_step(running, {"macs": 1.0}) is None
    d.undo_last()
    assert d.lost.tolist() == [12]


def test_steps_lead_to_multiples_of_round_to() -> None:
    d = descent_of("conv2", round_to=4)
    (move,) = d.moves
    assert d.repetitions(move) == 2, "14 to 12"
    d.take(2 * move)
    assert d.repetitions(move) == 4, "12 to 8"


def test_descend_stops_at_the_target_or_after_so_many_channels() -> None:
    for targets, most in (({"macs": 0.7}, math.inf), ({"macs": 0.0}, 5)):
        graph = graph_of("plain")
        model = CostModel(graph)
        descents = [ComponentDescent(p, model, 1, 1) for p in components(graph)]
        running = RunningCost(model, ("macs",))
        absolute: dict[CostKind, float] = {"macs": targets["macs"] * running.now["macs"]}
        taken = descend(descents, running, absolute, lambda d, r=running: d.even_step(r, {"macs": 1.0}), most)  # type: ignore[misc]
        assert fits(running.now, absolute) == (most == math.inf)
        assert sum(int(d.lost.sum()) for d in descents) == len(taken) == (5 if most == 5 else len(taken)) > 0

