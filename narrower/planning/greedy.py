"""Widths from a budget: greedy descent, by equal shares or by the loss for the cost saved."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from ..errors import BudgetError, first_few
from ..graph.cost import CostKind, CostModel, RunningCost, shown
from ..graph.equal_counts import Component
from .damage import Sensitivity
from .requests import Budget, most_removable

LOOK_AHEAD = 8
Step = tuple[float, np.ndarray]
"""Value of a step (lower is better), and the number of channels that each cell of its component loses."""


class ComponentDescent:
    """The descent of one component: how many channels its cells have lost, and which steps remain."""

    def __init__(self, part: Component, model: CostModel, round_to: int, min_channels: float) -> None:
        self.part, self.model, self.round_to = part, model, round_to
        self.sizes = {c.group: model.graph[c.group].size for c in part.cells}
        self.columns = [model.column[c.group] for c in part.cells]
        self.moves = part.moves()
        self.most = most_removable(part, self.sizes, min_channels)
        self.lost = np.zeros(len(part.cells), dtype=np.int64)
        self.history: list[np.ndarray] = []

    def best_step(self, running: RunningCost, weight: Mapping[CostKind, float],
                  loss: Callable[[np.ndarray], float]) -> Step | None:
        """The step that loses least for what it saves; None when nothing more can go. `loss`: what a step loses."""
        values = [(loss(step) / saved, step) for step, saved in self.steps(running, weight)]
        return min(values, key=lambda found: found[0], default=None)

    def even_step(self, running: RunningCost, weight: Mapping[CostKind, float]) -> Step | None:
        """The step after which the cells that it shrinks have lost the smallest share; None when nothing more can go."""
        values = [(float(((self.lost + step) / self.part.sizes)[step > 0].max()), step)
                  for step, _ in self.steps(running, weight)]
        return min(values, key=lambda found: found[0], default=None)

    def steps(self, running: RunningCost, weight: Mapping[CostKind, float]) -> Iterator[tuple[np.ndarray, float]]:
        """The steps that can be taken, with the cost that each saves. Where a step saves nothing, longer ones are tried.

        A few channels less may take as long as before, or longer.
        """
        for move in self.moves:
            least = self.repetitions(move)
            for times in range(least, least + LOOK_AHEAD * self.round_to, self.round_to):
                step = move * times
                if (self.lost + step > self.most).any():
                    break
                saved = sum(weight[k] * v for k, v in running.saved(self.per_group(step)).items())
                if saved > 0:
                    yield step, saved
                    break

    def damage(self, step: np.ndarray, sensitivity: Sensitivity) -> float:
        """By how much the measured damage of its groups grows with a step."""
        total = sum(self.sizes.values())
        before, after = (sensitivity.damage([*self.sizes], float(n.sum()) / total) for n in (self.lost, self.lost + step))
        return after - before

    def repetitions(self, move: np.ndarray) -> int:
        """How often a move is taken at once, so that widths become multiples of `round_to` where they can."""
        if self.round_to == 1:
            return 1
        taken = dict.fromkeys(self.sizes, 0)
        width = dict(self.sizes)
        for cell, n, lost in zip(self.part.cells, move, self.lost, strict=True):
            taken[cell.group] += int(n)
            width[cell.group] -= int(lost)
        return next((times for times in range(1, self.round_to) if all(
            (width[g] - times * n) % self.round_to == 0 for g, n in taken.items() if n)), self.round_to)

    def per_group(self, step: np.ndarray) -> np.ndarray:
        """The channels that a step removes from each group, in the order of the cost model."""
        out = np.zeros(len(self.model.names))
        np.add.at(out, self.columns, step)
        return out

    def take(self, step: np.ndarray) -> None:
        """Remove the channels of a step."""
        self.lost = self.lost + step
        self.history.append(step)

    def undo_last(self) -> None:
        """Give back the channels of the last step."""
        self.lost = self.lost - self.history.pop()


Descent = TypeVar("Descent", bound=ComponentDescent)


def fits(now: Mapping[CostKind, float], targets: Mapping[CostKind, float]) -> bool:
    """Whether all costs are within their targets, up to rounding."""
    return all(now[k] <= targets[k] * (1 + 1e-12) for k in targets)


def descend(descents: Sequence[Descent], running: RunningCost, targets: Mapping[CostKind, float],
            best: Callable[[Descent], Step | None], most: float = math.inf) -> list[int]:
    """Greedy: take the step of the lowest value, until the costs fit or `most` channels are gone.

    Returns whose steps were taken, in order. The value of a step only grows while others are taken, so a heap whose entries
    are updated when they come up is exact. (Not quite in milliseconds: on a runtime that likes multiples, a step may save more
    after another one.)
    """
    heap = [(found[0], k) for k, d in enumerate(descents) if (found := best(d))]
    heapq.heapify(heap)
    taken: list[int] = []
    count = 0
    while heap and count < most and not fits(running.now, targets):
        _, k = heapq.heappop(heap)
        found = best(descents[k])
        if found is None:
            continue
        if heap and found[0] > heap[0][0]:  # its value has grown since it was pushed
            heapq.heappush(heap, (found[0], k))
            continue
        running.move(descents[k].per_group(found[1]))
        descents[k].take(found[1])
        taken.append(k)
        count += int(found[1].sum())
        if after := best(descents[k]):
            heapq.heappush(heap, (after[0], k))
    return taken


def by_budget(model: CostModel, parts: list[Component], budget: Budget, round_to: Mapping[str, int], min_channels: float,
              sensitivity: Sensitivity | None = None) -> list[np.ndarray]:
    """The number of channels that each cell of each component loses, so that the costs are within the budget.

    Without a sensitivity all groups lose the same share: the next step is one after which its cells have lost the least. With
    it, the next step is the one that adds the least damage per cost saved. What a step saves depends on the other widths, and
    is computed anew each time. Widths become multiples of `round_to`, given for each group, where they can. Then steps that
    still fit are undone, the last one first. Raises BudgetError if the budget cannot be reached.
    """
    dense = {k: model.cost(k, model.dense) for k in model.terms}
    targets = budget.targets(dense)
    running = RunningCost(model, tuple(targets))
    weight = {k: 1 / dense[k] for k in targets}
    descents = [ComponentDescent(p, model, max(round_to[c.group] for c in p.cells), min_channels) for p in parts]
    taken = descend(descents, running, targets, lambda d: d.even_step(running, weight) if sensitivity is None
                    else d.best_step(running, weight, partial(d.damage, sensitivity=sensitivity)))
    if not fits(running.now, targets):
        left = {g.name for g in model.graph.free} - {c.group for p in parts for c in p.cells}
        widest = max(round_to.values(), default=1)
        held = {f"min_channels={min_channels:g}": min_channels != 1, f"round_to={widest}": widest > 1,
                f"exclude= ({first_few(sorted(left), 3)})": bool(left)}
        raise unreachable(running, budget, targets, dense, [setting for setting, holds in held.items() if holds])
    for k in reversed(taken):
        back = -descents[k].per_group(descents[k].history[-1])
        saved = running.saved(back)
        if all(running.now[c] - saved[c] <= targets[c] for c in targets):
            running.move(back)
            descents[k].undo_last()
    return [d.lost for d in descents]


def unreachable(running: RunningCost, budget: Budget, targets: Mapping[CostKind, float],
                dense: Mapping[CostKind, float], held: Sequence[str]) -> BudgetError:
    """The error names the least cost that can be reached, the largest layers in the way, and the settings that hold more."""
    kind = next(k for k in targets if running.now[k] > targets[k])
    costs = running.model.by_tensor(kind, running.widths)
    largest = sorted(costs, key=lambda t: -costs[t])[:3]
    in_way = [f"{g.name} ({g.pinned})" for g in running.model.graph if g.pinned and any(
        s.makes and s.tensor in largest for s in g.slices)]
    layers = ", ".join(f"{t} {shown(kind, costs[t])}" for t in largest)
    pinned = f"; pinned: {'; '.join(in_way)}" if in_way else ""
    given = getattr(budget, kind)
    kept = f"; held by {', '.join(held)} too" if held else ""
    percent = kind != "latency_ms" and 1 < given <= 100
    meant = f"; for {given:g} % give {given / 100:g}" if percent else ""
    return BudgetError(
        f"{kind}={shown(kind, targets[kind])} ({targets[kind] / dense[kind]:.1%} of {shown(kind, dense[kind])}) cannot be "
        f"reached: the least is {shown(kind, running.now[kind])} ({running.now[kind] / dense[kind]:.1%}). "
        f"What remains is mostly {layers}{pinned}{kept}{meant}"
    )
