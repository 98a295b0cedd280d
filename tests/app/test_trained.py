"""What the methods that narrow in the training share."""

from __future__ import annotations

import copy

import pytest
import torch
from support.plans import graph_of
from torch import nn

import narrower
from narrower.app.config import PruneConfig
from narrower.app.trained import difference, scored_by_prior


def test_a_plan_is_scored_by_the_prior_and_leaves_groups_alone() -> None:
    graph = graph_of("plain")
    name, *others = [group.name for group in graph.free]
    given = PruneConfig(method="soft", prior="fpgm", exclude=["a"])
    found = scored_by_prior(given, graph, {name: "why"})
    assert (found.method, found.exclude) == ("fpgm", ["a", name])
    with pytest.raises(narrower.PlanError, match=f"--method soft can narrow nothing here: {name}: because"):
        scored_by_prior(given, graph, dict.fromkeys([name, *others], "because"))


def test_a_merged_network_that_computes_something_else_is_an_error() -> None:
    net, x = nn.Linear(4, 3), torch.ones(2, 4)
    assert difference(net, copy.deepcopy(net), x) == 0
    other = copy.deepcopy(net)
    other.bias.data[0] += 1
    with pytest.raises(narrower.VerifyError, match="differs from the trained one by"):
        difference(net, other, x)
