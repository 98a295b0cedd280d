"""sensitivity: what a group's channels are worth, measured on images that nothing was fitted on."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support.networks import PATTERNS, Head, Trap, modulated, unit
from support.resrep_training import randomised
from torch import Tensor, nn

import narrower
from narrower.allocation import measure as allocation
from narrower.allocation.measure import MEASURED, TrialCut, cuts_of, measured_damages
from narrower.graph.equal_counts import components
from narrower.planning.plan import costed_plan
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


def test_the_images_measured_on_do_not_count_in_what_is_fitted() -> None:
    """So the damage on images is the mean of that on each, whichever else are measured: every sixth one."""
    model, x = network(), torch.cat(batches())
    graph = narrower.trace(model, x[:1])
    scores = narrower.magnitude(model, graph)
    others = torch.randn(12, 3, 8, 8) * torch.linspace(0.5, 3, 12).view(-1, 1, 1, 1)

    def damages(measured: Tensor) -> np.ndarray:
        x[MEASURED - 1::MEASURED] = measured
        return np.array([c.damages for c in narrower.sensitivity(model, graph, scores, [x]).curves])

    some, first = x[MEASURED - 1::MEASURED].clone(), torch.arange(12) < 6
    apart = damages(some), damages(others)
    mixed = [damages(torch.where(chosen.view(-1, 1, 1, 1), some, others)) for chosen in (first, ~first)]
    assert not np.allclose(*apart, rtol=0.1)
    np.testing.assert_allclose(sum(mixed), sum(apart), rtol=1e-9)


def test_no_more_images_are_measured_on_than_it_says() -> None:
    model, x = network(), torch.randn(66 * MEASURED, 3, 4, 4)
    graph = narrower.trace(model, x[:1])
    assert narrower.sensitivity(model, graph, narrower.random(graph), [x], shares=(0.5,)).images == 64


def test_shares_may_come_in_any_order() -> None:
    """A curve has them ascending: another order could not be read from a file again."""
    model = network()
    graph = narrower.trace(model, batches()[0][:1])
    found, want = (narrower.sensitivity(model, graph, narrower.random(graph), batches(), shares=shares)
                   for shares in ((0.5, 0.25, 0.75), (0.25, 0.5, 0.75)))
    assert found == want == narrower.Sensitivity.from_json(found.to_json())


def test_a_weight_that_reads_a_group_along_both_dimensions_is_cut_along_both() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Linear(6, 6, bias=False), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).mean((2, 3))
            return self.c((x + self.b(x)) @ self.b.weight)

    model = Tied().eval()
    graph = narrower.trace(model, batches()[0][:1])
    (part,) = components(graph)
    scores = {"a": np.array([5.0, 0, 3, 1, 4, 2])}
    (cut,) = cuts_of(graph, 0, part, scores, model, {}, (0.5,))
    stays = torch.tensor([1.0, 0, 1, 0, 1, 0])
    assert torch.equal(cut.weights["b.weight"], model.b.weight * stays * stays[:, None])


def test_constant_channels_cost_nothing_as_an_intercept_makes_up_for_them() -> None:
    model = randomised(nn.Sequential(unit(3, 12), Head(12))).eval()
    with torch.no_grad():
        named_tensors(model)["0.1.weight"][:3] = 0
        named_tensors(model)["0.1.bias"][:3] = 2.0
    graph = narrower.trace(model, batches()[0][:1])
    found = narrower.sensitivity(model, graph, {"0.0": torch.arange(12.0)}, batches(), shares=(0.25, 0.5))
    assert found.curves[0].damages[0] < 1e-9 < 1e-6 < found.curves[0].damages[1]


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
    with pytest.raises(narrower.DataError, match="measure='kl' compares class scores"):
        narrower.sensitivity(model, graph, narrower.random(graph), batches(), measure="kl")


def test_the_measure_is_the_one_that_is_given() -> None:
    model = network()
    graph = narrower.trace(model, batches()[0][:1])
    scores = narrower.magnitude(model, graph)
    kl, relative = (narrower.sensitivity(model, graph, scores, batches(), measure=measure) for measure in (None, "relative"))
    assert (kl.measure, relative.measure) == ("kl", "relative") and kl.curves[0].damages != relative.curves[0].damages


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
    with pytest.raises(narrower.DataError, match="batch 1 has shape"):
        narrower.sensitivity(model, graph, scores, [torch.randn(12, 3, 8, 8), torch.randn(12, 3, 9, 9)])
    with pytest.raises(narrower.DataError, match=r"does not run on inputs of shape \(1, 4, 8, 8\)"):
        narrower.sensitivity(model, graph, scores, batches(channels=4))
    with pytest.raises(narrower.PlanError, match="not the one that was traced"):
        narrower.sensitivity(nn.Sequential(unit(3, 12), Head(12)), graph, scores, batches())


class Ranked(nn.Module):
    """Gives the order of the classes only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out.argsort(1)


