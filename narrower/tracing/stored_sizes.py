"""Numbers that modules have stored at construction and that must follow the widths: split sizes, shapes, channel counts.

Where a probe fails, the module at fault may hold the old size in an attribute. The candidates are those of its numbers that
count the channels of an operand of the failing call; the probe decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

import numpy as np
from torch import nn

from ..surgery.attributes import Place, entries
from ..surgery.resize import mirrored_attributes
from .interpreter import Event
from .labels import Axes, Axis, Ids, Label, along, fibres

Edits = Mapping[Place, Ids]  # the ids that each number counts

Count = Callable[[Ids], int]


def labels_of(event: Event, axes: Axes) -> list[Label]:
    """The labels of a call's operands and results; those of a parameter by its dimensions."""
    out: list[Label] = []
    for given in (*event.inputs, *event.carried):
        if not isinstance(given, str):
            out += given.labels
            continue
        for axis, start in axes.start.items():
            if isinstance(axis, Axis) and axis.tensor == given:
                out.append(Label(along(np.arange(start, start + axes.size[axis]), axis.dim + 1, axis.dim), axis.dim))
    return out


def proposals(names: Sequence[str], modules: Mapping[str, nn.Module], log: Sequence[Event], failed: int,
              axes: Axes) -> Iterator[dict[Place, Ids]]:
    """Edits that may mend the call `failed`, most likely first: for the modules of that name, and for all others of its class
    at the same call of theirs."""
    for name in names:
        module = modules[name]
        own = calls_of(log, name)
        if not own:
            continue
        nth = max((k for k, i in enumerate(own) if i <= failed), default=0)
        alike = [n for n, m in modules.items() if type(m) is type(module)]
        others = {n: calls for n in alike if len(calls := calls_of(log, n)) > nth}
        found: list[dict[Place, Ids]] = []
        for way, attribute in product(range(3), numbers_of(module)):
            edits: dict[Place, Ids] = {}
            for n, calls in others.items():
                edits |= counted(modules[n], n, attribute, labels_of(log[calls[nth]], axes), way)
            if any(p.module == name for p in edits) and not any(same(edits, f) for f in found):
                found.append(edits)
                yield edits


def same(a: Edits, b: Edits) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[p], b[p]) for p in a)


def calls_of(log: Sequence[Event], module: str) -> list[int]:
    return [i for i, event in enumerate(log) if event.module == module]


def numbers_of(module: nn.Module) -> list[str]:
    """The attributes that hold numbers above one, but for those that `fit` sets anyway."""
    skip = mirrored_attributes(module, {})
    return [n for n, v in vars(module).items() if n not in skip and any(x > 1 for x in entries(v).values())]


def counted(module: nn.Module, name: str, attribute: str, labels: Sequence[Label], way: int) -> dict[Place, Ids]:
    """What the numbers of an attribute may count. Way 0: the channels of an operand, or successive pieces of them; 1: its first
    ones; 2: all of them, wherever they stand."""
    values = entries(getattr(module, attribute, None))
    out: dict[Place, Ids] = {}
    for label in labels:
        fibre = fibres(label)[0]
        if way == 0 and len(values) > 1 and sum(values.values()) == len(fibre):
            ends = np.cumsum(list(values.values()))
            return {Place(name, attribute, k): fibre[end - v:end] for (k, v), end in zip(values.items(), ends, strict=True)}
        for k, v in values.items():
            if v < 2 or Place(name, attribute, k) in out:
                continue
            if way == 0 and v == len(fibre):
                out[Place(name, attribute, k)] = fibre
            elif way == 1 and v < len(fibre):
                out[Place(name, attribute, k)] = fibre[:v]
            elif way == 2 and v == label.ids.size > len(fibre):
                out[Place(name, attribute, k)] = label.ids.reshape(-1)
    return out
