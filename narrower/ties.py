"""Equal counts: which numbers of channels can go together.

A tie says that several sets of channels must keep equally many. Channels of one group that stand in the same blocks of the
same ties are interchangeable and form a *cell*; a tie is then a set of linear equations between the numbers of channels
that the cells lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .groups import Graph


@dataclass(frozen=True, eq=False)
class Cell:
    """Interchangeable channels of one group."""

    group: str
    channels: np.ndarray


@dataclass(frozen=True, eq=False)
class Component:
    """Cells that ties connect; `equations @ removed == 0` for the numbers of channels that the cells lose."""

    cells: tuple[Cell, ...]
    equations: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        return np.array([len(c.channels) for c in self.cells])

    def removable(self, want: np.ndarray, most: np.ndarray) -> np.ndarray:
        """Numbers to remove, as near to `want` as the ties allow, from 0 to `most` of each cell."""
        want = np.minimum(want, most)
        if not len(self.equations) or not (self.equations @ want).any():
            return want
        return nearest_integers(self.equations, want, most)

    def moves(self) -> list[np.ndarray]:
        """The smallest steps that keep all ties: numbers to remove from each cell at once."""
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
    """Integers x with equations @ x == 0, least <= x <= most, and the smallest sum of |x - want|; zeros if there are none."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    n = len(want)
    identity = np.eye(n)
    result = milp(
        np.concatenate([np.zeros(n), np.ones(n)]),  # variables: x, and u >= |x - want|
        integrality=np.concatenate([np.ones(n), np.zeros(n)]),
        bounds=Bounds(np.concatenate([np.zeros(n) if least is None else least, np.zeros(n)]),
                      np.concatenate([most, np.full(n, np.inf)])),
        constraints=[
            LinearConstraint(np.hstack([equations, np.zeros_like(equations)]), 0, 0),
            LinearConstraint(np.hstack([identity, -identity]), -np.inf, want),
            LinearConstraint(np.hstack([-identity, -identity]), -np.inf, -want),
        ],
        options={"time_limit": 5},
    )
    if result.x is None:
        return np.zeros(n, dtype=np.int64)
    return np.round(result.x[:n]).astype(np.int64)


def components(graph: Graph, names: Sequence[str] | None = None) -> list[Component]:
    """Cells of the free groups (or of those named), joined where a tie connects them."""
    chosen = [g for g in graph.free if names is None or g.name in names]
    marks: dict[str, list[np.ndarray]] = {g.name: [] for g in chosen}
    for tie in graph.ties:
        counts: dict[str, np.ndarray] = {}
        for b, block in enumerate(tie.blocks):
            for name, channels in block.items():
                if name in marks:
                    table = counts.setdefault(name, np.zeros((len(tie.blocks), graph[name].size), dtype=np.int64))
                    np.add.at(table[b], channels, 1)
        for name, table in counts.items():
            marks[name].append(table)
    cells: list[Cell] = []
    of_group: dict[str, list[int]] = {}
    for g in chosen:
        if marks[g.name]:
            _, cell_of = np.unique(np.concatenate(marks[g.name]), axis=1, return_inverse=True)
            cell_of = cell_of.reshape(-1)
        else:
            cell_of = np.zeros(g.size, dtype=np.int64)
        for k in range(cell_of.max() + 1):
            of_group.setdefault(g.name, []).append(len(cells))
            cells.append(Cell(g.name, np.nonzero(cell_of == k)[0]))
    rows: list[np.ndarray] = []
    for tie in graph.ties:
        lines = []
        for block in tie.blocks:
            line = np.zeros(len(cells))
            for name, channels in block.items():
                if name in marks:
                    per_channel = np.bincount(channels, minlength=graph[name].size)
                    for k in of_group[name]:
                        line[k] = per_channel[cells[k].channels[0]]
            lines.append(line)
        rows += [line - lines[0] for line in lines[1:] if (line != lines[0]).any()]
    return connected(cells, np.array(rows).reshape(len(rows), len(cells)))


def connected(cells: list[Cell], equations: np.ndarray) -> list[Component]:
    """Split cells and equations into independent parts."""
    root = list(range(len(cells)))

    def find(k: int) -> int:
        while root[k] != k:
            root[k] = root[root[k]]
            k = root[k]
        return k

    for row in equations:
        members = np.nonzero(row)[0]
        for k in members[1:]:
            root[find(int(k))] = find(int(members[0]))
    parts: dict[int, list[int]] = {}
    for k in range(len(cells)):
        parts.setdefault(find(k), []).append(k)
    used = {find(int(np.nonzero(row)[0][0])): [] for row in equations}  # type: dict[int, list[np.ndarray]]
    for row in equations:
        used[find(int(np.nonzero(row)[0][0]))].append(row)
    return [
        Component(tuple(cells[k] for k in members), np.array([row[members] for row in used.get(key, [])]))
        for key, members in parts.items()
    ]