def test_outputs_without_numbers_to_compare_are_an_error_and_the_model_is_untouched() -> None:
    model = Ranked()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    graph = narrower.trace(model, batches()[0][:1])
    scores = narrower.random(graph)
    with pytest.raises(narrower.DataError, match="without floating-point numbers"):
        narrower.sensitivity(model, graph, scores, batches())
    plan = narrower.plan(graph, scores, remove=0.3)
    small = narrower.narrow(model, plan)
    with pytest.raises(narrower.DataError, match="without floating-point numbers"):
        narrower.reconstruct(model, small, plan, batches())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_model_in_train_mode_is_measured_in_eval_mode_and_stays_in_train_mode() -> None:
    model = network()
    graph = narrower.trace(model, batches()[0][:1])
    scores = narrower.magnitude(model, graph)
    want = narrower.sensitivity(model, graph, scores, batches())
    model.train()
    assert narrower.sensitivity(model, graph, scores, batches()) == want
    assert model.training and all(m.training for m in model.modules())


class Unseen(nn.Module):
    """Layers whose inputs cannot be seen: a centred weight, and a parameter that is a factor as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.c, self.matrix, self.head = nn.Conv2d(8, 4, 1), nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        centred = self.b.weight - self.b.weight.mean((1, 2, 3), keepdim=True)
        x = torch.relu(nn.functional.conv2d(torch.relu(self.a(x)), centred, self.b.bias))
        out: Tensor = self.head(torch.relu(torch.relu(self.c(x)).mean((2, 3)) @ self.matrix))
        return out


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, (self.weight - mean) / torch.sqrt(variance + 1e-5), self.bias)


class Attends(nn.Module):
    """Query and key are read by a matrix product alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.query, self.key, self.value = (nn.Conv2d(3 if k == 0 else 8, 8, 1) for k in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        q, k, v = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        out: Tensor = x.flatten(2) + (v @ (q.transpose(1, 2) @ k).softmax(1))
        return out.mean(2)


class LowRank(nn.Module):
    """A linear layer whose weight is computed: zeros in a part of it are none in the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.linear, self.head = nn.Conv2d(3, 12, 3), nn.Linear(12, 8), nn.Linear(8, 5)
        self.left, self.right = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 12))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x)).mean((2, 3))
        out: Tensor = self.head(torch.relu(nn.functional.linear(y, self.linear.weight + self.left @ self.right)))
        return out


class Tied(nn.Module):
    """A convolution and a transposed one read one weight along its two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.code, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        code = torch.relu(self.code(torch.relu(self.stem(x))))
        out: Tensor = self.head(nn.functional.conv_transpose2d(code, self.code.weight))
        return out


MIXING: dict[str, nn.Module] = {
    "group norm": nn.Sequential(nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.ReLU(True), nn.Conv2d(12, 8, 3), Head(8)),
    "standardised weight": nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), Standardised(12, 8, 3), nn.ReLU(), Head(8)),
    "matrix product": Attends(),
    "computed linear weight": LowRank(),
    "tied autoencoder": Tied(),
    "modulated weight": Trap(modulated, 8, style=nn.Linear(12, 12), weight=nn.Parameter(torch.randn(1, 8, 12, 3, 3))),
}


