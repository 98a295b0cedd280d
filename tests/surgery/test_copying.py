"""Copies of a model are complete and share nothing that they should not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from support import reference
from support.networks import IMAGES, PATTERNS, Plain
from torch import Tensor, nn
from torch.nn.utils import prune

import narrower
from narrower.errors import TraceError
from narrower.surgery.copying import computed_tensors, duplicate, loose_tensors, moved
from narrower.surgery.walk import named_tensors


@pytest.mark.parametrize("name", PATTERNS)
def test_a_duplicate_has_the_given_tensors_and_everything_else_of_its_own(name: str) -> None:
    case = PATTERNS[name]
    model = case.make().eval()
    given: dict[int, torch.Tensor] = {}
    for t in named_tensors(model).values():
        new = t.detach().clone()
        given.setdefault(id(t), nn.Parameter(new) if isinstance(t, nn.Parameter) else new)
    dup = duplicate(model, given)
    assert all(named_tensors(dup)[n] is given[id(t)] for n, t in named_tensors(model).items())
    assert not {id(m) for m in model.modules()} & {id(m) for m in dup.modules()}
    a, b = (reference.flat(reference.call(m, case.inputs)) for m in (model, dup))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_duplicate_keeps_what_refers_to_its_own_parts() -> None:
    class Cyclic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.parts = [self.conv, {"again": self.conv}]
            self.config = {"width": 4}
            self.me = (self,)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.parts[0] is self.conv and self.me[0] is self
            return self.conv(x)

    model = Cyclic()
    dup = duplicate(model, {})
    assert dup.parts[0] is dup.conv is dup.parts[1]["again"] is not model.conv  # type: ignore[index]
    assert dup.me[0] is dup and dup.config is not model.config  # type: ignore[index]
    dup(IMAGES)


def test_a_moved_model_is_a_copy_with_its_loose_tensors_and_the_same_model_where_it_is_already() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[0].scale = torch.ones(4)
    model[1].weight = model[0].bias  # tied
    there: Any = moved(model, torch.device("meta"))
    tensors = [*named_tensors(there).values(), *loose_tensors(there)]
    assert {t.device.type for t in tensors} == {"meta"} and len(tensors) == 8
    assert there[1].weight is there[0].bias and isinstance(there[0].bias, nn.Parameter)
    assert {t.device.type for t in (*named_tensors(model).values(), *loose_tensors(model))} == {"cpu"}
    assert moved(model, torch.device("cpu")) is model


def test_a_duplicate_of_a_compiled_module_runs_its_own_forward() -> None:
    model = Plain().eval()
    model.compile(backend="eager")
    model.conv2.compile(backend="eager")
    dense = model(IMAGES)
    dup: Any = duplicate(model, {})
    with torch.no_grad():
        dup.conv2.weight.zero_()
    assert not torch.equal(dup(IMAGES), dense) and torch.equal(model(IMAGES), dense)
    assert model._compiled_call_impl is not None, "the original stays compiled"


def in_closure(model: Any) -> None:
    old = model.conv2.forward
    model.conv2.forward = lambda x: old(x)


def in_closure_of_closure(model: Any) -> None:
    def calling(f: Any) -> Any:
        return lambda x: f(x)

    model.conv2.forward = calling(calling(model.conv2.forward))


def in_default(model: Any) -> None:
    model.conv2.forward = lambda x, old=model.conv2.forward, *, norm=model.bn1: old(x)


def in_partial(model: Any) -> None:
    run = partial(torch.utils.checkpoint.checkpoint, model.conv2.forward, use_reentrant=False)
    model.conv2.forward = lambda x: run(x)


def in_method(model: Any) -> None:
    old = model.conv2.forward
    model.conv2.forward = MethodType(lambda self, x: old(x), model.conv2)


def that_calls_itself(model: Any) -> None:
    old = model.conv2.forward

    def forward(x: Tensor, again: bool = True) -> Tensor:
        return forward(x, False) if again else old(x)

    model.conv2.forward = forward


@pytest.mark.parametrize("replace", [in_closure, in_closure_of_closure, in_default, in_partial, in_method, that_calls_itself])
def test_a_forward_that_was_replaced_by_a_function_runs_the_copy(replace: Callable[[Any], None]) -> None:
    model = Plain().eval()
    replace(model)
    dense = model(IMAGES)
    dup: Any = duplicate(model, {})
    assert torch.equal(dup(IMAGES), dense)
    with torch.no_grad():
        dup.conv2.weight.zero_()
    assert not torch.equal(dup(IMAGES), dense) and torch.equal(model(IMAGES), dense)


def test_what_a_function_holds_beside_the_model_stays_shared() -> None:
    model, seen = Plain().eval(), list[nn.Module]()
    model.conv1.register_forward_hook(lambda m, args, out: seen.append(m))
    model.conv2.register_forward_hook(lambda m, args, out: seen.append(m if m is model.conv2 else nn.Identity()))
    dup = duplicate(model, {})
    dup(IMAGES)
    assert seen == [dup.conv1, dup.conv2]


global_forward: Any = None


def test_a_forward_that_reads_a_part_of_the_model_as_a_global_variable_is_refused() -> None:
    global global_forward
    model: Any = Plain().eval()
    global_forward = model.conv2.forward
    model.conv2.forward = lambda x: global_forward(x)
    with pytest.raises(TraceError, match="the forward of conv2 .* variable 'global_forward'"):
        duplicate(model, {})
    model.conv2.forward = MethodType(lambda self, x: global_forward(x), model.conv2)
    with pytest.raises(TraceError, match="the forward of conv2 .* variable 'global_forward'"):
        duplicate(model, {})
    global_forward = nn.Identity()
    duplicate(model, {})


class Saver:
    """Keeps what a layer returned, as an object that is a hook, or whose method is."""

    out: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.out = out


class Keeps(nn.Module):
    """Keeps an activation of its last forward."""

    def __init__(self, keep: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.conv, self.last, self.keep = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1), keep
        self.seen: Any = {}
        self.saver = Saver()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.keep(self, x)
        return self.last(x)


KEEPS: dict[str, Callable[[Any, Tensor], None]] = {
    "attribute": lambda m, x: setattr(m, "seen", x),
    "dict": lambda m, x: m.seen.update(x=x),
    "list": lambda m, x: setattr(m, "seen", [x, x]),
    "nested": lambda m, x: m.seen.update(x=[{"y": (x,)}]),
    "object": lambda m, x: setattr(m.saver, "out", x),
    "hook": lambda m, x: m._forward_hooks or m.register_forward_hook(m.saver),
    "method": lambda m, x: m._forward_hooks or m.register_forward_hook(m.saver.__call__),
}


@pytest.mark.parametrize("how", KEEPS)
def test_an_activation_that_is_kept_is_copied_without_its_history(how: str) -> None:
    model = Keeps(KEEPS[how]).eval()
    model(IMAGES)
    model(IMAGES)
    (kept,) = computed_tensors(model)
    graph = narrower.trace(model, IMAGES)
    plan = narrower.plan(graph, narrower.random(graph), remove=0.5)
    small = narrower.narrow(model, plan)
    assert not computed_tensors(small) and kept.grad_fn is not None
    narrower.verify(model, small, plan, IMAGES)
    narrower.ResRep(model, graph, macs=0.7, steps=3).merge()


@pytest.mark.parametrize("make", [nn.utils.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)],
                         ids=["norm", "prune"])
def test_weights_that_hooks_compute_from_parameters_narrow(make: Callable[[nn.Module], nn.Module]) -> None:
    """Old-style weight norm and pruning keep the computed weight as a plain attribute, with its history."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), make(nn.Conv2d(8, 6, 1)), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    assert computed_tensors(model)
    graph = narrower.trace(model, IMAGES)
    plan = narrower.plan(graph, narrower.random(graph), remove=0.5)
    small = narrower.narrow(model, plan)
    narrower.verify(model, small, plan, IMAGES)
    small.train()(IMAGES).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_other_reasons_why_a_model_cannot_be_copied_are_raised() -> None:
    class Stubborn:
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no copies of me")

    model = Keeps(KEEPS["attribute"])
    model.saver = Stubborn()  # type: ignore[assignment]
    model(IMAGES)
    with pytest.raises(RuntimeError, match="no copies of me"):
        duplicate(model, {})
