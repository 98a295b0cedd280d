"""Copy a model: on meta tensors, with its real weights, or with other tensors."""

from __future__ import annotations

import copy
import dis
import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import PlanError, TraceError
from ..graph.types import Graph
from ..inputs import contents as held_by
from ..inputs import device_of, has_float64, map_tensors
from .walk import WRAPPERS, keep_modes, modules_of, named_tensors, outer_modes_off, tensor_shapes


def parameter_like(t: Tensor, new: Tensor) -> Tensor:
    """`new` as a parameter if `t` is one."""
    return nn.Parameter(new, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else new


def same_tensors(model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    """The parameters and buffers of the model. Raises PlanError if their names or shapes differ from the traced model."""
    tensors, traced = named_tensors(model), graph.shapes
    shapes = tensor_shapes(tensors)
    odd = sorted(n for n in {*shapes, *traced} if shapes.get(n) != traced.get(n))[:3]
    if odd:
        kind = type(model).__name__
        unwrap = f". It is wrapped in {kind}: give model.{WRAPPERS[kind]} instead" if kind in WRAPPERS else ""
        raise PlanError("the model is not the one that was traced: " + "; ".join(
            f"{n} is {shapes.get(n, 'missing')}, was {traced.get(n, 'missing')}" for n in odd) + unwrap)
    return tensors


class Stage(NamedTuple):
    """A runnable copy of the model, its inputs, and its tensors by name."""

    model: nn.Module
    inputs: Any
    tensors: Mapping[str, Tensor]


def stage(model: nn.Module, inputs: Any, kind: str) -> Stage:
    """A copy of `model` in eval mode, and of the inputs. `kind` "meta": on meta tensors. "real": with copies of the values,
    as a forward may write into its weights and inputs."""
    memo: dict[int, Tensor] = {}
    for t in (*named_tensors(model).values(), *loose_tensors(model)):
        new = torch.empty(t.shape, dtype=t.dtype, device="meta") if kind == "meta" else t.detach().clone()
        memo[id(t)] = nn.Parameter(new, requires_grad=False) if isinstance(t, nn.Parameter) else new
    try:
        skeleton = duplicate(model, memo).eval()
    except TraceError:
        raise
    except Exception as e:
        raise TraceError(f"the model cannot be copied ({type(e).__name__}: {e}); trace needs copy.deepcopy(model)") from e
    given = map_tensors(inputs, lambda t: t.detach().to("meta") if kind == "meta" else t.detach().clone())
    return Stage(skeleton, given, named_tensors(skeleton))


TABLES = frozenset(vars(nn.Module()))  # attributes of every module: parameters, hooks and so on


@contextmanager
def restore_after(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Restore the attributes and hooks of modules afterwards, so that one forward does not affect the next."""
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

PLAIN = (int, float, bool, str, bytes, complex, type(None), type, torch.dtype, torch.device, torch.Size)

SIMPLE = {*PLAIN}  # the same, for the exact type

COMPILED = "_compiled_call_impl"  # what nn.Module.compile() stores: it runs the module that it was called on, not a copy


class Copies(dict[int, Any]):
    """The memo of copy.deepcopy: {id: copy}. `parts`: the ids of all modules and tensors of the model that is copied.

    Raises TraceError if the forward of a module is a function that reads a part of the model as a global variable.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[int, Tensor]) -> None:
        super().__init__(tensors)
        modules = modules_of(model)
        self.parts = {*tensors, *(id(m) for _, m in modules), *map(id, named_tensors(model).values())}
        for name, m in modules:
            forward = m.__dict__.get("forward")
            function: Any = forward.__func__ if isinstance(forward, MethodType) else forward
            for variable in globals_of(function.__code__) if isinstance(function, FunctionType) else ():
                if self.holds_part(function.__globals__.get(variable)):
                    raise TraceError(f"the forward of {name or 'the model'} was replaced by a function that reads the global "
                                     f"variable {variable!r}, a part of the model: a copy would run the original. Make the "
                                     "variable a local one, of a function that replaces the forward")

    def holds_part(self, value: Any, seen: frozenset[int] = frozenset()) -> bool:
        """Whether a value is a part of the model, or a function or container that holds one."""
        if id(value) in self.parts:
            return True
        if id(value) in seen:
            return False
        inner: Any = ()
        if isinstance(value, FunctionType):
            inner = [*contents(value.__closure__), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        elif isinstance(value, MethodType):
            inner = [value.__self__]
        elif isinstance(value, partial):
            inner = [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, (dict, list, tuple, set)):
            inner = value.values() if isinstance(value, dict) else value
        return any(self.holds_part(v, seen | {id(value)}) for v in inner)


def duplicate(model: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """A deep copy that uses `tensors` ({id of a tensor: replacement}) in place of these tensors.

    Like copy.deepcopy with a memo, but several times faster: it copies the dicts of modules itself and leaves only other
    objects to copy.deepcopy. Modules with their own `__deepcopy__` or `__reduce__` go to copy.deepcopy whole. Modules that
    override `train` are switched to train mode and back, so that they drop values cached from the old parameters. Tensors with
    a history, such as an activation that a forward keeps, which copy.deepcopy refuses, are copied without it.
    """
    try:
        new = copy_module(model, Copies(model, tensors))
        if any(type(m).train is not nn.Module.train for m in new.modules()):
            with keep_modes(new):
                new.train()
        return new
    except RuntimeError:
        computed = {id(t): t.detach().clone() for t in computed_tensors(model) if id(t) not in tensors}
        if not computed:
            raise
        return duplicate(model, {**tensors, **computed})


def computed_tensors(model: nn.Module) -> list[Tensor]:
    """The tensors with a history that modules hold, in containers, objects and hooks too."""
    waiting = [v for m in model.modules() for v in vars(m).values()]
    seen: dict[int, Any] = {}
    while waiting:
        x = waiting.pop()
        if id(x) not in seen:
            seen[id(x)] = x
            waiting += [x.__self__] if isinstance(x, MethodType) else held_by(x) or ()
    return [x for x in seen.values() if isinstance(x, Tensor) and x.grad_fn is not None]


@outer_modes_off()
def independent_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers are fresh: no gradients, no history, nothing shared with `model`."""
    return duplicate(model, {id(t): parameter_like(t, t.detach().clone()) for t in named_tensors(model).values()})


def moved(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, or a copy of it on `device` if it is elsewhere."""
    if device_of(model) == device:
        return model
    return duplicate(model, {id(t): parameter_like(t, t.detach().to(device, copy=True))
                             for t in (*named_tensors(model).values(), *loose_tensors(model))})


def where_float64_is(model: nn.Module) -> nn.Module:
    """The model, or a copy of it on the CPU if its device has no float64."""
    return model if has_float64(device_of(model)) else moved(model, torch.device("cpu"))


@cache
def copies_itself(kind: type) -> bool:
    """Whether a module class defines its own copying."""
    own = [c for c in kind.__mro__ if c is not object and not c.__module__.startswith("torch.nn.")]
    return any(n in vars(c) for c in own for n in CUSTOM)


def copy_module(module: nn.Module, memo: Copies) -> nn.Module:
    kind: Any = type(module)
    if id(module) in memo:
        return memo[id(module)]
    if copies_itself(kind):
        return copy.deepcopy(module, memo)
    new: nn.Module = kind.__new__(kind)
    memo[id(module)] = new
    table = new.__dict__
    for name, value in module.__dict__.items():
        if name != COMPILED:
            table[name] = value if type(value) in SIMPLE else copy_value(value, memo)
    return new


def copy_value(value: Any, memo: Copies) -> Any:
    kind: Any = type(value)
    if id(value) in memo:
        return memo[id(value)]
    if kind is dict or kind is OrderedDict:
        new: Any = kind()
        if value:  # most dicts of a module are empty
            memo[id(value)] = new
            for k, v in value.items():
                new[k if type(k) in SIMPLE else copy.deepcopy(k, memo)] = v if type(v) in SIMPLE else copy_value(v, memo)
        return new
    if isinstance(value, nn.Module):
        return copy_module(value, memo)
    if kind is FunctionType:
        return copy_function(value, memo) if memo.holds_part(value) else value
    if kind is MethodType:
        return MethodType(copy_value(value.__func__, memo), copy_value(value.__self__, memo))
    if kind is set and not value:
        return set()
    if isinstance(value, PLAIN) or (kind is tuple and all(isinstance(v, PLAIN) for v in value)):
        return value
    return copy.deepcopy(value, memo)


def copy_function(function: FunctionType, memo: Copies) -> FunctionType:
    """A function that holds parts of the model in its closure or its defaults, with their copies there instead.

    As in `old = block.forward; block.forward = lambda x: checkpoint(old, x)`. What else it holds stays shared.
    """
    def own(value: Any) -> Any:
        return copy_value(value, memo) if memo.holds_part(value) else value

    old = function.__closure__ or ()
    cells = tuple(CellType() if any(map(memo.holds_part, contents([cell]))) else cell for cell in old)
    new = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    memo[id(function)] = new  # before the cells are filled: a function may hold itself
    for cell, was in zip(cells, old, strict=True):
        if cell is not was:
            cell.cell_contents = own(was.cell_contents)
    new.__defaults__ = function.__defaults__ and tuple(map(own, function.__defaults__))
    new.__kwdefaults__ = {k: own(v) for k, v in (function.__kwdefaults__ or {}).items()}
    new.__dict__.update(function.__dict__)
    return new


def contents(cells: Iterable[CellType] | None) -> list[Any]:
    """What the cells of a closure hold; some may still be empty."""
    found = []
    for cell in cells or ():
        with suppress(ValueError):
            found.append(cell.cell_contents)
    return found


def globals_of(code: CodeType) -> set[str]:
    """The global variables that a function reads, and the functions that are defined in it."""
    names = {str(i.argval) for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return names.union(*(globals_of(inner) for inner in code.co_consts if isinstance(inner, CodeType)))
