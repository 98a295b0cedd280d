"""The probe: narrow every free group on fake tensors, run the model's own forward, and compare the channels that meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..graph.equal_counts import components
from ..graph.selection import Cut, Kept
from ..graph.types import Graph
from ..surgery.resize import fit, slice_tensor
from .constraints import ConstraintCollector
from .grouping import Solution
from .interpreter import LabelInterpreter
from .labels import Carried, Ids, Label
from .operators.interface import Call
from .operators.table import row_of


class Mismatch(Exception):
    """Other channels meet than in the dense forward, or a size is fixed: the ids concerned, and why."""

    def __init__(self, ids: np.ndarray, reason: str, choice: tuple[str, int] | None = None) -> None:
        super().__init__(reason)
        self.ids, self.reason, self.choice = ids, reason, choice
        self.mode, self.module, self.place = "eval", "", 0  # where the probe stood


class Probe(LabelInterpreter):
    """Carries the surviving units through a narrowed forward; any disagreement is a Mismatch."""

    def __init__(self, model: nn.Module, dense: ConstraintCollector, solution: Solution, kept: Kept) -> None:
        super().__init__(model, dense.axes, dense.answers)
        self.dense, self.unit, self.cuts = dense, solution.unit, kept.cuts
        self.alive_units = alive(solution, kept)
        self.views: Counter[int] = Counter()  # labels that a view has been asked about
        self.held: list[Ids] = []  # keeps the ids of arrays in `same` from being used again
        self.same: dict[tuple[int, int], tuple[Ids, Ids, bool]] = {}

    def axis(self, name: str, dim: int, size: int, blocks: int) -> Ids:
        """Units of what is left of an axis."""
        key = (name, dim)
        if key not in self.axes.start:
            raise Mismatch(np.zeros(0, int), f"{name} is used in another way when narrow")
        start = self.axes.start[key]
        ids = self.unit[start:start + self.axes.size[key]]
        stay = self.cuts.get(name, {}).get(dim)
        if stay is not None:
            ids = np.take_along_axis(ids.reshape(len(stay), -1), stay, axis=1).reshape(-1)
        if len(ids) != size * blocks:
            # a depthwise weight: as many blocks as channels are left
            raise Mismatch(ids, f"{name} has another size when narrow")
        return ids

    def labelled(self, name: str, dim: int, size: int) -> bool:
        return (name, dim) in self.axes.start

    def depthwise(self, call: Call) -> bool:
        return call.place in self.dense.depthwise_calls

    def constant(self, call: Call, size: int, key: int) -> Ids:
        k = ("constant", call.name, call.number, key)
        if self.axes.size.get(k) != size:
            raise Mismatch(np.zeros(0, int), f"a padding grows or shrinks with the channels ({self.where()})")
        return self.unit[self.axes.start[k]:self.axes.start[k] + size]

    def unite(self, a: Ids, b: Ids) -> None:
        if a is b:
            return
        try:
            x, y = np.broadcast_arrays(a, b)
        except ValueError:
            raise Mismatch(np.concatenate([a.reshape(-1), b.reshape(-1)]), f"sizes disagree ({self.where()})") from None
        if not np.array_equal(x, y):
            bad = x != y
            raise Mismatch(np.concatenate([x[bad], y[bad]]), f"other channels meet when narrow ({self.where()})")

    def spread(self, call: Call, dims: Sequence[int], ids: Ids) -> tuple[int, ...]:
        met = self.views[call.place]
        self.views[call.place] += 1
        return self.dense.spreads[call.place][met] if met < len(self.dense.spreads.get(call.place, ())) else tuple(dims)

    def split_dim(self, call: Call, dims: Sequence[int], ids: Ids) -> int:
        """A view splits channels: only the dimension that the trace took as free may have another size now."""
        was, _, where = self.dense.splits.get(call.place, ((), ids, ""))
        free = self.dense.choices.get(where, dims[-1])
        dense = self.dense.log[call.place].shapes[0] if call.place < len(self.dense.log) else ()
        new = tuple(call.out.shape)
        if was != tuple(dims) or len(dense) != len(new):
            raise Mismatch(np.zeros(0, int), f"other shapes when narrow ({self.where()})")
        changed = [d for d in dims if dense[d] != new[d]]
        if changed and changed != [free]:
            raise Mismatch(np.zeros(0, int), "another dimension of a view shrinks", (where, changed[0]))
        return free

    def refused(self, call: Call) -> None:
        """A call failed: if it is a view that splits channels, its sizes may tell that another dimension shrinks."""
        dims, _, where = self.dense.splits.get(call.place, ((), None, ""))
        if dims and len(call.args) > 1 and isinstance(call.args[1], (list, tuple)):
            dense, now = self.dense.log[call.place].shapes[0], call.args[1]
            changed = [d for d in dims if d < len(now) and now[d] != dense[d]]
            if len(now) == len(dense) and len(changed) == 1:
                raise Mismatch(np.zeros(0, int), "another dimension of a view shrinks", (where, changed[0]))

    def happened(self, call: Call, outs: Sequence[Tensor], carried: Sequence[Carried]) -> None:
        """The same call as in the dense forward, with the same numbers; what comes out has the surviving channels, in order."""
        def wrong(reason: str) -> Mismatch:
            ids = [x.ids.reshape(-1) for c in (*self.carried_in(), *carried) for x in c.labels]
            return Mismatch(np.concatenate(ids) if ids else np.zeros(0, int), f"{reason} when narrow ({self.where()})")

        if call.place >= len(self.dense.log) or self.dense.log[call.place].name != call.name:
            raise wrong("other operators run")
        event = self.dense.log[call.place]
        if event.numbers != self.numbers(call):
            raise wrong(f"{call.name} gets other numbers")
        for t, now, shape, was in zip(outs, carried, event.shapes, event.carried, strict=False):
            if now.uniform and was.uniform and not now.labels:
                continue
            free = {x.free for x in was.labels}
            if len(t.shape) != len(shape) or any(
                a != b and d not in free and d not in now.even for d, (a, b) in enumerate(zip(t.shape, shape, strict=True))
            ):
                raise wrong(f"{call.name} gives another shape")
            # a dimension that is left with one channel may have lost its label in a view
            ours, theirs = ([x for x in c.labels if t.shape[x.free] > 1] for c in (now, was))
            if [x.free for x in ours] != [x.free for x in theirs]:
                raise wrong(f"{call.name} treats channels differently")
            for a, b in zip(ours, theirs, strict=True):
                across = [x for x in theirs if x.free != b.free and b.ids.shape[x.free] > 1
                          and x.ids.size == x.ids.shape[x.free]]
                if not (self.survives(a.ids, self.without(b, across)) if across else self.survives(a.ids, b)):
                    raise wrong(f"{call.name} gives other channels")

    def without(self, label: Label, across: Sequence[Label]) -> Label:
        """A label whose ids change along dimensions that shrink too (a grouped weight's rows), less what goes there."""
        ids = label.ids
        for other in across:
            ids = ids.compress(self.alive_units[self.unit[other.ids.reshape(-1)]], axis=other.free)
        self.held.append(ids)
        return Label(ids, label.free)

    def survives(self, now: Ids, dense: Label) -> bool:
        """Whether `now` is what is left of the dense ids, in the same order."""
        key = (id(now), id(dense.ids))
        if key not in self.same:
            units = np.moveaxis(self.unit[dense.ids], dense.free, -1)
            alive = self.alive_units[units]
            counts = alive.sum(-1)
            moved = np.moveaxis(now, dense.free, -1)
            left = units[alive]
            fits = (counts == moved.shape[-1]).all() and moved.shape[:-1] == units.shape[:-1]
            self.same[key] = (now, dense.ids, bool(fits and np.array_equal(left.reshape(moved.shape), moved)))
        return self.same[key][2]


def alive(solution: Solution, kept: Kept) -> np.ndarray:
    """For each unit whether it is left."""
    out = np.ones(len(solution.group_of) + 1, dtype=bool)
    for g, group in enumerate(solution.graph.groups):
        if group.name in kept.keep:
            of_group = np.nonzero(solution.group_of == g)[0]
            out[of_group] = kept.mask(group.name)[solution.channel_of[of_group]]
    return out


def trial_keep(graph: Graph, spare_ends: bool = False) -> Kept:
    """Kept channels for a probe: of each free group between a third and three quarters, in different numbers. The first and the
    last of a group go, or (`spare_ends`) stay, and those behind the first go: what takes channels by number, from either end,
    or a share of them, gets others in one of both trials."""
    rng = np.random.default_rng(0)
    removed: list[tuple[str, np.ndarray]] = []
    for k, part in enumerate(components(graph)):
        sizes = part.sizes
        # no two neighbours lose the same share; one channel more or less tells sizes apart that agree by accident
        share = 0.25 + 0.4 * ((k * 0.618) % 1)
        want = np.maximum(1, np.minimum(sizes - 1, np.round(sizes * share))).astype(np.int64)
        lost = part.removable(want, np.where(sizes > 2, sizes - 2, sizes - 1))  # one that is left by itself tells little
        for cell, n in zip(part.cells, lost, strict=True):
            first, inner, last = np.split(cell.channels, [1, max(1, len(cell.channels) - 1)])
            order = [inner, last, first] if spare_ends else [first, last, rng.permutation(inner)]
            removed.append((cell.group, np.concatenate(order)[:n]))
    return Kept.without(graph, removed)


def takes_by_number(dense: ConstraintCollector) -> bool:
    """Whether the forward slices or crops channels."""
    return any(a.ids.shape[a.free] != b.ids.shape[b.free]
               for e in dense.log if row_of(e.name).takes_by_number and isinstance(e.inputs[0], Carried)
               for a, b in zip(e.inputs[0].labels, e.carried[0].labels, strict=False))


def narrow_in_place(model: nn.Module, tensors: Mapping[str, Tensor], cuts: Mapping[str, Cut]) -> list[Any]:
    """Fit the tracing copy to the cut shapes; tied tensors stay one object."""
    done: dict[int, Tensor] = {}
    for name, cut in cuts.items():
        t = tensors[name]
        small = slice_tensor(t.detach(), cut)
        done[id(t)] = nn.Parameter(small, requires_grad=False) if isinstance(t, nn.Parameter) else small
    return fit(model, {name: done[id(t)] for name, t in tensors.items() if id(t) in done})
