"""A latency table predicts what its machine would take, and knows what the machine likes; plans spend its milliseconds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.latency import survey_of, table_of, truth
from support.networks import PATTERNS
from support.plans import asked, graph_of, widths
from torch import nn

import narrower
from narrower.deployment.layer_times import key_of
from narrower.deployment.survey import operator_of, sizes_in, survey
from narrower.graph.cost import CostModel
from narrower.inputs import call_model
from narrower.planning.latency import CLASSES, LatencyTable, Point, Whole, fitted, fitted_whole, log_terms, steps_read

PLAIN = ["plain", "residual", "depthwise", "transposed", "unet", "volume", "tokens", "shared"]


def bilinear(job: Mapping[str, Any]) -> float:
    """A machine that calls, reads, computes and writes, each in its time."""
    n0, n1 = job["sizes"]
    area = math.prod(job["size"]) * math.prod(job["kernel"])
    return 0.02 + 1e-3 * n0 + 2e-3 * n1 + 1e-4 * area * n0 * n1


def blocks_of_eight(job: Mapping[str, Any]) -> float:
    """A machine that computes eight out channels at once, and is slow where the in channels are odd."""
    n0, n1 = job["sizes"]
    return 1e-4 * (8 + 8 * math.ceil(n0 / 8)) * (4 + n1) * (1.5 if n1 % 2 else 1.0)


@pytest.mark.parametrize("name", PLAIN)
def test_the_time_of_any_widths_follows_from_a_few(name: str) -> None:
    table = table_of(name, bilinear)
    for rate in (0.1, 0.4, 0.7):
        small = narrower.narrow(PATTERNS[name].make(), narrower.plan(
            graph_of(name), narrower.random(graph_of(name)), remove=rate, latency=table))
        sizes = sizes_in(small, survey_of(name))
        assert table.predict(sizes) == pytest.approx(truth(survey_of(name), bilinear, sizes), rel=0.04)


@pytest.mark.parametrize("name", PLAIN)
def test_plans_predict_what_the_narrow_network_takes(name: str) -> None:
    """The cost that the planner counts step by step is the table's prediction for the weights that come out."""
    table = table_of(name, bilinear)
    plan = narrower.plan(graph_of(name), narrower.random(graph_of(name)), latency_ms="0.7x", latency=table, round_to=1)
    assert plan.latency_ms is not None
    dense, narrow = plan.latency_ms
    sizes = [sizes_in(m, survey_of(name)) for m in (PATTERNS[name].make(), narrower.narrow(PATTERNS[name].make(), plan))]
    assert (dense, narrow) == pytest.approx([table.predict(s) for s in sizes])
    assert narrow <= 0.7 * dense and f"predicted {dense:,.3f} ms" in plan.summary


@pytest.mark.parametrize("name", ["plain", "residual", "unet"])
def test_where_time_is_macs_plans_by_time_are_plans_by_macs(name: str) -> None:
    graph = graph_of(name)
    model = CostModel(graph)
    macs = model.by_tensor("macs", model.dense)
    found = survey_of(name)
    per = {found.kinds[layer.kind]: macs[layer.tensor] / math.prod(graph.shapes[layer.tensor][:2]) for layer in found.layers}
    kinds = {json.dumps(k._asdict()): v for k, v in per.items()}

    def machine(job: Mapping[str, Any]) -> float:
        return 1e-6 * kinds[json.dumps({k: v for k, v in job.items() if k != "sizes"})] * math.prod(job["sizes"])

    table = table_of(name, machine)
    scores = narrower.random(graph)
    by_macs, by_time = (narrower.plan(graph, scores, round_to=1, latency=table, **asked(kind, 0.6))
                        for kind in ("macs", "latency_ms"))
    assert widths(by_macs) == widths(by_time)


def test_a_constant_is_found_by_the_whole_network_and_cannot_be_saved() -> None:
    table = table_of("plain", bilinear, rest=100.0)
    assert table.errors == pytest.approx([0.0], abs=0.02)
    graph = graph_of("plain")
    with pytest.raises(narrower.BudgetError, match=r"latency_ms=.* cannot be reached: the least is .*%\). What remains"):
        narrower.plan(graph, narrower.random(graph), latency_ms=0.1, latency=table)


