"""A latency table predicts what its machine would take, and knows what the machine likes; plans spend its milliseconds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.latency import survey_of, table_of, truth
from support.networks import PATTERNS
from support.plans import asked, graph_of, widths
from torch import nn

import narrower
from narrower.deployment.layer_times import key_of
from narrower.deployment.survey import sizes_in, survey
from narrower.graph.cost import CostModel
from narrower.planning.latency import CLASSES, LatencyTable, Whole, steps_read

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


def test_multiples_are_read_from_neighbouring_widths() -> None:
    near = (64, 63, 62, 60, 56, 48, 32)

    def read(time: Any) -> tuple[int, tuple[float, ...]]:
        return steps_read(near, [time(w) for w in near])

    assert read(lambda w: 3 + w) == (1, (1.0,) * len(CLASSES))
    assert read(lambda w: 3 + 8 * math.ceil(w / 8)) == (8, (1.0,) * len(CLASSES))
    slow = read(lambda w: (3 + w) * (1.5 if w % 4 else 1.0))
    assert slow[0] == 4 and slow[1][0] > 1.4 and slow[1][1] > 1.4 and slow[1][2:] == (1.0,) * 4
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


def test_tables_and_plans_go_through_json() -> None:
    table = table_of("residual", bilinear, rest=1.0)
    again = LatencyTable.from_json(table.to_json())
    assert again == table and str(again) == str(table)
    graph = graph_of("residual")
    plan = narrower.plan(graph, narrower.random(graph), latency_ms="0.8x", latency=again)
    assert narrower.Plan.from_json(plan.to_json(), graph).latency_ms == plan.latency_ms


@pytest.mark.parametrize("damage", [
    lambda d: d.pop("kinds"), lambda d: d["points"][0].update(ms=-1.0), lambda d: d["layers"][0].update(kind=99),
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
    assert (table.spread, loud.spread) == (0.0, 0.4) and loud.error == max(map(abs, loud.errors)), "numbers, not only text"
