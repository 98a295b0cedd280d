"""compose: two cuts as one plan on the dense graph."""

from __future__ import annotations

import pytest
import torch
from support.networks import PATTERNS
from support.plans import edited, graph_of

import narrower


@pytest.mark.parametrize("name", PATTERNS)
def test_two_cuts_are_one_by_the_composed_plan(name: str) -> None:
    model = PATTERNS[name].make().eval()
    graph = narrower.trace(model, PATTERNS[name].inputs)
    first = narrower.plan(graph, narrower.random(graph, 1), remove=0.3)
    small = narrower.narrow(model, first)
    graph2 = narrower.trace(small, PATTERNS[name].inputs)
    second = narrower.plan(graph2, narrower.random(graph2, 2), remove=0.4)
    twice, whole = narrower.narrow(small, second), narrower.compose(first, second)
    once = narrower.narrow(model, whole)
    assert whole.graph is graph and whole.macs[0] == first.macs[0] and whole.macs[1] == pytest.approx(second.macs[1])
    assert whole.params[1] == second.params[1] < first.params[1]
    wanted, found = twice.state_dict(), once.state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(t, found[n]) for n, t in wanted.items())


def test_a_bias_that_a_repair_has_given_goes_with_its_channels() -> None:
    """The first graph does not know it."""
    model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1, bias=False), torch.nn.Conv2d(8, 2, 1)), torch.zeros(1, 3, 4, 4)
    graph = narrower.trace(model, x)
    first = narrower.plan(graph, narrower.random(graph), remove=0.25)
    small = narrower.narrow(model, first)
    small.get_submodule("0").bias = torch.nn.Parameter(torch.ones(6))
    graph2 = narrower.trace(small, x)
    whole = narrower.compose(first, narrower.plan(graph2, narrower.random(graph2), remove=0.5))
    assert [len(kept) for kept in whole.keep.values()] == [3]


def test_requests_are_listed_in_order() -> None:
    case = PATTERNS["plain"]
    model = case.make().eval()
    whole = narrower.plan(graph := narrower.trace(model, case.inputs), narrower.random(graph), macs=0.9)
    for macs in (0.8, 0.7):
        graph2 = narrower.trace(narrower.narrow(model, whole), case.inputs)
        whole = narrower.compose(whole, narrower.plan(graph2, narrower.random(graph2), macs=macs))
    assert [step["macs"] for step in whole.request["steps"]] == [0.9, 0.8, 0.7]
    assert narrower.Plan.from_json(whole.to_json(), graph).request == whole.request


def test_a_plan_for_another_network_is_refused() -> None:
    graph = graph_of("plain")
    first = narrower.plan(graph, narrower.random(graph), remove=0.3)
    with pytest.raises(narrower.PlanError, match=r"not for the network that the first one gives.*conv1"):
        narrower.compose(first, first)
    other = graph_of("residual")
    with pytest.raises(narrower.PlanError, match="not for the network"):
        narrower.compose(first, narrower.plan(other, narrower.random(other), remove=0.3))


def test_channels_that_only_leave_together_are_not_split() -> None:
    """The second graph comes from a network whose layers are not added: a sum that a changed forward has dropped."""
    class Branches(torch.nn.Module):
        def __init__(self, added: bool) -> None:
            super().__init__()
            self.a, self.b, self.added = torch.nn.Conv2d(3, 6, 1), torch.nn.Conv2d(3, 6, 1), added
            self.c, self.d = torch.nn.Conv2d(6, 2, 1), torch.nn.Conv2d(6, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.a(x), self.b(x)
            if self.added:
                a = b = a + b
            y: torch.Tensor = self.c(a) + self.d(b)
            return y

    x = torch.randn(1, 3, 4, 4)
    graphs = [narrower.trace(Branches(added), x) for added in (True, False)]
    everything = edited(narrower.plan(graphs[0], narrower.random(graphs[0]), remove=0.2), "a", list(range(6)))
    second = narrower.plan(graphs[1], narrower.random(graphs[1]), remove={"a": 0.5})
    with pytest.raises(narrower.PlanError, match=r"group 'a'.*in some layers only"):
        narrower.compose(everything, second)


def test_channels_that_are_whole_in_the_first_graph_alone_are_not_kept_silently() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.GroupNorm(1, 8), torch.nn.Conv2d(8, 8, 1), torch.nn.ReLU(),
                                torch.nn.Conv2d(8, 2, 1)).eval()
    x = torch.randn(2, 3, 4, 4)
    graph = narrower.trace(model, x, allow_inexact=False)
    first = narrower.plan(graph, narrower.random(graph), remove=0.25)
    wide = narrower.trace(narrower.narrow(model, first), x)
    second = narrower.plan(wide, narrower.random(wide), remove=0.5)
    assert len(wide.free) > len(graph.free)
    with pytest.raises(narrower.PlanError, match=r"removes channels of 0\.weight \(dimension 0\) that stay whole"):
        narrower.compose(first, second)
