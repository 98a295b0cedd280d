"""Centripetal SGD: the filters of a cluster are trained to become identical, then one of them stays.

Ding et al., "Centripetal SGD for Pruning Very Deep Convolutional Networks With Complicated Structure" (CVPR 2019). Channels
that are identical are merged without a loss: one of them stays, and what read the others is added to what reads it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, PlanError, check_state
from ..graph.types import ChannelGroup, Graph, Slice
from ..inputs import precise, real_rows
from ..narrowing.narrow import narrow
from ..narrowing.step_hooks import hook_steps, not_done
from ..planning.plan import Plan, check_groups, costed_plan
from ..planning.plan import plan as plan_widths
from ..planning.requests import excluded
from ..preconditions import check_number, checked
from ..surgery.copying import independent_copy, same_tensors
from ..surgery.walk import named_tensors
from .clusters import cluster_means, cluster_sums, even_clusters, nearest_clusters

FORMAT = 1
PUBLISHED: Mapping[str, Any] = {"strength": 3e-3}
"""The settings of the paper."""
IDENTICAL = 1e-4
"""Filters of a cluster whose distance to their mean, relative to its norm, is no larger are merged without a warning."""

Clustering = Literal["kmeans", "even"]
Scope = Literal["inner", "all"]


class CentripetalSGD:
    """Train the filters of each cluster towards each other, and merge them in the end.

    Train the model as usual, with an optimizer that was passed to `attach`. `merge` then returns the narrow network. Example:
    `csgd = CentripetalSGD(model, graph, macs=0.5, steps=len(loader) * epochs)`.

    In each step the filters of a cluster get the mean of their gradients (eq. 4 of the paper), and so do their biases and
    BatchNorms. What they differ by shrinks. By default it falls linearly to zero, until the time `together`, a fraction of the
    steps. From then on they are identical, so `merge` loses nothing, and what is trained is the narrow network. As published,
    `strength=3e-3` adds the pull to the gradient instead: differences then fall with the learning rate, and never end.

    `macs`, `params`: the budget, as for `plan`; all groups lose the same share. Instead `remove`, as for `plan`, or `plan`, of
    which only the widths count. `scope`: "inner" for channels that one layer makes, "all" for residual streams too: all layers
    that write there have the same clusters. `clustering`: "kmeans" of the filters as they are now (of the first layer that
    writes, the pacesetter of the paper), or "even" numbers of neighbours. `exclude`: patterns of groups to leave alone;
    `reasons` says why others are. `seed`: of k-means.

    Raises PlanError if the model is not the traced one, has nothing to merge, or does not fit the plan, BudgetError for a
    budget that cannot be reached, ConfigError for settings out of range.
    """

    @checked
    def __init__(self, model: nn.Module, graph: Graph, *, macs: float | None = None, params: float | None = None,
                 remove: float | Mapping[str, float] | None = None, plan: Plan | None = None, steps: int,
                 scope: Scope = "inner", exclude: Sequence[str] = (), clustering: Clustering = "kmeans",
                 strength: float | None = None, together: float = 0.5, seed: int = 0) -> None:
        if type(steps) is not int or steps < 1:
            raise ConfigError(f"steps={steps!r}: give the number of optimizer steps of the training")
        if clustering not in ("kmeans", "even") or scope not in ("inner", "all"):
            raise ConfigError(f"clustering={clustering!r}, scope={scope!r}: give 'kmeans' or 'even', 'inner' or 'all'")
        check_number("together", together, 0, 1)
        if not together:
            raise ConfigError(f"together={together!r}: give a fraction of the steps, up to 1")
        if strength is not None:
            check_number("strength", strength, 0, inside=True)
        check_number("seed", seed, 0, whole=True)
        tensors = same_tensors(model, graph)
        self.model, self.graph, self.steps, self.step = model, graph, steps, 0
        self.strength, self.together = strength, together
        self.reasons = {**unmergeable(graph, scope), **dict.fromkeys(excluded(graph, exclude), "excluded")}
        if plan is None:
            if len(self.reasons) == len(graph.free):
                why = "; ".join(f"{n}: {w}" for n, w in list(self.reasons.items())[:4])
                raise PlanError(f"there is nothing to merge: {why or 'nothing is free'}")
            ones = {g.name: torch.ones(g.size) for g in graph.free}
            plan = plan_widths(graph, ones, macs=macs, params=params, remove=remove, exclude=[*self.reasons])
        elif not (macs is params is remove is None):
            raise PlanError("a plan= says what remains: give it no macs=, params= or remove=")
        widths = widths_of(plan, graph, self.reasons)
        self.clusters: dict[str, np.ndarray] = {}
        for name, count in widths.items():
            made = maker(graph[name])
            rows = rows_at(tensors[made.tensor].detach().cpu(), made.dim, torch.as_tensor(positions(made)))
            filters = real_rows(rows).double().numpy()
            size = graph[name].size
            self.clusters[name] = even_clusters(size, count) if clustering == "even" else nearest_clusters(filters, count, seed)
        self.optimizer: torch.optim.Optimizer | None = None
        self.places: list[Place] = []  # where the channels of clusters are made, once a step has needed it

    # ------------------------------------------------------------------------------------------------ the user's side

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Apply the rule in every step of `optimizer`, by hooks; `step(closure)` works too. Raises ConfigError if it calls a
        closure several times in a step, as LBFGS does, if its step calls no hooks, or if one was attached before."""
        if self.optimizer is not None:
            raise ConfigError("attach was called before: a CentripetalSGD has one optimizer")
        hook_steps(optimizer, before=self.before_step, after=self.after_step)
        self.optimizer = optimizer

    @property
    def plan(self) -> Plan:
        """The plan whose channels stay: the first of each cluster. The others are merged into it, so `verify`, which compares
        with the network without them, does not apply."""
        keep = {g.name: np.arange(g.size) for g in self.graph.free}
        keep |= {name: first_of(clusters) for name, clusters in self.clusters.items()}
        return costed_plan(self.graph, keep, {"centripetal": len(self.clusters)})

    def merge(self, model: nn.Module | None = None) -> nn.Module:
        """The narrow network. With the filters of each cluster identical it computes what the trained one does, to rounding.

        `model`: an averaged copy to merge instead. Neither is changed. Warns if filters still differ; their means are taken.
        Raises ConfigError if they do and no step was made: they then have nothing to do with each other.
        """
        source = self.model if model is None else model
        tensors = named_tensors(source)
        if (left := spread(tensors, places_in(tensors, self.graph, self.clusters))) > IDENTICAL:
            said = f"filters that are merged still differ, by {left:.1e} of their norm: "
            said += not_done(self.optimizer, self.step, self.steps)
            if not self.step:
                raise ConfigError(said)
            warnings.warn(said, stacklevel=2)
        whole = self.unified(source)
        add_readers(named_tensors(whole), self.graph, self.clusters)
        return narrow(whole, self.plan)

    def unified(self, model: nn.Module | None = None) -> nn.Module:
        """A copy of the network, or of `model`, as wide as before, whose filters are the means of their clusters. It computes
        what `merge` returns does, to rounding."""
        source = self.model if model is None else model
        whole = independent_copy(source)
        tensors = named_tensors(whole)
        pull(tensors, places_in(tensors, self.graph, self.clusters), 0.0)
        return whole

    def progress(self) -> dict[str, float]:
        """Figures for a log. `merged`: the multiply-adds after the merge, as a share of the dense network's. `spread`: the
        largest distance of a filter to the mean of its cluster, relative to the norm of the mean."""
        dense, now = self.plan.macs
        return {"merged": now / dense, "spread": spread(*self.present())}

    def __str__(self) -> str:
        p = self.progress()
        channels = sum(len(c) for c in self.clusters.values())
        left = sum(int(c.max()) + 1 for c in self.clusters.values())
        line = (f"step {self.step} of {self.steps}: {channels} channels become {left}, with {p['merged']:.1%} of the "
                f"multiply-adds; those of a cluster differ by {p['spread']:.1e} of their norm")
        return "\n".join([line, *(f"left alone: {n}: {why}" for n, why in self.reasons.items())])

    # ------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Settings, counter and clusters, as plain values. Weights are in the model's own state dict."""
        return {"format": FORMAT, "steps": self.steps, "strength": self.strength, "together": self.together,
                "groups": {g.name: g.size for g in self.graph.free}, "step": self.step,
                "clusters": {name: c.tolist() for name, c in self.clusters.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state`, with its clusters. The state dicts of model and optimizer are loaded beside it.

        Raises StorageError for another format, setting or model.
        """
        check_state({key: value for key, value in self.state_dict().items() if key not in ("step", "clusters")}, state)
        self.step = state["step"]
        self.clusters = {name: np.array(c, dtype=np.int64) for name, c in state["clusters"].items()}
        self.places = []

    # ------------------------------------------------------------------------------------------------ the rule

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The gradients of a step are averaged, and as published the pull is added."""
        tensors, places = self.present()
        uphill = {id(t) for g in optimizer.param_groups if g.get("maximize") for t in g["params"]}
        for p in places:
            t = tensors[p.tensor]
            if t.grad is None:
                continue
            mean = cluster_means(rows_at(t.grad, p.dim, p.at), p.clusters, p.sizes)
            if self.strength is not None:
                rows = rows_at(t, p.dim, p.at)
                strength = -self.strength if id(t) in uphill else self.strength
                mean += strength * (rows - cluster_means(rows, p.clusters, p.sizes))
            put_rows(t.grad, p.dim, p.at, mean)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step: unless as published, differences shrink in proportion to the steps that are left."""
        self.step += 1
        if self.strength is None:
            left = self.together * self.steps - self.step
            pull(*self.present(), max(0.0, left / (left + 1)) if left > 0 else 0.0)

    def present(self) -> tuple[dict[str, Tensor], list[Place]]:
        """The tensors of the model as they are, and the places in them. Indices are copied to a device once, not in each step:
        every copy would make the host wait for all that was queued before."""
        tensors = named_tensors(self.model)
        if not self.places or any(p.at.device != tensors[p.tensor].device for p in self.places):
            self.places = places_in(tensors, self.graph, self.clusters)
        return tensors, self.places


# ------------------------------------------------------------------------------------------------ which channels


def unmergeable(graph: Graph, scope: Scope = "all") -> dict[str, str]:
    """The free groups whose channels cannot be merged, or not in this scope, with the reasons."""
    computed = {tensor for tensor, _ in graph.computed.values()}
    products = {m.group for p in graph.products for m in p.members}
    tied = {name for tie in graph.ties for block in tie.blocks for name in block}
    reasons = {}
    for g in graph.free:
        readers = [s for s in g.slices if s.reads]
        if not g.exact:
            reasons[g.name] = "a layer computes across its channels, and would see one where it saw several"
        elif scope == "inner" and sum(s.makes and not depthwise(s, graph) for s in g.slices) > 1:
            reasons[g.name] = "several layers make it"
        elif g.name in tied or any(s.blocks > 1 for s in g.slices):
            reasons[g.name] = "its channels are in groups of a convolution or in pieces, which read different things"
        elif g.name in products or not readers:
            reasons[g.name] = "it is read by something else than weights"
        elif any(s.tensor in computed for s in g.slices):
            reasons[g.name] = "weights that make or read it are computed from parameters"
        elif any(s.role == "both" for s in g.slices):
            reasons[g.name] = "one weight makes it and reads it"
        elif not all(alike(s, g.size) for s in g.slices):
            reasons[g.name] = "its channels lie in tensors in different orders"
    return reasons


def depthwise(s: Slice, graph: Graph) -> bool:
    """Whether a filter reads one channel only, of its own group."""
    shape = graph.shapes[s.tensor]
    return len(shape) > 2 and shape[1] == 1 and (s.tensor, 1) not in graph.by_axis


def alike(s: Slice, size: int) -> bool:
    """Whether each channel has equally many positions, at the same distances from its first."""
    if len(s.positions) % size or (np.bincount(s.channels, minlength=size) != len(s.positions) // size).any():
        return False
    at = positions(s)
    return bool((at - at[:, :1] == at[:1] - at[0, 0]).all())


def positions(s: Slice) -> np.ndarray:
    """The positions of each channel, ascending. Shape (size, positions of a channel)."""
    order = np.lexsort((s.positions, s.channels))
    return s.positions[order].reshape(int(s.channels.max()) + 1, -1)


def widths_of(plan: Plan, graph: Graph, reasons: Mapping[str, str]) -> dict[str, int]:
    """How many clusters each group gets that loses channels. Raises PlanError if the plan does not fit."""
    check_groups({g.name: g.size for g in plan.graph.free}, graph)
    losing = {g.name: len(plan.keep[g.name]) for g in graph.free if len(plan.keep[g.name]) < g.size}
    for name in losing:
        if name in reasons:
            raise PlanError(f"the plan removes channels of {name}, which cannot be merged: {reasons[name]}; plan with "
                            f"exclude=[{name!r}]")
    if not losing:
        raise PlanError("the plan removes nothing")
    return losing


def first_of(clusters: np.ndarray) -> np.ndarray:
    """The first channel of each cluster."""
    return np.sort(np.unique(clusters, return_index=True)[1])


def maker(group: ChannelGroup) -> Slice:
    """The slice of the weight that makes the channels."""
    return next(s for s in group.slices if s.makes)


# ------------------------------------------------------------------------------------------------ tensors


class Place(NamedTuple):
    """Where a tensor makes the channels of clusters: filters, biases, BatchNorms, depthwise filters.

    `at` (size, positions of a channel): the positions of each channel along `dim`. `clusters` (size,): the cluster of each.
    `sizes` (clusters,): how many channels each cluster has. All are on the device of the tensor.
    """

    tensor: str
    dim: int
    at: Tensor
    clusters: Tensor
    sizes: Tensor


def places_in(tensors: Mapping[str, Tensor], graph: Graph, clusters: Mapping[str, np.ndarray]) -> list[Place]:
    """Everything that makes the channels of clusters."""
    made = ((s, c) for name, c in clusters.items() for s in graph[name].slices if s.role != "in")
    return [Place(s.tensor, s.dim, *(torch.as_tensor(a, device=tensors[s.tensor].device)
                                     for a in (positions(s), c, np.bincount(c)))) for s, c in made]


def rows_at(t: Tensor, dim: int, at: Tensor) -> Tensor:
    """The part of a tensor that belongs to each channel. Shape (size, positions of a channel, ...)."""
    return t.detach().movedim(dim, 0)[at]


@torch.no_grad()
def put_rows(t: Tensor, dim: int, at: Tensor, rows: Tensor) -> None:
    """Replace what `rows_at` gives, in place."""
    t.movedim(dim, 0)[at] = rows


@torch.no_grad()
def pull(tensors: Mapping[str, Tensor], places: Sequence[Place], factor: float) -> None:
    """Multiply what the channels of a cluster differ by, in all that makes them, by `factor`, in place."""
    for p in places:
        rows = rows_at(tensors[p.tensor], p.dim, p.at)
        mean = cluster_means(rows, p.clusters, p.sizes)
        put_rows(tensors[p.tensor], p.dim, p.at, mean + factor * (rows - mean) if factor else mean)


@torch.no_grad()
def add_readers(tensors: Mapping[str, Tensor], graph: Graph, clusters: Mapping[str, np.ndarray]) -> None:
    """Add what reads the channels of a cluster to what reads its first, in place. The others become zero."""
    done = set()
    for name, c in clusters.items():
        for s in graph[name].slices:
            t = tensors[s.tensor]
            if s.reads and (id(t), s.dim, name) not in done:
                done.add((id(t), s.dim, name))
                index, first, at = (torch.as_tensor(a, device=t.device)
                                    for a in (c, np.unique(c, return_index=True)[1], positions(s)))
                put_rows(t, s.dim, at, cluster_sums(rows_at(t, s.dim, at), index, first))


@torch.no_grad()
def spread(tensors: Mapping[str, Tensor], places: Sequence[Place]) -> float:
    """The largest distance of a filter, bias or BatchNorm entry to the mean of its cluster, relative to the largest norm."""
    found = [0.0]
    for p in places:
        rows = precise(rows_at(tensors[p.tensor], p.dim, p.at).flatten(1))
        mean = cluster_means(rows, p.clusters, p.sizes)
        found.append(float((rows - mean).norm(dim=1).max() / mean.norm(dim=1).max().clamp_min(1e-12)))
    return max(found)