def damage_of_narrow(model: nn.Module, graph: narrower.Graph, scores: narrower.Scores, remove: dict[str, float]) -> float:
    """The divergence of the network that `narrow` returns, on the images that `sensitivity` measures on."""
    plan = narrower.plan(graph, scores, remove=remove)  # also groups that a layer of that name makes
    keep = {n: kept if n in remove else np.arange(graph[n].size) for n, kept in plan.keep.items()}
    small = narrower.narrow(model, costed_plan(graph, keep, plan.request))
    dtype = next(model.parameters()).dtype
    x = torch.cat(batches())[MEASURED - 1:: MEASURED].to(dtype)
    with torch.no_grad():
        p, q = (m(x).double().log_softmax(1) for m in (model, small))
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize("name", MIXING)
def test_without_repair_the_damage_is_that_of_what_narrow_returns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a layer mixes channels: it no longer sees those that went."""
    monkeypatch.setattr(allocation, "second_moments", lambda *_: {})
    model = randomised(copy.deepcopy(MIXING[name])).double().eval()
    graph = narrower.trace(model, batches()[0][:1].double())
    scores = narrower.random(graph)
    found = narrower.sensitivity(model, graph, scores, [b.double() for b in batches()], shares=(0.5,))
    assert {n for c in found.curves for n in c.groups} == {g.name for g in graph.free}
    for curve in found.curves:
        want = damage_of_narrow(model, graph, scores, dict.fromkeys(curve.groups, 0.5))
        assert want > 0 and curve.damages[0] == pytest.approx(want, rel=1e-6), curve.groups


def test_layers_whose_inputs_cannot_be_seen_are_cut_without_repair_and_named() -> None:
    torch.manual_seed(0)
    model = Unseen().eval()
    graph = narrower.trace(model, batches()[0][:1])
    scores = narrower.random(graph)
    lines: list[str] = []
    found = narrower.sensitivity(model, graph, scores, batches(), shares=(0.5,), progress=lines.append)
    assert "cut without repair" in lines[0] and lines[0].endswith("b.weight, matrix")
    for group in ("a", "c"):
        assert found.by_group[group].damages[0] == pytest.approx(damage_of_narrow(model, graph, scores, {group: 0.5}), rel=0.05)
    plan = narrower.plan(graph, scores, remove=0.5)
    repaired = narrower.reconstruct(model, narrower.narrow(model, plan), plan, batches())
    assert set(repaired.left) == {"b.weight", "matrix"} and [r.weight for r in repaired.layers] == ["c.weight", "head.weight"]


def test_readers_at_several_depths_are_all_cut() -> None:
    """The damage is that of the network whose readers, early and late, have lost the channels."""
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.early, self.late = unit(3, 8), unit(8, 6), nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.late(x).mean((2, 3)) + self.early(x).mean((2, 3))[:, :5]

    model = randomised(Skip()).eval()
    x = torch.randn(4, 3, 8, 8)
    named = named_tensors(model)
    weights = {n: named[n] * (torch.arange(8) < 4).view(1, -1, 1, 1) for n in ("early.0.weight", "late.weight")}
    found, _ = measured_damages(model, [TrialCut(0, 0.5, weights, {})], [(x, 4)], None, None)
    other = copy.deepcopy(model)
    for name, weight in weights.items():
        named_tensors(other)[name].data.copy_(weight)
    with torch.no_grad():
        p, q = model(x).double().log_softmax(1), other(x).double().log_softmax(1)
    assert found[0] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-5)


def test_shares_that_remove_as_many_channels_are_measured_once() -> None:
    model = randomised(nn.Sequential(unit(3, 4), Head(4))).eval()
    graph = narrower.trace(model, batches()[0][:1])
    found = narrower.sensitivity(model, graph, narrower.random(graph), batches(), shares=(0.05, 0.2, 0.3, 0.5, 0.55, 0.99))
    assert found.curves[0].shares == (0.25, 0.5, 0.75)
