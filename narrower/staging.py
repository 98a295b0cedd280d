"""A copy of a model that can be run without touching the model, and what goes in and comes out."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import TraceError
from .surgery import duplicate, modes_kept, named_tensors


class Stage(NamedTuple):
    """A copy of the model that can be run, its inputs, and its tensors."""

    model: nn.Module
    inputs: Any
    tensors: Mapping[str, Tensor]


def staged(model: nn.Module, inputs: Any, kind: str) -> Stage:
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
    given = mapped(inputs, lambda t: t.detach().to("meta")) if kind == "meta" else inputs
    return Stage(skeleton, given, named_tensors(skeleton))


TABLES = frozenset(vars(nn.Module()))  # of every module: parameters, hooks and the like


@contextmanager
def unchanged(modules: Sequence[nn.Module]) -> Iterator[None]:
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
        for value in m.__dict__.values():
            if isinstance(value, Tensor):
                yield value


def mapped(x: Any, f: Callable[[Tensor], Any]) -> Any:
    """`f` of every tensor in nested tuples, lists and dicts."""
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, dict):
        return {k: mapped(v, f) for k, v in x.items()}
    return type(x)(mapped(v, f) for v in x) if type(x) in (list, tuple) else x


def call(model: nn.Module, inputs: Any) -> Any:
    """The model on a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module gets its own mode back."""
    with modes_kept(model):
        model.eval()
        yield


def shapes_of(x: Any) -> str:
    return ", ".join(str(tuple(t.shape)) for t in flattened(x)) or type(x).__name__


def flattened(x: Any) -> list[Tensor]:
    """All tensors of nested tuples, lists, dicts and dataclasses."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        x = list(x.values())
    elif hasattr(x, "__dataclass_fields__"):
        x = [getattr(x, f) for f in x.__dataclass_fields__]
    return [t for v in x for t in flattened(v)] if isinstance(x, (list, tuple)) else []
