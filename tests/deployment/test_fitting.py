"""fit_latency: what was predicted is measured, and a wrong prediction is corrected once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from support.latency import survey_of, table_of, truth
from support.networks import PATTERNS, images
from support.plans import graph_of
from torch import nn

import narrower
from narrower.deployment import fitting
from narrower.deployment.survey import sizes_in
from narrower.deployment.tabulating import place_of

NAME = "residual"


def believed(job: Mapping[str, Any]) -> float:
    n0, n1 = job["sizes"]
    return 1e-3 * n0 * n1


def setting(monkeypatch: pytest.MonkeyPatch, drift: float, *factors: float) -> tuple[Any, ...]:
    """A network whose dense form takes `drift` times, narrow forms `drift * factor` times, what its table believes.

    The narrow form of the second trial has the second factor, if there is one.
    """
    model, graph, x = PATTERNS[NAME].make(), graph_of(NAME), images(batch=1)
    table = table_of(NAME, believed)
    table = narrower.LatencyTable(place_of(model, x, "eager", 1), *(getattr(table, name) for name in (
        "kinds", "layers", "points", "steps", "networks")))

    def time_networks(modules: Sequence[nn.Module], *place: Any, seconds: float) -> list[tuple[float, float]]:
        times = [truth(survey_of(NAME), believed, sizes_in(m, survey_of(NAME))) for m in modules]
        return [(drift * times[0], 0.1), (drift * left.pop(0) * times[1], 0.2)]

    left = [*factors, factors[-1]]
    monkeypatch.setattr(fitting, "time_networks", time_networks)
    return model, graph, narrower.random(graph), x, table


@pytest.mark.parametrize("wanted", ["0.6x", 0.6])
def test_a_wrong_prediction_is_corrected(monkeypatch: pytest.MonkeyPatch, wanted: Any) -> None:
    model, graph, scores, x, table = setting(monkeypatch, 1.3, 1.2)
    found = narrower.fit_latency(model, graph, scores, x, latency=table, latency_ms=wanted, round_to=1)
    first, second = found.trials
    assert first.spread == 0.2, "the larger one"
    assert first.error == pytest.approx(1 / (1.3 * 1.2) - 1, rel=0.05)
    assert found.target_ms == pytest.approx(0.6 * first.dense_ms), "a fraction is one of the dense network measured beside"
    assert first.measured_ms > 1.1 * found.target_ms and second.measured_ms == pytest.approx(found.target_ms, rel=0.08)
    assert sum(len(k) for k in found.plan.keep.values()) < sum(len(k) for k in narrower.plan(
        graph, scores, latency=table, latency_ms=wanted, round_to=1).keep.values())
    assert f"measured {second.measured_ms:.3f} ms" in str(found)


def test_milliseconds_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, scores, x, table = setting(monkeypatch, 1.3, 1.0)
    target = 0.6 * table.predict(table.networks[0].sizes)
    found = narrower.fit_latency(model, graph, scores, x, latency=table, latency_ms=f"{target}ms", round_to=1)
    assert found.target_ms == pytest.approx(target) and found.trials[-1].measured_ms == pytest.approx(target, rel=0.08)


def test_a_plan_that_is_made_already_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, scores, x, table = setting(monkeypatch, 1.0, 1.0)
    monkeypatch.setattr(fitting, "NEAR", 0.1)
    start = narrower.plan(graph, scores, latency=table, latency_ms=0.5, round_to=1)
    monkeypatch.delattr(fitting, "plan")
    found = narrower.fit_latency(model, graph, scores, x, latency=table, start=start, latency_ms=0.5, round_to=1)
    assert found.plan is start and len(found.trials) == 1
    other = narrower.plan(graph, scores, macs=0.5)
    with pytest.raises(narrower.ConfigError, match="make it with latency="):
        narrower.fit_latency(model, graph, scores, x, latency=table, start=other, latency_ms=0.5)


def test_a_right_prediction_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, scores, x, table = setting(monkeypatch, 1.0, 1.0)
    monkeypatch.setattr(fitting, "NEAR", 0.1)
    found = narrower.fit_latency(model, graph, scores, x, latency=table, latency_ms="0.6x", round_to=1)
    assert len(found.trials) == 1


def test_a_prediction_so_far_off_that_nothing_would_have_to_go_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, scores, x, table = setting(monkeypatch, 1.0, 0.3)
    found = narrower.fit_latency(model, graph, scores, x, latency=table, latency_ms="0.6x", round_to=1)
    assert len(found.trials) == 1 and found.trials[0].measured_ms < 0.5 * found.target_ms


def test_of_two_trials_the_one_within_the_target_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, scores, x, table = setting(monkeypatch, 1.0, 0.8, 1.3)
    found = narrower.fit_latency(model, graph, scores, x, latency=table, latency_ms="0.6x", round_to=1)
    first, second = found.trials
    assert first.measured_ms < found.target_ms < second.measured_ms and found.trial is first
    assert found.plan.latency_ms is not None and found.plan.latency_ms[1] == first.predicted_ms
    assert narrower.measure(found.module, x, seconds=0)["macs"] == found.plan.macs[1]
    assert "the first plan" in str(found)


def test_of_two_trials_over_the_target_the_nearer_one_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for second, kept in ((1.35, 1), (3.0, 0)):
        model, graph, scores, x, table = setting(monkeypatch, 1.0, 1.3, second)
        found = narrower.fit_latency(model, graph, scores, x, latency=table, latency_ms="0.6x", round_to=1)
        assert min(t.measured_ms for t in found.trials) > found.target_ms and found.trial is found.trials[kept]


def test_a_second_plan_that_cannot_be_reached_leaves_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, scores, x, table = setting(monkeypatch, 1.0, 100.0)
    found = narrower.fit_latency(model, graph, scores, x, latency=table, latency_ms="0.6x", round_to=1)
    assert found.trials == (found.trial,) and found.share > 50
    with pytest.raises(narrower.BudgetError, match="cannot be reached"):
        narrower.fit_latency(model, graph, scores, x, latency=table, latency_ms="0.001x", round_to=1)


def test_tables_of_other_places_and_missing_targets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, scores, x, table = setting(monkeypatch, 1.0, 1.0)
    with pytest.raises(narrower.ConfigError, match="needs latency_ms="):
        narrower.fit_latency(model, graph, scores, x, latency=table, macs=0.5)
    with pytest.raises(narrower.ConfigError, match=r"table is of shape \[1, 3, 8, 8\] and not \[2, 3, 8, 8\]"):
        narrower.fit_latency(model, graph, scores, images(batch=2), latency=table, latency_ms="0.6x")
    with pytest.raises(narrower.ConfigError, match="table is of an unknown place"):
        narrower.fit_latency(model, graph, scores, x, latency=replace(table, place={}), latency_ms="0.6x")
