"""Slice tensors, and fit a module to tensors of other shapes."""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .errors import PlanError, StorageError, TraceError
from .groups import Graph, Slice

Keep = Mapping[str, np.ndarray]  # group name -> kept channels, ascending


class Selection(NamedTuple):
    """Positions that stay along one dimension, shape (blocks, kept): one row, or one for each group of a convolution."""

    dim: int
    rows: np.ndarray


def selections(graph: Graph, keep: Keep) -> dict[str, list[Selection]]:
    """What stays of every tensor that loses something: {tensor name: selections, one for each dimension}."""
    gone: dict[tuple[str, int], tuple[int, list[np.ndarray]]] = {}
    for name, kept in keep.items():
        group = graph[name]
        if len(kept) == group.size:
            continue
        removed = np.ones(group.size, dtype=bool)
        removed[kept] = False
        for s in group.slices:
            blocks, parts = gone.setdefault((s.tensor, s.dim), (s.blocks, []))
            parts.append(s.positions[removed[s.channels]])
    out: dict[str, list[Selection]] = {}
    for (tensor, dim), (blocks, parts) in gone.items():
        stays = np.ones(graph.shapes[tensor][dim] * blocks, dtype=bool)
        stays[np.concatenate(parts)] = False
        rows = stays.reshape(blocks, -1)
        if len(set(rows.sum(1).tolist())) > 1:
            raise PlanError(f"{tensor}: each of its {blocks} groups must keep equally many channels")
        out.setdefault(tensor, []).append(Selection(dim, np.nonzero(rows)[1].reshape(blocks, -1)))
    return out


def sliced(t: Tensor, chosen: Sequence[Selection]) -> Tensor:
    """The part of `t` that stays; same dtype, device and memory format."""
    if t.is_meta:  # only the shape matters
        sizes = {dim: rows.shape[1] for dim, rows in chosen}
        return torch.empty([sizes.get(d, n) for d, n in enumerate(t.shape)], dtype=t.dtype, device="meta")
    # blocks refer to the dense dimension 0, so dimensions that are read in blocks go first
    for dim, rows in sorted(chosen, key=lambda s: -len(s.rows)):
        index = torch.as_tensor(rows, device=t.device)
        if len(index) == 1:
            t = t.index_select(dim, index[0])
        else:
            parts = t.chunk(len(index), dim=0)
            t = torch.cat([p.index_select(dim, index[k]) for k, p in enumerate(parts)], dim=0)
    return t


