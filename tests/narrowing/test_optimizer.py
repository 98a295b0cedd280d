"""An optimizer follows its parameters into the narrow network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import reference
from support.networks import IMAGES, Plain
from torch import Tensor, nn

import narrower
from narrower.narrowing.optimizer import Swap, cut_state

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_goes_on_with_its_state(name: str) -> None:
    """The next step is that of an optimizer made for the narrow network with the surviving elements of the state."""
    torch.manual_seed(0)
    model = Plain().double().eval()  # no batch statistics: gradients of both networks are comparable
    x = IMAGES.double()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        step(model, optimizer, x)
    plan = reference.halved(model, x)
    index = reference.survivors(narrower.narrow(reference.coded(model), plan), model)
    old = {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
    small = narrower.narrow(model, plan, optimizer=optimizer)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in small.parameters()}
    assert {id(p) for p in optimizer.state} == {id(p) for p in small.parameters()}, "the old parameters' state is left"

    fresh_model = copy.deepcopy(small)
    fresh = OPTIMIZERS[name](fresh_model.parameters())
    for n, p in fresh_model.named_parameters():
        shape = dict(model.named_parameters())[n].shape
        fresh.state[p] = {k: v.flatten()[index[n]].clone() if isinstance(v, Tensor) and v.shape == shape else copy.deepcopy(v)
                          for k, v in old[n].items()}
    for _ in range(2):
        step(small, optimizer, x)
        step(fresh_model, fresh, x)
    for (n, a), b in zip(small.named_parameters(), fresh_model.parameters(), strict=True):
        assert torch.equal(a, b), n
    before = narrower.narrow(model, plan)
    assert not any(torch.equal(a, b) for a, b in zip(small.parameters(), before.parameters(), strict=True))


def test_an_optimizer_with_groups_keeps_their_settings() -> None:
    model = Plain()
    settings: list[dict[str, Any]] = [{"params": [model.conv1.weight], "lr": 0.5}, {"params": model.fc.parameters()}]
    optimizer = torch.optim.SGD(settings, lr=0.1)
    small: Any = narrower.narrow(model, reference.halved(model, IMAGES), optimizer=optimizer)
    assert optimizer.param_groups[0]["params"][0] is small.conv1.weight
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.1]
    assert optimizer.param_groups[1]["params"][0] is small.fc.weight


def test_state_has_the_memory_format_of_the_parameter() -> None:
    """Otherwise fused and foreach steps take a slow path, or fail."""
    model = Plain().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, IMAGES)
    small = narrower.narrow(model, reference.halved(model, IMAGES), optimizer=optimizer)
    assert any(not p.is_contiguous() for p in small.parameters())
    assert all(optimizer.state[p]["momentum_buffer"].stride() == p.stride() for p in small.parameters())


def test_state_that_does_not_fit_the_new_shape_begins_anew() -> None:
    """Adafactor keeps sums over the rows and columns of matrices."""
    torch.manual_seed(0)
    model = Plain()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    step(model, optimizer, IMAGES)
    small: Any = narrower.narrow(model, reference.halved(model, IMAGES), optimizer=optimizer)
    assert small.conv1.weight.shape != model.conv1.weight.shape and small.fc.bias.shape == model.fc.bias.shape
    assert not optimizer.state[small.conv1.weight] and float(optimizer.state[small.fc.bias]["step"]) == 1
    step(small, optimizer, IMAGES)
    assert "row_var" in optimizer.state[small.conv1.weight]


def test_state_of_a_parameter_that_keeps_its_shape_stays_whatever_it_holds() -> None:
    state = {"step": torch.tensor(3.0), "row_var": torch.rand(4, 1), "moment": torch.rand(4, 5)}
    weight = torch.rand(4, 5)
    cut = cut_state(state, Swap(weight, weight.clone(), lambda t: t))
    assert cut.keys() == state.keys() and all(torch.equal(cut[name], state[name]) for name in state)


def test_an_optimizer_of_another_model_is_refused() -> None:
    """One that has other parameters besides the model's is not."""
    model, other = Plain(), Plain()
    plan = reference.halved(model, IMAGES)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    before = [*optimizer.param_groups[0]["params"]]
    with pytest.raises(narrower.ConfigError, match="the SGD given as optimizer= has no parameter of this model"):
        narrower.narrow(model, plan, optimizer=optimizer)
    assert all(a is b for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))
    narrower.narrow(model, plan, optimizer=torch.optim.SGD([*other.parameters(), *model.parameters()], lr=0.1))


def test_lbfgs_is_refused_which_would_go_on_with_the_old_parameters() -> None:
    """It has a list of parameters of its own, and one history over all of them."""
    model = Plain()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    with pytest.raises(narrower.ConfigError, match="LBFGS cannot go on with smaller parameters"):
        narrower.narrow(model, reference.halved(model, IMAGES), optimizer=optimizer)
    assert all(a is b for a, b in zip(model.parameters(), optimizer.param_groups[0]["params"], strict=True))
