"""ResRep: compactors on a model, the schedule of their masks, the rule for their gradients, and the merge.

Ding et al., "ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting" (ICCV 2021).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BudgetError, ConfigError, PlanError, StorageError
from ..graph.cost import CostKind, CostModel
from ..graph.selection import Kept
from ..graph.types import Graph
from ..narrowing.narrow import record
from ..narrowing.optimizer import carry_optimizer
from ..planning.greedy import fits
from ..planning.plan import widths
from ..planning.requests import Budget, matching
from ..surgery.copying import duplicate, fresh_copy, same_tensors
from ..surgery.walk import named_tensors
from .compactor import NAME, Compactor, behind, resrep_gradient, row_norms, rows_like, turned_around, unit_rows
from .placement import Scope, prepare
from .ranking import by_channel, candidates, choose, priors
from .restructure import Layout, restore_shapes, restructure
from .schedule import Forgetting, Ranking, decoupled

FORMAT = 1


class ResRep:
    """Compactors behind the layers of `model` (which is changed, in place), and their training to a budget.

    The model computes what it did before. Train it as ever, with an optimizer over `param_groups` to which `attach` was
    called; between steps `shrink` takes out what is zero already; `merge` gives the narrow network.

    `macs`, `params`: what may remain, as for `plan`. `steps`: optimizer steps of the whole training; the schedule follows
    from it. `scope="inner"`: channels that one layer makes, as in the paper; "all": residual streams too. `exclude`: patterns
    of groups to leave. `scores`: what is known of the channels beforehand; row norms count times a channel's score relative
    to its group's mean. `settings`: see `Forgetting`.

    Raises PlanError if the model is not the one that was traced or nothing can be compacted, BudgetError for a budget below
    the least that can be reached, ConfigError for odd settings.
    """

    def __init__(self, model: nn.Module, graph: Graph, *, macs: float | None = None, params: float | None = None,
                 steps: int, scope: Scope = "inner", exclude: Sequence[str] = (), scores: Mapping[str, Tensor] | None = None,
                 settings: Forgetting | None = None) -> None:
        if macs is None and params is None:
            raise PlanError("give a budget: macs= or params=")
        if type(steps) is not int or steps < 1:
            raise ConfigError(f"steps={steps!r}: give the number of optimizer steps of the training")
        if scope not in ("inner", "all"):
            raise ConfigError(f"scope={scope!r}: give 'inner' or 'all'")
        same_tensors(model, graph)
        if any(isinstance(m, Compactor) for m in model.modules()):
            raise ConfigError("the model has compactors already: merge them first, or take a fresh model")
        left_out = {n for p in ([exclude] if isinstance(exclude, str) else exclude) for n in matching(graph, p)}
        self.model, (self.graph, found) = model, prepare(model, graph, scope, left_out)
        graph = self.graph
        self.reasons = {**found.reasons, **dict.fromkeys(left_out, "excluded")}
        self.parts, self.rows = candidates(graph, {n: r for n, r in found.rows.items() if n not in left_out}, self.reasons)
        if not self.rows:
            raise PlanError("ResRep finds nothing to compact: "
                            + ("; ".join(f"{n}: {w}" for n, w in list(self.reasons.items())[:4]) or "nothing is free"))
        used = {site for mine in self.rows.values() for site in mine}
        self.sites = {m: s for m, s in found.sites.items() if m in used}
        self.constants = [c for c in found.constants if c[1] in self.rows]
        self.cost = CostModel(graph)
        self.dense: dict[CostKind, float] = {k: self.cost.cost(k, self.cost.dense) for k in ("macs", "params")}
        self.targets = Budget(macs, params).targets(self.dense)
        self.check_reachable()
        self.budget = {"macs": macs, "params": params}
        self.scope, self.steps, self.step = scope, steps, 0
        settings = settings or Forgetting()
        self.settings = settings.over(steps, self.channels_to_go(settings.ranking))
        self.prior = priors(graph, self.rows, scores)
        self.keep = {g.name: np.arange(g.size) for g in graph.free}
        self.layout = Layout({}, {name: np.arange(s.size) for name, s in self.sites.items()})
        self.masked = dict(self.dense)
        self.optimizer: torch.optim.Optimizer | None = None
        self.before: dict[str, Tensor] = {}
        self.resting = self.idle = False  # the budget is reached; and the compactors are merged
        self.shrinking: set[str] = set()  # compactors with chosen rows
        self.penalised: dict[str, Tensor] = {}
        self.follow_every = min(8, max(1, steps // 100))
        self.ruled_rows = {name: np.zeros(s.size, dtype=bool) for name, s in self.sites.items()}
        for site, row in (item for mine in self.rows.values() for item in mine.items()):
            self.ruled_rows[site][row.positions] = True
        self.install()

    # ------------------------------------------------------------------------------------------------ the user's side

    def param_groups(self, lr: float, weight_decay: float = 0.0, momentum: float | None = None,
                     **options: Any) -> list[dict[str, Any]]:
        """Two parameter groups for an optimizer: the network's own, and the compactors' (no weight decay; for SGD, that is
        where `momentum` is given, their own momentum, and the rate that goes with it). A loop that sets rates itself
        multiplies by the group's `lr_scale`."""
        forgetting = [c.weight for c in self.compactors().values()]
        own = {id(w) for w in forgetting}
        remembering = [p for p in self.model.parameters() if id(p) not in own]
        first = {"params": remembering, "lr": lr, "weight_decay": weight_decay, **options}
        second = {**first, "params": forgetting, "weight_decay": 0.0}
        if momentum is not None:
            first["momentum"], second["momentum"] = momentum, self.settings.momentum
            scale = self.settings.lr_scale
            second["lr_scale"] = min(1.0, (1 - second["momentum"]) / (1 - momentum)) if scale is None else scale
            second["lr"] = lr * second["lr_scale"]
        return [first, second]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let every step of `optimizer` follow the rule. Raises ConfigError if it lacks a compactor, decays one, or one was
        attached before."""
        if self.optimizer is not None:
            raise ConfigError("attach was called before: a ResRep has one optimizer")
        group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        for name, c in self.compactors().items():
            if id(c.weight) not in group_of:
                raise ConfigError(f"the optimizer lacks the compactor of {name}: make it of resrep.param_groups(lr=...)")
            if group_of[id(c.weight)].get("weight_decay"):
                raise ConfigError(f"the optimizer decays the compactor of {name}: give the compactors weight_decay=0, "
                                  "as resrep.param_groups does")
        self.optimizer = optimizer
        optimizer.register_step_pre_hook(self.before_step)
        optimizer.register_step_post_hook(self.after_step)

    def shrink(self, *, fold: bool = True, ema: Sequence[nn.Module] = ()) -> float:
        """Take the channels out of the running network whose rows are zero, and give back the share of the dense MACs (or
        parameters) that remain. Call it between steps, with no graph held.

        With `fold` compactors are merged into their layers and begin anew as diagonals of their row norms: producers get
        narrower too, and once the budget is reached all are merged for good. In eval mode the network computes the same; in
        train mode its BatchNorms take their variance from the compactors' running one. Without, only rows and what reads them
        go, and training goes on exactly as it would have.
        The optimizer follows (momentum and the like are sliced), and so do learning rate schedulers; `ema`: averaged copies of
        the model, such as timm's `ModelEmaV3.module`, which lose the same channels (what they remember of them too).
        Rebuild DistributedDataParallel around the model afterwards.
        """
        keep = self.remaining()
        idle = fold and self.resting and not self.idle
        if idle or any(len(keep[n]) < len(self.keep[n]) for n in keep):
            for m in (*ema, self.model):
                layout, swaps = restructure(m, self.graph, self.sites, self.layout, keep, self.constants, fold=fold, idle=idle)
            self.idle |= idle
            if self.optimizer is not None:
                carry_optimizer(self.optimizer, swaps)
            self.keep, self.layout, self.penalised = keep, layout, {}
        return self.reached()

    def waiting(self) -> float:
        """The share of the dense network that `shrink` would take out now; 1 when it can merge the compactors for good."""
        if self.resting and not self.idle:
            return 1.0
        return self.reached(self.keep) - self.reached()

    def merge(self, model: nn.Module | None = None) -> nn.Module:
        """The narrow network: plain modules, every compactor merged; the trained model stays as it is, or `model`: an averaged
        copy of it. In eval mode it computes what was trained, to rounding. Warns if the budget has not been reached."""
        source = self.model if model is None else model
        small = duplicate(source, {id(t): fresh_copy(t) for t in named_tensors(source).values()})
        keep = self.remaining()
        restructure(small, self.graph, self.sites, self.layout, keep, self.constants, fold=True, merge=True)
        now = widths(self.cost, keep)
        for kind, target in self.targets.items():
            have = self.cost.cost(kind, now)
            if have > target:
                warnings.warn(f"the budget was not reached: {kind} {have:,.0f} of {self.dense[kind]:,.0f} remain "
                              f"({have / self.dense[kind]:.1%}), {target / self.dense[kind]:.1%} was asked for; train longer "
                              f"(step {self.step} of {self.steps})", stacklevel=2)
        record(small, Kept(self.graph, keep))
        return small

    def progress(self) -> dict[str, float]:
        """Shares of the dense network: `masked` (without chosen channels) and `reached` (without those that are zero), of the
        budget's kind; `chosen` and `zero` channels; the least and mean norm of the rows that stay."""
        kind = next(iter(self.targets))
        norms = self.norms()
        chosen = self.chosen_channels()
        keep = self.remaining()
        stay = np.concatenate([norms[n][~chosen[n]] for n in norms])
        return {
            "masked": self.masked[kind] / self.dense[kind], "reached": self.reached(keep),
            "chosen": float(sum(c.sum() for c in chosen.values())),
            "zero": float(sum(self.graph[n].size - len(kept) for n, kept in keep.items())),
            "least_norm": float(stay.min()) if len(stay) else 0.0, "mean_norm": float(stay.mean()) if len(stay) else 0.0,
        }

    def __str__(self) -> str:
        p = self.progress()
        kind = next(iter(self.targets))
        line = (f"step {self.step} of {self.steps}: {kind} masked {p['masked']:.1%}, reached {p['reached']:.1%} of the dense "
                f"network (budget {self.targets[kind] / self.dense[kind]:.1%}); {p['zero']:.0f} channels are zero, "
                f"{p['chosen']:.0f} chosen; norms of the rest from {p['least_norm']:.2f}, {p['mean_norm']:.2f} on average")
        return "\n".join([line, *(f"not compacted: {n}: {why}" for n, why in self.reasons.items())])

    # ------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Schedule, counters, masks and the shapes that shrinking has left; tensors and plain values only. Weights are in the
        model's own state dict, momentum in the optimizer's."""
        return {
            "format": FORMAT, "step": self.step, "steps": self.steps, "budget": dict(self.budget), "scope": self.scope,
            "settings": asdict(self.settings), "groups": {n: self.graph[n].size for n in self.rows},
            "masked": dict(self.masked), "resting": (self.resting, self.idle),
            "keep": {n: k.tolist() for n, k in self.keep.items()},
            "ends": [(t, d, rows.tolist()) for (t, d), rows in self.layout.ends.items()],
            "rows": {n: r.tolist() for n, r in self.layout.rows.items()},
            "masks": {n: {"chosen": c.chosen.clone(), "gone": c.gone.clone()} for n, c in self.compactors().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, on a fresh ResRep around the dense model: the model gets the shapes that it had then
        (an attached optimizer its parameters). Load the model's and the optimizer's own state dicts after this.

        Raises StorageError for another format, budget, schedule or model.
        """
        mine = {"format": FORMAT, "steps": self.steps, "budget": self.budget, "scope": self.scope,
                "settings": asdict(self.settings), "groups": {n: self.graph[n].size for n in self.rows}}
        for key, value in mine.items():
            if state.get(key) != value:
                what = "the model" if key == "groups" else key
                raise StorageError(f"this state is of another run: {what} was {state.get(key)}, is {value}")
        if self.layout.ends or self.step:
            raise StorageError("load_state_dict needs a fresh ResRep around the dense model")
        layout = Layout({(t, d): np.array(rows) for t, d, rows in state["ends"]},
                        {n: np.array(r) for n, r in state["rows"].items()})
        swaps = restore_shapes(self.model, self.graph, self.sites, layout)
        if self.optimizer is not None:
            carry_optimizer(self.optimizer, swaps)
        self.layout, self.step, self.masked = layout, state["step"], dict(state["masked"])
        self.resting, self.idle = state["resting"]
        self.keep = {n: np.array(k, dtype=np.int64) for n, k in state["keep"].items()}
        for name, c in self.compactors().items():
            for mask in ("chosen", "gone"):
                getattr(c, mask).copy_(state["masks"][name][mask])
            c.following, c.idle = self.step % self.follow_every == 0, self.idle
            c.weight.requires_grad_(not self.idle)
            if bool(c.chosen.any()):
                self.shrinking.add(name)

    # ------------------------------------------------------------------------------------------------ the rule

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, args: Any = None, kwargs: Any = None) -> None:
        """The pre-hook: choose when it is time, then turn every compactor's gradient into the rule's."""
        if getattr(optimizer, "grad_scale", None) is not None:
            raise ConfigError(f"{type(optimizer).__name__} with fused=True unscales gradients inside its step, where the rule "
                              "cannot see them: make it with fused=False to use a GradScaler")
        if self.idle:
            return
        s, compactors = self.settings, self.compactors()
        grads = [c.weight.grad for c in compactors.values() if c.weight.grad is not None]
        if not grads:
            raise ConfigError("no gradient has reached the compactors: run the model that ResRep was given, then backward()")
        if not bool(torch.stack([g.sum() for g in grads]).isfinite().all()):
            raise ConfigError(f"the gradients are not finite at step {self.step}: the step was not made, the weights are "
                              "those of the last good one; try a lower learning rate")
        if self.step >= s.warmup_steps and (self.step - s.warmup_steps) % s.mask_interval == 0:  # type: ignore[operator]
            self.update_masks()
        for name, c in compactors.items():
            w, group = c.weight, self.group_of(optimizer, c.weight)
            if self.resting or name in self.shrinking or decoupled(optimizer):
                self.before[name] = w.detach().clone()
            if w.grad is None:
                continue
            if self.resting:
                w.grad.zero_()
            elif decoupled(optimizer):
                w.grad.masked_fill_(rows_like(c.chosen, w), 0)
            else:
                w.grad.copy_(resrep_gradient(w.grad, w, c.chosen, self.strengths(name, c, group)))

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, args: Any = None, kwargs: Any = None) -> None:
        """The post-hook: a chosen row that the step has turned around is zero from now on."""
        self.step += 1
        for name, c in self.compactors().items() if not self.idle else ():
            c.following = self.step % self.follow_every == 0
            w, old = c.weight, self.before.pop(name, None)
            if old is None:
                continue
            if self.resting:
                w.copy_(old)
                continue
            if decoupled(optimizer) and w.grad is not None:
                strength = self.strengths(name, c, self.group_of(optimizer, w), decoupled=True)
                w.sub_(rows_like(strength, w) * unit_rows(old))
            c.gone |= turned_around(w, old, c.chosen, self.settings.threshold)
            zero = rows_like(c.gone, w)
            w.masked_fill_(zero, 0)
            for value in optimizer.state.get(w, {}).values():
                if isinstance(value, Tensor) and value.shape == w.shape:
                    value.masked_fill_(zero, 0)

    @staticmethod
    def group_of(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Any]:
        """The parameter group that a compactor is in."""
        return next(g for g in reversed(optimizer.param_groups) if any(p is q for q in g["params"]))

    def strengths(self, name: str, c: Compactor, group: Mapping[str, Any], decoupled: bool = False) -> Tensor:
        """The penalty of each row; for optimizers that it is decoupled from, how far a row goes in this step."""
        slow, fast = self.settings.pulls(float(group["lr"]), group.get("momentum", 0.0), decoupled)
        if name not in self.penalised:
            rows = torch.as_tensor(self.ruled_rows[name][self.layout.rows[name]], device=c.weight.device)
            self.penalised[name] = rows.to(c.weight.dtype)
        kept = self.penalised[name] * slow
        return torch.where(c.chosen, fast, kept) if name in self.shrinking else kept

    def update_masks(self) -> None:
        """Choose anew (section 3.3): the lowest rows of all compactors, at most theta of them, up to the budget."""
        s = self.settings
        updates = (self.step - s.warmup_steps) // s.mask_interval + 1  # type: ignore[operator]
        most = math.floor(updates * s.rows_per_update + 1e-9)  # type: ignore[operator]
        ranking = {n: v * self.prior[n] for n, v in self.norms().items()}
        chosen, self.masked = choose(self.graph, self.cost, self.parts, ranking, self.targets, most, s.ranking)
        dense = {name: np.zeros(site.size, dtype=bool) for name, site in self.sites.items()}
        for site, row in (item for mine in self.rows.values() for item in mine.items()):
            dense[site][row.positions] |= chosen[row.group][row.channels]
        for name, c in self.compactors().items():
            here = torch.as_tensor(dense[name][self.layout.rows[name]], device=c.weight.device)
            c.chosen.copy_(here | c.gone)
            if bool(c.chosen.any()):
                self.shrinking.add(name)
        self.resting = s.rest and self.is_reached()

    # ------------------------------------------------------------------------------------------------ what is where

    def compactors(self) -> dict[str, Compactor]:
        """The compactors in the model, by the module that they stand behind."""
        return {name: getattr(self.model.get_submodule(name), NAME) for name in self.sites}

    def install(self) -> None:
        """Put the compactors into the model, as submodules of the modules that they stand behind."""
        named = named_tensors(self.model)
        for name, site in self.sites.items():
            module = self.model.get_submodule(name)
            variance = None
            if site.norm is not None and site.kind != "diagonal":
                variance = named[f"{site.norm}.weight"].detach() ** 2
            module.add_module(NAME, Compactor(site, named[site.rows[0]], variance).train(module.training))
            module.register_forward_hook(behind)

    def check_reachable(self) -> None:
        """BudgetError if even one channel of everything is too much."""
        least = choose(self.graph, self.cost, self.parts, {n: np.ones(self.graph[n].size) for n in self.rows},
                       dict.fromkeys(self.targets, 0.0), math.inf, "norm")[1]
        for kind, target in self.targets.items():
            if least[kind] > target:
                others = "; ".join(f"{n}: {w}" for n, w in list(self.reasons.items())[:4])
                raise BudgetError(
                    f"{kind}={target:,.0f} ({target / self.dense[kind]:.1%} of the dense network) cannot be reached with "
                    f"compactors on {len(self.rows)} groups: the least is {least[kind]:,.0f} "
                    f"({least[kind] / self.dense[kind]:.1%})"
                    + (f". Left alone: {others}" if others else ""))

    def channels_to_go(self, ranking: Ranking) -> int:
        """About how many channels the budget asks for."""
        rng = np.random.default_rng(0)
        ranks = {n: rng.random(self.graph[n].size) for n in self.rows}
        chosen, _ = choose(self.graph, self.cost, self.parts, ranks, self.targets, math.inf, ranking)
        return sum(int(c.sum()) for c in chosen.values())

    def by_channel(self, values: Mapping[str, np.ndarray], fill: float) -> dict[str, list[np.ndarray]]:
        """See `choosing.by_channel`."""
        return by_channel(self.graph, self.rows, self.layout.rows, values, fill)

    def norms(self) -> dict[str, np.ndarray]:
        """The root mean square, over the rows of a channel, of their norms."""
        found = {n: row_norms(c.weight.detach()).double().cpu().numpy() for n, c in self.compactors().items()}
        return {g: np.sqrt(np.nanmean(np.square(rows), axis=0)) for g, rows in self.by_channel(found, 0.0).items()}

    def chosen_channels(self) -> dict[str, np.ndarray]:
        """The channels that are to go, a bool for each."""
        found = {n: c.chosen.cpu().numpy().astype(float) for n, c in self.compactors().items()}
        return {g: np.nanmax(rows, axis=0) > 0 for g, rows in self.by_channel(found, 1.0).items()}

    def remaining(self) -> dict[str, np.ndarray]:
        """The channels that stay: all but those whose every row is zero, as far as ties let them go (gone ones stay gone)."""
        found = {n: (~c.gone).cpu().numpy().astype(float) for n, c in self.compactors().items()}
        alive = {g: np.nanmax(rows, axis=0) > 0 for g, rows in self.by_channel(found, 0.0).items()}
        removed: list[tuple[str, np.ndarray]] = []
        for part in self.parts:
            zero = [c.channels[~alive[c.group][c.channels]] for c in part.cells]
            zero = [z[np.argsort(np.isin(z, self.keep[c.group]), kind="stable")] for z, c in zip(zero, part.cells, strict=True)]
            counts = np.array([len(z) for z in zero])
            removed += [(cell.group, channels[: int(n)])
                        for cell, channels, n in zip(part.cells, zero, part.removable(counts, counts), strict=True)]
        return dict(Kept.without(self.graph, removed).keep)

    def is_reached(self) -> bool:
        """Whether the network without the channels that are zero meets the budget."""
        now = widths(self.cost, self.remaining())
        return fits({kind: self.cost.cost(kind, now) for kind in self.targets}, self.targets)

    def reached(self, keep: Mapping[str, np.ndarray] | None = None) -> float:
        """The share of the dense cost that remains: without the channels that are zero, or with those in `keep`."""
        kind = next(iter(self.targets))
        return self.cost.cost(kind, widths(self.cost, self.remaining() if keep is None else keep)) / self.dense[kind]
