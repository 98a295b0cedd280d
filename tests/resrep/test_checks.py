"""What would keep compactors from training is said by name, before rows are chosen in vain."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from support.resrep_training import X, chain, chain_graph, sgd, train
from torch import nn

import narrower
from narrower.errors import ConfigError
from narrower.resrep.checks import check_reached


def compacted(model: nn.Module | None = None) -> narrower.ResRep:
    return narrower.ResRep(chain() if model is None else model, chain_graph(), macs=0.6, steps=24)


def test_frozen_compactors_are_refused_by_name_and_layers_frozen_before_are_compacted() -> None:
    resrep = compacted()
    resrep.model.get_submodule("0").requires_grad_(False)
    with pytest.raises(ConfigError, match=r"requires_grad=False: 0\.1; exclude= their groups, or freeze layers before"):
        sgd(resrep)
    model = chain()
    model.get_submodule("0").requires_grad_(False)
    resrep = compacted(model)
    train(resrep, sgd(resrep), X, 24)
    assert resrep.remaining().cuts and len(resrep.remaining().keep["0.0"]) < 12
    assert resrep.reached() <= 0.6


def test_compactors_of_which_no_row_is_chosen_need_no_gradient() -> None:
    resrep = compacted()
    compactors = resrep.compactors()
    name, first = next(iter(compactors.items()))
    check_reached(compactors)
    first.choose(torch.arange(len(first.rows)) < 2)
    with pytest.raises(ConfigError, match=rf"no gradient has reached: {re.escape(name)}; run the model"):
        check_reached(compactors)


def test_dampening_is_refused() -> None:
    """It makes the pull weaker by as much, and rows would not be zero in time."""
    resrep = compacted()
    with pytest.raises(ConfigError, match=r"dampens the compactor of 0\.1, .* dampening=0"):
        resrep.attach(torch.optim.SGD(resrep.param_groups(lr=0.1, momentum=0.9, dampening=0.9)))


def converted(model: nn.Module, name: str) -> None:
    """One part of a model with SyncBatchNorm, to which compactors go over, but not their hooks."""
    setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(model.get_submodule(name)))


def test_compactors_that_lost_their_hook_are_named_when_rows_are_chosen() -> None:
    resrep = compacted()
    optimizer = sgd(resrep)
    converted(resrep.model, "1")
    with pytest.raises(ConfigError, match=r"rows are to shrink .* no gradient has reached: 1\.1; .*convert_sync_batchnorm"):
        train(resrep, optimizer, X, 24)
    assert 0 < resrep.step < 12


def as_compiled_before() -> tuple[narrower.ResRep, Callable[[torch.Tensor], torch.Tensor]]:
    model = chain().train()
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    return compacted(model), compiled


def test_a_model_that_ran_compiled_before_it_had_compactors_is_told_to_reset() -> None:
    torch.compiler.reset()
    resrep, compiled = as_compiled_before()
    optimizer = sgd(resrep)
    compiled(X).sum().backward()
    with pytest.raises(ConfigError, match=r"no gradient has reached the compactors: .*torch\.compiler\.reset\(\)"):
        optimizer.step()
    torch.compiler.reset()
    compiled(X).sum().backward()
    optimizer.step()


def test_a_compactor_that_a_step_leaves_out_has_had_its_gradient_before() -> None:
    """As where a network skips layers at random."""
    resrep = compacted()
    optimizer = sgd(resrep)
    train(resrep, optimizer, X, 1)
    skipped = resrep.compactors()["1.1"].weight
    skipped.register_post_accumulate_grad_hook(lambda w: setattr(w, "grad", None))
    train(resrep, optimizer, X, 10)
    assert resrep.chosen_channels()["1.0"].any() and skipped.grad is None


@pytest.mark.parametrize("to_none", [False, True])
def test_a_shrink_refuses_gradients_that_no_step_has_used(to_none: bool) -> None:
    """It would drop those of most parameters. What a step has used may stay, as loops clear gradients before or after it."""
    resrep = narrower.ResRep(chain(), chain_graph(), macs=0.6, steps=24, settings=narrower.Forgetting(rest=False))
    optimizer = sgd(resrep)

    def backward(scale: float = 1.0) -> None:
        (resrep.model(X).square().mean() * scale).backward()

    def refused() -> None:
        with pytest.raises(ConfigError, match="gradients are there that no step has used"):
            resrep.shrink()

    for _ in range(11):
        optimizer.zero_grad(set_to_none=to_none)
        backward()
        refused()
        backward()
        refused()
        optimizer.step()
    assert resrep.progress()["zero"]
    assert resrep.shrink(fold=False) < 1
    backward()
    refused()
    optimizer.step()
    optimizer.zero_grad(set_to_none=to_none)
    resrep.shrink()
    backward(float("inf"))  # a GradScaler skips the step
    resrep.shrink()
    optimizer.zero_grad(set_to_none=to_none)
    backward()
    resrep.model[-1].fc.weight.grad[0, 0] = float("inf")  # type: ignore[index]  # so it does for any of them
    resrep.shrink()


def test_averages_are_the_copy_or_hold_it_and_others_are_refused_before_anything_is_cut() -> None:
    resrep = compacted()
    good, other = torch.optim.swa_utils.AveragedModel(resrep.model), torch.optim.swa_utils.AveragedModel(chain())
    train(resrep, sgd(resrep), X, 24)
    shapes = [t.shape for t in good.state_dict().values()]
    for use in (lambda: resrep.shrink(ema=[good, other]), lambda: resrep.merge(other)):
        with pytest.raises(ConfigError, match="AveragedModel is no copy of the network with its compactors"):
            use()
    assert [t.shape for t in good.state_dict().values()] == shapes
    resrep.shrink(ema=[good])
    assert [t.shape for t in good.module.state_dict().values()] == [t.shape for t in resrep.model.state_dict().values()]
    merged = resrep.merge(good)
    assert not any(hasattr(m, "compactor") for m in merged.modules()) and merged(X).shape == resrep.model(X).shape
