"""Read and write numbers that modules store and that depend on the widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from ..graph.selection import Kept
from .resize import Change


class Place(NamedTuple):
    """An attribute of a module, or an entry of one."""

    module: str
    attribute: str
    entry: int | None = None


def entries(value: Any) -> dict[int | None, int]:
    if type(value) is int:
        return {None: value}
    if isinstance(value, (tuple, list)) and value and all(type(v) is int for v in value):
        return dict(enumerate(value))
    return {}


def attribute_values(kept: Kept) -> dict[Place, int]:
    """The numbers that modules must store when these channels are kept."""
    return {Place(e.module, e.attribute, e.entry): int(kept.mask_along(e.members, e.size).sum()) for e in kept.graph.edits}


def set_attributes(model: nn.Module, values: Mapping[Place, int]) -> list[Change]:
    """Write the numbers into the model. Returns what was replaced."""
    changes: list[Change] = []
    for place, value in values.items():
        module = model.get_submodule(place.module)
        old = vars(module)[place.attribute]
        if not 0 <= value <= entries(old).get(place.entry, -1):
            raise TypeError(f"{place.module}.{place.attribute} cannot be {value}")
        changes.append(Change(module, place.attribute, old))
        if place.entry is None:
            setattr(module, place.attribute, value)
        else:
            new = list(old)
            new[place.entry] = value
            setattr(module, place.attribute, type(old)(new))
    return changes
