"""Scores from weights and gradients, against their formulas computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import networks, reference
from support.networks import IMAGES, PATTERNS, Plain
from torch import Tensor, nn

import narrower

BATCHES = [(networks.images(seed=k), torch.tensor([0, 1, 2, 3])) for k in range(2)]
SCORES: dict[str, Callable[[nn.Module, narrower.Graph, Any], narrower.Scores]] = {
    "magnitude": lambda m, g, x: narrower.magnitude(m, g),
    "l1": lambda m, g, x: narrower.magnitude(m, g, p=1),
    "fpgm": lambda m, g, x: narrower.fpgm(m, g),
    "taylor": lambda m, g, x: narrower.taylor(m, g, [(x, 0.5)], squares),
    "random": lambda m, g, x: narrower.random(g),
    "hrank": lambda m, g, x: narrower.hrank(m, g, [(x, None)]),
}


def squares(out: Any, target: float) -> Tensor:
    return torch.stack([(t - target).square().mean() for t in reference.flat(out)]).sum()


def relative(t: Tensor) -> Tensor:
    return t / t.mean()


@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_magnitude_is_the_norm_of_each_filter(p: float) -> None:
    model = Plain()
    graph = narrower.trace(model, IMAGES)
    found = narrower.magnitude(model, graph, p=p)
    for name in ("conv1", "conv2", "conv3"):
        w = model.get_parameter(f"{name}.weight")
        want = torch.stack([sum(v.abs() ** p for v in row.flatten()) ** (1 / p) for row in w])
        assert torch.allclose(relative(found[name]), relative(want), rtol=1e-4)


def test_a_shared_channel_averages_its_layers() -> None:
    """A residual stream: each layer counts the same, whatever its scale."""
    case = PATTERNS["residual"]
    model = case.make()
    graph = narrower.trace(model, case.inputs)
    layers = ["0.0", "1.conv2.0"]
    assert list(graph["0.0"].layers) == layers
    model.get_parameter("1.conv2.0.weight").data.mul_(100)
    norms = [relative(model.get_parameter(f"{n}.weight").flatten(1).norm(dim=1)) for n in layers]
    assert torch.allclose(relative(narrower.magnitude(model, graph)["0.0"]), relative(norms[0] + norms[1]), rtol=1e-5)


def test_transposed_and_grouped_filters() -> None:
    """A transposed convolution makes the channels of its second dimension, in each of its groups."""
    case = PATTERNS["transposed"]
    model = case.make()
    graph = narrower.trace(model, case.inputs)
    w = model.get_parameter("up.weight")  # (8, 12 / 2, 2, 2), two groups
    want = torch.cat([w[:4].transpose(0, 1).flatten(1).norm(dim=1), w[4:].transpose(0, 1).flatten(1).norm(dim=1)])
    group = graph["up"]
    others = [s for s in group.slices if s.role == "out" and s.tensor != "up.weight"]
    found = narrower.magnitude(model, graph)["up"]
    if not others:
        assert torch.allclose(relative(found), relative(want), rtol=1e-5)
    else:  # the depthwise one behind makes the same channels
        wide = model.get_parameter("wide.weight").flatten(1).norm(dim=1)
        assert torch.allclose(relative(found), relative(relative(want) + relative(wide)), rtol=1e-5)


def test_fpgm_is_the_sum_of_distances() -> None:
    model = Plain()
    graph = narrower.trace(model, IMAGES)
    w = model.conv2.weight.data
    w[3] = w[5]  # two equal filters are the most replaceable together with whatever lies in the middle
    w[9] = 10 * w[9]
    found = narrower.fpgm(model, graph)["conv2"]
    rows = w.flatten(1)
    want = torch.stack([sum((a - b).norm() for b in rows) for a in rows])
    assert torch.allclose(relative(found), relative(want), rtol=1e-4)
    assert found.argmax() == 9 and abs(found[3] - found[5]) < 1e-5


def test_bn_scale_is_gamma() -> None:
    case = PATTERNS["residual"]
    model = case.make()
    graph = narrower.trace(model, case.inputs)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data = torch.randn(m.num_features)
    found = narrower.bn_scale(model, graph)
    assert torch.allclose(found["1.conv1.0"], model.get_parameter("1.conv1.1.weight").abs())
    both = (model.get_parameter("0.1.weight").abs() + model.get_parameter("1.conv2.1.weight").abs()) / 2
    assert torch.allclose(found["0.0"], both)


def test_bn_scale_needs_a_batch_norm() -> None:
    model = Plain()
    with pytest.raises(narrower.PlanError, match="conv2"):
        narrower.bn_scale(model, narrower.trace(model, IMAGES))


def test_taylor_is_the_squared_first_order_change() -> None:
    """(sum of gradient * weight over the filter)^2, summed over batches: the derivative by a factor on the filter."""
    model = Plain().eval()
    graph = narrower.trace(model, IMAGES)
    found = narrower.taylor(model, graph, BATCHES, F.cross_entropy)
    for name in ("conv1", "conv2", "conv3"):
        want = torch.zeros(graph[name].size)
        for x, y in BATCHES:
            factor = torch.ones(graph[name].size, requires_grad=True)
            w = model.get_parameter(f"{name}.weight")
            values = {f"{name}.weight": w * factor.view(-1, 1, 1, 1)}
            F.cross_entropy(torch.func.functional_call(model, values, (x,)), y).backward()
            assert factor.grad is not None
            want += factor.grad.square()
        assert torch.allclose(found[name], want, rtol=1e-3, atol=1e-10)


def test_taylor_gives_the_model_all_its_inputs() -> None:
    """A pair of inputs inside of a pair with targets is no pair with targets."""
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 2)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            x = x if y is None else x - y
            return self.head(self.conv(x).relu().mean((2, 3)))

    model, x, y = Two().eval(), networks.images(), networks.images(seed=1)
    graph, labels = narrower.trace(model, (x, y)), torch.zeros(len(x), dtype=torch.long)
    both, difference = (narrower.taylor(model, graph, [(inputs, labels)], F.cross_entropy) for inputs in ((x, y), x - y))
    assert torch.equal(both["conv"], difference["conv"])


def test_a_layer_that_the_loss_does_not_see_has_no_taylor_score() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(n, 4, 1) for n in (3, 3, 4, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.c(self.a(x)), self.d(self.b(x))

    model = Two().eval()
    graph = narrower.trace(model, IMAGES)
    found = narrower.taylor(model, graph, [(IMAGES, None)], lambda out, _: out[0].square().mean())
    assert found["a"].min() > 0 and not found["b"].any()


def test_taylor_leaves_the_model_as_it_was() -> None:
    model = Plain().train()
    model.conv1.requires_grad_(False)
    model(IMAGES).sum().backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    graph = narrower.trace(model, IMAGES)
    scores = narrower.taylor(model, graph, BATCHES, F.cross_entropy)
    assert scores["conv1"].abs().sum() > 0, "a frozen layer has scores too"
    assert not model.conv1.weight.requires_grad and model.conv2.weight.requires_grad and model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    for n, p in model.named_parameters():
        assert (p.grad is None) == (grads[n] is None) and (p.grad is None or torch.equal(p.grad, grads[n])), n  # type: ignore[arg-type]


def test_random_is_seeded() -> None:
    graph = narrower.trace(Plain(), IMAGES)
    a, b, c = narrower.random(graph, 1), narrower.random(graph, 1), narrower.random(graph, 2)
    assert all(torch.equal(a[n], b[n]) and not torch.equal(a[n], c[n]) for n in a)
    state = torch.get_rng_state()
    narrower.random(graph)
    assert torch.equal(state, torch.get_rng_state())
    for seed in (0.5, -1, "one"):
        with pytest.raises(narrower.ConfigError, match="seed=.*: give a whole number from 0"):
            narrower.random(graph, seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", PATTERNS)
def test_every_score_covers_every_network(name: str, score: str) -> None:
    case = PATTERNS[name]
    model = case.make().eval()
    graph = narrower.trace(model, case.inputs)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    scores = SCORES[score](model, graph, case.inputs)
    assert set(scores) == {g.name for g in graph.free}
    for g in graph.free:
        s = scores[g.name]
        assert isinstance(s, Tensor) and s.shape == (g.size,) and s.is_floating_point() and bool(s.isfinite().all())
        assert float(s.min()) >= 0 and not s.requires_grad
        assert score == "hrank" or g.size < 4 or float(s.std()) > 0, "no two channels are alike here"
    narrower.plan(graph, scores, macs=0.6)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_users_own_score() -> None:
    """Any mapping from group names to tensors will do."""
    model = Plain()
    graph = narrower.trace(model, IMAGES)
    own: dict[str, Any] = {g.name: torch.arange(g.size) for g in graph.free}
    assert narrower.plan(graph, own, remove=0.5).keep["conv1"].tolist() == [5, 6, 7, 8, 9]


def test_bad_calls() -> None:
    model = Plain()
    graph = narrower.trace(model, IMAGES)
    p: Any
    for p in (0, -1, float("nan"), float("inf"), "2"):
        with pytest.raises(narrower.ConfigError, match=f"p='?{p}'?: give a number above 0"):
            narrower.magnitude(model, graph, p=p)
    with pytest.raises(narrower.DataError, match="no batches"):
        narrower.taylor(model, graph, [], F.cross_entropy)


@pytest.mark.parametrize("batch", [IMAGES[:2], {"images": IMAGES, "labels": None}, (IMAGES,)])
def test_taylor_without_labels_says_so(batch: Any) -> None:
    """Two images in a tensor are no pair of inputs and targets."""
    model = Plain()
    graph = narrower.trace(model, IMAGES)
    with pytest.raises(narrower.DataError, match=r"taylor needs labels: each batch must be a pair \(inputs, targets\)"):
        narrower.taylor(model, graph, [batch], F.cross_entropy)


class Spectral(nn.Module):
    """A layer of a Fourier neural operator: complex weights `(in, out, 3, 3)` on the lowest frequencies."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, 3, 3, dtype=torch.cfloat) / inputs)

    def forward(self, x: Tensor) -> Tensor:
        found = torch.einsum("bixy,ioxy->boxy", torch.fft.rfft2(x)[:, :, :3, :3], self.weight)
        return torch.fft.irfft2(found, s=x.shape[-2:])


class ComplexLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 8, dtype=torch.cfloat), nn.Linear(8, 5, dtype=torch.cfloat)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)[:, :12].to(torch.cfloat))
        return self.last(x * x).abs()


@pytest.mark.filterwarnings("error:Casting complex")
def test_complex_weights_count_whole() -> None:
    """Their imaginary part was dropped."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Spectral(6, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    graph = narrower.trace(model, IMAGES)
    rows = model.get_parameter("1.weight").detach().movedim(1, 0).flatten(1)
    assert torch.allclose(narrower.magnitude(model, graph)["1"], relative(rows.abs().square().sum(1).sqrt()), rtol=1e-4)
    assert torch.allclose(narrower.magnitude(model, graph, p=1)["1"], relative(rows.abs().sum(1)), rtol=1e-4)
    distances = (rows[:, None] - rows[None]).abs().square().sum(2).sqrt().sum(1)
    assert torch.allclose(narrower.fpgm(model, graph)["1"], relative(distances), rtol=1e-4)


@pytest.mark.filterwarnings("error:Casting complex")
def test_taylor_of_complex_weights_is_the_change_along_both_parts() -> None:
    model = ComplexLinear().eval()
    graph = narrower.trace(model, IMAGES)
    found = narrower.taylor(model, graph, [(IMAGES, 0.5)], squares)["first"]
    want = torch.zeros(8)
    for channel in range(8):
        changed = ComplexLinear().eval()
        changed.load_state_dict(model.state_dict())
        scale = torch.ones((), requires_grad=True)
        weight = changed.first.weight.detach()
        mask = torch.eye(8)[channel][:, None]
        del changed.first.weight
        changed.first.weight = weight * (1 - mask) + weight * mask * scale
        (gradient,) = torch.autograd.grad(squares(changed(IMAGES), 0.5), scale)
        want[channel] = gradient.square()
    assert torch.allclose(found, want, rtol=1e-3)


@pytest.mark.filterwarnings("error:Casting complex")
def test_what_measures_activations_leaves_complex_layers_alone() -> None:
    """Least squares there are real: a group that only complex layers read gets its magnitude."""
    model, x = ComplexLinear().eval(), torch.randn(32, 3, 4, 4)
    graph = narrower.trace(model, x)
    scores = narrower.obs(model, graph, [x])
    assert torch.equal(scores["first"], narrower.magnitude(model, graph)["first"])
    narrower.sensitivity(model, graph, scores, [x])
    plan = narrower.plan(graph, scores, remove=0.5)
    assert "last.weight" in narrower.reconstruct(model, narrower.narrow(model, plan), plan, [x]).left
    assert narrower.CentripetalSGD(model, graph, remove=0.5, steps=3).clusters
    assert narrower.SoftPruning(model, graph, macs=0.7, steps=3).step() > 0


def test_scores_of_a_network_without_free_channels_are_empty() -> None:
    model = nn.Conv2d(3, 4, 1)
    graph = narrower.trace(model, IMAGES)
    assert narrower.taylor(model, graph, [(IMAGES, 0.5)], squares) == narrower.magnitude(model, graph) == {}
