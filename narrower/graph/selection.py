"""Which positions of every tensor stay when some channels go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..errors import PlanError
from .types import Graph

Keep = Mapping[str, np.ndarray]  # group name -> kept channels, ascending


class Selection(NamedTuple):
    """Positions that stay along one dimension, shape (blocks, kept): one row, or one for each group of a convolution."""

    dim: int
    rows: np.ndarray


def selections(graph: Graph, keep: Keep) -> dict[str, list[Selection]]:
    """What stays of every tensor that loses something: {tensor name: selections, one for each dimension}."""
    gone: dict[tuple[str, int], tuple[int, list[np.ndarray]]] = {}
    for name, kept in keep.items():
        group = graph[name]
        if len(kept) == group.size:
            continue
        removed = np.ones(group.size, dtype=bool)
        removed[kept] = False
        for s in group.slices:
            blocks, parts = gone.setdefault((s.tensor, s.dim), (s.blocks, []))
            parts.append(s.positions[removed[s.channels]])
    out: dict[str, list[Selection]] = {}
    for (tensor, dim), (blocks, parts) in gone.items():
        stays = np.ones(graph.shapes[tensor][dim] * blocks, dtype=bool)
        stays[np.concatenate(parts)] = False
        rows = stays.reshape(blocks, -1)
        if len(set(rows.sum(1).tolist())) > 1:
            raise PlanError(f"{tensor}: each of its {blocks} groups must keep equally many channels")
        out.setdefault(tensor, []).append(Selection(dim, np.nonzero(rows)[1].reshape(blocks, -1)))
    return out
