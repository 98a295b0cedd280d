"""What a forward calls, to tell whether it does the same in train as in eval mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .operators.elementwise import like
from .operators.table import row_of
from .recorder import Recorder

NOISE = "noise"  # what stands for a tensor of random or equal numbers


def outline(recorder: Recorder, outputs: Sequence[Tensor]) -> tuple[list[Any], list[Any]]:
    """The calls of a forward, each with what made its inputs, and what made the outputs.

    Left out are the calls that make noise, multiply or add it, as dropout does, and those that count batches.
    """
    counters = [n for n, t in recorder.alive.items() if t.ndim == 0 and not t.is_floating_point()]
    calls: list[Any] = []
    made: dict[Any, Any] = {**recorder.constants, **dict.fromkeys(counters, NOISE)}
    for step in recorder.steps:
        inputs = [made.get(i, i) for i in step.inputs if i is not None]
        real = [i for i in inputs if i != NOISE]
        noisy = len(real) < len(inputs)
        if row_of(step.name).rule is like or (noisy and not real):
            made.update(dict.fromkeys(step.outputs, NOISE))
        elif step.name.endswith("dropout") or (noisy and step.name in ("add", "mul", "div")):
            made.update(dict.fromkeys(step.outputs, real[0]))
        else:
            numbers = () if row_of(step.name).layer == "batch norm" else (step.rest, step.options)
            made.update((n, (len(calls), k)) for k, n in enumerate(step.outputs))
            calls.append((step.name, inputs, numbers))
    return calls, [made.get(n, n) for n in map(recorder.numbered, outputs)]
