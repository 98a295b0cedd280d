"""The probe: narrow every free group on fake tensors, run the model's own forward, and compare the channels that meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..graph.selection import Kept
from ..graph.types import PinCode, PinReason
from .constraints import ConstraintCollector
from .dense import Mode
from .grouping import Solution
from .interpreter import LabelInterpreter, Location
from .labels import Axis, Carried, Ids, Label, PaddingAxis
from .operators.interface import Call


@dataclass(frozen=True, eq=False)
class Failure:
    """What a narrowed forward does otherwise than the dense one.

    `reason`: becomes the reason of the groups that are pinned for it. `units`: of the channels that met wrongly; none if that
    is not known. `mode`, `module`, `place`: the forward, the module in which the failing call runs, the number of the call.
    `view_dim`: set if another dimension of a view shrinks than was assumed: the view's source line, and that dimension.
    """

    reason: PinReason
    units: np.ndarray
    mode: Mode = "eval"
    module: str = ""
    place: int = 0
    view_dim: tuple[str, int] | None = None

    def is_after(self, other: Failure) -> bool:
        """Whether the probe got further than to the other failure."""
        return (self.mode, self.place) > (other.mode, other.place)  # "eval" comes before "train"


class Mismatch(Exception):
    """Ends a probe; carries the Failure to `trials.probe`."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure.reason))
        self.failure = failure


class Probe(LabelInterpreter):
    """Carries the surviving units through a narrowed forward; any disagreement is a Mismatch.

    Labels hold units here, not ids: see `DenseRun.unit_of`.
    """

    def __init__(self, model: nn.Module, mode: Mode, dense: ConstraintCollector, solution: Solution, kept: Kept) -> None:
        super().__init__(model, dense.axes, dense.answers)
        self.mode, self.dense, self.unit, self.cuts = mode, dense, solution.channels.unit_of, kept.cuts
        self.alive_units = solution.surviving_units(kept)
        self.views: Counter[int] = Counter()  # labels that a view has been asked about
        self.held: list[Ids] = []  # keeps the ids of arrays in `same` from being used again
        self.same: dict[tuple[int, int], tuple[Ids, Ids, bool]] = {}

    def mismatch(self, text: str, units: Sequence[np.ndarray] = (), view_dim: tuple[str, int] | None = None) -> Mismatch:
        return Mismatch(self.failure("differs", text, units, self.location(), view_dim))

    def failure(self, code: PinCode, text: str, units: Sequence[np.ndarray], location: Location,
                view_dim: tuple[str, int] | None = None) -> Failure:
        flat = np.concatenate([x.reshape(-1) for x in units]) if units else np.zeros(0, dtype=np.int64)
        return Failure(PinReason(code, text, location.source), flat, self.mode, location.module, self.place, view_dim)

    def units_read(self) -> list[np.ndarray]:
        """The units that the operands of the current call carry."""
        return [x.ids for c in self.carried_in() for x in c.labels]

    def axis(self, name: str, dim: int, size: int, blocks: int) -> Ids:
        """Units of what is left of an axis."""
        key = Axis(name, dim)
        if key not in self.axes.start:
            raise self.mismatch(f"{name} is used in another way when narrow")
        start = self.axes.start[key]
        ids = self.unit[start:start + self.axes.size[key]]
        stay = self.cuts.get(name, {}).get(dim)
        if stay is not None:
            ids = ids[stay[0]] if len(stay) == 1 else np.take_along_axis(ids.reshape(len(stay), -1), stay, axis=1).reshape(-1)
        if len(ids) != size * blocks:
            # a depthwise weight: as many blocks as channels are left
            raise self.mismatch(f"{name} has another size when narrow", [ids])
        return ids

    def labelled(self, name: str, dim: int, size: int) -> bool:
        return Axis(name, dim) in self.axes.start

    def is_depthwise(self, call: Call) -> bool:
        return call.place in self.dense.depthwise_calls

    def padding_ids(self, call: Call, size: int, part: int) -> Ids:
        key = PaddingAxis(call.name, call.number, part)
        if self.axes.size.get(key) != size:
            raise self.mismatch("a padding grows or shrinks with the channels")
        return self.unit[self.axes.start[key]:self.axes.start[key] + size]

    def unite(self, a: Ids, b: Ids) -> None:
        if a is b:
            return
        try:
            x, y = np.broadcast_arrays(a, b)
        except ValueError:
            raise self.mismatch("sizes disagree", [a, b]) from None
        if not np.array_equal(x, y):
            raise self.mismatch("other channels meet when narrow", [x[x != y], y[x != y]])

    def ignore(self, *fact: Any, **named: Any) -> None:
        """The dense forward has said it already: what still holds is seen in what the outputs carry (`on_call`)."""

    tie = pin = mix = sum_over = use_axis = use_weight = read_maps = ignore

    def spread_dims(self, call: Call, dims: Sequence[int], ids: Ids) -> tuple[int, ...]:
        met = self.views[call.place]
        self.views[call.place] += 1
        return self.dense.spreads[call.place][met] if met < len(self.dense.spreads.get(call.place, ())) else tuple(dims)

    def view_dim(self, call: Call, dims: Sequence[int], ids: Ids) -> int:
        """A view splits channels: only the dimension that the trace took as free may have another size now."""
        was, _, where = self.dense.splits.get(call.place, ((), ids, ""))
        free = self.dense.view_dims.get(where, dims[-1])
        dense = self.dense.log[call.place].shapes[0] if call.place < len(self.dense.log) else ()
        new = tuple(call.out.shape)
        if len(dense) != len(new) or (was != tuple(dims) and dense != new):  # of two kinds of channels `was` is the last one's
            raise self.mismatch("other shapes when narrow")
        changed = [d for d in dims if dense[d] != new[d]]
        if changed and changed != [free]:
            raise self.mismatch("another dimension of a view shrinks", view_dim=(where, changed[0]))
        return free

    def on_failure(self, call: Call) -> None:
        """A call failed: if it is a view that splits channels, its sizes may tell that another dimension shrinks."""
        dims, _, where = self.dense.splits.get(call.place, ((), None, ""))
        if dims and len(call.args) > 1 and isinstance(call.args[1], (list, tuple)):
            dense, now = self.dense.log[call.place].shapes[0], call.args[1]
            changed = [d for d in dims if d < len(now) and now[d] != dense[d]]
            if len(now) == len(dense) and len(changed) == 1:
                raise self.mismatch("another dimension of a view shrinks", view_dim=(where, changed[0]))

    def on_call(self, call: Call, outs: Sequence[Tensor], carried: Sequence[Carried]) -> None:
        """The same call as in the dense forward, with the same numbers; what comes out has the surviving channels, in order."""
        def wrong(reason: str) -> Mismatch:
            return self.mismatch(f"{reason} when narrow", self.units_read() + [x.ids for c in carried for x in c.labels])

        if call.place >= len(self.dense.log) or self.dense.log[call.place].name != call.name:
            raise wrong("other operators run")
        event = self.dense.log[call.place]
        if event.numbers != self.numbers(call):
            made = call.name.startswith("lift_fresh")
            raise wrong("torch.tensor makes another number from a width" if made else f"{call.name} gets other numbers")
        for t, now, shape, was in zip(outs, carried, event.shapes, event.carried, strict=False):
            if now.uniform and was.uniform and not now.labels:
                continue
            free = {x.free for x in was.labels} | (set(now.even) & set(was.even))
            if len(t.shape) != len(shape) or any(
                a != b and d not in free for d, (a, b) in enumerate(zip(t.shape, shape, strict=True))
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
