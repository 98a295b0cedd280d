"""fold: a removed channel that is a constant leaves without a trace, where what reads it can take the constant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.networks import images
from support.resrep_training import difference, outputs, randomised, sgd, train
from torch import Tensor, nn

import narrower


class Net(nn.Module):
    """`first`, `activation`, `second` (and its BatchNorm or bias), and a head."""

    def __init__(self, activation: Callable[[Tensor], Tensor], second: nn.Module, first: nn.Module | None = None,
                 norm: bool = True) -> None:
        super().__init__()
        self.first = first or nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12) if norm else nn.Identity()
        self.second, self.head = second, nn.Linear(10, 3)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm(self.first(x)))
        return self.head(F.relu(self.second(x)).mean((2, 3)))


def biased(**options: Any) -> nn.Module:
    return nn.Conv2d(12, 10, 1, **options)


def normed(kernel: int = 1, **options: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(12, 10, kernel, bias=False, **options), nn.BatchNorm2d(10))


class Twice(nn.Module):
    """One layer that reads the channels before and behind a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = biased()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer(torch.sigmoid(x))


class Own(nn.Conv2d):
    """Has a forward of its own, which would not use a bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


class Flat(nn.Module):
    """Every channel spread over all positions, read by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)).view(-1, 10, 1, 1)


