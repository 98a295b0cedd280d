"""Copies of a model: on meta tensors, with real weights, with other tensors."""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import PlanError, TraceError
from ..graph.types import Graph
from ..inputs import map_tensors
from .walk import keep_modes, named_tensors


def fresh_copy(t: Tensor) -> Tensor:
    new = t.detach().clone()
    return nn.Parameter(new, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else new


def same_tensors(model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    """The tensors of the model, or PlanError if they are not those that were traced."""
    tensors, traced = named_tensors(model), graph.shapes
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    odd = sorted(n for n in {*shapes, *traced} if shapes.get(n) != traced.get(n))[:3]
    if odd:
        raise PlanError("the model is not the one that was traced: " + "; ".join(
            f"{n} is {shapes.get(n, 'missing')}, was {traced.get(n, 'missing')}" for n in odd))
    return tensors


class Stage(NamedTuple):
    """A copy of the model that can be run, its inputs, and its tensors."""

    model: nn.Module
    inputs: Any
    tensors: Mapping[str, Tensor]


def stage(model: nn.Module, inputs: Any, kind: str) -> Stage:
    """A copy of `model` on meta tensors, or with its real weights (shared) and buffers (copied)."""
    memo: dict[int, Tensor] = {}
    for t in (*named_tensors(model).values(), *loose_tensors(model)):
        if kind == "meta":
            new = torch.empty(t.shape, dtype=t.dtype, device="meta")
        else:
            new = t.detach() if isinstance(t, nn.Parameter) else t.detach().clone()
        memo[id(t)] = nn.Parameter(new, requires_grad=False) if isinstance(t, nn.Parameter) else new
    try:
        skeleton = duplicate(model, memo).eval()
    except Exception as e:
        raise TraceError(f"the model cannot be copied ({type(e).__name__}: {e}); trace needs copy.deepcopy(model)") from e
    given = map_tensors(inputs, lambda t: t.detach().to("meta")) if kind == "meta" else inputs
    return Stage(skeleton, given, named_tensors(skeleton))


TABLES = frozenset(vars(nn.Module()))  # of every module: parameters, hooks and the like


@contextmanager
def restore_after(modules: Sequence[nn.Module]) -> Iterator[None]:
    """What a forward stores in its modules must not change the next one."""
    before = [(m.__dict__, m.__dict__.copy()) for m in modules]
    kept = [(v, v.copy()) for table, _ in before for k, v in table.items() if type(v) in (dict, list) and k not in TABLES]
    kept += [(hooks, hooks.copy()) for m in modules for hooks in (m._forward_pre_hooks, m._forward_hooks)]
    try:
        yield
    finally:
        for now, was in before:
            if len(now) != len(was) or not all(map(operator.is_, now.values(), was.values())):
                now.clear()
                now.update(was)
        for value, contents in kept:
            if value or contents:
                value.clear()
                (value.update if isinstance(value, dict) else value.extend)(contents)


def loose_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules hold as plain attributes."""
    for m in model.modules():
        yield from (v for name, v in m.__dict__.items() if name not in TABLES and isinstance(v, Tensor))


CUSTOM = ("__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")

PLAIN = (int, float, bool, str, bytes, complex, type(None), type, torch.dtype, torch.device, torch.Size, FunctionType)

SIMPLE = {*PLAIN}  # the same, for the exact type


def duplicate(model: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """A deep copy in which the tensors with these ids are replaced and not copied.

    The same as copy.deepcopy with a memo, but several times faster: it copies the tables of a module itself and hands only what
    is not plain to copy.deepcopy. Modules with a `__deepcopy__` or `__reduce__` of their own go there whole. What modules keep
    until they are trained, such as tables made of their parameters, the copy has to make anew.
    """
    try:
        new = copy_module(model, dict(tensors))
        if any(type(m).train is not nn.Module.train for m in new.modules()):
            with keep_modes(new):
                new.train()
        return new
    except RuntimeError as e:
        computed = [n or "the model" for n, m in model.named_modules()
                    if any(isinstance(v, Tensor) and v.grad_fn is not None for v in vars(m).values())]
        if not computed:
            raise
        raise TraceError(f"{computed[0]} holds a tensor that is computed from others (old-style weight_norm or prune): make it "
                         "permanent first, with torch.nn.utils.remove_weight_norm or prune.remove") from e


@cache
def copies_itself(kind: type) -> bool:
    """Whether a class of modules says itself how it is copied."""
    own = [c for c in kind.__mro__ if c is not object and not c.__module__.startswith("torch.nn.")]
    return any(n in vars(c) for c in own for n in CUSTOM)


def copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    kind: Any = type(module)
    if id(module) in memo:
        return memo[id(module)]
    if copies_itself(kind):
        return copy.deepcopy(module, memo)
    new: nn.Module = kind.__new__(kind)
    memo[id(module)] = new
    table = new.__dict__
    for name, value in module.__dict__.items():
        table[name] = value if type(value) in SIMPLE else copy_value(value, memo)
    return new


def copy_value(value: Any, memo: dict[int, Any]) -> Any:
    kind: Any = type(value)
    if id(value) in memo:
        return memo[id(value)]
    if kind is dict or kind is OrderedDict:
        new: Any = kind()
        if value:  # most tables of a module are empty
            memo[id(value)] = new
            for k, v in value.items():
                new[k if type(k) in SIMPLE else copy.deepcopy(k, memo)] = v if type(v) in SIMPLE else copy_value(v, memo)
        return new
    if isinstance(value, nn.Module):
        return copy_module(value, memo)
    if kind is set and not value:
        return set()
    if isinstance(value, PLAIN) or (kind is tuple and all(isinstance(v, PLAIN) for v in value)):
        return value
    return copy.deepcopy(value, memo)
