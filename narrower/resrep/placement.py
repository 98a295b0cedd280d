"""Where compactors are inserted, and which of their rows must be zero before a channel can be removed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from math import isnan, prod
from typing import Literal, NamedTuple

from torch import nn

from ..graph.types import ChannelGroup, ChannelMap, Graph
from ..narrowing.constant_propagation import Propagation, propagate
from ..narrowing.constant_values import ZERO
from ..narrowing.layers import Depthwise, Obstacle, Producer, Reader
from ..surgery.resize import add_biases, takes_bias

Scope = Literal["inner", "all"]
CompactorKind = Literal["full", "block", "diagonal"]


@dataclass(frozen=True)
class Site:
    """A compactor's place: at the output of `module`, on the `size` channels of dimension `dim`.

    `norm`: the BatchNorm that it is merged into. `weight`, `bias`: of the layer. If there is a BatchNorm, a full or
    block-diagonal compactor is merged into both, a diagonal one into the BatchNorm alone. `blocks`: the groups of the
    convolution.
    """

    module: str
    kind: CompactorKind
    size: int
    dim: int = 1
    weight: str | None = None
    bias: str | None = None
    norm: str | None = None
    transposed: bool = False
    blocks: int = 1

    @property
    def rows(self) -> tuple[str, int]:
        """The tensor and dimension whose positions are the compactor's rows."""
        if self.norm is not None:
            return f"{self.norm}.weight", 0
        return str(self.weight), int(self.transposed)


def merge_targets(site: Site) -> dict[str, tuple[str, int]]:
    """The tensors that a compactor is merged into, and the dimension of its channels in each."""
    norm = {part: (f"{site.norm}.{leaf}", 0) for part, leaf in (
        ("gamma", "weight"), ("beta", "bias"), ("mean", "running_mean"), ("var", "running_var"))}
    if site.norm is not None and site.kind == "diagonal":
        return {part: norm[part] for part in ("gamma", "beta")}
    targets = {} if site.norm is None else norm
    if site.weight is not None:
        targets["weight"] = site.weight, int(site.transposed)
    if site.bias is not None:
        targets["bias"] = site.bias, 0
    return targets