ONES = np.ones(2)
SHARES = [(1.0, 1.0), (1.0, 0.5), (0.5, 1.0), (0.5, 0.5), (0.25, 0.25)]


def time_of(points: list[Point], shares: tuple[float, float], dense: float = 64) -> float:
    """What is read from points for a layer with these shares of `dense` channels."""
    return float(np.exp(log_terms(np.array([shares])) @ fitted(points, ONES, dense * ONES))[0])


def layer_points(time: Any, dense: int = 64) -> list[Point]:
    return [Point(0, (int(a * dense), int(b * dense)), time(a, b)) for a, b in SHARES]


def test_without_other_points_a_time_is_proportional_to_both_sizes() -> None:
    one = [Point(0, (64, 64), 3.0)]
    for shares in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.25), (0.5, 0.5)):
        assert time_of(one, shares) == pytest.approx(3.0 * math.prod(shares), rel=1e-6)


def test_points_say_how_a_time_falls_not_the_pull() -> None:
    """A pull towards proportional times is weak."""
    points = layer_points(lambda a, b: 2.0 * a ** 0.3 * b ** 0.7)
    for shares in SHARES:
        assert time_of(points, shares) == pytest.approx(2.0 * shares[0] ** 0.3 * shares[1] ** 0.7, rel=0.01)


def test_a_layer_reads_its_own_points_and_others_the_less_the_farther_they_are() -> None:
    """A layer of the same kind of other sizes, ten times as slow as these say, misleads little, and less from farther away."""
    own = layer_points(lambda a, b: a * b)
    found = [max(abs(math.log(time_of([*own, Point(0, (64 * k, 64 * k), 10.0 * k * k)], s) / math.prod(s))) for s in SHARES)
             for k in (2, 4, 8, 16)]
    assert found == sorted(found, reverse=True) and found[0] < 0.1 and found[-1] < 0.2 * found[0]


@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=5), st.sampled_from([32, 64]))
def test_with_every_size_that_shrinks_the_time_does(ms: list[float], dense: int) -> None:
    """Whatever was measured: noise is no reason for a plan to widen a layer."""
    points = [p._replace(ms=t) for p, t in zip(layer_points(lambda a, b: 1.0), ms, strict=False)]
    grid = np.linspace(0.05, 1.0, 9)
    shares = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1).reshape(-1, 2)
    times = np.exp(log_terms(shares) @ fitted(points, ONES, dense * ONES)).reshape(9, 9)
    assert (np.diff(times, axis=0) > 0).all() and (np.diff(times, axis=1) > 0).all()


def test_whole_networks_say_what_layers_and_elements_and_the_rest_take() -> None:
    """The relative errors are least, so a slow network counts no more than a quick one. Nothing is negative."""
    rows = np.array([[1.0, 100.0, 1.0], [2.0, 100.0, 1.0], [4.0, 900.0, 1.0], [900.0, 20.0, 1.0]])
    want = np.array([1.3, 0.02, 0.7])
    assert fitted_whole(rows, rows @ want) == pytest.approx(want, rel=0.02)
    assert fitted_whole(rows[:1], np.array([1.0])) == pytest.approx((1.0, 0.0, 0.0), abs=1e-3), "the sum of the layers"
    factor, per_element, rest = fitted_whole(rows, rows @ np.array([1.3, 0.02, -0.7]))
    assert 1 < factor < 1.4 and per_element > 0 and rest == 0
    slow, quick = (fitted_whole(np.array([[1.0, 0, 0], [100.0, 0, 0]]), np.array(ms))[0] for ms in ((1.2, 100), (1.0, 120)))
    assert slow == pytest.approx(quick, rel=1e-3)


