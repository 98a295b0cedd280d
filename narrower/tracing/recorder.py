"""The part of a dispatch mode that knows nothing of channels: it runs a forward, and records what it calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..graph.types import Step
from ..surgery.walk import named_tensors
from .labels import Axes
from .operators.call_counter import CallCounter
from .operators.data_dependent import Answer, copy_answer
from .operators.interface import Call, plain, tensors_in
from .operators.shapes import infer_output

CARRIED, NUMBER = "_narrower_carried", "_narrower_number"


class Unseen(Exception):
    """Meta tensors do not show what the forward does: it needs real values."""


class Recorder(TorchDispatchMode):
    """Runs a forward of `model` and records its calls in `steps`. `answers`: what it reads from data, on real tensors."""

    def __init__(self, model: nn.Module, axes: Axes, answers: Sequence[Answer] | None = None) -> None:
        super().__init__()
        self.axes, self.answers, self.asked = axes, answers, 0
        self.alive = named_tensors(model)
        for t in self.alive.values():
            for left in (CARRIED, NUMBER):  # by a forward that wrote into it
                t.__dict__.pop(left, None)
        self.tensors = {id(t): name for name, t in reversed(self.alive.items())}
        self.counter = CallCounter(self.alive.values())
        self.steps: list[Step] = []
        # The tensors that no step made, by number, and what is known of them: that of a constant is another in each forward.
        self.constants: dict[int, tuple[Any, ...]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = self.counter.count(func, args, kwargs)
        out = self.output(func, call, func._schema.name[-1] == "_")
        self.record(call, tensors_in((out,)), False)
        return out

    def output(self, func: Any, call: Call, in_place: bool) -> Any:
        """The output of a call: the answer of a forward on real values, or a blank tensor, or what PyTorch computes."""
        if self.answers is not None and call.operator.depends_on_data(call.args):
            self.asked += 1
            if self.asked > len(self.answers):
                raise Unseen("a question that was not asked before")
            return copy_answer(self.answers[self.asked - 1])
        out = infer_output(call, in_place, hollow=self.answers is not None)
        return func(*call.args, **call.kwargs) if out is None else out

    def record(self, call: Call, outs: Sequence[Tensor], labelled: bool) -> None:
        """Add a call to `steps`. Its outputs `outs` get their numbers."""
        inputs: list[int | str | None] = []
        for a in call.args:
            inputs += [self.read(t) for t in a] if isinstance(a, (list, tuple)) and tensors_in(a) else [self.read(a)]
        for t in outs:
            self.give_number(t)
        options = tuple((k, v) for k, v in call.kwargs.items() if not isinstance(v, Tensor))
        made = tuple(n for t in outs if (n := self.number_of(t)) is not None)
        self.made.update(made)
        self.steps.append(Step(call.name, tuple(inputs), plain(call.args), options, made, labelled))

    def read(self, t: Any) -> int | str | None:
        """`numbered`, of what a step reads. What no step made is noted, with its values if they may be indices."""
        number = self.numbered(t)
        if isinstance(number, int) and number not in self.made and number not in self.constants:
            indices = not (t.is_meta or t.is_floating_point() or t.is_complex())
            self.constants[number] = (t.dtype, t.shape, t.tolist() if indices else None)
        return number

    def numbered(self, t: Any) -> int | str | None:
        """The name of a parameter or buffer, the number of an activation, or None for other arguments."""
        if not isinstance(t, Tensor):
            return None
        number = self.number_of(t)
        if number is not None:
            return number
        return self.tensors[id(t)] if id(t) in self.tensors else self.give_number(t)

    def number_of(self, t: Tensor) -> int | None:
        """The number of a tensor. One of an earlier trace, which example inputs may still have, is none: it counted anew."""
        axes, number = getattr(t, NUMBER, (None, None))
        return number if axes is self.axes else None

    def give_number(self, t: Tensor) -> int:
        number = self.axes.number()
        setattr(t, NUMBER, (self.axes, number))
        return number