def mirrored(module: nn.Module, dense: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The attributes of a module that repeat the shapes of its tensors, as they should be now; `dense` gives the shapes
    of its own tensors before."""
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
    old = dense.get("weight", shape)
    if isinstance(module, nn.modules.conv._ConvNd) and shape and old:
        groups = module.groups
        if module.transposed:
            if groups > 1 and groups == module.in_channels:
                groups = shape[0]
            return {"in_channels": shape[0], "out_channels": shape[1] * groups, "groups": groups}
        if groups > 1 and groups == module.in_channels:
            groups = shape[0] // (old[0] // module.in_channels)
        return {"in_channels": shape[1] * groups, "out_channels": shape[0], "groups": groups}
    if isinstance(module, nn.Linear) and shape:
        return {"in_features": shape[1], "out_features": shape[0]}
    if isinstance(module, (nn.modules.batchnorm._NormBase,)):
        vector = module.weight if module.weight is not None else module.running_mean
        return {} if vector is None else {"num_features": vector.shape[0]}
    if isinstance(module, nn.GroupNorm) and shape:
        return {"num_channels": shape[0]}
    if isinstance(module, nn.PReLU) and shape:
        return {"num_parameters": shape[0]}
    if isinstance(module, nn.Embedding) and shape:
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if hasattr(module, "normalized_shape") and shape:
        return {"normalized_shape": type(module.normalized_shape)(shape)}
    return {}


def takes_bias(model: nn.Module, weight: str) -> bool:
    """Whether the layer with this weight has no bias and would use one: torch's own convolutions and linear layers."""
    owner, _, leaf = weight.rpartition(".")
    module = model.get_submodule(owner)
    own = type(module).forward.__module__.startswith("torch.nn.modules.")
    return own and leaf == "weight" and isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and module.bias is None


def give_bias(model: nn.Module, name: str) -> None:
    """Give the layer that should hold the bias `name` one of zeros, as long as its weight makes channels."""
    module = model.get_submodule(name.rpartition(".")[0])
    weight = module.weight
    assert isinstance(weight, Tensor)
    module.bias = nn.Parameter(weight.detach().new_zeros(len(weight)), requires_grad=weight.requires_grad)


def with_biases(model: nn.Module, graph: Graph, weights: Iterable[str]) -> Graph:
    """Give the layers with these weights a bias of zeros, in place. Returns the graph with these biases."""
    names = {w: f"{w.removesuffix('weight')}bias" for w in sorted(weights)}
    for name in names.values():
        give_bias(model, name)
    groups = tuple(replace(g, slices=(*g.slices, *(
        Slice(names[s.tensor], 0, "along", s.channels, s.positions) for s in g.slices if s.tensor in names and s.dim == 0)))
        for g in graph.groups)
    return replace(graph, groups=groups, shapes={**graph.shapes, **{n: graph.shapes[w][:1] for w, n in names.items()}},
                   parameters=graph.parameters | set(names.values()), created=(*graph.created, *names.values()))


class Undo(NamedTuple):
    module: nn.Module
    attribute: str
    value: Any


def fit(model: nn.Module, tensors: Mapping[str, Tensor], dense: Mapping[str, tuple[int, ...]] | None = None) -> list[Undo]:
    """Put `tensors` (by parameter or buffer name, other shapes allowed) into `model`, in place, and update the attributes
    that mirror their shapes. Tied tensors must be the same object under each of their names. `dense`
    gives the shapes before, if the tensors are already there. Returns what was replaced.

    Raises StorageError for a name that the model does not have.
    """
    undo: list[Undo] = []
    by_owner: dict[str, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        owner, _, leaf = name.rpartition(".")
        by_owner.setdefault(owner, {})[leaf] = t
    for owner, leaves in by_owner.items():
        try:
            module = model.get_submodule(owner)
        except AttributeError as e:
            raise StorageError(f"the model has no module {owner!r}, which should hold {sorted(leaves)}") from e
        before = {}
        for leaf, t in leaves.items():
            store = module._parameters if leaf in module._parameters else module._buffers
            old = store.get(leaf)
            if old is None:
                raise StorageError(f"the model has no tensor {owner}.{leaf}")
            before[leaf] = dense[f"{owner}.{leaf}".lstrip(".")] if dense else tuple(old.shape)
            undo.append(Undo(module, leaf, old))
            store[leaf] = t  # type: ignore[assignment]
        for attribute, value in mirrored(module, before).items():
            undo.append(Undo(module, attribute, getattr(module, attribute)))
            if attribute in module.__dict__:  # nn.Module's own way takes ten times as long
                module.__dict__[attribute] = value
            else:
                setattr(module, attribute, value)
    return undo


def undone(undo: list[Undo]) -> None:
    """Take a fit back."""
    for module, name, value in reversed(undo):
        if name in module._parameters:
            module._parameters[name] = value
        elif name in module._buffers:
            module._buffers[name] = value
        else:
            setattr(module, name, value)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without garbage collection: a full one, set off by many small objects, can take longer than a trace."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module gets its own mode, train or eval, back."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under each of its names: `named_modules(remove_duplicate=False)`, several times as fast."""
    out: list[tuple[str, nn.Module]] = []

    def visit(name: str, module: nn.Module) -> None:
        out.append((name, module))
        for leaf, child in module._modules.items():
            if child is not None:
                visit(f"{name}.{leaf}" if name else leaf, child)

    visit("", model)
    return out


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, tied ones under each of their names."""
    modules = modules_of(model)
    return {f"{name}.{leaf}" if name else leaf: t for tables in ("_parameters", "_buffers") for name, m in modules
            for leaf, t in getattr(m, tables).items() if t is not None}


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
        new = copied_module(model, dict(tensors))
        if any(type(m).train is not nn.Module.train for m in new.modules()):
            with modes_kept(new):
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


def copied_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    kind: Any = type(module)
    if id(module) in memo:
        return memo[id(module)]
    if copies_itself(kind):
        return copy.deepcopy(module, memo)
    new: nn.Module = kind.__new__(kind)
    memo[id(module)] = new
    table = new.__dict__
    for name, value in module.__dict__.items():
        table[name] = value if type(value) in SIMPLE else copied_value(value, memo)
    return new


def copied_value(value: Any, memo: dict[int, Any]) -> Any:
    kind: Any = type(value)
    if id(value) in memo:
        return memo[id(value)]
    if kind is dict or kind is OrderedDict:
        new: Any = kind()
        if value:  # most tables of a module are empty
            memo[id(value)] = new
            for k, v in value.items():
                new[k if type(k) in SIMPLE else copy.deepcopy(k, memo)] = v if type(v) in SIMPLE else copied_value(v, memo)
        return new
    if isinstance(value, nn.Module):
        return copied_module(value, memo)
    if kind is set and not value:
        return set()
    if isinstance(value, PLAIN) or (kind is tuple and all(isinstance(v, PLAIN) for v in value)):
        return value
    return copy.deepcopy(value, memo)
