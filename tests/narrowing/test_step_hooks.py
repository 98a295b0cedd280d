"""Hooks see the gradients of a step, whether they are computed before it or in a closure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.resrep_training import X, chain, chain_graph, train

import narrower
from narrower.narrowing.step_hooks import hook_steps


def square(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """The gradients of the squares of what is trained."""
    optimizer.zero_grad()
    loss = torch.stack([p.square().sum() for group in optimizer.param_groups for p in group["params"]]).sum()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("step", [
    lambda optimizer, closure: (closure(), optimizer.step())[0],
    torch.no_grad()(lambda optimizer, closure: optimizer.step(closure)),
    torch.no_grad()(lambda optimizer, closure: optimizer.step(closure=closure)),
], ids=["before", "by position", "by name"])  # fmt: skip
def test_the_hooks_are_called_around_a_step_with_its_gradients(step: Callable[..., Any]) -> None:
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer, seen = torch.optim.SGD([w], lr=0.5), list[Any]()

    def before(given: torch.optim.Optimizer) -> None:
        assert given is optimizer and w.grad is not None
        seen.append((w.tolist(), w.grad.tolist()))
        w.grad[0] = 0

    hook_steps(optimizer, before=torch.no_grad()(before), after=lambda given: seen.append((w.tolist(), given is optimizer)))
    assert step(optimizer, lambda: square(optimizer)) == 5
    assert seen == [([1.0, 2.0], [2.0, 4.0]), ([1.0, 0.0], True)]


class Twice(torch.optim.SGD):
    """Takes the gradient at a second place, as sharpness-aware minimisation does."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
            return closure()


def test_an_optimizer_that_calls_its_closure_again_is_refused_by_name() -> None:
    w = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(narrower.ConfigError, match="LBFGS calls its closure several times in a step"):
        hook_steps(torch.optim.LBFGS([w]), after=print)
    optimizer = Twice([w], lr=0.1)
    hook_steps(optimizer, before=print, after=print)
    with pytest.raises(narrower.ConfigError, match="Twice calls its closure several times in a step"):
        optimizer.step(lambda: square(optimizer))


class Sharpness(torch.optim.SGD):
    """Sharpness-aware minimisation: from the gradients that are there it goes up, and calls its closure once, at that place."""

    def __init__(self, params: Any, *, to_none: bool, **options: Any) -> None:
        super().__init__(params, **options)
        self.to_none = to_none
        self.base_optimizer = torch.optim.SGD(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        old = [p.clone() for p in parameters]
        for p in parameters:
            p.data = p + 0.05 * p.grad  # unseen by the weight's own count of changes
        self.zero_grad(set_to_none=self.to_none)
        torch.enable_grad()(closure)()
        for p, value in zip(parameters, old, strict=True):
            p.data = value
        self.base_optimizer.step()


@pytest.mark.parametrize("to_none", [False, True])
def test_an_optimizer_that_clears_gradients_before_its_closure_is_refused_and_its_base_is_taken(to_none: bool) -> None:
    """The closure has run before: a second gradient, of the place that the step has gone to, never comes."""
    w, seen = torch.nn.Parameter(torch.tensor([1.0, 2.0])), list[Any]()
    optimizer = Sharpness([w], to_none=to_none, lr=0.5)
    hook_steps(optimizer, before=print, after=seen.append)
    w.square().sum().backward()
    with pytest.raises(narrower.ConfigError, match=r"Sharpness .*clears gradients .*optimizer\.base_optimizer"):
        optimizer.step(lambda: w.square().sum().backward())
    assert not seen

    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = Sharpness([w], to_none=to_none, lr=0.5)
    hook_steps(optimizer.base_optimizer, before=lambda given: seen.append(w.grad.tolist()), after=seen.append)  # type: ignore
    w.square().sum().backward()
    optimizer.step(lambda: w.square().sum().backward())
    assert seen[0] == pytest.approx([2.2, 4.4]) and seen[1:] == [optimizer.base_optimizer]


class Wrapper(torch.optim.Optimizer):
    """Wraps an optimizer without the constructor of its base, as accelerate's and timm's Lookahead do, under some name."""

    def __init__(self, optimizer: torch.optim.Optimizer, name: str = "optimizer") -> None:
        setattr(self, name, optimizer)
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self.inner = optimizer

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def test_hooks_are_those_of_the_optimizer_inside_a_wrapper() -> None:
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    inner, seen = torch.optim.SGD([w], lr=0.5), list[Any]()
    wrapper = Wrapper(Wrapper(inner))
    hook_steps(wrapper, before=seen.append, after=seen.append)
    square(inner)
    wrapper.step()
    assert seen == [inner, inner]


def test_an_optimizer_whose_step_calls_no_hooks_is_refused_by_name() -> None:
    inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.5)
    with pytest.raises(narrower.ConfigError, match="the step of Wrapper calls no hooks"):
        hook_steps(Wrapper(inner, "base"), after=print)
    assert not inner._optimizer_step_post_hooks


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_fused_optimizer_with_a_scaler_is_refused_in_its_first_step(unscaled: bool) -> None:
    """It skips a step by itself where gradients overflow, and unscales them where no hook sees them."""
    w, scaler = torch.nn.Parameter(torch.ones(2)), torch.amp.GradScaler("cpu")
    optimizer, seen = torch.optim.SGD([w], lr=0.5, fused=True), list[Any]()
    hook_steps(optimizer, before=seen.append, after=seen.append)
    scaler.scale(w.square().sum()).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    with pytest.raises(narrower.ConfigError, match="SGD with fused=True unscales gradients inside its step"):
        scaler.step(optimizer)
    assert not seen and w.tolist() == [1, 1]


METHODS: dict[str, Callable[..., Any]] = {
    "resrep": lambda model: narrower.ResRep(model, chain_graph(), macs=0.6, steps=24),
    "soft": lambda model: narrower.SoftPruning(model, chain_graph(), macs=0.6, steps=1, harden=0.0),
    "centripetal": lambda model: narrower.CentripetalSGD(model, chain_graph(), macs=0.6, steps=24, strength=3e-3),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_alike_with_a_closure_and_refuses_lbfgs(name: str) -> None:
    def trained(*, closure: bool) -> dict[str, torch.Tensor]:
        model = chain()
        method = METHODS[name](model)
        groups = method.param_groups(lr=0.05, momentum=0.9) if name == "resrep" else model.parameters()
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        method.attach(optimizer)
        if name == "soft":
            method.step()
        train(model, optimizer, X, 20, closure=closure)
        return model.state_dict()

    plain, closed = trained(closure=False), trained(closure=True)
    assert all(torch.equal(value, closed[key]) for key, value in plain.items())

    method = METHODS[name](chain())
    lbfgs = torch.optim.LBFGS(method.model.parameters())
    with pytest.raises(narrower.ConfigError, match="LBFGS calls its closure several times"):
        method.attach(lbfgs)
    assert method.optimizer is None
