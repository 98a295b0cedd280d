"""Budget and Plan: which channels stay."""

from __future__ import annotations

import difflib
import fnmatch
import heapq
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from .cost import CostModel, Kind, Running
from .errors import BudgetError, PlanError
from .groups import Graph, table
from .ties import Component, components

FORMAT = 1


class Scores(dict[str, Tensor]):
    """{group name: Tensor[size]}: one score for each channel of each free group; higher is kept."""


@dataclass(frozen=True)
class Budget:
    """What may remain: a fraction of the dense network (between 0 and 1) or an absolute number (above 1)."""

    macs: float | None = None
    params: float | None = None

    def targets(self, dense: Mapping[Kind, float]) -> dict[Kind, float]:
        """Absolute numbers. Raises PlanError for a value that is neither a fraction in (0, 1) nor below the dense cost."""
        out: dict[Kind, float] = {}
        wanted: tuple[tuple[Kind, float | None], ...] = (("macs", self.macs), ("params", self.params))
        for kind, value in wanted:
            if value is None:
                continue
            if not (isinstance(value, (int, float)) and math.isfinite(value)) or value <= 0 or value == 1:
                raise PlanError(f"{kind}={value}: give a fraction between 0 and 1, or an absolute number above 1")
            out[kind] = value * dense[kind] if value < 1 else float(value)
            if out[kind] >= dense[kind]:
                raise PlanError(f"{kind}={value:g} is no less than the dense network has ({dense[kind]:,.0f})")
        return out


@dataclass(frozen=True, eq=False)
class Plan:
    """Kept channels of every free group, in ascending order, with the cost that follows from them.

    `macs` and `params` are (dense, narrow): multiply-adds for one sample, and parameters.
    """

    graph: Graph = field(repr=False)
    keep: Mapping[str, np.ndarray] = field(repr=False)
    macs: tuple[float, float]
    params: tuple[float, float]
    request: Mapping[str, Any]

    def __str__(self) -> str:
        model = CostModel(self.graph)
        costs = [model.by_tensor("macs", w) for w in (model.dense, widths(model, self.keep))]
        rows = [("group", "dense", "kept", "MACs dense", "MACs narrow", "")]
        for g in self.graph.groups:
            kept = len(self.keep[g.name]) if g.free else g.size
            made = {s.tensor for s in g.slices if s.role == "out"}
            sums = [sum(c[t] for t in made if t in c) for c in costs]
            note = f"pinned: {g.pinned}" if g.pinned else "" if g.exact else "inexact"
            rows.append((g.name, str(g.size), str(kept), f"{sums[0]:,.0f}", f"{sums[1]:,.0f}", note))
        (m0, m1), (p0, p1) = self.macs, self.params
        return (f"{table(rows)}\nMACs {m0:,.0f} -> {m1:,.0f} ({m1 / m0:.1%}), "
                f"parameters {p0:,.0f} -> {p1:,.0f} ({p1 / p0:.1%})")

    def to_json(self) -> str:
        """All but the graph, which `from_json` takes again."""
        return json.dumps({
            "format": FORMAT,
            "groups": {g.name: g.size for g in self.graph.free},
            "keep": {name: [int(c) for c in kept] for name, kept in self.keep.items()},
            "macs": list(self.macs), "params": list(self.params), "request": dict(self.request),
        })

    @staticmethod
    def from_json(text: str, graph: Graph) -> Plan:
        """The plan that `to_json` wrote. Raises PlanError for damaged text, another version or another network."""
        try:
            data = json.loads(text)
            version, groups, keep = data["format"], dict(data["groups"]), dict(data["keep"])
            request = dict(data.get("request", {}))
        except (ValueError, KeyError, TypeError) as e:
            raise PlanError(f"this is not a plan ({type(e).__name__}: {e})") from e
        if version != FORMAT:
            raise PlanError(f"the plan has format {version}, this version of narrower reads {FORMAT}")
        here = {g.name: g.size for g in graph.free}
        if groups != here:
            odd = [n for n in {**here, **groups} if groups.get(n) != here.get(n)][:3]
            raise PlanError(f"the plan is of another network: its groups differ, for example {odd}")
        return made(graph, {n: checked(n, kept, here) for n, kept in keep.items()}, request)


def checked(name: str, kept: Any, sizes: Mapping[str, int]) -> np.ndarray:
    """Kept channels as written in a file, or PlanError."""
    ok = name in sizes and isinstance(kept, list) and bool(kept) and all(type(c) is int for c in kept)
    if not ok or sorted(set(kept)) != kept or kept[0] < 0 or kept[-1] >= sizes[name]:
        raise PlanError(f"the kept channels of group {name!r} are not ascending numbers below its size")
    return np.array(kept, dtype=np.int64)


