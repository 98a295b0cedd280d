"""Requests, checked against the graph: budgets, patterns, scores, smallest widths."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import PlanError, StorageError
from ..graph.cost import CostKind, shown
from ..graph.equal_counts import Component
from ..graph.types import Graph


@dataclass(frozen=True)
class Budget:
    """The cost that may remain, of each kind: a fraction of the dense network (below 1) or an absolute number (above 1).

    Milliseconds may also be text: "0.6x" is a fraction, "0.6ms" are milliseconds.
    """

    macs: float | None = None
    params: float | None = None
    latency_ms: float | str | None = None

    def targets(self, dense: Mapping[CostKind, float]) -> dict[CostKind, float]:
        """The budget in absolute numbers. Raises PlanError for a value that is no fraction in (0, 1) and not below `dense`."""
        out: dict[CostKind, float] = {}
        wanted: tuple[tuple[CostKind, float | str | None], ...] = (
            ("macs", self.macs), ("params", self.params), ("latency_ms", self.latency_ms))
        for kind, value in wanted:
            if value is None:
                continue
            value = plain(value)
            if kind == "latency_ms" and isinstance(value, str):
                value = fraction_of(value, dense[kind])
            if isinstance(value, str):
                raise PlanError(f"{kind}={value!r} is text: give a number, such as 0.5 for one half")
            if value == 1:
                raise PlanError(f"{kind}={value} is the whole network, and nothing would go: give a fraction below 1, or an "
                                "absolute number above 1")
            if not (isinstance(value, (int, float)) and math.isfinite(value)) or value <= 0:
                raise PlanError(f"{kind}={value}: give a fraction between 0 and 1, or an absolute number above 1")
            out[kind] = value * dense[kind] if value < 1 else float(value)
            if out[kind] >= dense[kind]:
                raise PlanError(f"{kind}={value:g} is no less than the dense network has ({shown(kind, dense[kind])})")
        return out


def plain(x: Any) -> Any:
    """A number of numpy as one of Python, which plans can write to files. Anything else as it is."""
    return x.item() if isinstance(x, np.generic) else x


def read_latency(wanted: float | str) -> tuple[float, bool]:
    """A time, and whether it is a fraction of the dense one: 0.6 and "0.6x" are, 12 and "12ms" are milliseconds.

    Raises PlanError for other text and for what is no positive number, or no fraction below 1.
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*(x|ms)\s*", wanted) if isinstance(wanted, str) else None
    try:
        value = float(found[1] if found else wanted)
    except ValueError:
        value = math.nan
    relative = found[2] == "x" if found else value < 1
    if found and relative and value >= 1:
        raise PlanError(f"latency_ms={wanted!r} is no less than the dense network takes: give a fraction below 1")
    if (isinstance(wanted, str) and not found) or not 0 < value < math.inf:
        raise PlanError(f"latency_ms={wanted!r}: write 0.6x for a fraction of the dense time, or 12ms for "
                        "milliseconds")
    return value, relative


def fraction_of(text: str, dense: float) -> float:
    """What "0.6x" or "12ms" is as a fraction of the dense time. Raises PlanError for other text."""
    value, relative = read_latency(text)
    value = value if relative else value / dense
    if value >= 1:
        raise PlanError(f"latency_ms={text!r} is no less than the dense network takes ({dense:,.3f} ms)")
    return value


def matching(graph: Graph, pattern: str) -> list[str]:
    """The free groups whose name, or one of whose layers, matches a shell pattern. Raises PlanError if there is none."""
    if not isinstance(pattern, str):
        raise PlanError(f"{pattern!r} is no pattern: give the name of a group or layer as a string")
    hits = [g for g in graph if any(fnmatch.fnmatchcase(n, pattern) for n in (g.name, *g.layers))]
    if not hits:
        names = [g.name for g in graph.free] or list(graph.by_name)
        near = difflib.get_close_matches(pattern, names, 3, 0.3)
        raise PlanError(f"no group matches {pattern!r}; groups are named like {', '.join(near or names[:3])}")
    free = [g.name for g in hits if g.free]
    if not free:
        raise PlanError(f"{pattern!r} matches only groups that cannot shrink: {hits[0].name} is pinned: {hits[0].pinned}")
    return free


def excluded(graph: Graph, patterns: str | Sequence[str]) -> set[str]:
    """The free groups that any of the patterns matches. Raises PlanError for a pattern without a match."""
    if not isinstance(patterns, Iterable):
        raise PlanError(f"exclude={patterns!r}: give patterns of groups and layers, or leave it out")
    return {name for p in ([patterns] if isinstance(patterns, str) else patterns) for name in matching(graph, p)}


def checked_scores(graph: Graph, scores: Mapping[str, Tensor], left_out: set[str]) -> dict[str, np.ndarray]:
    """Scores of the free groups that are not `left_out`, as float64 arrays, shifted so that none is negative.

    Where all are zero they become ones. Raises PlanError for missing groups, other shapes and values that are not finite.
    """
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


def restored_scores(mine: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The relative scores of a saved state. Raises StorageError if they are others than `mine`.

    Scores that were measured again may differ a little. States that were saved by earlier versions have none.
    """
    if "scores" not in state:
        return dict(mine)
    saved = {name: np.asarray(s, dtype=np.float64) for name, s in state["scores"].items()}
    if saved.keys() != mine.keys() or not all(np.allclose(mine[name], s, rtol=0.02, atol=0.02) for name, s in saved.items()):
        raise StorageError("this state is of another run: its scores= were others. Give those that it was begun with")
    return saved


def lowest_channels(parts: Sequence[Component], counts: Sequence[np.ndarray],
                    values: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """From each cell of each component as many channels as `counts` says: those with the lowest values, ties by index."""
    return [(cell.group, cell.channels[np.argsort(values[cell.group][cell.channels], kind="stable")[: int(n)]])
            for part, numbers in zip(parts, counts, strict=True) for cell, n in zip(part.cells, numbers, strict=True)]


def least_width(min_channels: float, size: int) -> int:
    """How many channels a group of that size keeps at least: `min_channels`, or below 1 that share of them, rounded up."""
    return int(min_channels) if min_channels >= 1 else math.ceil(min_channels * size)


def most_removable(part: Component, sizes: Mapping[str, int], min_channels: float) -> np.ndarray:
    """The most that each cell may lose: one channel of it stays, and its share of the `min_channels` of its group."""
    return np.array([max(0, size - least_width(min_channels, size)) * len(c.channels) // size
                     for c in part.cells for size in [sizes[c.group]]])
