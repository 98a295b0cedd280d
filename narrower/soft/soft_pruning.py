"""Soft pruning: mask the lowest channels again and again while the network trains, from soft to hard.

He et al., "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks" (IJCAI 2018): after each epoch the lowest
filters become zero, and train on. Three variations are settings here. The number of masked channels grows (He et al.,
"Asymptotic Soft Filter Pruning", IEEE Transactions on Cybernetics 2020). They are multiplied by a factor that falls to zero
(Cai et al., "Softer Pruning, Incremental Regularization", ICPR 2020). One after the other stays at zero for good (Cai et al.,
"GHFP: Gradually Hard Filter Pruning", IJCNN 2021).

The papers multiply the filter that makes a channel. Behind a BatchNorm this does not give a channel of zeros: its shift stays,
and it normalises any other factor away. Here the weights that *read* the channel are multiplied. With a factor of zero this is
the masked network by which `narrow` and `verify` define removal, in train mode too. So nothing is lost when the channels go.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, PlanError, check_state
from ..graph.equal_counts import components
from ..graph.selection import Kept
from ..graph.types import Graph
from ..inputs import precise
from ..narrowing.narrow import narrow
from ..narrowing.step_hooks import hook_steps
from ..planning.plan import Plan, check_groups, costed_plan
from ..planning.plan import plan as plan_budget
from ..planning.requests import checked_scores, excluded, lowest_channels, restored_scores
from ..preconditions import check_number, checked
from ..surgery.copying import same_tensors
from ..surgery.masking import Axis, removed_inputs
from ..surgery.walk import named_tensors

FORMAT = 1

AT_ZERO = 1e-6
"""Channels are at zero if what reads them has no more than this of a weight's norm."""

PUBLISHED: Mapping[str, Mapping[str, float | None]] = {
    "sfp": {"factor": 0.0, "grow": 0.0, "harden": None},
    "asymptotic": {"factor": 0.0, "grow": 1.0, "harden": None},
    "softer": {"factor": 1.0, "grow": 0.0, "harden": None},
    "gradual-hard": {"factor": 0.0, "grow": 0.0, "harden": 1.0},
}
"""The settings that make the published methods of it, in the order of the papers above."""

Masks = dict[str, np.ndarray]
"""{group: bool array, shape (size,)}."""


