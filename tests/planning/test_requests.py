"""Requests are checked: patterns, scores, options."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.plans import graph_of, widths

import narrower
from narrower.graph.cost import CostKind
from narrower.graph.equal_counts import Cell, Component
from narrower.planning.requests import Budget, checked_scores, matching, most_removable, restored_scores


@pytest.mark.parametrize("values", ["zero", "negative", "equal", "integers"])
def test_odd_but_legal_scores_give_a_plan(values: str) -> None:
    graph = graph_of("plain")
    make: Any = {"zero": torch.zeros, "negative": lambda n: -torch.arange(n).float(), "equal": torch.ones,
            "integers": lambda n: torch.arange(n)}[values]
    scores = narrower.Scores({g.name: make(g.size) for g in graph.free})
    plan = narrower.plan(graph, scores, macs=0.5)
    assert plan.macs[1] <= 0.5 * plan.macs[0]
    if values == "negative":
        assert plan.keep["conv2"].tolist() == list(range(len(plan.keep["conv2"])))


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
    ({"macs": 0.5, "exclude": [3]}, "3"), ({"macs": 0.5, "exclude": None}, "exclude=None"),
    ({"macs": np.bool_(True)}, "macs"), ({"macs": 0.5, "round_to": np.bool_(True)}, "round_to"),
    ({"macs": 0.5, "exclude": "*"}, "the least is"),
    ({"macs": 0.5, "round_to": 0}, "round_to"), ({"macs": 0.5, "round_to": -4}, "round_to"),
    ({"macs": 0.5, "round_to": 2.5}, "round_to"), ({"macs": 0.5, "round_to": "8"}, "round_to"),
    ({"macs": 0.5, "min_channels": 0}, "min_channels"), ({"macs": 0.5, "min_channels": 1.5}, "min_channels"),
    ({"remove": 0.5, "min_channels": None}, "min_channels"), ({"remove": 0.5, "min_channels": True}, "min_channels"),
    ({"macs": 0.5, "min_channels": -0.1}, "min_channels"), ({"macs": 0.5, "min_channels": float("nan")}, "min_channels"),
]


@pytest.mark.parametrize(("request_", "word"), BAD, ids=[str(r) for r, _ in BAD])
def test_a_bad_request_is_a_clear_error(request_: dict[str, Any], word: str) -> None:
    graph = graph_of("plain")
    with pytest.raises(narrower.PlanError, match=word):
        narrower.plan(graph, narrower.random(graph), **request_)


def test_numbers_of_numpy_are_numbers() -> None:
    graph = graph_of("plain")
    scores = narrower.random(graph)
    for given in ({"macs": np.float32(0.5)}, {"params": np.float64(0.5)}, {"macs": np.int64(20_000)},
                  {"remove": np.float32(0.5), "round_to": np.int64(2), "min_channels": np.int32(3)},
                  {"remove": {"conv1": np.float16(0.5)}}):
        found = narrower.plan(graph, scores, **given)
        assert widths(narrower.Plan.from_json(found.to_json(), graph)) == widths(found)
    half: Any = np.float32(0.5)
    assert widths(narrower.plan(graph, scores, macs=half)) == widths(narrower.plan(graph, scores, macs=0.5))


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


def test_a_budget_is_absolute_above_one_and_a_fraction_below() -> None:
    dense: dict[CostKind, float] = {"macs": 1000.0, "params": 50.0}
    assert Budget(macs=0.5).targets(dense) == {"macs": 500.0}
    assert Budget(macs=300, params=0.1).targets(dense) == {"macs": 300.0, "params": 5.0}
    for bad, says in ((0, "macs=0: give a fraction between 0 and 1"), (-1, "between 0 and 1"), (math.inf, "between 0 and 1"),
                      (math.nan, "between 0 and 1"), (1000, "macs=1000 is no less than"), ("50%", "macs='50%' is text"),
                      (1, "macs=1 is the whole network"), (1.0, "macs=1.0 is the whole network")):
        with pytest.raises(narrower.PlanError, match=says):
            Budget(macs=bad).targets(dense)  # type: ignore[arg-type]


def test_patterns_match_names_of_groups_and_of_their_layers() -> None:
    graph = graph_of("residual")
    assert matching(graph, "1.*") == ["0.0", "1.conv1.0"], "1.conv2 writes into 0.0's group"
    assert matching(graph, "2.conv1.0") == ["2.conv1.0"]
    with pytest.raises(narrower.PlanError, match="pinned"):
        matching(graph, next(g.name for g in graph if not g.free))


def test_scores_are_shifted_to_zero_and_never_all_zero() -> None:
    graph = graph_of("plain")
    scores: dict[str, torch.Tensor] = {g.name: torch.zeros(g.size) for g in graph.free}
    scores["conv2"] = torch.arange(14) - 5.0
    checked = checked_scores(graph, scores, {"conv1"})
    assert "conv1" not in checked
    assert checked["conv2"].tolist() == list(range(14))
    assert all((values == 1).all() for name, values in checked.items() if name != "conv2")


def test_each_cell_keeps_one_channel_and_its_share_of_the_least_width() -> None:
    part = Component((Cell("a", np.arange(6)), Cell("a", np.arange(6, 9)), Cell("b", np.arange(4))), np.zeros((0, 3)))
    sizes = {"a": 9, "b": 4}
    assert most_removable(part, sizes, 1).tolist() == [5, 2, 3]
    assert most_removable(part, sizes, 3).tolist() == [4, 2, 1]
    assert most_removable(part, sizes, 99).tolist() == [0, 0, 0]



def test_scores_of_a_state_are_restored_unless_they_are_others() -> None:
    """Scores that were measured again differ by rounding."""
    saved = {"a": [0.5, 1.5]}
    again = {"a": np.array([0.501, 1.499])}
    assert restored_scores(again, {"scores": saved})["a"].tolist() == saved["a"]
    assert restored_scores(again, {})["a"] is again["a"]
    for other in ({"a": np.array([1.5, 0.5])}, {}):
        with pytest.raises(narrower.StorageError, match="its scores= were others"):
            restored_scores(other, {"scores": saved})
