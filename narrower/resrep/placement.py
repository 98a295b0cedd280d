"""Where compactors stand: the rows that each group's channels need to be zero."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from torch import nn

from ..graph.types import ChannelMap, Graph
from ..narrowing.constant_propagation import Reader, Site, Walk
from ..surgery.resize import add_biases, takes_bias

Scope = Literal["inner", "all"]


@dataclass(frozen=True, eq=False)
class Places:
    """Sites by module, the rows of sites that each group's channels need to be zero, why other groups cannot be compacted,
    and what a group's channels are where `reader` reads them when their rows are zero."""

    sites: Mapping[str, Site]
    rows: Mapping[str, Mapping[str, ChannelMap]]
    reasons: Mapping[str, str]
    constants: tuple[tuple[Reader, str, float], ...] = ()


def places(graph: Graph, scope: Scope = "inner", takes_bias: Callable[[str], bool] = lambda weight: False) -> Places:
    """Sites and rows for the free groups of a graph; `scope="inner"` leaves out the channels that several layers make."""
    walk = Walk(graph, takes_bias)
    needed: dict[str, dict[str, ChannelMap]] = {}
    reasons: dict[str, str] = {}
    constants: dict[tuple[Reader, str], float] = {}
    for activation, reader in walk.needs:
        for module in sorted(activation.sites):
            for s in graph.by_axis.get(walk.sites[module].rows, ()):
                if activation.broken:
                    reasons.setdefault(s.group, activation.broken)
                needed.setdefault(s.group, {})[module] = s
        for group, value in activation.values.items():
            number = float(value)
            if number == 0 or reader == "":
                continue
            if number != number or isinstance(reader, str):
                why = "" if number != number else f", and {reader}"
                reasons.setdefault(group, f"{activation.name} makes {number:.3g} of zero{why}")
            else:
                constants[reader, group] = number
    gates = {walk.sites[m].weight for m in walk.gates}
    rows: dict[str, Mapping[str, ChannelMap]] = {}
    for g in graph.free:
        mine = needed.get(g.name, {})
        makers = {s.tensor for s in g.slices if s.role == "out"} - gates - walk.depthwise
        if not g.exact:
            reasons[g.name] = "a layer mixes these channels: a zero among them is not as good as none"
        elif not mine or len(np.unique(np.concatenate([r.channels for r in mine.values()]))) < g.size:
            reasons.setdefault(g.name, "no layer was found whose zeros would reach all that reads them")
        elif scope == "inner" and len(makers) > 1:
            reasons.setdefault(g.name, f"{len(makers)} layers make these channels (scope='inner')")
        if g.name not in reasons:
            rows[g.name] = mine
    used = {module for mine in rows.values() for module in mine}
    return Places({m: s for m, s in walk.sites.items() if m in used}, rows,
                  {g.name: reasons[g.name] for g in graph.free if g.name in reasons},
                  tuple((reader, group, number) for (reader, group), number in constants.items() if group in rows))


def prepare(model: nn.Module, graph: Graph, scope: Scope, without: Collection[str] = ()) -> tuple[Graph, Places]:
    """The places on a model, and its graph when its layers have got (in place) the biases that constants of other groups than
    `without` need."""
    found = places(graph, scope, partial(takes_bias, model))
    missing = {reader.weight for reader, group, _ in found.constants if reader.missing and group not in without}
    if not missing:
        return graph, found
    graph = add_biases(model, graph, missing)
    return graph, places(graph, scope)
