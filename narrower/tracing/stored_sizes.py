"""Numbers that modules have stored at construction and that must follow the widths: split sizes, shapes, channel counts.

Where a probe fails, the module in which the failing call runs may hold the dense size in an attribute. Candidates are those of
its numbers that equal a number of channels of an operand or result of the call. A probe decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Literal

import numpy as np
from torch import nn

from ..surgery.attributes import Place, entries
from ..surgery.resize import mirrored_attributes
from .interpreter import Event
from .labels import Axes, Axis, Ids, Label, along, fibres

Sizes = dict[Place, Ids]
"""{a number that a module stores: the channel ids that it counts}."""

Way = Literal["whole", "first", "everywhere"]
"""What a number counts: all channels of an operand (or successive parts of them), the first of them, or all its channel ids in
every dimension."""

WAYS: tuple[Way, ...] = ("whole", "first", "everywhere")


def proposals(names: Sequence[str], modules: Mapping[str, nn.Module], log: Sequence[Event], failed: int,
              axes: Axes) -> Iterator[Sizes]:
    """Stored sizes that may mend the call number `failed`, most likely first.

    Each proposal is for one attribute of one of the modules called `names`, and for the same attribute of all other modules of
    its class: they are taken to count the same at the same call of their own.
    """
    for name in names:
        module = modules[name]
        own = calls_of(log, name)
        if not own:
            continue
        nth = max((k for k, i in enumerate(own) if i <= failed), default=0)
        alike = [n for n, m in modules.items() if type(m) is type(module)]
        labels = {n: labels_of(log[calls[nth]], axes) for n in alike if len(calls := calls_of(log, n)) > nth}
        found: list[Sizes] = []
        for way, attribute in product(WAYS, number_attributes(module)):
            sizes: Sizes = {}
            for n in labels:
                sizes |= counted(Place(n, attribute), modules[n], labels[n], way)
            if any(p.module == name for p in sizes) and not any(same(sizes, f) for f in found):
                found.append(sizes)
                yield sizes


def calls_of(log: Sequence[Event], module: str) -> list[int]:
    return [i for i, event in enumerate(log) if event.module == module]


def same(a: Sizes, b: Sizes) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[p], b[p]) for p in a)


def number_attributes(module: nn.Module) -> list[str]:
    """The attributes that hold numbers above one, without those that `fit` sets anyway."""
    skip = mirrored_attributes(module, {})
    return [n for n, v in vars(module).items() if n not in skip and any(x > 1 for x in entries(v).values())]


def labels_of(event: Event, axes: Axes) -> list[Label]:
    """The labels of the operands of a call and of its results; of a parameter, one for each of its dimensions."""
    out: list[Label] = []
    for given in (*event.inputs, *event.carried):
        if not isinstance(given, str):
            out += given.labels
            continue
        for axis, start in axes.start.items():
            if isinstance(axis, Axis) and axis.tensor == given:
                out.append(Label(along(np.arange(start, start + axes.size[axis]), axis.dim + 1, axis.dim), axis.dim))
    return out


def counted(attribute: Place, module: nn.Module, labels: Sequence[Label], way: Way) -> Sizes:
    """What the numbers of an attribute may count of the labels of a call."""
    values = entries(getattr(module, attribute.attribute, None))
    out: Sizes = {}
    for label in labels:
        fibre = fibres(label)[0]
        if way == "whole" and len(values) > 1 and sum(values.values()) == len(fibre):
            ends = np.cumsum(list(values.values()))
            return {attribute._replace(entry=k): fibre[end - v:end] for (k, v), end in zip(values.items(), ends, strict=True)}
        for k, v in values.items():
            place = attribute._replace(entry=k)
            if v < 2 or place in out:
                continue
            if way == "whole" and v == len(fibre):
                out[place] = fibre
            elif way == "first" and v < len(fibre):
                out[place] = fibre[:v]
            elif way == "everywhere" and v == label.ids.size > len(fibre):
                out[place] = label.ids.reshape(-1)
    return out
