"""Equal counts: how many channels can be removed together.

A tie requires several sets of channels to keep equally many. Channels of one group that are in the same blocks of the same
ties are interchangeable. They form a *cell*. A tie is then a set of linear equations between the numbers of channels that
are removed from each cell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from .types import ChannelGroup, Graph


@dataclass(frozen=True, eq=False)
class Cell:
    """Interchangeable channels of one group."""

    group: str
    channels: np.ndarray


@dataclass(frozen=True, eq=False)
class Component:
    """Cells connected by ties. `equations @ removed == 0` for the number of channels removed from each cell."""

    cells: tuple[Cell, ...]
    equations: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        return np.array([len(c.channels) for c in self.cells])

    def removable(self, want: np.ndarray, most: np.ndarray) -> np.ndarray:
        """The numbers to remove that are nearest to `want` and satisfy the ties, from 0 to `most` for each cell."""
        want = np.minimum(want, most)
        if not len(self.equations) or not (self.equations @ want).any():
            return want
        return nearest_integers(self.equations, want, most)

    def moves(self) -> list[np.ndarray]:
        """The smallest steps that satisfy all ties. A step is the number of channels to remove from each cell at once."""
        n = len(self.cells)
        if not len(self.equations):
            return list(np.eye(n, dtype=np.int64))
        ones = np.ones(n, dtype=np.int64)
        if len({c.group for c in self.cells}) == 1 and not (self.equations @ ones).any():
            return [ones]
        found: dict[bytes, np.ndarray] = {}
        for k in range(n):
            least = np.zeros(n)
            least[k] = 1
            move = nearest_integers(self.equations, least, self.sizes, least)
            if move.any():
                found[move.tobytes()] = move
        return list(found.values())


def nearest_integers(equations: np.ndarray, want: np.ndarray, most: np.ndarray,
                     least: np.ndarray | None = None) -> np.ndarray:
    """Minimise sum |x - want| over integers x with equations @ x == 0 and least <= x <= most. Zeros if there is no such x.

    `equations` and `most` may go on behind `want`: with further integers, from 0 on, that are not part of the sum.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    n, others = len(want), len(most) - len(want)
    identity, zeros = np.eye(n), np.zeros((n, others))
    low = np.concatenate([np.zeros(n) if least is None else least, np.zeros(others + n)])
    result = milp(
        np.concatenate([np.zeros(n + others), np.ones(n)]),  # variables: x, the further integers, and u >= |x - want|
        integrality=np.concatenate([np.ones(n + others), np.zeros(n)]),
        bounds=Bounds(low, np.concatenate([most, np.full(n, np.inf)])),
        constraints=[
            LinearConstraint(np.hstack([equations, np.zeros((len(equations), n))]), 0, 0),
            LinearConstraint(np.hstack([identity, zeros, -identity]), -np.inf, want),
            LinearConstraint(np.hstack([-identity, zeros, -identity]), -np.inf, -want),
        ],
        options={"time_limit": 5},
    )
    if result.x is None:
        return np.zeros(n, dtype=np.int64)
    return np.round(result.x[:n]).astype(np.int64)


# The components of each graph, found once; rankings ask for them again and again. Weak, so that graphs are still freed. Not a
# property of Graph, because `types` would then have to import this module.
KNOWN: WeakKeyDictionary[Graph, list[Component]] = WeakKeyDictionary()


def components(graph: Graph, without: Collection[str] = ()) -> list[Component]:
    """The components of the free groups, except the groups named in `without`."""
    if without:
        return find_components(graph, [g for g in graph.free if g.name not in without])
    if graph not in KNOWN:
        KNOWN[graph] = find_components(graph, graph.free)
    return KNOWN[graph]


def find_components(graph: Graph, chosen: Sequence[ChannelGroup]) -> list[Component]:
    # Each block gets a random number. Channels with equal sums over their blocks are in the same blocks, so they share a cell.
    rng = np.random.default_rng(0)
    marks = {g.name: np.zeros(g.size, dtype=np.uint64) for g in chosen}
    for tie in graph.ties:
        for block, number in zip(tie.blocks, rng.integers(1, 2**62, len(tie.blocks), dtype=np.uint64), strict=True):
            for name, channels in block.items():
                if name in marks:
                    np.add.at(marks[name], channels, number)
    cells: list[Cell] = []
    cell_of: dict[str, np.ndarray] = {}
    for g in chosen:
        _, at, inverse = np.unique(marks[g.name], return_index=True, return_inverse=True)
        cell = np.argsort(np.argsort(at))[inverse.reshape(-1)]  # numbered in the order of their first channels
        cell_of[g.name] = cell + len(cells)
        cells += [Cell(g.name, part) for part in np.split(np.argsort(cell, kind="stable"), np.cumsum(np.bincount(cell))[:-1])]
    equations: list[dict[int, float]] = []
    for tie in graph.ties:
        # for each block, the share of every cell's channels that it has
        first, *others = [
            {k: n / len(cells[k].channels) for name, channels in block.items() if name in cell_of
             for k, n in Counter(cell_of[name][channels].tolist()).items()} for block in tie.blocks]
        for shares in others:
            differences = {k: shares.get(k, 0.0) - first.get(k, 0.0) for k in sorted(shares.keys() | first.keys())}
            equations.append({k: d for k, d in differences.items() if d})
    return split_components(cells, [e for e in equations if e])


def split_components(cells: list[Cell], equations: Sequence[Mapping[int, float]]) -> list[Component]:
    """Split cells and equations ({cell: coefficient}) into connected components."""
    root = list(range(len(cells)))

    def find(k: int) -> int:
        while root[k] != k:
            root[k] = root[root[k]]
            k = root[k]
        return k

    for row in equations:
        first, *others = row
        for k in others:
            root[find(k)] = find(first)
    parts: dict[int, list[int]] = {}
    for k in range(len(cells)):
        parts.setdefault(find(k), []).append(k)
    rows: dict[int, list[Mapping[int, float]]] = {}
    for row in equations:
        rows.setdefault(find(next(iter(row))), []).append(row)
    out = []
    for key, members in parts.items():
        place = {k: n for n, k in enumerate(members)}
        table = np.zeros((len(rows.get(key, ())), len(members)))
        for n, row in enumerate(rows.get(key, ())):
            for k, value in row.items():
                table[n, place[k]] = value
        out.append(Component(tuple(cells[k] for k in members), table))
    return out
