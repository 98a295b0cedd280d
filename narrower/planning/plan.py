"""plan: scores and a request to a Plan, the channels that stay."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import PlanError
from ..graph.cost import CostModel
from ..graph.equal_counts import components
from ..graph.selection import Kept
from ..graph.types import Graph, Slice, html_table, table
from .damage import Sensitivity
from .greedy import by_budget
from .rates import by_rate
from .requests import Budget, checked_scores, excluded, lowest_channels

FORMAT = 1


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
        return f"{table(self.rows)}\n{self.summary}"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return html_table(self.rows, [self.summary])

    @property
    def summary(self) -> str:
        """The costs, in words."""
        (m0, m1), (p0, p1) = self.macs, self.params
        return (f"MACs {m0:,.0f} -> {m1:,.0f} ({m1 / m0:.1%}), "
                f"parameters {p0:,.0f} -> {p1:,.0f} ({p1 / p0:.1%})")

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A header, and a row for each group, with the multiply-adds of the layers that make its channels.

        A layer that makes channels of several groups counts for each by its number of channels there.
        """
        rows: list[tuple[str, ...]] = [("group", "dense", "kept", "MACs dense", "MACs narrow", "")]
        made = macs_by_group(self.graph, self.keep)
        for g in self.graph.groups:
            kept = len(self.keep[g.name]) if g.free else g.size
            note = f"pinned: {g.pinned}" if g.pinned else "" if g.exact else "inexact"
            rows.append((g.name, str(g.size), str(kept), *(f"{n:,.0f}" for n in made.pop(g.name)), note))
        if made:
            rows.append(("(others)", "", "", *(f"{sum(n):,.0f}" for n in zip(*made.values(), strict=True)), ""))
        return rows

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
        return costed_plan(graph, {n: parse_kept(n, kept, here) for n, kept in keep.items()}, request)


def parse_kept(name: str, kept: Any, sizes: Mapping[str, int]) -> np.ndarray:
    """Kept channels as written in a file, or PlanError."""
    ok = name in sizes and isinstance(kept, list) and bool(kept) and all(type(c) is int for c in kept)
    if not ok or sorted(set(kept)) != kept or kept[0] < 0 or kept[-1] >= sizes[name]:
        raise PlanError(f"the kept channels of group {name!r} are not ascending numbers below its size")
    return np.array(kept, dtype=np.int64)


def macs_by_group(graph: Graph, keep: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{group, or tensor that makes channels of none: its multiply-adds (dense, narrow)}. They add up to those of the plan."""
    model, kept = CostModel(graph), Kept(graph, keep)
    costs = [model.by_tensor("macs", w) for w in (model.dense, widths(model, keep))]
    made = {g.name: np.zeros(2) for g in graph.groups}
    outs: dict[str, list[Slice]] = {}
    for s in (s for g in graph.groups for s in g.slices if s.role == "out"):
        outs.setdefault(s.tensor, []).append(s)
    for tensor in costs[0]:
        both = np.array([c[tensor] for c in costs])
        counts = np.array([[len(s.positions), kept.mask(s.group)[s.channels].sum()] for s in outs.get(tensor, [])])
        if not len(counts):
            made[tensor] = both
        for s, count in zip(outs.get(tensor, []), counts, strict=True):
            made[s.group] += both * count / counts.sum(0)
    return made


def widths(model: CostModel, keep: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.array([len(keep[n]) for n in model.names], dtype=np.float64)


def costed_plan(graph: Graph, keep: Mapping[str, np.ndarray], request: Mapping[str, Any]) -> Plan:
    """A plan with its costs. Raises PlanError where the counts break a tie (unequal numbers in the groups of a conv)."""
    missing = [g.name for g in graph.free if g.name not in keep]
    if missing:
        raise PlanError(f"no kept channels given for group {missing[0]!r}")
    kept = Kept(graph, keep)
    for part in components(graph):
        lost = np.array([(~kept.mask(c.group)[c.channels]).sum() for c in part.cells])
        if len(part.equations) and (part.equations @ lost).any():
            names = sorted({c.group for c in part.cells})
            raise PlanError(f"group {', '.join(names[:3])}: the kept channels must be equally many in each of its parts "
                            "(groups of a convolution or norm, pieces of a split)")
    model = CostModel(graph)
    after = widths(model, keep)
    pairs = [(model.cost(k, model.dense), model.cost(k, after)) for k in ("macs", "params")]
    return Plan(graph, dict(keep), pairs[0], pairs[1], dict(request))


def plan(graph: Graph, scores: Mapping[str, Tensor], *, macs: float | None = None, params: float | None = None,
         remove: float | Mapping[str, float] | None = None, round_to: int = 1, exclude: Sequence[str] = (),
         min_channels: int = 1, sensitivity: Sensitivity | None = None) -> Plan:
    """Choose the channels that stay: those with the highest scores, under a budget or at a rate.

    Args:
        graph: from `trace`.
        scores: one number per channel of each free group. Higher is kept.
        macs, params: the cost that may remain: a fraction of the dense network in (0, 1), or an absolute number. The plan is
            within it, and no removed step would fit back. All groups lose the same share of their channels, as far as ties,
            `round_to` and `min_channels` allow: scores are compared within a group only.
        remove: instead of a budget, the fraction of channels taken from each group, or {pattern: fraction} over names of
            groups and layers. Of several patterns that match, the last one counts.
        round_to: kept widths are multiples of it where the dense widths allow.
        exclude: patterns of groups and layers that are left alone.
        min_channels: the least number of channels that each group keeps.
        sensitivity: the measured damage of each group, from `narrower.sensitivity` with the same scores. A budget is then met
            with the least damage: the step that minimises (damage added) per cost saved goes first. Groups that were not
            measured keep all channels.

    Raises:
        PlanError: the request does not fit the graph.
        BudgetError: the budget is below the least that can be reached.
    """
    if (remove is None) == (macs is None and params is None):
        raise PlanError("give either a budget (macs=, params=) or remove=")
    if sensitivity is not None and remove is not None:
        raise PlanError("sensitivity= spreads a budget (macs=, params=); remove= says itself what each group loses")
    if sensitivity is not None and (unknown := [n for n in sensitivity.by_group if n not in graph.by_name]):
        raise PlanError(f"the sensitivity is of another network: it knows a group {unknown[0]!r}, this graph does not")
    for name, value in (("round_to", round_to), ("min_channels", min_channels)):
        if type(value) is not int or value < 1:
            raise PlanError(f"{name}={value!r}: give a whole number from 1")
    if not graph.free:
        why = "; ".join(f"{g.name}: {g.pinned}" for g in graph.groups[:4])
        raise PlanError(f"nothing is free in this network ({why})")
    free, left_out = {g.name for g in graph.free}, excluded(graph, exclude)
    values = checked_scores(graph, scores, left_out)
    parts = components(graph, left_out if sensitivity is None else left_out | free - sensitivity.by_group.keys())
    request = {"macs": macs, "params": params, "remove": remove if not isinstance(remove, Mapping) else dict(remove),
               "round_to": round_to, "exclude": sorted(left_out), "min_channels": min_channels}
    if remove is not None:
        lost = by_rate(graph, parts, remove, round_to, min_channels)
    else:
        lost = by_budget(graph, parts, values, Budget(macs, params), round_to, min_channels, sensitivity)
    kept = Kept.without(graph, lowest_channels(parts, lost, values))
    return costed_plan(graph, kept.keep, {k: v for k, v in request.items() if v})