def widths(model: CostModel, keep: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.array([len(keep[n]) for n in model.names], dtype=np.float64)


def made(graph: Graph, keep: Mapping[str, np.ndarray], request: Mapping[str, Any]) -> Plan:
    """A plan with its costs. Raises PlanError where the counts break a tie (unequal numbers in the groups of a conv)."""
    missing = [g.name for g in graph.free if g.name not in keep]
    if missing:
        raise PlanError(f"no kept channels given for group {missing[0]!r}")
    gone = {g.name: np.ones(g.size, dtype=bool) for g in graph.free}
    for name, mask in gone.items():
        mask[keep[name]] = False
    for part in components(graph):
        lost = np.array([gone[c.group][c.channels].sum() for c in part.cells])
        if len(part.equations) and (part.equations @ lost).any():
            names = sorted({c.group for c in part.cells})
            raise PlanError(f"group {', '.join(names[:3])}: the kept channels must be equally many in each of its parts "
                            "(groups of a convolution or norm, pieces of a split)")
    model = CostModel(graph)
    after = widths(model, keep)
    pairs = [(model.cost(k, model.dense), model.cost(k, after)) for k in ("macs", "params")]
    return Plan(graph, dict(keep), pairs[0], pairs[1], dict(request))


def matching(graph: Graph, pattern: str) -> list[str]:
    """Free groups whose name, or the name of one of whose layers, matches. PlanError where there is none."""
    if not isinstance(pattern, str):
        raise PlanError(f"{pattern!r} is no pattern: give the name of a group or layer as a string")
    hits = [g for g in graph if any(fnmatch.fnmatchcase(n, pattern) for n in (g.name, *g.layers))]
    if not hits:
        near = difflib.get_close_matches(pattern, [g.name for g in graph], 3, 0.3)
        raise PlanError(f"no group matches {pattern!r}; groups are named like {', '.join(near or list(graph.by_name)[:3])}")
    free = [g.name for g in hits if g.free]
    if not free:
        raise PlanError(f"{pattern!r} matches only groups that cannot shrink: {hits[0].name} is pinned: {hits[0].pinned}")
    return free


def plan(graph: Graph, scores: Mapping[str, Tensor], *, macs: float | None = None, params: float | None = None,
         remove: float | Mapping[str, float] | None = None, round_to: int = 1, exclude: Sequence[str] = (),
         min_channels: int = 1) -> Plan:
    """Choose the channels that stay: the highest scores, under a budget or at a rate.

    `macs`, `params`: what may remain, a fraction of the dense network in (0, 1) or an absolute number; the plan ends below
    it, and no removed step would fit back. Every step removes what loses the smallest share of its group's remaining score, in
    log terms, for each layer of the group and times the root of its size, for the cost it saves; so scores need not be
    comparable between groups, no group is emptied, and wide layers, whose channels are cheap, keep more of them. `remove`
    instead: the fraction of channels taken from each group, or {pattern: fraction} over group or layer names (later patterns
    win). `round_to`: kept widths are multiples of it where the dense ones allow. `exclude`: patterns of groups to leave.
    `min_channels`: at least so many stay in each group.

    Raises PlanError for requests that do not fit the graph, BudgetError for a budget below the least that can be reached.
    """
    if (remove is None) == (macs is None and params is None):
        raise PlanError("give either a budget (macs=, params=) or remove=")
    for name, value in (("round_to", round_to), ("min_channels", min_channels)):
        if type(value) is not int or value < 1:
            raise PlanError(f"{name}={value!r}: give a whole number from 1")
    if not graph.free:
        why = "; ".join(f"{g.name}: {g.pinned}" for g in graph.groups[:4])
        raise PlanError(f"nothing is free in this network ({why})")
    left_out = {n for p in ([exclude] if isinstance(exclude, str) else exclude) for n in matching(graph, p)}
    values = checked_scores(graph, scores, left_out)
    parts = components(graph, left_out)
    request = {"macs": macs, "params": params, "remove": remove if not isinstance(remove, Mapping) else dict(remove),
               "round_to": round_to, "exclude": sorted(left_out), "min_channels": min_channels}
    if remove is not None:
        lost = by_rate(graph, parts, remove, round_to, min_channels)
    else:
        lost = by_budget(graph, parts, values, Budget(macs, params), round_to, min_channels)
    keep = {g.name: np.ones(g.size, dtype=bool) for g in graph.free}
    for part, counts in zip(parts, lost, strict=True):
        for cell, n in zip(part.cells, counts, strict=True):
            order = cell.channels[np.argsort(values[cell.group][cell.channels], kind="stable")]
            keep[cell.group][order[: int(n)]] = False
    return made(graph, {n: np.nonzero(k)[0] for n, k in keep.items()}, {k: v for k, v in request.items() if v})


def checked_scores(graph: Graph, scores: Mapping[str, Tensor], left_out: set[str]) -> dict[str, np.ndarray]:
    """Scores as arrays from zero upwards."""
    out = {}
    for g in graph.free:
        if g.name in left_out:
            continue
        if g.name not in scores:
            raise PlanError(f"the scores have no entry for group {g.name!r}; they must come from the same graph")
        s = np.asarray(scores[g.name].detach().cpu().double() if isinstance(scores[g.name], Tensor) else scores[g.name])
        if s.shape != (g.size,):
            raise PlanError(f"group {g.name!r} has {g.size} channels, its scores have shape {tuple(s.shape)}")
        if not np.isfinite(s).all():
            raise PlanError(f"the scores of group {g.name!r} are not all finite")
        s = s - min(0.0, float(s.min()))
        out[g.name] = s if s.any() else np.ones_like(s)
    return out


def by_rate(graph: Graph, parts: list[Component], remove: float | Mapping[str, float], round_to: int,
            min_channels: int) -> list[np.ndarray]:
    """Channels that each cell of each component loses."""
    rates = dict(remove) if isinstance(remove, Mapping) else {"*": remove}
    rate_of: dict[str, float] = {}
    for pattern, rate in rates.items():
        if not isinstance(rate, (int, float)) or not 0 <= rate < 1 or (rate == 0 and not isinstance(remove, Mapping)):
            raise PlanError(f"remove={rate!r} for {pattern!r}: give a fraction between 0 and 1")
        for name in matching(graph, pattern):
            rate_of[name] = float(rate)
    out = []
    for part in parts:
        totals = {c.group: graph[c.group].size for c in part.cells}
        wanted = {}
        for name, size in totals.items():
            kept = max(min_channels, 1, size - math.floor(rate_of.get(name, 0.0) * size + 1e-9))
            wanted[name] = size - min(size, math.ceil(kept / round_to) * round_to)
        want = spread([c.group for c in part.cells], part.sizes, wanted)
        out.append(part.removable(want, np.minimum(part.sizes - 1, limits(part, totals, min_channels))))
    return out


def spread(groups: list[str], sizes: np.ndarray, wanted: Mapping[str, int]) -> np.ndarray:
    """The losses of groups spread over their cells in proportion to size, largest remainders first."""
    out = np.zeros(len(sizes), dtype=np.int64)
    for name, n in wanted.items():
        cells = [k for k, g in enumerate(groups) if g == name]
        exact = sizes[cells] * n / sizes[cells].sum()
        base = np.floor(exact + 1e-9).astype(np.int64)
        for k in np.argsort(base - exact, kind="stable")[: n - int(base.sum())]:
            base[k] += 1
        out[cells] = base
    return out


def limits(part: Component, totals: Mapping[str, int], min_channels: int) -> np.ndarray:
    """The most that each cell may lose so that its group keeps `min_channels`."""
    left = {name: max(0, size - min_channels) for name, size in totals.items()}
    return np.array([min(len(c.channels) - 1, math.floor(left[c.group] * len(c.channels) / totals[c.group]))
                     if min_channels > 1 else len(c.channels) - 1 for c in part.cells])


class Steps:
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

    def next(self, running: Running, weight: Mapping[Kind, float]) -> tuple[float, np.ndarray] | None:
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


def fits(now: Mapping[Kind, float], targets: Mapping[Kind, float]) -> bool:
    """Whether costs are below the targets, to rounding."""
    return all(now[k] <= targets[k] * (1 + 1e-12) for k in targets)


def descend(steps: Sequence[Steps], running: Running, targets: Mapping[Kind, float],
            best: Callable[[Steps], tuple[float, np.ndarray] | None], most: float = math.inf) -> list[int]:
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
    kinds: tuple[Kind, ...] = ("macs", "params")
    dense = {k: model.cost(k, model.dense) for k in kinds}
    targets = budget.targets(dense)
    running = Running(model, tuple(targets))
    weight = {k: 1 / dense[k] for k in targets}
    steps = [Steps(graph, p, values, model, round_to, min_channels) for p in parts]
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


def unreachable(graph: Graph, model: CostModel, running: Running, targets: Mapping[Kind, float],
                dense: Mapping[Kind, float]) -> BudgetError:
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
