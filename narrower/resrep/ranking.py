"""Which channels ResRep removes: those with the lowest compactor rows, until the network without them meets the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..errors import BudgetError, PlanError
from ..graph.cost import CostKind, CostModel, RunningCost
from ..graph.equal_counts import Component, components
from ..graph.selection import Kept
from ..graph.types import Graph
from ..planning.greedy import ComponentDescent, Step, descend, fits
from ..planning.plan import Plan, check_groups, widths
from ..planning.requests import checked_scores, lowest_channels
from .placement import Placement, without_groups
from .schedule import Ranking

Costs = Mapping[CostKind, float]
Masks = dict[str, np.ndarray]
"""{group: bool array, shape (size,)}."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """The channels that compactors can remove, and the budget.

    `placement`: the compactors and, for each group, the rows that must be zero. `parts`: the components of these groups.
    `targets`: the largest value of each cost that the budget allows. `wanted`: the channels that a plan removes; None where
    norms decide.
    """

    cost: CostModel
    placement: Placement
    parts: Sequence[Component]
    targets: Costs
    ranking: Ranking
    wanted: Masks | None = None

    @property
    def graph(self) -> Graph:
        return self.cost.graph

    @property
    def kind(self) -> CostKind:
        """The first cost that the budget limits."""
        return next(iter(self.targets))

    def share(self, kept: Kept) -> float:
        """The cost with only the kept channels, as a share of the dense cost."""
        return self.costs(kept)[self.kind] / self.cost.cost(self.kind, self.cost.dense)

    def costs(self, kept: Kept) -> dict[CostKind, float]:
        """The costs that the budget limits, with only the kept channels."""
        return {kind: self.cost.cost(kind, widths(self.cost, kept.keep)) for kind in self.targets}

    def missed(self, kept: Kept) -> list[str]:
        """For each limit of the budget that is exceeded with only the kept channels, by how much."""
        texts = []
        for kind, have in self.costs(kept).items():
            target, dense = self.targets[kind], self.cost.cost(kind, self.cost.dense)
            if have > target * (1 + 1e-12):
                texts.append(f"{kind} {have:,.0f} of {dense:,.0f} remain ({have / dense:.1%}), "
                             f"{target / dense:.1%} was asked for")
        return texts

    def meets_budget(self, kept: Kept) -> bool:
        return fits(self.costs(kept), self.targets)

    def choose(self, norms: Mapping[str, np.ndarray], most: float = math.inf) -> tuple[Masks, dict[CostKind, float]]:
        """Choose channels, lowest first, until the network without them meets the budget or `most` are chosen.

        `norms`: {group: array (size,)}. Ranking "norm": the lowest norm of all groups first (section 3.3 of the paper).
        Channels tied together count with their mean. "share": the smallest share of the group's sum per cost saved. At least
        one channel of every cell stays. Of a plan's channels those with the lowest norms go first. Returns the chosen channels,
        and the costs without them.
        """
        if self.wanted is not None:
            chosen = lowest_of(self.wanted, norms, most)
            return chosen, self.costs(self.without(chosen))
        running = RunningCost(self.cost, tuple(self.targets))
        weight = {k: 1 / self.cost.cost(k, self.cost.dense) for k in self.targets}
        steps = [NormDescent(p, self.cost, norms) for p in self.parts]
        descend(steps, running, self.targets,
                lambda s: s.lowest_step() if self.ranking == "norm" else s.best_step(running, weight, s.share_lost), most)
        kept = Kept.without(self.graph, lowest_channels(self.parts, [s.lost for s in steps], norms))
        return {name: ~kept.mask(name) for name in self.placement.rows}, dict(running.now)

    def count(self) -> int:
        """How many channels a plan removes, or an estimate of how many must be: the number chosen for random norms."""
        rng = np.random.default_rng(0)
        chosen, _ = self.choose({n: rng.random(self.graph[n].size) for n in self.placement.rows})
        return sum(int(c.sum()) for c in chosen.values())

    def check_reachable(self) -> None:
        """Raise BudgetError if even the smallest network, with one channel of every cell, exceeds the budget.

        A plan can always be reached.
        """
        if self.wanted is not None:
            return
        smallest = replace(self, targets=dict.fromkeys(self.targets, 0.0), ranking="norm")
        least = smallest.choose({n: np.ones(self.graph[n].size) for n in self.placement.rows})[1]
        for kind, target in self.targets.items():
            if least[kind] > target:
                dense = self.cost.cost(kind, self.cost.dense)
                others = "; ".join(f"{n}: {w}" for n, w in list(self.placement.reasons.items())[:4])
                raise BudgetError(
                    f"{kind}={target:,.0f} ({target / dense:.1%} of the dense network) cannot be reached with "
                    f"compactors on {len(self.placement.rows)} groups: the least is {least[kind]:,.0f} "
                    f"({least[kind] / dense:.1%})" + (f". Left alone: {others}" if others else ""))

    def remaining(self, alive: Masks, before: Kept) -> Kept:
        """The channels that stay if all but the `alive` ones are removed, as far as ties allow.

        If ties allow only some, those that were removed `before` go first.
        """
        zero = [np.array([(~alive[c.group][c.channels]).sum() for c in part.cells]) for part in self.parts]
        counts = [part.removable(n, n) for part, n in zip(self.parts, zero, strict=True)]
        order = {group: np.where(stays, 2, before.mask(group)) for group, stays in alive.items()}
        return Kept.without(self.graph, lowest_channels(self.parts, counts, order))

    def planned(self, reached: Kept) -> Kept:
        """The channels that a plan keeps; without a plan, those that training has `reached`."""
        if self.wanted is None or all((reached.mask(name) == ~mask).all() for name, mask in self.wanted.items()):
            return reached
        return self.without(self.wanted)

    def without(self, removed: Masks) -> Kept:
        """All channels but these."""
        return Kept.without(self.graph, [(name, np.nonzero(mask)[0]) for name, mask in removed.items()])

    def removed_by_plan(self) -> dict[str, list[int]] | None:
        """The channels that a plan removes, for a saved state. None without a plan."""
        if self.wanted is None:
            return None
        return {name: np.nonzero(mask)[0].tolist() for name, mask in self.wanted.items()}

    def by_channel(self, values: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray],
                   fill: float) -> dict[str, list[np.ndarray]]:
        """Convert values of compactor rows into values of channels: {group: one array (size,) per site}.

        `values`, `rows`: by site, the values of its remaining rows and their dense indices. `fill`: the value of other rows. If
        several rows of a site belong to one channel, the largest value counts. nan if a site has no row of the channel.
        """
        out: dict[str, list[np.ndarray]] = {}
        for group, maps in self.placement.rows.items():
            for site, m in maps.items():
                dense = np.full(self.placement.sites[site].size, fill)
                dense[rows[site]] = values[site]
                value = np.full(self.graph[group].size, -np.inf)
                np.maximum.at(value, m.channels, dense[m.positions])
                out.setdefault(group, []).append(np.where(np.isinf(value), np.nan, value))
        return out


class NormDescent(ComponentDescent):
    """The descent of one component by the `norms` of its channels: {group: array (size,)}."""

    def __init__(self, part: Component, model: CostModel, norms: Mapping[str, np.ndarray]) -> None:
        super().__init__(part, model, round_to=1, min_channels=1)
        self.layers = {name: max(1, len(model.graph[name].layers)) for name in self.sizes}
        self.sorted = [np.sort(norms[c.group][c.channels]) for c in part.cells]
        self.remaining = {name: float(norms[name].sum()) for name in self.sizes}

    def norms_of(self, step: np.ndarray) -> list[np.ndarray]:
        """For each cell the norms of the channels that a step removes: the lowest of those left."""
        return [values[lost:lost + n] for values, lost, n in zip(self.sorted, self.lost, step, strict=True)]

    def lowest_step(self) -> Step | None:
        """The step whose channels have the lowest mean norm; None when nothing more can go."""
        moves = [m for m in self.moves if (self.lost + m <= self.most).all()]
        return min(((float(np.concatenate(self.norms_of(m)).mean()), m) for m in moves), key=lambda found: found[0],
                   default=None)

    def share_lost(self, step: np.ndarray) -> float:
        """Minus the log of the share of the sum of norms that is left after a step.

        Summed over the groups. Each counts once per layer, times the root of its size.
        """
        lost: dict[str, float] = {}
        for cell, norms in zip(self.part.cells, self.norms_of(step), strict=True):
            if len(norms):
                lost[cell.group] = lost.get(cell.group, 0.0) + float(norms.sum())
        out = 0.0
        for name, value in lost.items():
            left = self.remaining[name]
            share = min(1 - 1e-12, value / left) if left > 0 else 1 - 1e-12
            out -= self.layers[name] * math.sqrt(self.sizes[name]) * math.log1p(-share)
        return out

    def take(self, step: np.ndarray) -> None:
        for cell, norms in zip(self.part.cells, self.norms_of(step), strict=True):
            self.remaining[cell.group] -= float(norms.sum())
        super().take(step)


def lowest_of(wanted: Masks, norms: Mapping[str, np.ndarray], most: float) -> Masks:
    """Of the wanted channels the `most` with the lowest norms, all where there are no more."""
    pairs = sorted((float(norms[name][k]), name, int(k)) for name, mask in wanted.items() for k in np.nonzero(mask)[0])
    chosen = {name: np.zeros_like(mask) for name, mask in wanted.items()}
    for _, name, k in pairs[: int(min(most, len(pairs)))]:
        chosen[name][k] = True
    return chosen


def wanted_by(plan: Plan, graph: Graph, placement: Placement) -> Masks:
    """The channels that a plan removes, of each group with compactors.

    Raises PlanError if the plan is of another graph, removes nothing, or removes channels without a compactor.
    """
    check_groups({g.name: g.size for g in plan.graph.free}, graph)
    kept = Kept(graph, plan.keep)
    losing = [g.name for g in graph.free if not kept.mask(g.name).all()]
    if not losing:
        raise PlanError("the plan removes nothing")
    without = [name for name in losing if name not in placement.rows]
    if without:
        why = "; ".join(f"{n}: {placement.reasons.get(n, 'nothing to compact')}" for n in without[:4])
        raise PlanError(f"the plan removes channels of {len(without)} groups that have no compactor: plan with exclude= for "
                        f"them, or try scope='all' ({why})")
    return {name: ~kept.mask(name) for name in placement.rows}


def tied_parts(graph: Graph, placement: Placement) -> tuple[list[Component], Placement]:
    """The components whose groups all have compactors, and their placement. The other components are left out whole."""
    parts, reasons = [], {}
    for part in components(graph):
        groups = {c.group for c in part.cells}
        lacking = sorted(groups - placement.rows.keys())
        if lacking:
            reasons.update(dict.fromkeys(groups & placement.rows.keys(), f"tied to {lacking[0]}, which has no compactor"))
        else:
            parts.append(part)
    return parts, without_groups(placement, reasons)


def priors(graph: Graph, placement: Placement, scores: Mapping[str, Tensor] | None) -> dict[str, np.ndarray]:
    """Scores divided by the mean of their group. Ones if `scores` is None. Raises PlanError for scores of another graph."""
    if scores is None:
        return {n: np.ones(graph[n].size) for n in placement.rows}
    values = checked_scores(graph, scores, {g.name for g in graph.free} - placement.rows.keys())
    return {n: v / v.mean() for n, v in values.items()}