class SoftPruning:
    """Mask the lowest channels of `model` at each `step`, and narrow it by them in the end.

    Train the model as usual. Call `step` after each epoch, or after every so many optimizer steps. `narrow` then returns the
    narrow network. Example: `soft = SoftPruning(model, graph, macs=0.5, steps=epochs)`.

    A channel's value is the norm of its filters times the norm of the weights that read it, each relative to the mean of its
    layer. So a masked channel starts at zero and has to grow back to be kept.

    `macs`, `params`: the budget, as for `plan`: all groups lose the same share, and values decide at each step which channels.
    Instead `plan`, for example by measured damage: which channels go is decided already; with `fixed=False` only how many of
    each group, and values decide which. `steps`: how often `step` will be called. `exclude`: patterns of groups to leave
    alone. `scores`: values are multiplied by a channel's score, divided by the mean of its group. Three settings make the
    method, with time as a fraction of the steps:

    - `factor`: what the weights are multiplied by at first. It falls to 0 linearly, until the time `harden`.
    - `grow`: the time when all channels of the budget are masked. Before, the number grows as 1 - (1 - time / grow)^3.
    - `harden`: the time when all masked channels are hard: they stay masked, and at zero if an optimizer is attached. Before,
      their share grows linearly, the lowest first. None: no channel ever is, and `factor` falls until the end.

    The defaults go from soft to hard. `PUBLISHED` has those of the papers. `harden=0` is hard pruning.

    Raises PlanError if the model is not the traced one or does not fit the plan, BudgetError for a budget that cannot be
    reached, ConfigError for settings out of range.
    """

    @checked
    def __init__(self, model: nn.Module, graph: Graph, *, macs: float | None = None, params: float | None = None,
                 plan: Plan | None = None, fixed: bool = True, steps: int, exclude: Sequence[str] = (),
                 scores: Mapping[str, Tensor] | None = None, factor: float = 1.0, grow: float = 0.5,
                 harden: float | None = 0.75) -> None:
        if (plan is None) == (macs is None and params is None):
            raise PlanError("give a budget, macs= or params=, or instead a plan=")
        if type(steps) is not int or steps < 1:
            raise ConfigError(f"steps={steps!r}: say how often step() will be called")
        for name, value in (("factor", factor), ("grow", grow), ("harden", harden)):
            if value is not None or name != "harden":
                check_number(name, value, 0, 1)
        same_tensors(model, graph)
        self.model, self.graph, self.steps, self.calls = model, graph, steps, 0
        self.factor, self.grow, self.harden = factor, grow, harden
        self.reasons = {**unmaskable(graph), **dict.fromkeys(excluded(graph, exclude), "excluded")}
        self.parts = components(graph, self.reasons.keys())
        given = checked_scores(graph, scores, set(self.reasons)) if scores is not None else {}
        self.prior = {name: s / s.mean() for name, s in given.items()}
        if plan is not None:
            check_plan(plan, graph, self.reasons)
        self.wanted = {g.name: ~Kept(graph, plan.keep).mask(g.name) for g in graph.free} if plan and fixed else None
        goal = plan or plan_budget(graph, {n: torch.as_tensor(v) for n, v in self.values().items()}, macs=macs, params=params,
                                   exclude=[*self.reasons])
        self.goal = [np.array([(~Kept(graph, goal.keep).mask(c.group)[c.channels]).sum() for c in part.cells])
                     for part in self.parts]
        self.masked: Masks = {g.name: np.zeros(g.size, dtype=bool) for g in graph.free}
        self.hard: Masks = {name: m.copy() for name, m in self.masked.items()}
        self.zeros: dict[Axis, Tensor] | None = None  # where weights read hard channels, once it is needed
        self.optimizer: torch.optim.Optimizer | None = None

    # ------------------------------------------------------------------------------------------------ the user's side

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep hard channels at zero between steps, by hooks on `optimizer` and on the weights that read them. From `harden`
        on, the training then is that of the narrow network. Raises ConfigError for LBFGS, which has no zeros within its steps,
        for an optimizer whose step calls no hooks, or if one was attached before."""
        if self.optimizer is not None:
            raise ConfigError("attach was called before: a SoftPruning has one optimizer")
        hook_steps(optimizer, after=lambda optimizer: self.zero_hard())
        self.hook_gradients()
        self.optimizer = optimizer

    def hook_gradients(self) -> None:
        """Keep the gradients of what reads a hard channel at zero, by hooks on the weights; `attach` does so too.

        They would move nothing, as these weights return to zero, but clipping would count them and scale down the others.
        """
        tensors, axes = named_tensors(self.model), dict[Tensor, list[Axis]]()
        for axis, slices in self.graph.by_axis.items() if self.harden is not None else ():
            if slices[0].reads and tensors[axis[0]].requires_grad:
                axes.setdefault(tensors[axis[0]], []).append(axis)
        for t, own in axes.items():
            t.register_post_accumulate_grad_hook(partial(self.zero_gradient, own))

    def zero_gradient(self, axes: Iterable[Axis], t: Tensor) -> None:
        """Set the gradient of a weight, which reads along these axes, to zero where it reads a hard channel."""
        if t.grad is not None:
            self.fill_zeros(t.grad, axes)

    def step(self) -> float:
        """Choose the channels to mask anew, and multiply the weights that read them, in place. Returns the factor. Call it
        between optimizer steps, while no autograd graph is held."""
        self.calls += 1
        time = min(1.0, self.calls / self.steps)
        values = {n: np.where(self.hard[n], -1.0, v) for n, v in self.values().items()}
        self.masked = self.choose(share_at(time, self.grow), values)
        share = 0.0 if self.harden is None else reached(time, self.harden)
        for name, masked in self.masked.items():
            count = int(np.floor(share * masked.sum() + 1e-9))
            lowest = np.argsort(np.where(masked, values.get(name, 0.0), np.inf), kind="stable")[:count]
            self.hard[name] = np.isin(np.arange(len(masked)), lowest)  # hard channels come first, so they stay hard
        self.zeros = None
        factor = self.factor * (1 - reached(time, 1.0 if self.harden is None else self.harden))
        multiply_readers(self.model, kept_without(self.graph, self.masked), factor)
        self.zero_hard()
        return factor

    @property
    def plan(self) -> Plan:
        """The plan of the channels that are masked now."""
        return costed_plan(self.graph, kept_without(self.graph, self.masked).keep, {"soft": self.calls})

    def narrow(self, model: nn.Module | None = None) -> nn.Module:
        """The narrow network, without the masked channels. It computes what the masked one does, to rounding.

        `model`: an averaged copy to narrow instead. Neither is changed. An average lags behind: its masked channels are at zero
        some time after those of the trained model. Warns if masked channels are missing or not at zero; these are cut as they
        are.
        """
        source = self.model if model is None else model
        missing = sum(int(n.sum()) for n in self.goal) - sum(int(m.sum()) for m in self.masked.values())
        left = weight_left(source, kept_without(self.graph, self.masked))
        if missing or left > AT_ZERO:
            what = [f"{missing} channels of the budget are not masked yet"] * bool(missing)
            what += [f"channels that are cut are not at zero (what reads them has up to {left:.1e} of a weight's norm)"
                     ] * (left > AT_ZERO)
            late = "" if model is None else "; an average lags behind: train on after that, or average over fewer steps"
            warnings.warn(f"{' and '.join(what)}: call step() {self.steps} times, the last time after the last optimizer step "
                          f"(it was called {self.calls} times){late}", stacklevel=2)
        return narrow(source, self.plan)

    def progress(self) -> dict[str, float]:
        """Figures for a log.

        `masked`: the multiply-adds without masked channels, as a share of the dense network's. `channels`, `hard`: numbers of
        masked and of hard channels.
        """
        dense, now = self.plan.macs
        return {"masked": now / dense, "channels": float(sum(m.sum() for m in self.masked.values())),
                "hard": float(sum(m.sum() for m in self.hard.values()))}

    def __str__(self) -> str:
        p, total = self.progress(), sum(int(n.sum()) for n in self.goal)
        line = (f"step {self.calls} of {self.steps}: {p['channels']:.0f} of {total} channels are masked, {p['hard']:.0f} of "
                f"them hard; without them {p['masked']:.1%} of the multiply-adds remain")
        return "\n".join([line, *(f"left alone: {n}: {why}" for n, why in self.reasons.items())])

    # ------------------------------------------------------------------------------------------------ state

    def run_settings(self) -> dict[str, Any]:
        """The settings that must agree between a saved state and the SoftPruning that loads it."""
        wanted = None if self.wanted is None else {n: np.nonzero(m)[0].tolist() for n, m in self.wanted.items()}
        return {"format": FORMAT, "steps": self.steps, "factor": self.factor, "grow": self.grow, "harden": self.harden,
                "plan": wanted, "budget": [n.tolist() for n in self.goal], "groups": {g.name: g.size for g in self.graph.free}}

    def state_dict(self) -> dict[str, Any]:
        """Settings, counter and masks, as plain values. Weights are in the model's own state dict."""
        return self.run_settings() | {"calls": self.calls, "masked": as_lists(self.masked), "hard": as_lists(self.hard),
                                      "scores": {n: s.tolist() for n, s in self.prior.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state`. The state dicts of the model and of the optimizer are loaded beside it, before or afterwards.

        Raises StorageError for another format, budget, setting, model or `scores=`.
        """
        check_state(self.run_settings(), state)
        self.prior = restored_scores(self.prior, state)
        self.calls = state["calls"]
        for key in ("masked", "hard"):
            masks: Masks = getattr(self, key)
            for name, channels in state[key].items():
                masks[name] = np.isin(np.arange(self.graph[name].size), channels)
        self.zeros = None

    # ------------------------------------------------------------------------------------------------ which channels

    def values(self) -> dict[str, np.ndarray]:
        """The value of each channel of the groups that can be masked. Shape (size,)."""
        tensors = named_tensors(self.model)
        made, read = (relative_norms(self.graph, tensors, role) for role in ("out", "in"))
        return {n: made[n] * read[n] * self.prior.get(n, 1.0) for n in made if n not in self.reasons}

    def choose(self, share: float, values: Mapping[str, np.ndarray]) -> Masks:
        """A share of the channels to remove, to the nearest number: those of the lowest values. With a plan, its channels only.

        Rounded down, the last channel of every group would go in the last step, after which nothing trains.
        """
        order = {n: v if self.wanted is None else np.where(self.wanted[n], v, np.inf) for n, v in values.items()}
        counts = [part.removable(np.floor(share * n + 0.5).astype(np.int64), n)
                  for part, n in zip(self.parts, self.goal, strict=True)]
        kept = Kept.without(self.graph, lowest_channels(self.parts, counts, order))
        return {g.name: ~kept.mask(g.name) for g in self.graph.free}

    def zero_hard(self) -> None:
        """Set what reads a hard channel to zero."""
        if self.zeros != {}:
            tensors = named_tensors(self.model)
            for axis in self.graph.by_axis:
                self.fill_zeros(tensors[axis[0]], [axis])

    @torch.no_grad()
    def fill_zeros(self, t: Tensor, axes: Iterable[Axis]) -> None:
        """Set a weight, or its gradient, to zero where it reads hard channels along these axes.

        The masks are copied to a device once for each `step`, not for each of the optimizer's: every copy would make the host
        wait for all that was queued before.
        """
        if self.zeros is None:
            self.zeros = removed_inputs(named_tensors(self.model), kept_without(self.graph, self.hard))
        for axis in axes:
            if axis in self.zeros:
                self.zeros[axis] = self.zeros[axis].to(t.device)
                t.masked_fill_(self.zeros[axis], 0)


def reached(time: float, end: float) -> float:
    """How much of the way to `end` is done at a time: from 0 to 1."""
    return 1.0 if time >= end else time / end


def share_at(time: float, grow: float) -> float:
    """The share of the channels that are masked at a time (Zhu and Gupta, "To Prune, or Not to Prune", 2017, eq. 1)."""
    return 1 - (1 - reached(time, grow)) ** 3


def unmaskable(graph: Graph) -> dict[str, str]:
    """The free groups that cannot be masked by weights that read them, with the reasons."""
    computed = {tensor for tensor, _ in graph.computed.values()}
    products = {m.group for p in graph.products for m in p.members}
    reasons = {}
    for g in graph.free:
        readers = [s for s in g.slices if s.reads]
        if not g.exact:
            reasons[g.name] = "a layer computes across its channels, and would see zeros where the narrow one sees nothing"
        elif g.name in products or not readers:
            reasons[g.name] = "it is read by something else than weights"
        elif any(s.tensor in computed for s in readers):
            reasons[g.name] = "the weights that read it are computed from parameters, and would not stay zero"
    return reasons


def check_plan(plan: Plan, graph: Graph, reasons: Mapping[str, str]) -> None:
    """Raise PlanError if a plan is of another network, or removes channels that cannot be masked."""
    check_groups({g.name: g.size for g in plan.graph.free}, graph)
    for name, why in reasons.items():
        if len(plan.keep[name]) < graph[name].size:
            raise PlanError(f"the plan removes channels of {name}, which cannot be masked: {why}; plan with exclude=[{name!r}]")


def kept_without(graph: Graph, masks: Masks) -> Kept:
    """The channels that are not masked."""
    return Kept.without(graph, ((name, np.nonzero(m)[0]) for name, m in masks.items()))


def as_lists(masks: Masks) -> dict[str, list[int]]:
    return {name: np.nonzero(m)[0].tolist() for name, m in masks.items()}


@torch.no_grad()
def multiply_readers(model: nn.Module, kept: Kept, factor: float) -> None:
    """Multiply every weight by `factor` where it reads a removed channel, in place."""
    tensors = named_tensors(model)
    for (name, _), gone in removed_inputs(tensors, kept).items():
        t = tensors[name]
        t.mul_(torch.where(gone, t.new_tensor(factor), 1.0))


@torch.no_grad()
def weight_left(model: nn.Module, kept: Kept) -> float:
    """The norm of what reads removed channels in a weight, relative to the weight's. The largest of all weights."""
    tensors = named_tensors(model)
    left = [float(precise(tensors[name] * gone).norm() / precise(tensors[name]).norm().clamp_min(1e-20))
            for (name, _), gone in removed_inputs(tensors, kept).items()]
    return max(left, default=0.0)


@torch.no_grad()
def relative_norms(graph: Graph, tensors: Mapping[str, Tensor], role: Literal["out", "in"]) -> dict[str, np.ndarray]:
    """For each channel the L2 norm of the weights that make it ("out") or read it ("in"), divided by the mean of its layer. The
    mean over layers; shape (size,)."""
    found = {}
    for g in graph.free:
        layers = []
        for s in (s for s in g.slices if s.role in (role, "both")):
            t = tensors[s.tensor].detach()
            rest = [d for d in range(t.dim()) if d != s.dim]
            squares = torch.cat([precise(part).abs().square().sum(rest) for part in t.chunk(s.blocks, dim=0)]).cpu().numpy()
            norms = np.sqrt(np.bincount(s.channels, squares[s.positions], g.size))
            layers.append(norms / max(float(norms.mean()), 1e-20))
        found[g.name] = np.mean(layers, axis=0) if layers else np.ones(g.size)
    return found
