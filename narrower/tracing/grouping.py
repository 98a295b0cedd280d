"""From the equations of a trace to a Graph: which ids are one channel, which channels form a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from ..graph.types import ChannelGroup, ChannelMap, Edit, Graph, MapSource, Mixer, Product, Role, Slice, Tie
from .constraints import ConstraintCollector
from .labels import Axes, Ids


class Solution(NamedTuple):
    """The graph, and for each id its channel: `unit[id]`, with the group and index of that channel (-1: pinned)."""

    graph: Graph
    unit: np.ndarray
    group_of: np.ndarray
    channel_of: np.ndarray


def units(traces: Sequence[ConstraintCollector], axes: Axes) -> np.ndarray:
    """The connected component of each id."""
    pairs, total = [p for t in traces for p in t.pairs], axes.total
    if not pairs or not total:
        return np.arange(total)
    a = np.concatenate([p[0] for p in pairs])
    b = np.concatenate([p[1] for p in pairs])
    _, labels = connected_components(coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(total, total)), directed=False)
    # number the units by their first id, that is in the order of execution
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def signatures(unit: np.ndarray, axes: Axes) -> np.ndarray:
    """For each unit a number that two units share where they stand in the same axes, equally often."""
    axis_of = np.repeat(np.arange(len(axes.size)), list(axes.size.values()))
    marks = np.random.default_rng(0).integers(1, 2**62, len(axes.size), dtype=np.uint64)
    out = np.zeros(unit.max() + 1, dtype=np.uint64)
    np.add.at(out, unit, marks[axis_of])
    return out


def solve(traces: Sequence[ConstraintCollector], axes: Axes, unit: np.ndarray, shapes: Mapping[str, tuple[int, ...]],
          parameters: frozenset[str], batch: int, pinned: Mapping[str, str], notes: Sequence[str] = (),
          edits: Mapping[Any, Ids] | None = None) -> Solution:
    """Groups from what the traces (eval, and train where it differs) have collected, and from their `units`; `pinned` adds
    reasons by group name."""
    count = int(unit.max()) + 1 if len(unit) else 0
    reason = np.full(count, -1)
    reasons: list[str] = []
    for ids, why in ((ids, str(why)) for t in traces for ids, why in t.pins):
        if why not in reasons:
            reasons.append(why)
        new = unit[ids]
        reason[new[reason[new] < 0]] = reasons.index(why)
    roles: dict[tuple[str, int], Role] = {}
    for t in traces:
        roles.update(t.roles)  # type: ignore[arg-type]
    inexact = np.zeros(count, dtype=bool)
    for t in traces:
        for *_, ids in t.mixers:
            inexact[unit[ids]] = True

    # only channels that some layer makes or that can go are groups; the read ends of an input are neither
    makers = [(key, axes.start[key], axes.size[key]) for key in axes.start if roles.get(key) == "out"]
    made = np.zeros(count, dtype=bool)
    for _, start, size in makers:
        made[unit[start:start + size]] = True
    reason[~made & (reason < 0)] = len(reasons)
    reasons.append("no layer makes these channels")
    mark = signatures(unit, axes) if count else np.zeros(0, dtype=np.uint64)
    keys = np.stack([mark, (reason + 1).astype(np.uint64)], axis=1) if count else np.zeros((0, 2), np.uint64)
    chosen = np.nonzero(made)[0]
    group_of = np.full(count, -1)
    channel_of = np.full(count, -1)
    layers: list[list[str]] = []
    names: list[str] = []
    group_reason: list[str | None] = []
    sizes: list[int] = []
    if len(chosen):
        _, first, inverse = np.unique(keys[chosen], axis=0, return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        group_of[chosen] = rank[inverse.reshape(-1)]
        for g in range(len(order)):
            mine = chosen[group_of[chosen] == g]
            channel_of[mine] = np.arange(len(mine))
            sizes.append(len(mine))
            layers.append([])
            r = reason[mine[0]]
            group_reason.append(None if r < 0 else reasons[r])
        for (tensor, _), start, size in makers:
            for g in np.unique(group_of[unit[start:start + size]]):
                layers[g].append(tensor.rpartition(".")[0] or tensor)
    taken: dict[str, int] = {}
    for g in range(len(sizes)):
        base = layers[g][0]
        taken[base] = taken.get(base, 0) + 1
        names.append(base if taken[base] == 1 else f"{base}#{taken[base]}")
        if group_reason[g] is None and names[g] in pinned:
            group_reason[g] = pinned[names[g]]
        if group_reason[g] is None and sizes[g] < 2:
            one = int(np.nonzero(group_of == g)[0][0])
            width = max(int((unit[start:start + size] == one).sum()) for _, start, size in makers)
            group_reason[g] = (f"the {width} channels of {base} can only go together" if width > 1
                               else f"one channel of {base} by itself")
    slices: list[list[Slice]] = [[] for _ in sizes]
    for key, start in axes.start.items():
        if key[0] == "constant":
            continue
        tensor, dim = key
        for g, m in members_of(unit[start:start + axes.size[key]], group_of, channel_of, names):
            slices[g].append(Slice(m.group, m.channels, m.positions, tensor, dim, roles.get(key, "along"), axes.blocks[key]))
    rough = np.zeros(len(sizes), dtype=bool)
    for u in np.nonzero(inexact)[0]:
        if group_of[u] >= 0:
            rough[group_of[u]] = True
    groups = tuple(
        ChannelGroup(names[g], sizes[g], tuple(slices[g]), tuple(dict.fromkeys(layers[g])), group_reason[g], not rough[g])
        for g in range(len(sizes))
    )

    def members(ids: Ids) -> tuple[ChannelMap, ...]:
        return tuple(m for _, m in members_of(unit[ids], group_of, channel_of, names))

    main = traces[0]
    sources = tuple(MapSource(weight, pool, main.map_readers[key], members(ids))
                    for key, (weight, pool, ids) in main.maps.items())
    mixers = tuple(Mixer(name, number, dim, len(ids), members(ids)) for name, number, dim, ids in main.mixers)
    products = tuple(Product(number, shape, members(ids)) for number, shape, ids in main.products)
    graph = Graph(
        groups, dict(shapes), parameters, {w: n / batch / prod(shapes[w]) for w, n in main.macs.items()},
        tuple(ties(traces, unit, group_of, channel_of, names)), sources, mixers, products, tuple(notes), dict(main.computed),
        tuple(s._replace(module=t.returned.get(s.outputs[0], "") if s.outputs else "", training=k > 0)
              for k, t in enumerate(traces) for s in t.steps),
        tuple(Edit(module, attribute, entry, len(ids), members(ids))
              for (module, attribute, entry), ids in (edits or {}).items()),
    )
    return Solution(graph, unit, group_of, channel_of)


def members_of(unit: np.ndarray, group_of: np.ndarray, channel_of: np.ndarray,
               names: Sequence[str]) -> list[tuple[int, ChannelMap]]:
    """The channels at the positions of an array of units, by group."""
    g, c = group_of[unit], channel_of[unit]
    if not len(g):
        return []
    if g[0] == g[-1] and (g == g[0]).all():
        return [] if g[0] < 0 else [(int(g[0]), ChannelMap(names[g[0]], c, np.arange(len(c))))]
    order = np.argsort(g, kind="stable")
    out = []
    for part in np.split(order, np.nonzero(np.diff(g[order]))[0] + 1):
        k = int(g[part[0]])
        if k >= 0:
            out.append((k, ChannelMap(names[k], c[part], part)))
    return out


def ties(traces: Sequence[ConstraintCollector], unit: np.ndarray, group_of: np.ndarray, channel_of: np.ndarray,
         names: Sequence[str]) -> list[Tie]:
    """Ties whose blocks differ; each once."""
    seen: set[tuple[object, ...]] = set()
    out = []
    for rows in (rows for t in traces for rows in t.ties):
        blocks = np.unique(np.sort(unit[rows], axis=1), axis=0)
        key = (blocks.shape, blocks.tobytes())
        if len(blocks) < 2 or key in seen:
            continue
        seen.add(key)
        maps = [{m.group: m.channels for _, m in members_of(b, group_of, channel_of, names)} for b in blocks]
        if any(maps):
            out.append(Tie(tuple(maps)))
    return out
