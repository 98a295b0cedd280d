"""Which channels ResRep sends away: the lowest rows of all compactors, until the masked network meets the budget."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from .cost import CostModel, Kind, Running
from .groups import Graph
from .planning import checked_scores
from .sites import Row
from .ties import Component, components


def choose(cost: CostModel, parts: Sequence[Component], norms: Mapping[str, np.ndarray], targets: Mapping[Kind, float],
           most: int) -> tuple[dict[str, np.ndarray], dict[Kind, float]]:
    """The channels with the lowest norms, until the network without them meets `targets` or `most` are chosen.

    `norms` has an array per group; a step that ties let go only together counts with its mean. One channel of every cell
    of a group stays. Returns {group: bool array} and the costs without them (section 3.3 of the paper).
    """
    kinds: tuple[Kind, ...] = tuple(targets)
    running = Running(cost, kinds)
    column = {n: k for k, n in enumerate(cost.names)}
    orders = [[c.channels[np.argsort(norms[c.group][c.channels], kind="stable")] for c in p.cells] for p in parts]
    lost = [np.zeros(len(p.cells), dtype=np.int64) for p in parts]
    moves = [p.moves() for p in parts]
    chosen = {c.group: np.zeros(len(norms[c.group]), dtype=bool) for p in parts for c in p.cells}

    def taken(k: int, move: np.ndarray) -> list[tuple[str, np.ndarray]]:
        return [(c.group, orders[k][i][lost[k][i]:lost[k][i] + move[i]]) for i, c in enumerate(parts[k].cells) if move[i]]

    def best(k: int) -> tuple[float, int, int] | None:
        found = [(float(np.mean(np.concatenate([norms[g][c] for g, c in taken(k, move)]))), k, m)
                 for m, move in enumerate(moves[k]) if (lost[k] + move < parts[k].sizes).all()]
        return min(found, default=None)

    heap = [b for k in range(len(parts)) if (b := best(k))]
    heapq.heapify(heap)
    count = 0
    while heap and count < most and any(running.now[kind] > targets[kind] for kind in kinds):
        _, k, m = heapq.heappop(heap)
        step = np.zeros(len(column))
        for group, channels in taken(k, moves[k][m]):
            chosen[group][channels] = True
            step[column[group]] += len(channels)
            count += len(channels)
        running.move(step)
        lost[k] = lost[k] + moves[k][m]
        if following := best(k):
            heapq.heappush(heap, following)
    return chosen, dict(running.now)


def candidates(graph: Graph, rows: Mapping[str, tuple[Row, ...]],
               reasons: dict[str, str]) -> tuple[list[Component], dict[str, tuple[Row, ...]]]:
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


def priors(graph: Graph, rows: Mapping[str, tuple[Row, ...]], scores: Mapping[str, Tensor] | None) -> dict[str, np.ndarray]:
    """Scores relative to their group's mean. Raises PlanError for scores of another graph."""
    if scores is None:
        return {n: np.ones(graph[n].size) for n in rows}
    values = checked_scores(graph, scores, {g.name for g in graph.free} - rows.keys())
    return {n: v / v.mean() for n, v in values.items()}
