"""Forwards that share what lies before a change: the outputs of earlier calls are taken from a recorded forward."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..narrowing.verify import Survivors
from ..repair.watching import input_and_weight
from ..surgery.walk import named_tensors
from ..tracing.operators.call_counter import CallCounter
from ..tracing.operators.interface import Call, address, tensors_in
from ..tracing.operators.table import operator_of


class Write(NamedTuple):
    """Call `number` writes into `tensor`, whose memory call `made` has made (-1: it was there before), and whose values were
    `before`."""

    number: int
    made: int
    tensor: Tensor
    before: Tensor


class Record(TorchDispatchMode):
    """Runs a forward and keeps the output of every call.

    `first_read`: the first call that reads each parameter or buffer, by the address of its memory. `calls`: what identifies
    each call in a graph; its tensors are not kept.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.counter = CallCounter(named_tensors(model).values())
        self.outputs: list[Any] = []
        self.calls: list[Call] = []
        self.first_read: dict[int, int] = {}
        self.made: dict[int, int] = {}
        self.writes: list[Write] = []
        self.replayed: int | None = None  # where the last replay began

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number = len(self.outputs)
        self.calls.append(self.counter.count(func, args, kwargs)._replace(args=(), kwargs={}))
        for t in tensors_in(args):
            self.made.setdefault(address(t), -1)
            if address(t) in self.counter.memory:
                self.first_read.setdefault(address(t), number)
        for t in written(func, args, kwargs or {}):
            self.writes.append(Write(number, self.made.setdefault(address(t), -1), t, t.clone()))
        out = func(*args, **(kwargs or {}))
        for t in tensors_in([out]):
            self.made.setdefault(address(t), number)
        self.outputs.append(out)
        return out

    def start(self, weights: Collection[int], survivors: Survivors | None) -> int:
        """The first call that reads one of the weights (by the address of their memory), or that mixes channels of which some
        do not survive."""
        mixing = () if survivors is None else (n for n, call in enumerate(self.calls) if survivors.changes(call))
        first = [next(iter(mixing), len(self.outputs)), *(self.first_read[w] for w in weights if w in self.first_read)]
        return min(first)


class Replay(TorchDispatchMode):
    """Runs a forward from call `start` on. Earlier calls return what was recorded.

    `intercepts` are added to the outputs of the layers that read these weights (by the address of their memory). `survivors`
    runs the calls that mix channels. What is written in place into recorded tensors is put back for the next replay, which
    must not start later: so those come first that start last.
    """

    def __init__(self, record: Record, start: int, intercepts: Mapping[int, Tensor],
                 survivors: Survivors | None = None) -> None:
        super().__init__()
        if record.replayed is not None and start > record.replayed:
            raise ValueError(f"a replay from call {start} after one from call {record.replayed}: tensors that are written in "
                             "place between them are not put back")
        record.replayed = start
        self.record, self.start, self.intercepts, self.number = record, start, intercepts, 0
        self.survivors, self.counter = survivors, record.counter.again()
        for write in reversed(record.writes):
            if write.made < start <= write.number:
                write.tensor.copy_(write.before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number, self.number = self.number, self.number + 1
        call = self.counter.count(func, args, kwargs) if self.survivors is not None else None
        if number < self.start and not is_view(func):  # a view must be made anew
            return self.record.outputs[number]
        if self.survivors is not None and call is not None and number >= self.start:
            out = self.survivors.run(func, call)
        else:
            out = func(*args, **(kwargs or {}))
        factors = input_and_weight(operator_of(func), args) if number >= self.start else None
        added = self.intercepts.get(address(factors[1])) if factors is not None else None
        return out if added is None else out + added.view(-1, *(1,) * (out.ndim - 2))


def written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes into."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | dict(kwargs)
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return list(tensors_in([given[name] for name in names if given.get(name) is not None]))


def is_view(func: Any) -> bool:
    """Whether the output of an operator shares the memory of an input, without a write."""
    return any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
