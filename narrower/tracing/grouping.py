"""From the constraints of the dense run to a Graph: which ids are one channel, and which channels form a group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np

from ..graph.selection import Kept
from ..graph.types import ChannelGroup, ChannelMap, Edit, Graph, MapSource, Mixer, PinReason, Product, Role, Slice, Step, Tie
from ..surgery.attributes import Place
from .dense import DenseRun
from .labels import Axis, Ids


@dataclass
class GroupDraft:
    """A group in the making: its units in the order of its channels, why they cannot go, the modules that make them."""

    units: np.ndarray
    reason: PinReason | None
    layers: list[str] = field(default_factory=list)
    name: str = ""


class ChannelIndex(NamedTuple):
    """The channel that each id stands for.

    `unit_of[id]`: the unit of an id (see `DenseRun.unit_of`). `group_of[unit]`: the number of its group.
    `channel_of[unit]`: its index in that group. The last two are -1 for units that no layer makes. `names`: of the groups.
    """

    unit_of: np.ndarray
    group_of: np.ndarray
    channel_of: np.ndarray
    names: Sequence[str]

    def maps(self, ids: Ids) -> list[ChannelMap]:
        """The channels along a flat array of ids, one map for each group."""
        return self.maps_of_units(self.unit_of[ids])

    def maps_of_units(self, units: np.ndarray) -> list[ChannelMap]:
        groups, channels = self.group_of[units], self.channel_of[units]
        if not len(groups):
            return []
        if (groups == groups[0]).all():  # the common case, without a sort
            return [ChannelMap(self.names[groups[0]], channels, np.arange(len(units)))] if groups[0] >= 0 else []
        order = np.argsort(groups, kind="stable")
        parts = np.split(order, np.nonzero(np.diff(groups[order]))[0] + 1)
        return [ChannelMap(self.names[groups[p[0]]], channels[p], p) for p in parts if groups[p[0]] >= 0]


class Solution(NamedTuple):
    """The graph, and where each channel id is in it."""

    graph: Graph
    channels: ChannelIndex

    def groups_of(self, units: np.ndarray) -> list[ChannelGroup]:
        """The groups that units belong to, in no particular order."""
        return [self.graph.groups[g] for g in set(self.channels.group_of[np.unique(units)].tolist()) - {-1}]

    def surviving_units(self, kept: Kept) -> np.ndarray:
        """For each unit whether it stays; those without a group do. Bool, shape (units,)."""
        stays = np.ones(len(self.channels.group_of), dtype=bool)
        for g, group in enumerate(self.graph.groups):
            if group.name in kept.keep:
                units = np.nonzero(self.channels.group_of == g)[0]
                stays[units] = kept.mask(group.name)[self.channels.channel_of[units]]
        return stays


def solve(dense: DenseRun, pins: Mapping[str, PinReason], stored_sizes: Mapping[Place, Ids]) -> Solution:
    """The groups of a dense run.

    `pins`: further reasons, by the name of a group. `stored_sizes`: for numbers that modules store, the ids that they count.
    """
    roles: dict[Axis, Role] = {}
    for axis, role in (found for c in dense.collectors.values() for found in c.roles):
        roles[axis] = role if roles.get(axis, role) == role else "both"
    makers = {axis: dense.units_of(axis) for axis in dense.axes.start
              if isinstance(axis, Axis) and roles.get(axis) in ("out", "both")}
    drafts = partition(dense, makers, *pin_reasons(dense))
    name_groups(drafts, makers, pins)
    index = index_of(drafts, dense.unit_of)
    slices = slices_of(dense, roles, index)
    inexact = {m.group for c in dense.collectors.values() for *_, ids in c.mixers for m in index.maps(ids)}
    groups = tuple(ChannelGroup(d.name, len(d.units), tuple(slices[d.name]), tuple(dict.fromkeys(d.layers)), d.reason,
                                d.name not in inexact) for d in drafts)
    return Solution(assemble(dense, groups, index, stored_sizes), index)


def pin_reasons(dense: DenseRun) -> tuple[np.ndarray, list[PinReason]]:
    """For each unit the number of the first reason why it cannot go, -1 if it can; and the reasons."""
    numbers = np.full(dense.unit_count, -1)
    reasons: dict[PinReason, int] = {}
    for ids, reason in (pin for c in dense.collectors.values() for pin in c.pins):
        units = dense.unit_of[ids]
        numbers[units[numbers[units] < 0]] = reasons.setdefault(reason, len(reasons))
    return numbers, list(reasons)


def partition(dense: DenseRun, makers: Mapping[Axis, np.ndarray], numbers: np.ndarray,
              reasons: Sequence[PinReason]) -> list[GroupDraft]:
    """The groups: units that stand on the same axes, equally often, and have the same reason. In the order of execution.

    Only units that some layer makes (`makers`: the units along each axis of the role "out") are channels of a group.
    """
    if not makers:
        return []
    made = np.unique(np.concatenate(list(makers.values())))
    keys = np.stack([signatures(dense)[made], (numbers[made] + 1).astype(np.uint64)], axis=1)
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    parts = np.split(made[np.argsort(inverse, kind="stable")], np.cumsum(np.bincount(inverse))[:-1])
    drafts = [GroupDraft(parts[k], (*reasons, None)[numbers[parts[k][0]]]) for k in np.argsort(first)]
    group_of = np.full(dense.unit_count, -1)
    for g, draft in enumerate(drafts):
        group_of[draft.units] = g
    for axis, units in makers.items():
        for g in np.unique(group_of[units]):
            drafts[g].layers.append(axis.tensor.rpartition(".")[0] or axis.tensor)
    return drafts


def signatures(dense: DenseRun) -> np.ndarray:
    """For each unit a number that two units share if they stand on the same axes, equally often: a sum of random numbers."""
    axes = dense.axes
    axis_of_id = np.repeat(np.arange(len(axes.size)), list(axes.size.values()))
    random = np.random.default_rng(0).integers(1, 2**62, len(axes.size), dtype=np.uint64)
    sums = np.zeros(dense.unit_count, dtype=np.uint64)
    np.add.at(sums, dense.unit_of, random[axis_of_id])
    return sums


def name_groups(drafts: Sequence[GroupDraft], makers: Mapping[Axis, np.ndarray], pins: Mapping[str, PinReason]) -> None:
    """Name each group after the first module that makes it, and complete the reasons: `pins`, and groups of one channel."""
    taken: Counter[str] = Counter()
    for draft in drafts:
        module = draft.layers[0]
        taken[module] += 1
        draft.name = module if taken[module] == 1 else f"{module}#{taken[module]}"
        draft.reason = draft.reason or pins.get(draft.name)
        if draft.reason is None and len(draft.units) == 1:
            width = max(int((units == draft.units[0]).sum()) for units in makers.values())
            draft.reason = PinReason("together", f"the {width} channels of {module} can only go together" if width > 1
                                     else f"one channel of {module} by itself")


def index_of(drafts: Sequence[GroupDraft], unit_of: np.ndarray) -> ChannelIndex:
    count = int(unit_of.max(initial=-1)) + 1
    group_of, channel_of = np.full(count, -1), np.full(count, -1)
    for g, draft in enumerate(drafts):
        group_of[draft.units] = g
        channel_of[draft.units] = np.arange(len(draft.units))
    return ChannelIndex(unit_of, group_of, channel_of, [d.name for d in drafts])


def slices_of(dense: DenseRun, roles: Mapping[Axis, Role], index: ChannelIndex) -> dict[str, list[Slice]]:
    """Where the channels of each group are along the axes of parameters and buffers, by the name of the group."""
    slices: dict[str, list[Slice]] = {name: [] for name in index.names}
    for axis, blocks in dense.axes.blocks.items():
        if isinstance(axis, Axis):
            for m in index.maps_of_units(dense.units_of(axis)):
                slices[m.group].append(Slice(m.group, m.channels, m.positions, *axis, roles.get(axis, "along"), blocks))
    return slices


def names_of_convolutions(steps: Iterable[Step]) -> list[str | int]:
    """Of each convolution of a forward its weight, or its number if that is computed, or if others have the same weight."""
    weights = [step.inputs[1] for step in steps if step.name == "convolution"]
    uses = Counter(weights)
    return [w if isinstance(w, str) and uses[w] == 1 else number for number, w in enumerate(weights)]


def assemble(dense: DenseRun, groups: tuple[ChannelGroup, ...], index: ChannelIndex,
             stored_sizes: Mapping[Place, Ids]) -> Graph:
    """The graph of these groups. What concerns single calls is taken from the eval forward alone."""
    main = dense.collectors["eval"]
    convolutions = names_of_convolutions(main.steps)

    def maps(ids: Ids) -> tuple[ChannelMap, ...]:
        return tuple(index.maps(ids))

    return Graph(
        groups, dict(dense.shapes), dense.parameters,
        uses={w: n / dense.batch / prod(dense.shapes[w]) for w, n in main.macs.items()},
        ties=tuple(ties_of(dense, index)),
        sources=tuple(MapSource(None if number is None else convolutions[number], pool, main.map_readers[key], maps(ids))
                      for key, (number, pool, ids) in main.maps.items()),
        mixers=tuple(Mixer(name, number, dim, len(ids), maps(ids)) for name, number, dim, ids in main.mixers),
        products=tuple(Product(number, shape, maps(ids)) for number, shape, ids in main.products),
        notes=dense.notes, computed=dict(main.computed),
        steps=tuple(s._replace(module=c.returned.get(s.outputs[0], "") if s.outputs else "", training=mode != "eval",
                               groups=tuple(frozenset(m.group for x in labels for m in maps(x.ids.reshape(-1)))
                                            for labels in c.pieces.get(k, ())))
                    for mode, c in dense.collectors.items() for k, s in enumerate(c.steps)),
        edits=tuple(Edit(*place, len(ids), maps(ids)) for place, ids in stored_sizes.items()),
    )


def ties_of(dense: DenseRun, index: ChannelIndex) -> list[Tie]:
    """Sets of channels that must keep equally many, where they differ; each tie once."""
    seen: set[tuple[object, ...]] = set()
    ties = []
    for rows in (rows for c in dense.collectors.values() for rows in c.ties):
        blocks = np.unique(np.sort(dense.unit_of[rows], axis=1), axis=0)
        key = (blocks.shape, blocks.tobytes())
        if len(blocks) < 2 or key in seen:
            continue
        seen.add(key)
        members = [{m.group: m.channels for m in index.maps_of_units(block)} for block in blocks]
        if any(members):
            ties.append(Tie(tuple(members)))
    return ties