@pytest.mark.parametrize("name", ["transposed", "shared", "depthwise", "tokens"])
def test_the_activations_that_layers_write_are_those_of_a_forward(name: str) -> None:
    """Of each call, and of every channel: also behind transposed convolutions with groups."""
    found, graph, table = survey_of(name), graph_of(name), table_of(name, bilinear)
    for rate in (0.1, 0.5):
        plan = narrower.plan(graph, narrower.random(graph), remove=rate)
        small = narrower.narrow(PATTERNS[name].make(), plan).eval()
        written: list[int] = []
        for m in small.modules():
            if operator_of(m):
                m.register_forward_hook(lambda m, args, out, w=written: w.append(out.numel()))
        call_model(small, PATTERNS[name].inputs)
        sizes = np.array([sizes_in(small, found)[t] for t in table.tensors], dtype=float)
        assert float(table.written @ table.outputs(np.arange(len(sizes)), sizes)) == sum(written)


def test_multiples_are_read_from_neighbouring_widths() -> None:
    near = (64, 63, 62, 60, 56, 48, 32)

    def read(time: Any) -> tuple[int, tuple[float, ...]]:
        return steps_read(near, [time(w) for w in near])

    assert read(lambda w: 3 + w) == (1, (1.0,) * len(CLASSES))
    assert read(lambda w: 3 + 8 * math.ceil(w / 8)) == (8, (1.0,) * len(CLASSES))
    slow = read(lambda w: (3 + w) * (1.5 if w % 4 else 1.0))
    assert slow[0] == 4 and slow[1][0] > 1.4 and slow[1][1] > 1.4 and slow[1][2:] == (1.0,) * 4
    for saved, multiple in ((0.55, 2), (0.45, 4)):  # two channels less save more or less than half of what they do on average
        assert steps_read(near, [64, 64, 64 - 2 * saved, 60, 56, 48, 32])[0] == multiple
    assert read(lambda w: 5.0)[0] == 16, "nothing is saved: only steps that are large are worth trying"


def wide() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 96, 3), nn.ReLU(), nn.Conv2d(96, 6, 3))
    return model.eval(), torch.zeros(1, 3, 8, 8)


def test_widths_that_a_runtime_likes_are_the_steps_of_a_plan() -> None:
    model, x = wide()
    graph = narrower.trace(model, x)
    found = survey(model, graph, x)
    sizes = sizes_in(model, found)
    table = found.table({}, {key_of(job): blocks_of_eight(job) for job in found.jobs()},
                        [Whole(sizes, truth(found, blocks_of_eight, sizes), 0.0)])
    assert table.multiples(graph) == {"0": 8, "2": 8} and table.liked(found.layers[1].kind) == (8, 2)
    for other in ((89, 64), (96, 63)):  # as slow as (96, 64), and slower
        changed = {**sizes, "2.weight": other}
        assert table.predict(changed) == pytest.approx(truth(found, blocks_of_eight, changed), rel=0.03)
    scores = narrower.random(graph)
    for request in ({"latency_ms": 0.6}, {"macs": 0.6, "round_to": "auto"},
                    {"remove": 0.4, "round_to": "auto"}):
        plan = narrower.plan(graph, scores, latency=table, **request)
        assert all(w % 8 == 0 for w in widths(plan).values()), request
        small = narrower.narrow(model, plan)
        assert plan.latency_ms is not None
        assert plan.latency_ms[1] == pytest.approx(truth(found, blocks_of_eight, sizes_in(small, found)), rel=0.03)
    odd = narrower.plan(graph, scores, latency=table, latency_ms=0.6, round_to=1)
    assert odd.latency_ms is not None and odd.latency_ms[1] <= 0.6 * odd.latency_ms[0], "over steps without gain"


def test_a_group_of_one_multiple_stays_whole_while_the_budget_allows() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 96, 3), nn.ReLU(), nn.Conv2d(96, 6, 3)).eval()
    graph = narrower.trace(model, torch.zeros(1, 3, 8, 8))
    found = survey(model, graph, torch.zeros(1, 3, 8, 8))
    table = found.table({}, {key_of(job): blocks_of_eight(job) for job in found.jobs()}, [])
    assert table.multiples(graph, blocks=1)["0"] == 8 and table.multiples(graph)["0"] == 4
    scores = narrower.random(graph)
    near, far = (widths(narrower.plan(graph, scores, macs=macs, round_to="auto", latency=table)) for macs in (0.4, 0.1))
    assert near["0"] == 8 and near["2"] < 96, "eight channels take as long as four"
    assert far["0"] == 4, "the budget cannot be met otherwise"


