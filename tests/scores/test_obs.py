"""obs: what cannot be repaired when a channel goes, against least squares written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.networks import PATTERNS, Head, chain, in_one_memory, unit
from support.resrep_training import randomised
from torch import Tensor, nn

import narrower
from narrower.repair.second_moments import STRENGTH
from narrower.scores.obs import PORTION, Read, costs, removal_errors, without
from narrower.surgery.walk import named_tensors


def read(size: int, per_channel: int, outputs: int = 5, seed: int = 0) -> Read:
    """A layer that reads `size` channels, in a random order, and one more input that is no channel's."""
    g = torch.Generator().manual_seed(seed)
    n = size * per_channel
    x = torch.randn(4 * n, n + 1, dtype=torch.float64, generator=g)
    x = x @ torch.randn(n + 1, n + 1, dtype=torch.float64, generator=g)
    inverse = torch.linalg.inv(x.T @ x / len(x))[:n, :n]
    channel = torch.arange(size).repeat(per_channel)[torch.randperm(n, generator=g)]
    return Read(inverse, torch.randn(outputs, n, dtype=torch.float64, generator=g), channel)


def error(r: Read, gone: Tensor) -> float:
    """The least error without these inputs: with A the inverse, trace(W_S (A_SS)^-1 W_S^T)."""
    w, a = r.weight[:, gone], r.inverse[gone][:, gone]
    return float((w @ torch.linalg.inv(a) @ w.T).trace())


@torch.no_grad()
def test_the_first_channel_and_its_score_are_those_of_explicit_least_squares() -> None:
    """A sequence of two convolutions: every channel alone is left out, the second convolution solved again from its patches."""
    model = chain(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 4, 3, padding=1)).double().eval()
    x = torch.randn(20, 3, 8, 8, dtype=torch.float64)
    graph = narrower.trace(model, x[:1])
    found = narrower.obs(model, graph, [x[:8], x[8:]])["0"]

    maps, kernel = model[1](model[0](x)), named_tensors(model)["2.weight"]
    patches = nn.functional.unfold(maps, 3, padding=1).transpose(1, 2).reshape(-1, 7, 9)
    out = patches.flatten(1) @ kernel.flatten(1).T
    variance = (out - out.mean(0)).square().mean(0).sum()
    ridge = STRENGTH * patches.square().mean()
    errors = []
    for c in range(7):
        rest = [k for k in range(7) if k != c]
        inputs = torch.cat([torch.ones(len(patches), 1, dtype=x.dtype), patches[:, rest].flatten(1)], 1)
        penalty = ridge * torch.eye(inputs.shape[1], dtype=x.dtype)
        penalty[0, 0] = 0
        wanted = patches[:, c] @ kernel[:, c].flatten(1).T
        change = torch.linalg.solve(inputs.T @ inputs / len(inputs) + penalty, inputs.T @ wanted / len(inputs)).T
        left = (wanted - inputs @ change.T).square().mean(0).sum()
        lost = ridge * (change[:, 1:].square().sum() + kernel[:, c].square().sum())
        errors.append(float((left + lost) / variance))
    assert int(found.argmin()) == min(range(7), key=errors.__getitem__)
    assert float(found.min()) == pytest.approx(min(errors), rel=1e-4)
    assert float(found.max()) == pytest.approx(1, abs=0.01)  # the reader has lost all


def test_costs_are_those_of_removing_each_channel_alone() -> None:
    r = read(6, 3)
    r = Read(r.inverse[1:][:, 1:], r.weight[:, 1:], r.channel[1:])  # channels may have different numbers of inputs
    want = [error(r, (r.channel == c).nonzero()[:, 0]) for c in range(6)]
    torch.testing.assert_close(costs(r, 6), torch.tensor(want, dtype=torch.float64))
    assert not costs(Read(r.inverse, r.weight, r.channel + 1), 7)[0]  # a channel that is not read


def test_a_downdate_is_the_problem_without_the_channels() -> None:
    r = read(6, 2)
    growth, rest = without(r, torch.tensor([4, 1]), 6)
    gone = [torch.isin(r.channel, torch.tensor(c)).nonzero()[:, 0] for c in ([4], [4, 1])]
    one, both = (error(r, s) for s in gone)
    assert float(growth[4]) == pytest.approx(one) and float(growth[1]) == pytest.approx(both - one)
    assert float(growth.sum()) == pytest.approx(both)
    assert sorted(rest.channel.unique().tolist()) == [0, 2, 3, 5]
    for c in (0, 2, 3, 5):
        more = torch.isin(r.channel, torch.tensor([4, 1, c])).nonzero()[:, 0]
        assert float(costs(rest, 6)[c]) == pytest.approx(error(r, more) - both)


