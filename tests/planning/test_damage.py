"""Damage curves: monotone, through their hull, JSON both ways; and budgets spread by them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.damage import damaged
from support.networks import Head, unit
from torch import nn, ones

import narrower
from narrower.planning.damage import Curve, Sensitivity, convex_hull, interpolated

CURVE = Curve(("a", "b"), (0.125, 0.25, 0.5, 0.75), (0.03, 0.02, 0.2, 1.0))


def test_the_hull_is_convex_monotone_and_below_the_points() -> None:
    shares, damages = convex_hull(CURVE)
    assert shares[0] == damages[0] == 0 and shares[-1] == 0.75
    assert damages[1] == 0.03  # that less damage was measured at twice the share is chance
    slopes = np.diff(damages) / np.diff(shares)
    assert (slopes >= 0).all() and (np.diff(slopes) >= 0).all()
    points = np.maximum.accumulate([0, *CURVE.damages])
    assert (np.interp([0, *CURVE.shares], shares, damages) <= points + 1e-12).all()


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6))
def test_damage_never_falls_with_the_share(damages: list[float]) -> None:
    shares = tuple((k + 1) / (len(damages) + 1) for k in range(len(damages)))
    hull = convex_hull(Curve(("a",), shares, tuple(damages)))
    found = [interpolated(*hull, s) for s in np.linspace(0.01, 0.99, 60)]
    assert (np.diff(found) >= -1e-12).all() and min(found) >= 0


def test_measured_points_on_the_hull_are_met() -> None:
    found = Sensitivity((CURVE,), "kl", 10)
    assert found.damage(["b"], 0.5) == pytest.approx(0.2) and found.damage(["a"], 0.75) == pytest.approx(1.0)
    assert found.damage(["a"], 0) == 0 and found.damage(["elsewhere"], 0.5) == 0
    assert found.damage(["a"], 0.9) > 1.0


def test_json_both_ways_and_damaged_text() -> None:
    found = Sensitivity((CURVE, Curve(("c",), (0.5,), (0.1,))), "relative", 7)
    assert Sensitivity.from_json(found.to_json()) == found
    for text in ("", "[]", "{}", found.to_json()[:-9], found.to_json().replace('"format": 1', '"format": 2'),
                 found.to_json().replace("0.125", "0.3"), found.to_json().replace("0.125", "NaN")):
        with pytest.raises(narrower.PlanError):
            Sensitivity.from_json(text)


@given(st.data())
def test_a_damaged_sensitivity_is_a_plan_error_or_a_sensitivity(draw: st.DataObject) -> None:
    text = json.dumps(damaged(json.loads(Sensitivity((CURVE,), "kl", 10).to_json()), draw))
    try:
        found = Sensitivity.from_json(text)
    except narrower.PlanError as e:
        assert str(e)
        return
    assert str(found) and Sensitivity.from_json(found.to_json()).curves == found.curves


def chain() -> tuple[narrower.Graph, narrower.Scores]:
    graph = narrower.trace(nn.Sequential(unit(3, 16), unit(16, 16), unit(16, 16), Head(16)), ones(1, 3, 8, 8))
    return graph, narrower.random(graph)


def test_a_budget_is_taken_where_it_does_least_damage() -> None:
    graph, scores = chain()
    cheap, dear = (0.001, 0.002, 0.004, 0.008), (0.1, 0.3, 1.0, 3.0)
    shares = CURVE.shares
    for name in ("0.0", "1.0", "2.0"):
        curves = tuple(Curve((g.name,), shares, cheap if g.name == name else dear) for g in graph.free)
        plan = narrower.plan(graph, scores, macs=0.8, sensitivity=Sensitivity(curves, "kl", 10))
        widths = {g.name: len(plan.keep[g.name]) for g in graph.free}
        assert widths[name] < min(w for n, w in widths.items() if n != name)
        assert plan.macs[1] <= 0.8 * plan.macs[0]


def test_what_was_not_measured_stays() -> None:
    graph, scores = chain()
    curves = tuple(Curve((g.name,), CURVE.shares, (0.1, 0.3, 1.0, 3.0)) for g in graph.free if g.name != "1.0")
    plan = narrower.plan(graph, scores, macs=0.7, sensitivity=Sensitivity(curves, "kl", 10))
    assert len(plan.keep["1.0"]) == 16 and all(len(plan.keep[n]) < 16 for n in ("0.0", "2.0"))


def test_round_to_and_least_widths_hold_as_before() -> None:
    graph, scores = chain()
    curves = tuple(Curve((g.name,), (0.5,), (0.1,)) for g in graph.free)
    plan = narrower.plan(graph, scores, macs=0.5, round_to=4, min_channels=8, exclude=["0.0"],
                         sensitivity=Sensitivity(curves, "kl", 10))
    widths = [len(plan.keep[g.name]) for g in graph.free]
    assert widths[0] == 16 and all(w % 4 == 0 and w >= 8 for w in widths)


def test_a_sensitivity_spreads_a_budget_only() -> None:
    graph, scores = chain()
    with pytest.raises(narrower.PlanError, match="sensitivity= spreads a budget"):
        narrower.plan(graph, scores, remove=0.5, sensitivity=Sensitivity((CURVE,), "kl", 10))
