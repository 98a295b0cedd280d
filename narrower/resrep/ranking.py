"""Which channels ResRep sends away: the lowest rows of all compactors, until the masked network meets the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from ..graph.cost import CostKind, CostModel, RunningCost
from ..graph.equal_counts import Component, components
from ..graph.types import ChannelMap, Graph
from ..planning.greedy import ComponentDescent, descend
from ..planning.requests import checked_scores
from .schedule import Ranking

Rows = Mapping[str, Mapping[str, ChannelMap]]
"""{group: {site: the rows of that site which must be zero for the group's channels to go}}."""


def choose(graph: Graph, cost: CostModel, parts: Sequence[Component], norms: Mapping[str, np.ndarray],
           targets: Mapping[CostKind, float], most: float,
           ranking: Ranking) -> tuple[dict[str, np.ndarray], dict[CostKind, float]]:
    """The channels that go, lowest first, until the network without them meets `targets` or `most` are chosen.

    `norms` has an array per group. Ranking "norm": the lowest of all go first (section 3.3 of the paper), where ties let
    channels go only together by their mean; "share": as in `plan`, what loses the smallest share of its group for the cost it
    saves. One channel of every cell of a group stays. Returns {group: bool array} and the costs without them.
    """
    running = RunningCost(cost, tuple(targets))
    weight = {k: 1 / cost.cost(k, cost.dense) for k in targets}
    steps = [ComponentDescent(graph, p, norms, cost, 1, 1) for p in parts]

    def best(s: ComponentDescent) -> tuple[float, np.ndarray] | None:
        if ranking == "share":
            return s.next(running, weight)
        moves = [m for m in s.moves if (s.lost + m <= s.most).all()]
        return min(((s.mean(m), m) for m in moves), key=lambda found: found[0], default=None)

    descend(steps, running, targets, best, most)
    chosen = {c.group: np.zeros(len(norms[c.group]), dtype=bool) for p in parts for c in p.cells}
    for part, step in zip(parts, steps, strict=True):
        for cell, n in zip(part.cells, step.lost, strict=True):
            chosen[cell.group][cell.channels[np.argsort(norms[cell.group][cell.channels], kind="stable")][: int(n)]] = True
    return chosen, dict(running.now)


def candidates(graph: Graph, rows: Rows,
               reasons: dict[str, str]) -> tuple[list[Component], dict[str, Mapping[str, ChannelMap]]]:
    """The components of which every group has rows: tied groups go together or not at all."""
    parts, mine = [], {}
    for part in components(graph):
        groups = {c.group for c in part.cells}
        if groups <= rows.keys():
            parts.append(part)
            mine.update({g: rows[g] for g in groups})
        else:
            for g in groups & rows.keys():
                reasons[g] = f"tied to {next(iter(groups - rows.keys()))}, which has no compactor"
    return parts, mine


def priors(graph: Graph, rows: Rows, scores: Mapping[str, Tensor] | None) -> dict[str, np.ndarray]:
    """Scores relative to their group's mean. Raises PlanError for scores of another graph."""
    if scores is None:
        return {n: np.ones(graph[n].size) for n in rows}
    values = checked_scores(graph, scores, {g.name for g in graph.free} - rows.keys())
    return {n: v / v.mean() for n, v in values.items()}


def by_channel(graph: Graph, rows: Rows, present: Mapping[str, np.ndarray],
               values: Mapping[str, np.ndarray], fill: float) -> dict[str, list[np.ndarray]]:
    """Values of the rows that are left (`present`, by site), per channel for each row of it; `fill` for rows that were dropped.
    Of several rows of one site the largest counts."""
    out: dict[str, list[np.ndarray]] = {}
    for group, mine in rows.items():
        for site, row in mine.items():
            dense = np.full(max(row.positions.max(), present[site].max(initial=0)) + 1, fill)
            dense[present[site]] = values[site]
            value = np.full(graph[group].size, -np.inf)
            np.maximum.at(value, row.channels, dense[row.positions])
            out.setdefault(group, []).append(np.where(np.isinf(value), np.nan, value))
    return out