def test_a_channel_with_many_positions_needs_a_smaller_multiple() -> None:
    """Four inputs of a linear layer for each channel: two channels fill eight."""
    model = nn.Sequential(nn.Conv2d(3, 64, 7), nn.ReLU(), nn.Flatten(), nn.Linear(256, 40), nn.ReLU(), nn.Linear(40, 6)).eval()
    x = torch.zeros(1, 3, 8, 8)
    graph = narrower.trace(model, x)
    found = survey(model, graph, x)

    def machine(job: Mapping[str, Any]) -> float:
        n0, n1 = job["sizes"]
        return 1e-4 * (4 + n0) * (8 + (8 * math.ceil(n1 / 8) if job["operator"] == "linear" else n1))

    table = found.table({}, {key_of(job): machine(job) for job in found.jobs()}, [])
    assert table.multiples(graph) == {"0": 2, "3": 8}
    assert [table.liked(layer.kind) for layer in found.layers[:2]] == [(1, 1), (1, 8)], "what each layer's own code likes"


def test_tables_and_plans_go_through_json() -> None:
    table = table_of("residual", bilinear, rest=1.0)
    again = LatencyTable.from_json(table.to_json())
    assert again == table and str(again) == str(table)
    graph = graph_of("residual")
    plan = narrower.plan(graph, narrower.random(graph), latency_ms="0.8x", latency=again)
    assert narrower.Plan.from_json(plan.to_json(), graph).latency_ms == plan.latency_ms


@pytest.mark.parametrize("damage", [
    lambda d: d.pop("kinds"), lambda d: d["points"][0].update(ms=-1.0), lambda d: d["layers"][0].update(kind=99),
    lambda d: d["points"][0].update(ms=0.0), lambda d: d["networks"][0].update(ms=math.inf),
    lambda d: d.update(format=0), lambda d: d["kinds"][0].update(kernel=3),
])  # fmt: skip
def test_damaged_tables_are_refused(damage: Any) -> None:
    data = json.loads(table_of("plain", bilinear).to_json())
    damage(data)
    with pytest.raises(narrower.PlanError, match="latency table"):
        LatencyTable.from_json(json.dumps(data))


def test_wrong_requests_are_refused() -> None:
    graph = graph_of("plain")
    scores = narrower.random(graph)
    table = table_of("plain", bilinear)
    wider = replace(table, layers=(table.layers[0]._replace(sizes=(99, 3)), *table.layers[1:]))
    for request, message in [
        ({"latency_ms": 0.5, "latency": wider}, r"of another network: its weight .* of sizes \(99, 3\) has \("),
        ({"latency_ms": 0.5}, "needs latency="), ({"macs": 0.5, "round_to": "auto"}, "needs latency="),
        ({"latency_ms": "half", "latency": table}, "write 0.6x"), ({"latency_ms": "9999ms", "latency": table}, "no less than"),
        ({"latency_ms": "1.2x", "latency": table}, "no less than"), ({"macs": 0.5, "round_to": "odd"}, "whole number"),
        ({"latency_ms": 0.5, "latency": table_of("residual", bilinear)}, "of another network"),
    ]:  # fmt: skip
        with pytest.raises(narrower.PlanError, match=message):
            narrower.plan(graph, scores, **request)  # type: ignore[arg-type]


def test_noise_is_said() -> None:
    table = table_of("plain", bilinear)
    assert not table.noisy and "too noisy" not in str(table)
    loud = LatencyTable(table.place, table.kinds, table.layers, table.points, table.steps,
                        (table.networks[0]._replace(spread=0.4),))
    assert loud.noisy and "too noisy: spread up to 40%" in str(loud)
    one = table.networks[0]
    torn = replace(table, networks=(one._replace(spread=0.2), one._replace(ms=1.5 * one.ms)))
    assert torn.spread == 0.2 and torn.error == -min(torn.errors) > 0.1 and torn.noisy, "times that contradict each other"
    assert not replace(table, networks=(one._replace(spread=0.2),)).noisy
    assert (table.spread, loud.spread) == (0.0, 0.4) and loud.error == max(map(abs, loud.errors)), "numbers, not only text"
