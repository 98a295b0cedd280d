"""Numbers that modules store at construction and that depend on the widths: split sizes, shapes, channel counts.

If a probe fails, the module that runs the failing call may store a dense size in an attribute. Candidates are its numbers that
equal a channel count of an operand or result of the call. Another probe decides.
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
"""{place of a stored number: the channel ids that it counts}."""

Way = Literal["whole", "first", "everywhere"]
"""What a number counts. "whole": all channels of an operand, or a list of successive parts. "first": its first channels.
"everywhere": its channel ids in all dimensions."""

WAYS: tuple[Way, ...] = ("whole", "first", "everywhere")


def proposals(names: Sequence[str], modules: Mapping[str, nn.Module], log: Sequence[Event], failed: int,
              axes: Axes) -> Iterator[Sizes]:
    """Stored sizes that may repair call number `failed`, most likely first.

    Each proposal is for one attribute of a module in `names`, and for the same attribute of all modules of its class. It is
    assumed to count the same thing at the same call of each of them.
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
    """The attributes with numbers above one, except those that `fit` sets anyway."""
    skip = mirrored_attributes(module, {})
    return [n for n, v in vars(module).items() if n not in skip and any(x > 1 for x in entries(v).values())]


def labels_of(event: Event, axes: Axes) -> list[Label]:
    """The labels of the operands and results of a call. A parameter has one label per dimension."""
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
    """The numbers of an attribute, with the channel ids of the call's labels that they may count."""
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