class InOut(nn.Module):
    """x @ W: the weight lies as (in, out), as in graph convolutions and in GPT-2. As wide as it reads: no shape tells."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 12) / 4), nn.Parameter(torch.randn(12))
        self.last = nn.Conv2d(12, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = torch.addmm(self.bias, x.permute(0, 2, 3, 1).reshape(-1, c), self.weight)
        return self.last(y.view(n, h, w, -1).permute(0, 3, 1, 2).relu())


def swish_of_pooled(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.max_pool2d(x + 1.5, 2), 2).clamp(max=3.0) * torch.sigmoid(F.avg_pool2d(F.max_pool2d(x, 2), 2))


SECOND: dict[str, Callable[[], nn.Module]] = {
    "bias": biased,
    "grouped": lambda: nn.Conv2d(12, 10, 3, groups=2),
    "norm": normed,
    "norm_unpadded": lambda: normed(3, stride=2),
    "linear": Flat,
    "in_out": InOut,
    "bare": lambda: nn.Conv2d(12, 10, 1, bias=False),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "softplus": lambda x: F.softplus(x, beta=2.0),
    "shifted": lambda x: 2 - F.gelu(x - 0.3, approximate="tanh") / 3,
    "clamped": lambda x: torch.clamp(x, max=-0.1),
    "twice": lambda x: torch.cos(x) + x.exp() * torch.sigmoid(x),
}
GONE = [1, 4, 7, 10]  # two of each half, for the grouped one


def made(activation: str, second: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return randomised(Net(ACTIVATIONS[activation], SECOND[second]()), seed).double()


def without(graph: narrower.Graph, gone: list[int]) -> narrower.Plan:
    """A plan that removes these channels of the first layer and nothing else."""
    marks = torch.ones(12)
    marks[gone] = 0.01
    scores = narrower.Scores({g.name: torch.ones(g.size) if "first" not in g.name else marks for g in graph.free})
    plan = narrower.plan(graph, scores, remove={"first*": len(gone) / 12 + 1e-6})
    (name,) = [g.name for g in graph.free if "first" in g.name]
    assert plan.keep[name].tolist() == [c for c in range(12) if c not in gone]
    return plan


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dead", ["filter", "scale"])
def test_constant_channels_leave_without_a_trace(activation: str, second: str, dead: str, tmp_path: Path) -> None:
    model, x = made(activation, second), images().double()
    with torch.no_grad():
        (model.first if dead == "filter" else model.norm).weight[GONE] = 0
    graph = narrower.trace(model, x)
    plan = without(graph, GONE)
    dense = outputs(model, x)
    assert difference(dense, outputs(narrower.narrow(model, plan), x)) > 1e-4  # cut as it is, something is lost
    state = {n: t.clone() for n, t in model.state_dict().items()}
    folded = narrower.fold(model, plan)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())  # the model is as it was
    assert not folded.left
    assert 0 < sum(folded.channels.values()) <= 4, str(folded)  # those that relu makes zero need nothing
    assert difference(dense, outputs(folded.model, x)) < 1e-12
    small = narrower.narrow(folded.model, folded.plan)
    assert difference(dense, outputs(small, x)) < 1e-12
    assert narrower.verify(folded.model, small, folded.plan, x).error < 1e-12
    assert folded.plan.params[1] == sum(p.numel() for p in small.parameters())
    narrower.save(small, tmp_path)
    again = narrower.load(tmp_path, lambda: made(activation, second))
    assert difference(dense, outputs(again, x)) < 1e-12


@pytest.mark.parametrize("case", ["padded", "transposed", "bare", "shared"])
def test_what_cannot_be_folded_is_said(case: str) -> None:
    second = {"padded": lambda: normed(3, padding=1), "transposed": lambda: nn.ConvTranspose2d(12, 10, 3),
              "bare": lambda: Own(12, 10, 1, bias=False), "shared": Twice}[case]()
    torch.manual_seed(0)
    model: Any = randomised(Net(torch.sigmoid, second)).double()
    with torch.no_grad():
        model.norm.weight[GONE] = 0
    x = images().double()
    graph = narrower.trace(model, x)
    folded = narrower.fold(model, without(graph, GONE))
    (why,) = folded.left.values()
    assert {"padded": "between zeros", "transposed": "between zeros", "bare": "neither a bias nor a BatchNorm",
            "shared": "more than once"}[case] in why
    assert "second" in why
    assert "not folded" in str(folded)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), folded.model.state_dict().values(), strict=True))


def test_zeros_behind_padding_need_no_fold() -> None:
    """relu of a negative shift is zero: padding does not matter."""
    torch.manual_seed(0)
    model: Any = randomised(Net(F.relu, normed(3, padding=1))).double()
    with torch.no_grad():
        model.norm.weight[GONE] = 0
        model.norm.bias[GONE] = -0.2
    x = images().double()
    plan = without(narrower.trace(model, x), GONE)
    folded = narrower.fold(model, plan)
    assert not folded.left
    assert difference(outputs(model, x), outputs(narrower.narrow(folded.model, folded.plan), x)) < 1e-12


@pytest.mark.parametrize("dead", ["filter", "scale"])
def test_constant_channels_that_stay_are_not_folded(dead: str) -> None:
    model, x = made("sigmoid", "bias"), images().double()
    with torch.no_grad():
        (model.first if dead == "filter" else model.norm).weight[[*GONE, 2, 3]] = 0
    folded = narrower.fold(model, without(narrower.trace(model, x), GONE))
    assert [*folded.channels.values()] == [len(GONE)]
    assert difference(outputs(model, x), outputs(narrower.narrow(folded.model, folded.plan), x)) < 1e-12


def test_norms_without_an_epsilon_of_their_own_do_not_disturb() -> None:
    first = nn.Conv2d(3, 8, 1)
    model = nn.Sequential(first, nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten(2), nn.RMSNorm(64), nn.Flatten(),
                          nn.Linear(6 * 64, 4))
    with torch.no_grad():
        first.weight[3], first.bias[3] = 0, 0.5  # type: ignore[index]
    graph = narrower.trace(model, images())
    plan = narrower.plan(graph, {g.name: torch.arange(g.size) - 9.0 * (torch.arange(g.size) == 3) for g in graph.free},
                         remove={"0": 1 / 8})
    assert sum(narrower.fold(model, plan).channels.values()) == 1


def test_channels_that_change_are_not_folded() -> None:
    model, x = made("sigmoid", "bias"), images().double()
    plan = without(narrower.trace(model, x), GONE)
    folded = narrower.fold(model, plan)
    assert not folded.channels
    assert not folded.left
    assert "0 removed channels" in str(folded)


def test_a_second_round_may_give_a_bias(tmp_path: Path) -> None:
    model, x = made("sigmoid", "bare"), images().double()
    graph = narrower.trace(model, x)
    small: Any = narrower.narrow(model, narrower.plan(graph, narrower.random(graph), remove=0.3))
    with torch.no_grad():
        small.norm.weight[:2] = 0
    graph = narrower.trace(small, x)
    scores = narrower.Scores({g.name: torch.arange(1.0, g.size + 1) for g in graph.free})
    plan = narrower.plan(graph, scores, remove={"first*": 0.25})
    folded = narrower.fold(small, plan)
    less = narrower.narrow(folded.model, folded.plan)
    assert sum(folded.channels.values()) == 2
    assert difference(outputs(small, x), outputs(less, x)) < 1e-12
    narrower.save(less, tmp_path)
    assert difference(outputs(less, x), outputs(narrower.load(tmp_path, lambda: made("sigmoid", "bare")), x)) < 1e-12


def test_a_batch_norm_with_names_of_its_own_is_left_alone() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma, self.beta = nn.Parameter(torch.ones(12)), nn.Parameter(torch.ones(12))
            self.mean: Tensor
            self.variance: Tensor
            self.register_buffer("mean", torch.zeros(12))
            self.register_buffer("variance", torch.ones(12))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.mean, self.variance, self.gamma, self.beta)

    model: Any = Net(torch.sigmoid, biased())
    model.norm = Norm()
    with torch.no_grad():
        model.norm.gamma[GONE] = 0
    folded = narrower.fold(model.double(), without(narrower.trace(model, images().double()), GONE))
    assert not folded.channels and not folded.left


class Gated(Net):
    """The channels times a gate that changes with the input, and a half more for what is zero then."""

    def __init__(self) -> None:
        super().__init__(F.relu, biased())
        self.gate = nn.Conv2d(3, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.norm(self.first(x)) * self.gate(x))
        return self.head(F.relu(self.second(y)).mean((2, 3)))


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_a_gate_leaves_only_zeros_constant(shift: float) -> None:
    torch.manual_seed(0)
    model: Any = randomised(Gated()).double()
    with torch.no_grad():
        model.norm.weight[GONE], model.norm.bias[GONE] = 0, shift
    x = images().double()
    folded = narrower.fold(model, without(narrower.trace(model, x), GONE))
    assert sum(folded.channels.values()) == (0 if shift else 4)
    if not shift:
        assert difference(outputs(model, x), outputs(narrower.narrow(folded.model, folded.plan), x)) < 1e-12


def test_two_constants_of_one_channel_are_none() -> None:
    """Read side by side, before and behind a sigmoid: one number cannot stand for both."""
    class Beside(Net):
        def __init__(self) -> None:
            super().__init__(F.relu, nn.Conv2d(24, 10, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.first(x))
            return self.head(F.relu(self.second(torch.cat([y, torch.sigmoid(y)], 1))).mean((2, 3)))

    torch.manual_seed(0)
    model: Any = randomised(Beside()).double()
    with torch.no_grad():
        model.norm.weight[GONE] = 0
    x = images().double()
    plan = without(narrower.trace(model, x), GONE)
    folded = narrower.fold(model, plan)
    assert not folded.channels
    assert narrower.verify(folded.model, narrower.narrow(folded.model, folded.plan), folded.plan, x).error < 1e-12


# ------------------------------------------------------------------------------------------------ ResRep


@pytest.mark.parametrize("second", ["bias", "norm", "norm_unpadded", "linear", "grouped", "bare"])
@pytest.mark.parametrize("activation", ["sigmoid", "softplus", "shifted", "twice"])
def test_resrep_folds_what_a_zero_becomes(activation: str, second: str, tmp_path: Path) -> None:
    """Rows are zero behind the first BatchNorm, and something else where they are read."""
    model, x = made(activation, second, 1), images().double()
    resrep = narrower.ResRep(model, narrower.trace(model, x), macs=0.6, steps=24)
    assert any("first" in n for n in resrep.placement.rows), resrep.reasons
    optimizer = sgd(resrep, 0.001)
    for n, fold in ((10, False), (8, True), (6, True)):
        train(resrep, optimizer, x, n, seed=n)
        before = outputs(resrep.model, x)
        assert difference(before, outputs(resrep.merge(), x)) < 1e-10
        resrep.shrink(fold=fold)
        assert difference(before, outputs(resrep.model, x)) < 1e-10
    small: Any = resrep.merge()
    assert resrep.reached() <= 0.6
    assert small.first.out_channels < 12
    narrower.save(small, tmp_path)
    again: Any = narrower.load(tmp_path, lambda: made(activation, second))
    assert difference(outputs(small, x), outputs(again, x)) < 1e-12
    # and once more: what was narrowed and has a new bias is narrowed again
    graph = narrower.trace(again, x)
    plan = narrower.plan(graph, narrower.random(graph), remove=0.3)
    less = narrower.narrow(again, plan)
    assert narrower.verify(again, less, plan, x).error < 1e-12
    narrower.save(less, tmp_path)
    assert difference(outputs(less, x), outputs(narrower.load(tmp_path, lambda: made(activation, second)), x)) < 1e-12


def test_resrep_says_where_a_zero_cannot_be_folded() -> None:
    torch.manual_seed(0)
    model: Any = randomised(Net(torch.sigmoid, normed(3, padding=1))).double()
    x = images().double()
    resrep = narrower.ResRep(model, narrower.trace(model, x), params=0.9, steps=24)
    (why,) = [w for n, w in resrep.reasons.items() if "first" in n]
    assert "sigmoid makes 0.5 of zero" in why
    assert "second.0.weight reads them between zeros" in why
