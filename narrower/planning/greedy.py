"""Widths from a budget: greedy descent over (score lost) / (cost saved)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..errors import BudgetError
from ..graph.cost import CostKind, CostModel, RunningCost
from ..graph.equal_counts import Component
from ..graph.types import Graph
from .requests import Budget


def limits(part: Component, totals: Mapping[str, int], min_channels: int) -> np.ndarray:
    """The most that each cell may lose so that its group keeps `min_channels`."""
    left = {name: max(0, size - min_channels) for name, size in totals.items()}
    return np.array([min(len(c.channels) - 1, math.floor(left[c.group] * len(c.channels) / totals[c.group]))
                     if min_channels > 1 else len(c.channels) - 1 for c in part.cells])


class ComponentDescent:
    """The steps that one component can take, each a number of channels from each of its cells."""

    def __init__(self, graph: Graph, part: Component, values: Mapping[str, np.ndarray], model: CostModel,
                 round_to: int, min_channels: int) -> None:
        self.part, self.model = part, model
        self.columns = [model.column[c.group] for c in part.cells]
        self.layers = {c.group: max(1, len(graph[c.group].layers)) for c in part.cells}
        self.most = limits(part, {c.group: graph[c.group].size for c in part.cells}, min_channels)
        self.sorted = [np.sort(values[c.group][c.channels]) for c in part.cells]
        self.lost = np.zeros(len(part.cells), dtype=np.int64)
        self.remaining = {name: float(values[name].sum()) for name in self.layers}
        self.total = dict(self.remaining)
        self.history: list[np.ndarray] = []
        self.sizes = {c.group: graph[c.group].size for c in part.cells}
        self.round_to = round_to
        self.moves = part.moves()

    def next(self, running: RunningCost, weight: Mapping[CostKind, float]) -> tuple[float, np.ndarray] | None:
        """The best step: (score lost / cost saved, channels by cell); None when nothing more can go."""
        best: tuple[float, np.ndarray] | None = None
        for move in self.moves:
            step = move * self.multiple(move)
            if (self.lost + step > self.most).any():
                continue
            saved = sum(weight[k] * v for k, v in running.saved(self.by_group(step)).items())
            if saved > 0 and (best is None or self.loss(step) / saved < best[0]):
                best = (self.loss(step) / saved, step)
        return best

    def multiple(self, move: np.ndarray) -> int:
        """How often a move is taken at once so that widths end on multiples of round_to, where they can."""
        if self.round_to == 1:
            return 1
        per_group: dict[str, int] = {}
        width: dict[str, int] = {}
        for cell, n, gone in zip(self.part.cells, move, self.lost, strict=True):
            per_group[cell.group] = per_group.get(cell.group, 0) + int(n)
            width[cell.group] = width.get(cell.group, self.sizes[cell.group]) - int(gone)
        for times in range(1, self.round_to + 1):
            if all((width[g] - times * n) % self.round_to == 0 for g, n in per_group.items() if n):
                return times
        return self.round_to

    def mean(self, step: np.ndarray) -> float:
        """The mean score of what a step takes."""
        taken = [v[lost:lost + n] for v, lost, n in zip(self.sorted, self.lost, step, strict=True)]
        return float(np.concatenate(taken).mean())

    def loss(self, step: np.ndarray) -> float:
        """-log of the share of score that its groups keep, for each of their layers, times the root of their size."""
        out = 0.0
        gone: dict[str, float] = {}
        for cell, values, lost, n in zip(self.part.cells, self.sorted, self.lost, step, strict=True):
            if n:
                gone[cell.group] = gone.get(cell.group, 0.0) + float(values[lost:lost + n].sum())
        for name, value in gone.items():
            left = self.remaining[name]
            share = min(1 - 1e-12, value / left) if left > 0 else 1 - 1e-12
            out -= self.layers[name] * math.sqrt(self.sizes[name]) * math.log1p(-share)
        return out

    def by_group(self, step: np.ndarray) -> np.ndarray:
        out = np.zeros(len(self.model.names))
        np.add.at(out, self.columns, step)
        return out

    def take(self, step: np.ndarray) -> None:
        for cell, values, lost, n in zip(self.part.cells, self.sorted, self.lost, step, strict=True):
            self.remaining[cell.group] -= float(values[lost:lost + n].sum())
        self.lost = self.lost + step
        self.history.append(step)

    def back(self) -> None:
        self.lost = self.lost - self.history.pop()


def fits(now: Mapping[CostKind, float], targets: Mapping[CostKind, float]) -> bool:
    """Whether costs are below the targets, to rounding."""
    return all(now[k] <= targets[k] * (1 + 1e-12) for k in targets)


def descend(steps: Sequence[ComponentDescent], running: RunningCost, targets: Mapping[CostKind, float],
            best: Callable[[ComponentDescent], tuple[float, np.ndarray] | None], most: float = math.inf) -> list[int]:
    """Greedy: the step of the lowest value, until the costs fit or `most` channels are gone; returns whose steps were taken.

    A step's value only grows while others are taken, so a heap with late updates is exact.
    """
    heap = [(found[0], k) for k, s in enumerate(steps) if (found := best(s))]
    heapq.heapify(heap)
    taken: list[int] = []
    count = 0
    while heap and count < most and not fits(running.now, targets):
        old, k = heapq.heappop(heap)
        found = best(steps[k])
        if found is None:
            continue
        if heap and found[0] > heap[0][0] and found[0] > old:  # its cost has changed since
            heapq.heappush(heap, (found[0], k))
            continue
        running.move(steps[k].by_group(found[1]))
        steps[k].take(found[1])
        taken.append(k)
        count += int(found[1].sum())
        if after := best(steps[k]):
            heapq.heappush(heap, (after[0], k))
    return taken


def by_budget(graph: Graph, parts: list[Component], values: Mapping[str, np.ndarray], budget: Budget, round_to: int,
              min_channels: int) -> list[np.ndarray]:
    """The step that loses least for what it saves, until below the budget; then what still fits comes back."""
    model = CostModel(graph)
    kinds: tuple[CostKind, ...] = ("macs", "params")
    dense = {k: model.cost(k, model.dense) for k in kinds}
    targets = budget.targets(dense)
    running = RunningCost(model, tuple(targets))
    weight = {k: 1 / dense[k] for k in targets}
    steps = [ComponentDescent(graph, p, values, model, round_to, min_channels) for p in parts]
    taken = descend(steps, running, targets, lambda s: s.next(running, weight))
    if not fits(running.now, targets):
        raise unreachable(graph, model, running, targets, dense)
    for k in reversed(taken):
        step = -steps[k].by_group(steps[k].history[-1])
        saved = running.saved(step)
        if all(running.now[c] - saved[c] <= targets[c] for c in targets):
            running.move(step)
            steps[k].back()
    return [s.lost for s in steps]


def unreachable(graph: Graph, model: CostModel, running: RunningCost, targets: Mapping[CostKind, float],
                dense: Mapping[CostKind, float]) -> BudgetError:
    """The least that can be reached, and the largest things in the way."""
    kind = next(k for k in targets if running.now[k] > targets[k])
    costs = model.by_tensor(kind, running.widths)
    largest = sorted(costs, key=lambda t: -costs[t])[:3]
    in_way = [f"{g.name} ({g.pinned})" for g in graph if g.pinned and any(
        s.role == "out" and s.tensor in largest for s in g.slices)]
    layers = ", ".join(f"{t} {costs[t]:,.0f}" for t in largest)
    pinned = f"; pinned: {'; '.join(in_way)}" if in_way else ""
    return BudgetError(
        f"{kind}={targets[kind]:,.0f} ({targets[kind] / dense[kind]:.1%} of {dense[kind]:,.0f}) cannot be reached: the least "
        f"is {running.now[kind]:,.0f} ({running.now[kind] / dense[kind]:.1%}). What remains is mostly {layers}{pinned}"
    )
