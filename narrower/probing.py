"""The probe: narrow every free group on fake tensors, run the model's own forward, and compare the channels that meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from .groups import Graph
from .labels import Ids, Label
from .ops import Call
from .recording import Recording, Trace
from .solving import Solution
from .surgery import Keep, Selection, fit, selections, sliced, undone
from .ties import components


class Mismatch(Exception):
    """Other channels meet than in the dense forward, or a size is fixed: the ids concerned, and why."""

    def __init__(self, ids: np.ndarray, reason: str, choice: tuple[int, int] | None = None) -> None:
        super().__init__(reason)
        self.ids, self.reason, self.choice = ids, reason, choice


class Probe(Recording):
    """Carries the surviving units through a narrowed forward; any disagreement is a Mismatch."""

    def __init__(self, model: nn.Module, dense: Trace, solution: Solution, cuts: Mapping[str, list[Selection]]) -> None:
        super().__init__(model, dense.axes)
        self.dense, self.unit, self.cuts = dense, solution.unit, cuts

    def axis(self, name: str, dim: int, size: int, blocks: int) -> Ids:
        """Units of what is left of an axis."""
        key = (name, dim)
        if key not in self.axes.start:
            raise Mismatch(np.zeros(0, int), f"{name} is used in another way when narrow")
        start = self.axes.start[key]
        ids = self.unit[start:start + self.axes.size[key]]
        for s in self.cuts.get(name, ()):
            if s.dim == dim:
                width = len(ids) // len(s.index)
                ids = ids[(s.index + width * np.arange(len(s.index))[:, None]).reshape(-1)]
        if len(ids) != size * blocks:
            # a depthwise weight: as many blocks as channels are left
            raise Mismatch(ids, f"{name} has another size when narrow")
        return ids

    def constant(self, call: Call, size: int, key: int) -> Ids:
        k = ("constant", call.name, call.number, key)
        if self.axes.size.get(k) != size:
            raise Mismatch(np.zeros(0, int), "a padding grows or shrinks with the channels")
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

    def pin(self, labels: Sequence[Label], reason: str) -> None: ...
    def tie(self, label: Label) -> None: ...
    def mix(self, call: Call, label: Label, dim: int) -> None: ...
    def role(self, label: Label | None, role: str) -> None: ...
    def use(self, label: Label | None, positions: float) -> None: ...
    def reads(self, label: Label, source: Tensor, pool: int) -> None: ...

    def scalars(self, call: Call, numbers: Sequence[float], labels: Sequence[Label]) -> None:
        """A number computed from a width (a scale by 1 / sqrt(channels)) would change what the others compute."""
        if labels and self.dense.numbers.get((call.name, call.number), numbers) != numbers:
            ids = np.concatenate([x.ids.reshape(-1) for x in labels])
            raise Mismatch(ids, f"a factor is computed from the number of channels ({self.where()})")

    def split_dim(self, call: Call, dims: Sequence[int], new: Sequence[int]) -> int:
        """A view splits channels: only the dimension that the trace took as free may have another size now."""
        dense = self.dense.splits.get(call.number)
        free = self.dense.choices.get(call.number, dims[-1])
        if dense is None or len(dense) != len(new):
            raise Mismatch(np.zeros(0, int), f"other shapes when narrow ({self.where()})")
        changed = [d for d in dims if dense[d] != new[d]]
        if changed and changed != [free]:
            raise Mismatch(np.zeros(0, int), "another dimension of a view shrinks", (call.number, changed[0]))
        return free


def trial(graph: Graph, seed: int = 0) -> Keep:
    """Kept channels for a probe: of each free group between a third and three quarters, in different numbers."""
    rng = np.random.default_rng(seed)
    keep = {g.name: np.arange(g.size) for g in graph.free}
    for k, part in enumerate(components(graph)):
        sizes = part.sizes
        # no two neighbours lose the same share; one channel more or less tells sizes apart that agree by accident
        share = 0.25 + 0.4 * ((k * 0.618) % 1)
        want = np.maximum(1, np.minimum(sizes - 1, np.round(sizes * share))).astype(np.int64)
        lost = part.removable(want, np.maximum(0, sizes - 1))
        for cell, n in zip(part.cells, lost, strict=True):
            gone = rng.choice(cell.channels, int(n), replace=False)
            keep[cell.group] = np.setdiff1d(keep[cell.group], gone, assume_unique=True)
    return keep


def narrowed_in_place(model: nn.Module, tensors: Mapping[str, Tensor], cuts: Mapping[str, list[Selection]]) -> list[Any]:
    """Fit the tracing copy to the cut shapes; tied tensors stay one object."""
    done: dict[int, Tensor] = {}
    new: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if name in cuts:
            if id(t) not in done:
                small = sliced(t.detach(), cuts[name])
                done[id(t)] = nn.Parameter(small, requires_grad=False) if isinstance(t, nn.Parameter) else small
        if id(t) in done:
            new[name] = done[id(t)]
    for name, t in tensors.items():  # other names of a tied tensor that were met before it was cut
        if id(t) in done:
            new[name] = done[id(t)]
    return fit(model, new)


__all__ = ["Mismatch", "Probe", "narrowed_in_place", "selections", "trial", "undone"]
