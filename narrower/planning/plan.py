"""plan: scores and a request to a Plan, the channels that stay."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ..errors import BudgetError, PlanError
from ..graph.cost import CostModel
from ..graph.equal_counts import components
from ..graph.selection import Kept
from ..graph.types import Graph, Slice, html_table, table
from ..preconditions import checked
from .damage import Sensitivity
from .drawing import draw_bars, new_axes
from .greedy import by_budget
from .latency import LatencyTable
from .rates import by_rate
from .requests import Budget, checked_scores, excluded, lowest_channels, plain

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Plan:
    """Kept channels of every free group, in ascending order, with the cost that follows from them.

    `macs`, `params` and `latency_ms` are (dense, narrow): multiply-adds for one sample, parameters, and predicted milliseconds
    where a latency table was given.
    """

    graph: Graph = field(repr=False)
    keep: Mapping[str, np.ndarray] = field(repr=False)
    macs: tuple[float, float]
    params: tuple[float, float]
    request: Mapping[str, Any]
    latency_ms: tuple[float, float] | None = None

    def __str__(self) -> str:
        return f"{table(self.rows)}\n{self.summary}"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return html_table(self.rows, [self.summary])

    def plot(self, axes: Any = None) -> Any:
        """A bar for each group, its channels and before them those that stay, on matplotlib axes: `axes`, or new ones.

        Returns the axes. Raises MissingExtraError without matplotlib.
        """
        sizes = [(g.name, g.size, len(self.keep[g.name]) if g.free else g.size) for g in self.graph.groups]
        axes = new_axes(len(sizes)) if axes is None else axes
        names, dense, kept = zip(*sizes, strict=True)
        draw_bars(axes, names, dense, kept, "channels")
        return axes

    @property
    def summary(self) -> str:
        """The costs, in words."""
        (m0, m1), (p0, p1) = self.macs, self.params
        time = "" if self.latency_ms is None else "predicted {:,.3f} ms -> {:,.3f} ms ({:.1%}), ".format(
            *self.latency_ms, self.latency_ms[1] / self.latency_ms[0])
        return (f"{time}MACs {m0:,.0f} -> {m1:,.0f} ({m1 / m0:.1%}), "
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
            "latency_ms": self.latency_ms and list(self.latency_ms),
        })

    @staticmethod
    def from_json(text: str, graph: Graph) -> Plan:
        """The plan that `to_json` wrote. Raises PlanError for damaged text, another version or another network."""
        try:
            data = json.loads(text)
            version, groups, keep = data["format"], dict(data["groups"]), dict(data["keep"])
            request, times = dict(data.get("request", {})), data.get("latency_ms")
            latency_ms = (float(times[0]), float(times[1])) if times else None
        except (ValueError, KeyError, TypeError, IndexError) as e:
            raise PlanError(f"this is not a plan ({type(e).__name__}: {e})") from e
        if version != FORMAT:
            raise PlanError(f"the plan has format {version}, this version of narrower reads {FORMAT}")
        here = {g.name: g.size for g in graph.free}
        check_groups(groups, graph)
        found = costed_plan(graph, {n: parse_kept(n, kept, here) for n, kept in keep.items()}, request)
        return replace(found, latency_ms=latency_ms)


def check_groups(groups: Mapping[str, int], graph: Graph) -> None:
    """Raise PlanError unless the free groups of a plan, with their sizes, are those of the graph."""
    here = {g.name: g.size for g in graph.free}
    if groups != here:
        odd = [n for n in {**here, **groups} if groups.get(n) != here.get(n)][:3]
        raise PlanError(f"the plan is of another network: its groups differ, for example {odd}")


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
    for s in (s for g in graph.groups for s in g.slices if s.makes):
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


def costed_plan(graph: Graph, keep: Mapping[str, np.ndarray], request: Mapping[str, Any],
                latency: LatencyTable | None = None) -> Plan:
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
    model = CostModel(graph, latency)
    after = widths(model, keep)
    pairs = {k: (model.cost(k, model.dense), model.cost(k, after)) for k in model.terms}
    return Plan(graph, dict(keep), pairs["macs"], pairs["params"], dict(request), pairs.get("latency_ms"))


@checked
def plan(graph: Graph, scores: Mapping[str, Tensor], *, macs: float | None = None, params: float | None = None,
         latency_ms: float | str | None = None, remove: float | Mapping[str, float] | None = None,
         round_to: int | Literal["auto"] | None = None, exclude: Sequence[str] = (), min_channels: float = 1,
         sensitivity: Sensitivity | None = None, latency: LatencyTable | None = None) -> Plan:
    """Choose the channels that stay: those with the highest scores, under a budget or at a rate.

    Args:
        graph: from `trace`.
        scores: one number per channel of each free group. Higher is kept.
        macs: the multiply-adds that may remain: a fraction of the dense network in (0, 1), or an absolute number. The plan is
            within it, and no removed step would fit back. All groups lose the same share of their channels, as far as ties,
            `round_to` and `min_channels` allow: scores are compared within a group only.
        params: the same for parameters.
        latency_ms: the same for the time of a forward as `latency` predicts it: a fraction below 1, milliseconds above, or
            text: "0.6x", "0.6ms".
        remove: instead of a budget, the fraction of channels taken from each group, or {pattern: fraction} over names of
            groups and layers. Of several patterns that match, the last one counts.
        round_to: kept widths are multiples of it where the dense widths allow. "auto": for each group, of what the runtime of
            `latency` computes in. 1 unless given, "auto" with latency_ms. A group that is no wider than one multiple stays
            whole under `macs` and `params`, unless they cannot be reached otherwise.
        exclude: patterns of groups and layers that are left alone.
        min_channels: the least number of channels that each group keeps: a whole number, or below 1 a share of its channels.
        sensitivity: the measured damage of each group, from `narrower.sensitivity` with the same scores. A budget is then met
            with the least damage: the step that minimises (damage added) per cost saved goes first. Groups that were not
            measured keep all channels.
        latency: times of this network on a machine, from `narrower.measure_latency`.

    Raises:
        PlanError: the request does not fit the graph.
        BudgetError: the budget is below the least that can be reached.
    """
    macs, params, latency_ms, round_to, min_channels = map(plain, (macs, params, latency_ms, round_to, min_channels))
    remove = {k: plain(v) for k, v in remove.items()} if isinstance(remove, Mapping) else plain(remove)
    budget = Budget(macs, params, latency_ms)
    check_request(graph, budget, remove, sensitivity, latency)
    round_to = ("auto" if latency_ms else 1) if round_to is None else round_to
    # A budget of milliseconds knows what a width costs. Others first leave groups whole that are one multiple wide.
    multiples = multiples_of(graph, round_to, latency, blocks=1 if macs or params else 2)
    if type(min_channels) not in (int, float) or not (0 < min_channels < 1 or (min_channels >= 1 and min_channels % 1 == 0)):
        raise PlanError(f"min_channels={min_channels!r}: give a whole number from 1, or a share between 0 and 1")
    free, left_out = {g.name for g in graph.free}, excluded(graph, exclude)
    values = checked_scores(graph, scores, left_out)
    parts = components(graph, left_out if sensitivity is None else left_out | free - sensitivity.by_group.keys())
    request = {"macs": macs, "params": params, "latency_ms": latency_ms, "round_to": round_to, "exclude": sorted(left_out),
               "remove": remove, "min_channels": min_channels}
    if remove is not None:
        lost = by_rate(graph, parts, remove, multiples, min_channels)
    else:
        spend = partial(by_budget, CostModel(graph, latency), parts, budget, min_channels=min_channels, sensitivity=sensitivity)
        try:
            lost = spend(multiples)
        except BudgetError:
            if round_to != "auto":
                raise
            lost = spend(multiples_of(graph, round_to, latency))
    kept = Kept.without(graph, lowest_channels(parts, lost, values))
    return costed_plan(graph, kept.keep, {k: v for k, v in request.items() if v}, latency)


def check_request(graph: Graph, budget: Budget, remove: float | Mapping[str, float] | None, sensitivity: Sensitivity | None,
                  latency: LatencyTable | None) -> None:
    """Raises PlanError where parts of a request contradict each other, or are of another network."""
    if (remove is None) == (budget == Budget()):
        raise PlanError("give either a budget (macs=, params=, latency_ms=) or remove=")
    if sensitivity is not None and remove is not None:
        raise PlanError("sensitivity= spreads a budget (macs=, params=, latency_ms=); remove= says what each group loses")
    if sensitivity is not None and (unknown := [n for n in sensitivity.by_group if n not in graph.by_name]):
        raise PlanError(f"the sensitivity is of another network: it knows a group {unknown[0]!r}, this graph does not")
    if budget.latency_ms is not None and latency is None:
        raise PlanError("latency_ms= needs latency=, times measured on a machine: see narrower.measure_latency")
    if latency is not None:
        latency.check(graph)
    if not graph.free:
        why = "; ".join([*(f"{g.name}: {g.pinned}" for g in graph.groups[:4]), *graph.notes])
        raise PlanError(f"nothing is free in this network ({why})")


def multiples_of(graph: Graph, round_to: int | str, latency: LatencyTable | None, blocks: int = 2) -> dict[str, int]:
    """The multiple for the width of each free group. Raises PlanError for anything but a whole number or "auto"."""
    if round_to == "auto":
        if latency is None:
            raise PlanError('round_to="auto" needs latency=, times measured on a machine: see narrower.measure_latency')
        return latency.multiples(graph, blocks)
    if type(round_to) is not int or round_to < 1:
        raise PlanError(f'round_to={round_to!r}: give a whole number from 1, or "auto"')
    return {g.name: round_to for g in graph.free}
