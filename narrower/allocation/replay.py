"""Forwards that share what lies before a change: the outputs of earlier calls are taken from a recorded forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..repair.watching import input_and_weight
from ..surgery.walk import named_tensors
from ..tracing.operators.interface import tensors_in


class Record(TorchDispatchMode):
    """Runs a forward and keeps the output of every call.

    `first_read`: the first call that reads each parameter or buffer, by the address of its memory. `overwritten`: for each
    call that writes in place, the tensor and its values before. `final`: each such tensor with its values after the last one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held = {t.untyped_storage()._cdata for t in named_tensors(model).values()}
        self.outputs: list[Any] = []
        self.first_read: dict[int, int] = {}
        self.overwritten: dict[int, tuple[Tensor, Tensor]] = {}
        self.final: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number = len(self.outputs)
        for t in tensors_in(args):
            if (memory := t.untyped_storage()._cdata) in self.held:
                self.first_read.setdefault(memory, number)
        in_place = func._schema.name[-1] == "_" and isinstance(args[0], Tensor)
        if in_place:
            self.overwritten[number] = args[0], args[0].clone()
        out = func(*args, **(kwargs or {}))
        if in_place:
            self.final[id(args[0])] = args[0], args[0].clone()
        self.outputs.append(out)
        return out


class Replay(TorchDispatchMode):
    """Runs a forward from call `start` on. Earlier calls return what was recorded; `intercepts` are added to the outputs of the
    layers that read these weights (by the address of their memory)."""

    def __init__(self, record: Record, start: int, intercepts: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.record, self.start, self.intercepts, self.number = record, start, intercepts, 0
        states: dict[int, tuple[Tensor, Tensor]] = {}  # recorded tensors as they were when `start` began
        for number, (t, before) in record.overwritten.items():
            if number >= start:
                states.setdefault(id(t), (t, before))
        for t, values in (record.final | states).values():  # an earlier replay may have left other values
            t.copy_(values)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number, self.number = self.number, self.number + 1
        if number < self.start and not is_view(func):  # a view must be made anew
            return self.record.outputs[number]
        out = func(*args, **(kwargs or {}))
        factors = input_and_weight(func._schema.name.removeprefix("aten::"), args) if number >= self.start else None
        added = self.intercepts.get(factors[1].untyped_storage()._cdata) if factors is not None else None
        return out if added is None else out + added.view(-1, *(1,) * (out.ndim - 2))


def is_view(func: Any) -> bool:
    """Whether the output of an operator shares the memory of an input, without a write."""
    return any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
