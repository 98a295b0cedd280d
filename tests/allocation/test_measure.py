"""sensitivity: what a group's channels are worth, measured on images that nothing was fitted on."""

from __future__ import annotations

import pytest
import torch
from support.networks import PATTERNS, Head, unit
from support.resrep_training import randomised
from torch import Tensor, nn

import narrower
from narrower.allocation.measure import MEASURED
from narrower.surgery.walk import named_tensors


def batches(channels: int = 3, size: int = 8) -> list[Tensor]:
    return list(torch.randn(72, channels, size, size, generator=torch.Generator().manual_seed(0)).split(30))


def network() -> nn.Module:
    return randomised(nn.Sequential(unit(3, 12), unit(12, 10), Head(10))).eval()


def test_every_free_group_has_a_curve_and_the_model_is_untouched() -> None:
    model = network()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    graph = narrower.trace(model, batches()[0][:1])
    lines: list[str] = []
    found = narrower.sensitivity(model, graph, narrower.magnitude(model, graph), batches(), progress=lines.append)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [c.groups for c in found.curves] == [(g.name,) for g in graph.free]
    assert all(c.shares == tuple(sorted(set(c.shares))) and min(c.damages) >= 0 for c in found.curves)
    assert found.measure == "kl" and found.images == 72 // MEASURED and "12 of 12 images" in lines[-1]


def test_duplicated_channels_cost_nothing_others_do() -> None:
    model = network()
    with torch.no_grad():
        for t in ("0.0.weight", "0.1.weight", "0.1.bias", "0.1.running_mean", "0.1.running_var"):
            named_tensors(model)[t][6:] = named_tensors(model)[t][:6]
    graph = narrower.trace(model, batches()[0][:1])
    scores = narrower.Scores({g.name: torch.arange(g.size, 0, -1).float() for g in graph.free})  # the last ones go first
    found = narrower.sensitivity(model, graph, scores, batches(), shares=(0.25, 0.5, 0.75))
    free, half, more = found.by_group["0.0"].damages
    assert free < 1e-3 * more and half < 1e-3 * more
    assert found.by_group["1.0"].damages[0] > 10 * half


def test_tied_groups_share_a_curve() -> None:
    model = randomised(PATTERNS["grouped"].make()).eval()
    graph = narrower.trace(model, torch.randn(1, 3, 16, 16))
    found = narrower.sensitivity(model, graph, narrower.random(graph), batches(size=16))
    names = [n for c in found.curves for n in c.groups]
    assert len(names) == len(set(names)) and set(names) <= {g.name for g in graph.free}


def test_outputs_that_are_no_logits_are_compared_by_squared_error() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = unit(3, 8), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 1, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.body(x)
            return {"boxes": self.one(x), "scores": self.two(x)}

    model = randomised(Two()).eval()
    graph = narrower.trace(model, batches()[0][:1])
    found = narrower.sensitivity(model, graph, narrower.random(graph), batches())
    assert found.measure == "relative" and found.curves[0].damages[-1] > 0


def test_bad_input_is_an_error() -> None:
    model = network()
    graph = narrower.trace(model, batches()[0][:1])
    scores = narrower.random(graph)
    with pytest.raises(narrower.DataError, match="got 0 images"):
        narrower.sensitivity(model, graph, scores, [])
    with pytest.raises(narrower.DataError, match="got 6 images"):
        narrower.sensitivity(model, graph, scores, batches(), images=6)
    with pytest.raises(narrower.DataError, match="not finite"):
        narrower.sensitivity(model, graph, scores, [torch.full((24, 3, 8, 8), float("nan"))])
    with pytest.raises(narrower.PlanError, match="no entry for group"):
        narrower.sensitivity(model, graph, narrower.Scores(), batches())
