"""The dispatch mode under which a forward runs. It attaches channel labels to every tensor.

`LabelInterpreter` sees every ATen call and applies the rule from `operators.table`. `constraints.ConstraintCollector` collects
what the rules report of the dense forward. `probe.Probe` checks it on a narrowed one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from traceback import walk_stack, walk_tb
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import TraceError
from ..inputs import call_model, device_of, flatten_tensors
from ..surgery.walk import modules_of
from .labels import NOTHING, Axes, Axis, Carried, Ids, Label, along
from .operators.data_dependent import Answer
from .operators.interface import Call, RuleContext, UnknownForm, address, plain, tensors_in
from .recorder import CARRIED, Recorder, Unseen


class RuleError(TraceError):
    """A rule of narrower has an error."""


FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError)


class Event(NamedTuple):
    """One call of a forward.

    `numbers`: its plain arguments. `shapes`, `carried`: of its outputs. `module`: which was running. `inputs`: what each
    carries, or the name of a parameter.
    """

    name: str
    numbers: tuple[Any, ...]
    shapes: list[tuple[int, ...]]
    carried: list[Carried]
    module: str = ""
    inputs: tuple[Carried | str, ...] = ()


class Location(NamedTuple):
    """The name of a module, and a text for people: the module and a source line."""

    module: str
    source: str


class LabelInterpreter(Recorder, RuleContext):
    """Carries labels through a forward of `model`. Subclasses decide what to do with the reported facts."""

    def __init__(self, model: nn.Module, axes: Axes, answers: Sequence[Answer] | None = None) -> None:
        super().__init__(model, axes, answers)
        modules = modules_of(model)
        self.modules = {id(m): name for name, m in reversed(modules)}  # the first name of each
        convolutions = [(n, m) for n, m in modules if isinstance(m, nn.modules.conv._ConvNd)]
        self.conv_groups = {f"{n}.weight".removeprefix("."): m.groups for n, m in convolutions}
        self.place = 0  # the number of the current call, or between calls of the next one
        self.written: dict[int, Tensor] = {}  # memory that was changed through a view, by its address
        self.seen: set[str] = set()
        self.touched: tuple[Tensor, ...] = ()
        self.given: tuple[Carried | str, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = self.counter.count(func, args, kwargs)
        self.place = call.place
        self.note_inputs(args)
        in_place = func._schema.name[-1] == "_"
        before = self.of(args[0]) if in_place else NOTHING
        try:
            call = call._replace(out=self.output(func, call, in_place))
        except Exception:
            self.on_failure(call)
            raise
        self.place += 1
        outs = tensors_in((call.out,))
        carried = self.apply_rule(call, len(outs))
        if in_place and call.out is args[0] and before.view:
            self.written[address(call.out)] = call.out
            if not before.labels and carried[0].labels:
                self.pin(carried[0].labels, "position", "written in place into a part of a tensor")
        for t, c in zip(outs, carried, strict=False):
            setattr(t, CARRIED, c)
        self.on_call(call, outs, carried)
        return call.out

    def on_failure(self, call: Call) -> None:
        """Called when the operator has failed. The error is then raised again."""

    def on_call(self, call: Call, outs: Sequence[Tensor], carried: Sequence[Carried]) -> None:
        """Called after a call. `carried`: what its outputs `outs` carry."""
        raise NotImplementedError

    def note_inputs(self, args: Any) -> None:
        """Store what the tensors among the arguments carry, and which parameters the forward has used."""
        self.touched = tuple(tensors_in(args))
        given: list[Carried | str] = []
        for t in self.touched:
            carried, name = getattr(t, CARRIED, None), self.tensors.get(id(t))
            if name is not None:
                self.seen.add(name)
            elif carried is None and t.is_meta:
                raise Unseen("a tensor made without a call")  # PyTorch 2.14: new_tensor on meta tensors
            if carried is not None and carried.chosen:
                self.pin(carried.chosen, "index", "the numbers of these channels are used: the indices of a maximum or minimum")
            given.append(carried or name or NOTHING)
        self.given = tuple(given)

    def apply_rule(self, call: Call, outputs: int) -> Sequence[Carried]:
        """What the outputs of a call carry. Without a rule for it: nothing, and the channels that it reads are pinned."""
        rule, name, lost = call.operator.rule, call.name, ""
        try:
            if rule is None:
                raise UnknownForm(f"operator {name if '::' in name else f'aten.{name}'} is not known")
            carried = rule(self, call)
        except UnknownForm as unknown:
            labels = [x for t in self.touched for x in self.of(t).labels]
            if labels:
                self.pin(labels, "operator", lost := str(unknown))
            carried = [NOTHING] * outputs
        except FAULTS as e:
            raise RuleError(f"narrower's rule for the operator aten.{name} fails ({self.where()}): {type(e).__name__}: {e}. "
                            "Please report it.") from e
        if call.pool >= 0:
            x = call.args[0]
            before = self.of(x).pool
            pool = before if before >= 0 and x.shape[2:].numel() == 1 else call.pool  # single pixels have no rank to tell
            carried = [c._replace(pool=pool) for c in carried]
        if self.given and all(isinstance(c, str) or c.weight for c in self.given):
            lost = next((c.lost for c in self.given if isinstance(c, Carried) and c.lost), lost)
            carried = [c._replace(weight=True, lost=lost) for c in carried]
        return carried

    # -------------------------------------------------------------------------------- what a tensor carries

    def of(self, t: Any) -> Carried:
        carried: Carried | None = getattr(t, CARRIED, None)
        if carried is not None:
            if (carried.uniform or carried.even) and self.written and address(t) in self.written:
                return carried._replace(uniform=False, even=())
            return carried
        if id(t) not in self.tensors or not isinstance(t, Tensor):
            return NOTHING
        name = self.tensors[id(t)]
        labels = []
        groups = self.conv_groups.get(name, 1)
        for dim, size in enumerate(t.shape):
            if (name in self.conv_groups and dim > 1) or not self.labelled(name, dim, size):
                continue
            ids = self.axis(name, dim, size, groups if dim == 1 else 1)
            if dim == 1 and groups > 1:
                rows = np.repeat(ids.reshape(groups, 1, -1), t.shape[0] // groups, axis=1)
                ids = rows.reshape(t.shape[0], -1, *(1,) * (t.ndim - 2))
                labels.append(Label(ids, 1, Axis(name, 1)))
            else:
                labels.append(Label(along(ids, t.ndim, dim), dim, Axis(name, dim)))
        return Carried(tuple(labels), weight=True)

    def carried_in(self) -> list[Carried]:
        """What the inputs of the current call carry, except unchanged parameters."""
        return [getattr(t, CARRIED) for t in self.touched if hasattr(t, CARRIED)]

    def weight_axes(self, w: Tensor, blocks: int, transposed: bool) -> tuple[Label | None, Label | None] | None:
        if id(w) not in self.tensors or hasattr(w, CARRIED):
            return None
        name, second = self.tensors[id(w)], None
        first = Label(self.axis(name, 0, w.shape[0], 1), 0, Axis(name, 0))
        if self.labelled(name, 1, w.shape[1]) or (transposed and blocks < w.shape[0]):
            second = Label(self.axis(name, 1, w.shape[1], blocks), 0, Axis(name, 1))
        if transposed and blocks > 1 and blocks == w.shape[0]:  # depthwise: what is made goes with what is read
            return None, Label(first.ids.repeat(w.shape[1]), 0, first.axis)
        return (first, second) if transposed else (second, first)

    def axis(self, name: str, dim: int, size: int, blocks: int) -> Ids:
        return self.axes.ids(Axis(name, dim), size, blocks)

    def labelled(self, name: str, dim: int, size: int) -> bool:
        """Whether a dimension of a parameter has channels. A single one cannot be removed."""
        return size > 1

    def is_single(self, label: Label) -> bool:
        return label.axis is not None and self.axes.size[label.axis] == 1

    def numbers(self, call: Call) -> tuple[Any, ...]:
        """All of a call that must not depend on widths, except output shapes: plain arguments, and `Operator.compared`."""
        extra: tuple[Any, ...] = ()
        compared = call.operator.compared
        x = None if compared == "nothing" else tensors_in(call.args)[-2] if call.operator.matrix_product else call.args[0]
        if isinstance(x, Tensor):
            c = self.of(x)
            if compared != "values":
                extra = tuple(n for d, n in enumerate(x.shape)
                              if d in c.even or (not c.labels and (c.uniform or compared == "shape")))
            elif x.is_meta and not c.labels:
                raise Unseen("a tensor made from numbers")
            elif not c.labels:
                extra = tuple(x.flatten()[:16].tolist())
        named = (v for v in call.kwargs.values() if type(v) in (int, float, complex))
        return *extra, *plain(call.args[slice(*call.operator.fixed_args)]), *named

    def where(self) -> str:
        """The innermost module that is running, and its source line."""
        return self.location().source

    def location(self, error: BaseException | None = None) -> Location:
        """Where the current call runs, or where an error was raised.

        Modules of torch.nn count only if no other module of the model is running: the line that calls them is more useful.
        """
        frames = walk_stack(sys._getframe(1)) if error is None else reversed(list(walk_tb(error.__traceback__)))
        inner = ""
        for frame, _ in frames:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in self.modules:
                module, file = self.modules[id(owner)], frame.f_code.co_filename.replace("\\", "/")
                if "torch/nn/" not in file:
                    line = f"{'/'.join(file.split('/')[-2:])}:{frame.f_lineno}"
                    return Location(module, f"{module or type(owner).__name__}, {line}")
                inner = inner or module
        return Location(inner, inner or "model")


def mark_as_given(tensors: Iterable[Tensor]) -> None:
    """Mark meta tensors that exist before the forward: they carry no channels."""
    for t in tensors:
        if t.is_meta and not hasattr(t, CARRIED):
            setattr(t, CARRIED, NOTHING)


class OwnPrecision(TorchFunctionMode):
    """A forward in which autocast does nothing, also where the forward itself turns it on: layers read their parameters, and no
    cast copies of them. Calls whose operands are of several types are left to it: they may fail without."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch._C._is_any_autocast_enabled():
            return func(*args, **kwargs)
        kinds = {t.dtype for t in tensors_in((*args, *kwargs.values())) if t.is_floating_point()}
        with torch._C._DisableAutocast() if len(kinds) < 2 else nullcontext():
            return func(*args, **kwargs)


@torch.no_grad()
def run_forward(model: nn.Module, inputs: Any, mode: AbstractContextManager[Any]) -> Any:
    """Run one forward under `mode`. Attention is computed as matrix products, so every device runs the same operators."""
    given = flatten_tensors(inputs)
    for t in given:
        t.__dict__.pop(CARRIED, None)  # of a forward that wrote into it
    mark_as_given(given)
    precision = nullcontext() if device_of(model).type == "meta" else OwnPrecision()  # autocast leaves meta tensors alone
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), precision, mode:
        return call_model(model, inputs)