class Constant(NamedTuple):
    """The `value` of a group's channels where `reader` reads them, if the rows of their compactors are zero."""

    reader: Reader
    group: str
    value: float


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the compactors of a graph are.

    `sites`: by module. `rows`: {group: {module: compactor rows that must be zero before the group's channels are removed}}.
    `reasons`: why the other free groups have no compactors. `constants`: what must be folded when channels are removed.
    """

    sites: Mapping[str, Site]
    rows: Mapping[str, Mapping[str, ChannelMap]]
    reasons: Mapping[str, str]
    constants: tuple[Constant, ...] = ()


def place(graph: Graph, scope: Scope, takes_bias: Callable[[str], bool] = lambda weight: False) -> Placement:
    """Sites and rows for the free groups of a graph. `scope="inner"` leaves out channels that several layers produce.

    `takes_bias`: whether the layer with a weight can be given a bias.
    """
    found = propagate(graph, takes_bias, lambda producer: ZERO)
    sites = find_sites(graph, found)
    needed, constants = rows_needed(graph, found), constants_met(found)
    obstacles = merged_twice(needed, sites) | obstacles_met(graph, found)
    # A gate only scales the channels, and a depthwise convolution only filters them. They do not count as layers here.
    passive = {s.weight for p in found.gates for s in sites.get(p.module, ())}
    passive |= {c.layer.weight for c in found.consumers if isinstance(c.layer, Depthwise)}
    reasons = {}
    for g in graph.free:
        makers = {s.tensor for s in g.slices if s.makes} - passive
        why = reason_against(g, needed.get(g.name, {}), sites, obstacles.get(g.name), len(makers) if scope == "inner" else 1)
        if why is not None:
            reasons[g.name] = why
    rows = {g.name: needed[g.name] for g in graph.free if g.name in needed}
    return without_groups(Placement({m: s for m, (s, *_) in sites.items()}, rows, {}, tuple(constants)), reasons)


def without_groups(placement: Placement, reasons: Mapping[str, str]) -> Placement:
    """The placement without these groups, and without the sites that only they need."""
    rows = {g: maps for g, maps in placement.rows.items() if g not in reasons}
    used = {site for maps in rows.values() for site in maps}
    return Placement({m: s for m, s in placement.sites.items() if m in used}, rows, {**placement.reasons, **reasons},
                     tuple(c for c in placement.constants if c.group in rows))


def prepare(model: nn.Module, graph: Graph, scope: Scope, without: Collection[str] = ()) -> tuple[Graph, Placement]:
    """The placement of compactors on a model, and its graph.

    A layer without bias that must take constants gets a bias of zeros, in place; not for groups in `without`.
    """
    found = place(graph, scope, partial(takes_bias, model))
    missing = {c.reader.weight for c in found.constants if c.reader.kind == "new bias" and c.group not in without}
    if not missing:
        return graph, found
    graph = add_biases(model, graph, missing)
    return graph, place(graph, scope)


def site_of(producer: Producer, graph: Graph) -> Site:
    """The compactor behind a producer."""
    layer, (tensor, dim), shapes = producer.layer, producer.axis, graph.shapes
    kind = compactor_kind(producer, graph)
    if layer is None or (producer.norm is not None and kind == "diagonal"):
        return Site(producer.module, kind, shapes[tensor][dim], norm=producer.norm)
    size = shapes[layer.weight][int(layer.transposed)] * (layer.blocks if layer.transposed else 1)
    return Site(producer.module, kind, size, -1 if len(shapes[layer.weight]) == 2 else 1, layer.weight, layer.bias,
                producer.norm, layer.transposed, layer.blocks)


def compactor_kind(producer: Producer, graph: Graph) -> CompactorKind:
    """Diagonal if only a scale can be merged, or if a full compactor would cost more than the convolution itself."""
    layer, norm, shapes = producer.layer, producer.norm, graph.shapes
    if layer is None or layer.weight not in graph.parameters:
        return "diagonal"
    if norm is not None and (not layer.module or f"{norm}.running_mean" not in shapes):
        return "diagonal"
    shape, dim = shapes[layer.weight], int(layer.transposed)
    makes, reads = shape[dim] // (1 if layer.transposed else layer.blocks), prod(shape) // shape[dim]
    if len(shape) == 2 or layer.depthwise or (layer.transposed and layer.blocks > 1) or makes > reads:
        return "diagonal"
    return "full" if layer.blocks == 1 else "block"


def find_sites(graph: Graph, found: Propagation) -> dict[str, set[Site]]:
    """The compactors that each module needs: one, or several if it returns the outputs of different layers."""
    sites: dict[str, set[Site]] = {}
    for producer in found.producers:
        if producer.axis in graph.by_axis:
            sites.setdefault(producer.module, set()).add(site_of(producer, graph))
    return sites


def rows_needed(graph: Graph, found: Propagation) -> dict[str, dict[str, ChannelMap]]:
    """{group: {module: rows}}: all rows that must be zero so that every consumer reads constants."""
    needed: dict[str, dict[str, ChannelMap]] = {}
    for consumer in found.consumers:
        for producer in sorted(consumer.activation.producers, key=lambda p: p.module):
            for s in graph.by_axis.get(producer.axis, ()):
                needed.setdefault(s.group, {})[producer.module] = s
    return needed


def obstacles_met(graph: Graph, found: Propagation) -> dict[str, str]:
    """Why a group's channels are not constant at some consumer, or cannot be folded there: the first reason of each group."""
    reasons: dict[str, str] = {}
    for activation, layer in found.consumers:
        if activation.obstacle is not None:
            for s in (s for p in activation.producers for s in graph.by_axis.get(p.axis, ())):
                reasons.setdefault(s.group, activation.obstacle)
        for group, number in ((group, float(v)) for group, v in activation.values.items()):
            if isnan(number) and not isinstance(layer, Depthwise):
                reasons.setdefault(group, f"{activation.changed_by} makes nan of zero")
            elif number != 0 and isinstance(layer, Obstacle):
                reasons.setdefault(group, f"{activation.changed_by} makes {number:.3g} of zero, and {layer.text}")
    return reasons


def merged_twice(needed: Mapping[str, Mapping[str, ChannelMap]], sites: Mapping[str, Collection[Site]]) -> dict[str, str]:
    """By group a tensor that the compactors of several modules would be merged into: tied weights, scales or biases."""
    modules = {m for maps in needed.values() for m in maps}
    targets = {m: {tensor for site in sites.get(m, ()) for tensor, _ in merge_targets(site).values()} for m in modules}
    times = Counter(tensor for tensors in targets.values() for tensor in tensors)
    return {group: f"{tensor} is shared by several layers" for group, maps in needed.items() for m in maps
            for tensor in targets[m] if times[tensor] > 1}


def constants_met(found: Propagation) -> list[Constant]:
    """The non-zero constants that layers read if rows are zero, each once."""
    met = {(layer, group): float(value) for activation, layer in found.consumers if isinstance(layer, Reader)
           for group, value in activation.values.items() if value != 0}
    return [Constant(reader, group, value) for (reader, group), value in met.items()]


def reason_against(group: ChannelGroup, rows: Mapping[str, ChannelMap], sites: Mapping[str, Collection[Site]],
                   obstacle: str | None, makers: int) -> str | None:
    """Why a group cannot have compactors, or None. `makers`: how many layers produce its channels."""
    if not group.exact:
        return "a layer mixes these channels: without a channel of zeros its output would change"
    if obstacle is not None:
        return obstacle
    for module in rows:
        if len(sites[module]) > 1:
            return f"{module} returns the outputs of different layers"
    if len({c for m in rows.values() for c in m.channels.tolist()}) < group.size:
        return "no layer was found whose zeros reach every layer that reads these channels"
    return f"{makers} layers make these channels (scope='inner')" if makers > 1 else None