def test_scores_are_the_errors_along_the_order_of_removal() -> None:
    reads = [read(2 * PORTION + 3, 1, seed=k) for k in range(2)]
    found = removal_errors(reads, 2 * PORTION + 3).double()
    order = found.argsort(stable=True)
    assert (found[order].diff() >= 0).all()
    for k in (0, 5, len(order) - 1):
        want = sum(error(r, torch.isin(r.channel, order[: k + 1]).nonzero()[:, 0]) for r in reads)
        assert float(found[order[k]]) == pytest.approx(want, rel=1e-5)
    portion = -(-len(order) // PORTION)
    first = torch.stack([costs(r, len(order)) for r in reads]).sum(0).argsort()
    assert order[:portion].tolist() == first[:portion].tolist()
    left = torch.stack([costs(without(r, order[:portion], len(order))[1], len(order)) for r in reads]).sum(0)
    assert int(order[portion]) == int(order[portion:][left[order[portion:]].argmin()])  # costs are computed anew


@torch.no_grad()
def test_duplicated_channels_go_first_at_no_error() -> None:
    model = randomised(chain(unit(3, 12), unit(12, 10), Head(10))).eval()
    for name in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        t = named_tensors(model)[f"0.{name}"]
        t[8:] = t[:4]
    x = torch.randn(40, 3, 8, 8)
    found = narrower.obs(model, narrower.trace(model, x[:1]), [x])["0.0"]
    first = found.argsort()[:4].tolist()
    assert {c % 8 for c in first} == {0, 1, 2, 3}  # one of each pair
    assert float(found[first].max()) < 2e-3 < 5e-3 < float(found.sort().values[4])  # the ridge alone costs a little


def test_every_pattern_has_finite_scores_for_every_free_group() -> None:
    for case in PATTERNS.values():
        model = randomised(case.make())
        graph = narrower.trace(model, case.inputs)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        model.train()
        found = narrower.obs(model, graph, [case.inputs])
        assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        assert {n: len(s) for n, s in found.items()} == {g.name: g.size for g in graph.free}
        assert all(s.isfinite().all() and (s >= 0).all() and s.dtype == torch.float32 for s in found.values())


def test_the_order_does_not_depend_on_how_images_are_batched() -> None:
    model = randomised(chain(unit(3, 8), unit(8, 6, stride=2), nn.Flatten(), nn.Linear(96, 5))).eval()
    x = torch.randn(24, 3, 8, 8)
    graph = narrower.trace(model, x[:1])
    parts = [[x], list(x.split(7)), [x, -x]]
    found = [narrower.obs(model, graph, batches, images=24) for batches in parts]
    for a, b in itertools.pairwise(found):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_parameters_in_one_memory_are_told_apart() -> None:
    model = randomised(chain(unit(3, 8), unit(8, 8), unit(8, 6), Head(6))).eval()
    x = torch.randn(20, 3, 8, 8)
    graph = narrower.trace(model, x[:1])
    want, found = narrower.obs(model, graph, [x]), narrower.obs(in_one_memory(model), graph, [x])
    assert all(torch.equal(found[n], t) for n, t in want.items())


def test_a_group_that_no_layer_reads_gets_its_magnitude() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = unit(3, 6), unit(3, 5), nn.Conv2d(5, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(x)).mean((2, 3)) * self.a(x).norm(dim=1).mean((1, 2))[:, None]

    model = randomised(Products()).eval()
    x = torch.randn(8, 3, 6, 6)
    graph = narrower.trace(model, x[:1])
    found, size = narrower.obs(model, graph, [x]), narrower.magnitude(model, graph)
    assert torch.equal(found["a.0"], size["a.0"]) and not torch.equal(found["b.0"], size["b.0"])


def test_a_layer_that_makes_nothing_costs_nothing() -> None:
    model = chain(unit(3, 6), nn.Conv2d(6, 4, 1)).eval()
    nn.init.zeros_(named_tensors(model)["1.weight"])
    x = torch.randn(8, 3, 6, 6)
    assert not narrower.obs(model, narrower.trace(model, x[:1]), [x])["0.0"].any()


def test_bad_input_is_an_error() -> None:
    model = chain(unit(3, 6), unit(6, 4), Head(4)).eval()
    x = torch.randn(8, 3, 6, 6)
    graph = narrower.trace(model, x[:1])
    with pytest.raises(narrower.DataError, match="obs got 0 images"):
        narrower.obs(model, graph, [])
    with pytest.raises(narrower.DataError, match="not finite"):
        narrower.obs(model, graph, [x.where(x < 2, torch.nan)])
    with torch.no_grad(), pytest.raises(narrower.DataError, match="reads is not finite"):
        named_tensors(model)["0.1.bias"][0] = torch.inf
        narrower.obs(model, graph, [x])
    with pytest.raises(narrower.PlanError, match="not the one that was traced"):
        narrower.obs(chain(unit(3, 5), unit(5, 4), Head(4)), graph, [x])
