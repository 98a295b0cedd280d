"""Costs as a function of the groups' widths: multiply-adds, parameters, milliseconds.

The size of every tensor dimension is linear in the widths. A cost is a sum over tensors, of a function of their sizes: for
multiply-adds and parameters a coefficient times their product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import numpy as np

from .types import Graph

CostKind = Literal["macs", "params", "latency_ms"]


def shown(kind: CostKind, value: float) -> str:
    """A cost as text."""
    return f"{value:,.3f}" if kind == "latency_ms" else f"{value:,.0f}"


class LayerTimes(Protocol):
    """Milliseconds of a network: those of the layers with these weights, and the rest, which no width changes."""

    @property
    def tensors(self) -> Sequence[str]: ...

    @property
    def rest_ms(self) -> float: ...

    def times(self, layers: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Milliseconds of some layers, by their numbers, with weights of these `sizes` [layers, 2]: dimensions 0 and 1."""


class Term(NamedTuple):
    """One kind of cost. `table`: for each tensor its dimensions, as rows of the model. `rest`: what does not change.

    `values` gives the costs of some rows of `table` from the sizes of their dimensions, [rows, dimensions].
    """

    table: np.ndarray
    values: Callable[[np.ndarray, np.ndarray], np.ndarray]
    rest: float


class CostModel:
    """Costs of a graph for given widths: the number of kept channels of each free group, in the order of `graph.free`.

    Each row of `per_channel` is one dimension of a tensor: size = fixed + per_channel @ widths. The last row is always 1: it
    pads tensors with fewer dimensions. With `latency` there is a cost "latency_ms".
    """

    def __init__(self, graph: Graph, latency: LayerTimes | None = None) -> None:
        self.graph, self.latency = graph, latency
        self.names = [g.name for g in graph.free]
        self.column = {name: k for k, name in enumerate(self.names)}
        self.dense = np.array([g.size for g in graph.free], dtype=np.float64)
        axes = list(dict.fromkeys([*((s.tensor, s.dim) for g in graph.free for s in g.slices),
                                   *((t, dim) for t in (latency.tensors if latency else ()) for dim in (0, 1))]))
        self.rows = rows = {axis: row for row, axis in enumerate(axes)}
        self.per_channel = np.zeros((len(axes) + 1, len(self.names)))
        for k, g in enumerate(graph.free):
            for s in g.slices:
                self.per_channel[rows[s.tensor, s.dim], k] += len(s.positions) / (s.blocks * g.size)
        self.fixed = np.array([*(graph.shapes[tensor][dim] for tensor, dim in axes), 1.0]) - self.per_channel @ self.dense
        self.dims: dict[str, list[int]] = {}
        for (tensor, _), row in rows.items():
            self.dims.setdefault(tensor, []).append(row)

    @cached_property
    def terms(self) -> dict[CostKind, Term]:
        """Each cost as a sum over tensors."""
        out: dict[CostKind, Term] = {"macs": self.product("macs"), "params": self.product("params")}
        if self.latency:
            table = np.array([[self.rows[t, 0], self.rows[t, 1]] for t in self.latency.tensors], dtype=np.int64).reshape(-1, 2)
            out["latency_ms"] = Term(table, self.latency.times, self.latency.rest_ms)
        return out

    def product(self, kind: CostKind) -> Term:
        """A cost that is a coefficient times the product of all sizes of a tensor."""
        width = max((len(rows) for rows in self.dims.values()), default=1)
        padded = {tensor: rows + [len(self.fixed) - 1] * (width - len(rows)) for tensor, rows in self.dims.items()}
        dense = self.dense_costs(kind)
        table = np.array([padded[t] for t in dense if t in padded], dtype=np.int64).reshape(-1, width)
        coef = np.array([cost for t, cost in dense.items() if t in padded], dtype=np.float64)
        coef /= np.prod(self.sizes(self.dense)[table], axis=1)
        rest = sum(cost for t, cost in dense.items() if t not in padded)
        return Term(table, lambda rows, sizes: coef[rows] * np.prod(sizes, axis=1), rest)

    def dense_costs(self, kind: CostKind) -> dict[str, float]:
        """The cost of each tensor of the dense network."""
        per_element = self.graph.uses if kind == "macs" else dict.fromkeys(self.graph.parameters, 1.0)
        return {t: n * float(np.prod(self.graph.shapes[t], dtype=np.float64)) for t, n in per_element.items()}

    def sizes(self, widths: np.ndarray) -> np.ndarray:
        return self.fixed + self.per_channel @ widths

    def cost(self, kind: CostKind, widths: np.ndarray) -> float:
        """The total cost at these widths: multiply-adds for one sample, parameters, or milliseconds."""
        table, values, rest = self.terms[kind]
        return rest + float(values(np.arange(len(table)), self.sizes(widths)[table]).sum())

    def by_tensor(self, kind: CostKind, widths: np.ndarray) -> dict[str, float]:
        """The cost of each tensor."""
        if kind == "latency_ms" and self.latency:
            table, values, _ = self.terms[kind]
            times = values(np.arange(len(table)), self.sizes(widths)[table])
            return dict(zip(self.latency.tensors, times.tolist(), strict=True))
        shares = self.sizes(widths) / self.sizes(self.dense)
        return {t: cost * float(np.prod(shares[self.dims.get(t, [])])) for t, cost in self.dense_costs(kind).items()}


class RunningCost:
    """Costs updated step by step. A step recomputes only the tensors that it changes."""

    def __init__(self, model: CostModel, kinds: tuple[CostKind, ...]) -> None:
        self.model, self.kinds = model, kinds
        self.widths = model.dense.copy()
        self.sizes = model.sizes(self.widths)
        self.now = {k: model.cost(k, self.widths) for k in kinds}
        self.touched: dict[CostKind, list[np.ndarray]] = {}
        for k in kinds:  # the table rows that each group changes
            table, group = np.nonzero((model.per_channel[model.terms[k].table] != 0).any(axis=1))
            self.touched[k] = np.split(table[np.argsort(group, kind="stable")], np.bincount(
                group, minlength=len(model.names)).cumsum()[:-1])

    def changes(self, step: np.ndarray) -> Iterator[tuple[CostKind, float, np.ndarray, np.ndarray]]:
        """For each cost: what removing `step` channels (one entry per group) saves, the dimensions that change, their sizes."""
        groups = np.nonzero(step)[0]
        for k in self.kinds:
            table, values, _ = self.model.terms[k]
            rows = self.touched[k][groups[0]]
            if len(groups) > 1:
                rows = np.unique(np.concatenate([self.touched[k][g] for g in groups]))
            ends = table[rows]
            before = self.sizes[ends]
            after = before - self.model.per_channel[ends[..., None], groups] @ step[groups]
            yield k, float((values(rows, before) - values(rows, after)).sum()), ends, after

    def saved(self, step: np.ndarray) -> dict[CostKind, float]:
        """What removing `step` channels would save."""
        return {k: value for k, value, *_ in self.changes(step)}

    def move(self, step: np.ndarray) -> None:
        """Remove `step` channels. A negative step puts them back."""
        for k, value, ends, after in list(self.changes(step)):
            self.now[k] -= value
            self.sizes[ends] = after
        self.widths -= step
