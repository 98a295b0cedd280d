"""Widths from rates: the fraction of channels taken from each group."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..errors import PlanError
from ..graph.equal_counts import Component, nearest_integers
from ..graph.types import Graph
from .requests import least_width, matching, most_removable


def by_rate(graph: Graph, parts: list[Component], remove: float | Mapping[str, float],
            round_to: Mapping[str, int], min_channels: float) -> list[np.ndarray]:
    """The number of channels that each cell of each component loses.

    Kept widths are rounded up to multiples of `round_to`, given for each group: to the next ones that the ties allow, which may
    be the dense widths. Raises PlanError for a rate outside [0, 1) or a pattern without a match.
    """
    rates = rate_by_group(graph, remove)
    out = []
    for part in parts:
        sizes = {c.group: graph[c.group].size for c in part.cells}
        wanted = {}
        for name, size in sizes.items():
            kept = max(least_width(min_channels, size), size - math.floor(rates.get(name, 0.0) * size + 1e-9))
            wanted[name] = size - min(size, math.ceil(kept / round_to[name]) * round_to[name])
        want = spread([c.group for c in part.cells], part.sizes, wanted)
        most = np.minimum(part.sizes - 1, most_removable(part, sizes, min_channels))
        lost, groups = part.removable(want, most), np.array([c.group for c in part.cells])
        rounded = all((size - n) % round_to[name] == 0 for name, size in sizes.items() if (n := lost[groups == name].sum()))
        out.append(lost if rounded else rounded_losses(part, want, most, wanted, round_to))
    return out


def rounded_losses(part: Component, want: np.ndarray, most: np.ndarray, wanted: Mapping[str, int],
                   round_to: Mapping[str, int]) -> np.ndarray:
    """The losses of cells nearest to `want` that satisfy the ties and leave widths that are multiples of `round_to`.

    Each group loses what is `wanted` of it, or some multiples less, or nothing.
    """
    groups = [*wanted]
    of_group = np.array([[c.group == name for c in part.cells] for name in groups], dtype=np.float64)
    total, multiple = np.array([wanted[n] for n in groups]), np.array([round_to[n] for n in groups])
    # losses of the cells = total * (0 or 1) - multiple * (0, 1, ...), for each group
    widths = np.hstack([of_group, -np.diag(total), np.diag(multiple)])
    ties = np.hstack([part.equations, np.zeros((len(part.equations), 2 * len(groups)))])
    most = np.concatenate([most, np.ones(len(groups)), total // multiple])
    return nearest_integers(np.vstack([ties, widths]), want, most)


def rate_by_group(graph: Graph, remove: float | Mapping[str, float]) -> dict[str, float]:
    """The rate of each free group; of several patterns that match, the last one counts."""
    out: dict[str, float] = {}
    for pattern, rate in (remove if isinstance(remove, Mapping) else {"*": remove}).items():
        if not isinstance(rate, (int, float)) or not 0 <= rate < 1 or (rate == 0 and not isinstance(remove, Mapping)):
            raise PlanError(f"remove={rate!r} for {pattern!r}: give a fraction between 0 and 1")
        out.update(dict.fromkeys(matching(graph, pattern), float(rate)))
    return out


def spread(groups: list[str], sizes: np.ndarray, wanted: Mapping[str, int]) -> np.ndarray:
    """Spread the losses of groups over their cells in proportion to size, the largest remainders first."""
    out = np.zeros(len(sizes), dtype=np.int64)
    for name, n in wanted.items():
        cells = [k for k, g in enumerate(groups) if g == name]
        exact = sizes[cells] * n / sizes[cells].sum()
        base = np.floor(exact + 1e-9).astype(np.int64)
        for k in np.argsort(base - exact, kind="stable")[: n - int(base.sum())]:
            base[k] += 1
        out[cells] = base
    return out
