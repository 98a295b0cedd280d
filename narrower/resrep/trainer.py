"""Insert compactors into a model, train them towards a budget, and merge them: Ding et al., "ResRep: Lossless CNN Pruning via
Decoupling Remembering and Forgetting" (ICCV 2021)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, PlanError, StorageError, check_state
from ..graph.cost import CostKind, CostModel
from ..graph.equal_counts import Component
from ..graph.selection import Kept
from ..graph.types import ChannelMap, Graph, html_table
from ..inputs import precise
from ..narrowing.narrow import record_narrowing
from ..narrowing.optimizer import carry_optimizers, check_carried
from ..narrowing.step_hooks import group_of, hook_steps, not_done
from ..planning.plan import Plan
from ..planning.requests import Budget, excluded, restored_scores
from ..preconditions import checked
from ..surgery.copying import independent_copy, same_tensors
from ..surgery.walk import named_tensors
from .checks import averaged, check_gradients, check_optimizer, check_reached, check_used, used_gradients
from .compactor import Compactor, insert_compactor, resrep_gradient, row_norms, rows_like, unit_rows
from .placement import Scope, prepare, without_groups
from .ranking import Candidates, priors, tied_parts, wanted_by
from .restructure import Mode, compactor_at, largest_cut, restore_shapes, restructure
from .schedule import Forgetting, decouples_penalty
from .showing import group_rows

FORMAT = 2

Phase = Literal["forgetting", "resting", "frozen"]
"""`forgetting`: rows are chosen and shrink to zero. `resting`: the budget is reached, and only the network trains on.
`frozen`: `shrink` has merged all compactors for good."""


class ResRep:
    """Insert compactors behind the layers of `model`, in place, and train them towards a budget.

    At first the model computes what it did before. Train it as usual, with an optimizer over `param_groups` that was passed to
    `attach`. Between steps `shrink` removes channels that are zero already. `merge` returns the narrow network.

    Args:
        model: the traced network.
        macs: the budget, as for `plan`. Norms of rows then decide during the training which channels go.
        params: likewise, of parameters.
        plan: instead of a budget, the channels that go. After all steps `merge` returns its widths.
        steps: optimizer steps of the whole training. The schedule follows from them.
        scope: "inner" for channels that one layer produces, as in the paper. "all" for residual streams too.
        exclude: patterns of groups to leave alone.
        scores: row norms are multiplied by a channel's score, divided by the mean of its group.
        settings: see `Forgetting`.

    Raises:
        PlanError: the model is not the traced one, nothing can be compacted, or the plan does not fit.
        BudgetError: the budget cannot be reached.
        ConfigError: a setting is out of range, or the model has compactors already.
    """

    @checked
    def __init__(self, model: nn.Module, graph: Graph, *, macs: float | None = None, params: float | None = None,
                 plan: Plan | None = None, steps: int, scope: Scope = "inner", exclude: Sequence[str] = (),
                 scores: Mapping[str, Tensor] | None = None, settings: Forgetting | None = None) -> None:
        if (plan is None) == (macs is None and params is None):
            raise PlanError("give a budget, macs= or params=, or instead a plan=")
        if type(steps) is not int or steps < 1:
            raise ConfigError(f"steps={steps!r}: give the number of optimizer steps of the training")
        if scope not in ("inner", "all"):
            raise ConfigError(f"scope={scope!r}: give 'inner' or 'all'")
        same_tensors(model, graph)
        if any(isinstance(m, Compactor) for m in model.modules()):
            raise ConfigError("the model has compactors already: merge them first, or take a fresh model")
        self.model = model
        cost, parts = self.find_places(graph, scope, exclude)
        self.dense: dict[CostKind, float] = {k: cost.cost(k, cost.dense) for k in ("macs", "params")}
        self.budget, self.scope = {"macs": macs, "params": params}, scope
        settings = settings or Forgetting()
        wanted = None if plan is None else wanted_by(plan, self.graph, self.placement)
        targets: dict[CostKind, float] = {"macs": plan.macs[1]} if plan else Budget(macs, params).targets(self.dense)
        self.candidates = Candidates(cost, self.placement, parts, targets, settings.ranking, wanted)
        self.candidates.check_reachable()
        self.prior = priors(self.graph, self.placement, scores)
        self.settings = settings.over(steps, self.candidates.count())
        self.steps, self.step = steps, 0
        self.phase: Phase = "forgetting"
        self.masked = dict(self.dense)  # the costs without chosen channels
        self.kept = Kept(self.graph, {g.name: np.arange(g.size) for g in self.graph.free})
        self.optimizer: torch.optim.Optimizer | None = None
        self.before: dict[str, Tensor] = {}  # weights of compactors before the step
        self.rates: dict[str, float] = {}  # learning rates of compactors in the last step
        self.used = used_gradients({})
        self.insert_compactors()

    def find_places(self, graph: Graph, scope: Scope, exclude: Sequence[str]) -> tuple[CostModel, list[Component]]:
        """Find the sites of compactors, and add the biases that they need. The costs, and what can be compacted."""
        left_out = excluded(graph, exclude)
        self.graph, found = prepare(self.model, graph, scope, left_out)
        parts, self.placement = tied_parts(self.graph, without_groups(found, dict.fromkeys(left_out, "excluded")))
        if not self.placement.rows:
            why = "; ".join(f"{n}: {w}" for n, w in list(self.reasons.items())[:4])
            raise PlanError(f"ResRep finds nothing to compact: {why or 'nothing is free'}")
        return CostModel(self.graph), parts

    def insert_compactors(self) -> None:
        """Insert each compactor as a submodule of the module whose output it takes."""
        named = named_tensors(self.model)
        for name, site in self.placement.sites.items():
            norm = None if site.kind == "diagonal" else site.norm
            variance = None if norm is None else precise(named[f"{norm}.weight"].detach()) ** 2
            insert_compactor(self.model.get_submodule(name), Compactor(site, named[site.rows[0]], variance))
        for name, rows in self.row_maps():
            compactor_at(self.model, name).penalised[rows.positions] = 1

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why groups have no compactors, by their names."""
        return self.placement.reasons

    # ------------------------------------------------------------------------------------------------ the user's side

    def param_groups(self, lr: float, weight_decay: float | None = None, momentum: float | None = None,
                     **options: Any) -> list[dict[str, Any]]:
        """Two parameter groups for an optimizer: the network's and the compactors'.

        Compactors have no weight decay; the network has that of the optimizer unless `weight_decay` is given. Give `momentum`
        for SGD: compactors then get their own momentum, and a learning rate to match. A training loop that sets learning rates
        must multiply them by the group's `lr_scale`.
        """
        forgetting = [c.weight for c in self.compactors().values()]
        own = {id(w) for w in forgetting}
        remembering = [p for p in self.model.parameters() if id(p) not in own]
        decay = {} if weight_decay is None else {"weight_decay": weight_decay}
        first = {"params": remembering, "lr": lr, **decay, **options}
        second = {**first, "params": forgetting, "weight_decay": 0.0}
        if momentum is not None:
            first["momentum"], second["momentum"] = momentum, self.settings.momentum
            scale = self.settings.lr_scale
            second["lr_scale"] = min(1.0, (1 - second["momentum"]) / (1 - momentum)) if scale is None else scale
            second["lr"] = lr * second["lr_scale"]
        return [first, second]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Apply ResRep's gradient rule in every step of `optimizer`, by hooks; `step(closure)` works too.

        Raises ConfigError if it lacks a compactor, decays or dampens one, calls a closure several times in a step (as LBFGS) or
        calls no hooks in its step, if a compactor is frozen, or if an optimizer was attached before.
        """
        if self.optimizer is not None:
            raise ConfigError("attach was called before: a ResRep has one optimizer")
        check_optimizer(optimizer, self.compactors())
        hook_steps(optimizer, before=self.before_step, after=self.after_step)
        self.optimizer = optimizer

    def shrink(self, *, fold: bool = True, ema: Sequence[nn.Module] = (),
               optimizers: Sequence[torch.optim.Optimizer] = ()) -> float:
        """Remove the channels whose rows are zero from the network in training. Returns the remaining share of the dense MACs
        (or parameters). Call it between steps, while no autograd graph is held and no gradients are accumulated.

        With `fold`, compactors are merged into their layers and start again as diagonals of their row norms, so these layers
        get narrower too. Once the budget is reached, all are merged for good. Outputs in eval mode stay the same. In train mode
        BatchNorms get their variance from the compactors' running variance. Without `fold`, only rows and their readers are
        removed, and training continues exactly as without `shrink`.

        Optimizer state (such as momentum) is sliced too, and learning rate schedulers stay valid. `optimizers`: others than the
        attached one (but not LBFGS), if they train parameters of the model; warns if a parameter is in none. `ema`: averaged
        copies of the model, such as timm's `ModelEmaV3`, from which the same channels are removed, though these lag
        behind and may not be zero there. Rebuild DistributedDataParallel around the model afterwards.
        """
        for optimizer in optimizers:
            check_carried(optimizer)
        check_used(self.compactors(), self.used, self.model)
        copies = [averaged(self.model, average) for average in ema]
        kept = self.remaining()
        mode: Mode = "cut" if not fold else "freeze" if self.phase == "resting" else "fold"
        if mode == "freeze" or any(len(kept.keep[n]) < len(k) for n, k in self.kept.keep.items()):
            for model in (*copies, self.model):
                swaps = restructure(model, self.placement, self.kept, kept, mode)
            carry_optimizers([self.optimizer, *optimizers], swaps, self.model)
            self.kept = kept
            if mode == "freeze":
                self.phase = "frozen"
        return self.reached()

    def waiting(self) -> float:
        """The share of the dense network that `shrink` would remove now. 1 if it can merge the compactors for good."""
        return 1.0 if self.phase == "resting" else self.candidates.share(self.kept) - self.reached()

    def merge(self, model: nn.Module | None = None, *, over: bool | None = None) -> nn.Module:
        """The narrow network: plain modules, with every compactor merged. In eval mode it equals the trained one to rounding.

        `model`: an averaged copy to merge instead of the trained model. Neither is changed. An average lags behind: warns if
        rows are cut that are not zero in it. `over`: whether the training is (None: after `steps`, not counting those that a
        GradScaler skips). Channels of a plan that are not zero then are cut. Warns if the budget is not reached.
        """
        small = independent_copy(self.model if model is None else averaged(self.model, model))
        reached = self.remaining()
        kept = self.candidates.planned(reached) if over or (over is None and self.step >= self.steps) else reached
        if model is not None and (left := largest_cut(small, self.placement, kept)) > self.settings.threshold:
            warnings.warn(f"the averaged copy is cut where it is not zero: compactor rows have norms up to {left:.1e}, of 1 at "
                          "first. Average over fewer steps, or train longer after all rows are zero", stacklevel=2)
        restructure(small, self.placement, self.kept, kept, "merge")
        for missed in self.candidates.missed(reached):
            rest = "" if kept is reached else "; the channels of the plan that are not zero yet are cut"
            why = not_done(self.optimizer, self.step, self.steps)
            warnings.warn(f"the budget was not reached: {missed}{rest}; {why}", stacklevel=2)
        record_narrowing(small, kept)
        return small

    def reached(self) -> float:
        """The cost without the channels that are zero, as a share of the dense MACs (or parameters)."""
        return self.candidates.share(self.remaining())

    def progress(self) -> dict[str, float]:
        """Figures for a log.

        `masked`, `reached`: the cost without chosen channels, and without zero channels, as shares of the dense network's.
        `chosen`, `zero`: numbers of channels. `least_norm`, `mean_norm`: of the rows that stay.
        """
        kind, norms, chosen, kept = self.candidates.kind, self.norms(), self.chosen_channels(), self.remaining()
        stay = np.concatenate([norms[n][~chosen[n]] for n in norms])
        return {
            "masked": self.masked[kind] / self.dense[kind], "reached": self.candidates.share(kept),
            "chosen": float(sum(c.sum() for c in chosen.values())),
            "zero": float(sum(self.graph[n].size - len(k) for n, k in kept.keep.items())),
            "least_norm": float(stay.min()) if len(stay) else 0.0, "mean_norm": float(stay.mean()) if len(stay) else 0.0,
        }

    def __str__(self) -> str:
        p, kind = self.progress(), self.candidates.kind
        budget = self.candidates.targets[kind] / self.dense[kind]
        line = (f"step {self.step} of {self.steps}: {kind} masked {p['masked']:.1%}, reached {p['reached']:.1%} of the dense "
                f"network (budget {budget:.1%}); {p['zero']:.0f} channels are zero, "
                f"{p['chosen']:.0f} chosen; norms of the rest from {p['least_norm']:.2f}, {p['mean_norm']:.2f} on average")
        return "\n".join([line, *(f"not compacted: {n}: {why}" for n, why in self.reasons.items())])

    def _repr_html_(self) -> str:
        """For notebooks."""
        return html_table(group_rows(self.norms(), self.chosen_channels(), self.remaining().keep), str(self).splitlines())

    # ------------------------------------------------------------------------------------------------ state

    def run_settings(self) -> dict[str, Any]:
        """The settings that must agree between a saved state and the ResRep that loads it."""
        return {"format": FORMAT, "steps": self.steps, "budget": dict(self.budget), "scope": self.scope,
                "plan": self.candidates.removed_by_plan(),
                "settings": asdict(self.settings), "groups": {n: self.graph[n].size for n in self.placement.rows}}

    def state_dict(self) -> dict[str, Any]:
        """Schedule, counters, masks and current shapes, as tensors and plain values. Weights are in the model's own state dict,
        momentum in the optimizer's."""
        return self.run_settings() | {
            "step": self.step, "phase": self.phase, "keep": {n: k.tolist() for n, k in self.kept.keep.items()},
            "masked": dict(self.masked), "rates": dict(self.rates), "scores": {n: s.tolist() for n, s in self.prior.items()},
            "compactors": {n: {"rows": c.rows.tolist(), "columns": c.columns.tolist(),
                               "chosen": c.chosen.bool(), "gone": c.gone.bool()} for n, c in self.compactors().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state` on a fresh ResRep around the dense model. The model gets the saved shapes, and an attached optimizer
        the new parameters. Afterwards load the state dicts of the model and of the optimizer.

        Raises StorageError for another format, budget, schedule, model or `scores=`.
        """
        check_state(self.run_settings(), state)
        if self.step or self.kept.cuts:
            raise StorageError("load_state_dict needs a fresh ResRep around the dense model")
        saved, kept = state["compactors"], Kept(self.graph, {n: np.array(k, dtype=np.int64) for n, k in state["keep"].items()})
        self.prior = restored_scores(self.prior, state)
        rows, columns = ({n: np.array(c[key], dtype=np.int64) for n, c in saved.items()} for key in ("rows", "columns"))
        swaps = restore_shapes(self.model, self.placement, kept, rows, columns)
        carry_optimizers([self.optimizer], swaps, self.model)
        self.kept, self.step, self.phase, self.masked = kept, state["step"], state["phase"], dict(state["masked"])
        self.rates = dict(state.get("rates", {}))
        for name, c in self.compactors().items():
            c.gone.copy_(saved[name]["gone"])
            c.choose(saved[name]["chosen"])
            c.following, c.reached = self.step % self.follow_every == 0, c.shrinking
            if self.phase == "frozen":
                c.freeze()

    # ------------------------------------------------------------------------------------------------ the rule

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """With the gradients of a step: update the masks when due, then apply the rule to every compactor's gradient."""
        if self.phase == "frozen":
            return
        s, compactors = self.settings, self.compactors()
        check_gradients(compactors.values(), self.step)
        due = self.step >= s.warmup_steps and (self.step - s.warmup_steps) % s.mask_interval == 0  # type: ignore[operator]
        if due and self.phase == "forgetting":
            self.update_masks()
            check_reached(compactors)
        decoupled = decouples_penalty(optimizer)
        for name, c in compactors.items():
            w, chosen = c.weight, c.chosen.bool()
            if self.phase == "resting" or c.shrinking or decoupled:
                self.before[name] = w.detach().clone()
            if w.grad is None or self.phase == "resting":
                continue
            if decoupled:
                w.grad.masked_fill_(rows_like(chosen, w), 0)
            else:
                group = group_of(optimizer, w)
                self.follow_rate(name, c, float(group["lr"]), optimizer.state.get(w, {}).get("momentum_buffer"))
                w.grad.copy_(resrep_gradient(w.grad, w, chosen, self.strengths(c, group, decoupled)))

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step: a chosen row that the step has reversed or made tiny is zero from now on."""
        self.step += 1
        decoupled, compactors = decouples_penalty(optimizer), self.compactors() if self.phase != "frozen" else {}
        self.used = used_gradients(compactors)
        for name, c in compactors.items():
            c.following = self.step % self.follow_every == 0
            w, old = c.weight, self.before.pop(name, None)
            if old is None:
                continue
            if self.phase == "resting":
                w.copy_(old)
                continue
            if decoupled and w.grad is not None:
                w.copy_(torch.where(rows_like(c.chosen.bool(), w), old, w))  # an optimizer that takes signs outruns every pull
                w.sub_(rows_like(self.strengths(c, group_of(optimizer, w), decoupled), w) * unit_rows(old))
            c.settle(old, self.settings.threshold, optimizer.state.get(w, {}))

    def follow_rate(self, name: str, c: Compactor, lr: float, momentum: Tensor | None) -> None:
        """Where SGD's learning rate has jumped up since the last step, scale the momentum of chosen rows down."""
        share = self.settings.share_of_momentum(lr, self.rates.get(name, lr))
        self.rates[name] = lr
        if share < 1 and c.shrinking and momentum is not None:
            momentum.mul_(torch.where(rows_like(c.chosen.bool(), momentum), share, 1.0))

    def strengths(self, c: Compactor, group: Mapping[str, Any], decoupled: bool) -> Tensor:
        """The penalty of each row `(K,)`. If `decoupled` from the gradient: the norm that the row loses in one step."""
        sign = -1 if group.get("maximize") and not decoupled else 1  # the step then goes along the gradient
        slow, fast = (sign * pull for pull in self.settings.pulls(float(group["lr"]), group.get("momentum", 0.0), decoupled))
        penalty = c.penalised * slow
        return torch.where(c.chosen.bool(), fast, penalty) if c.shrinking else penalty

    def update_masks(self) -> None:
        """Choose again (section 3.3): the lowest rows of all compactors, at most theta more than before, up to the budget."""
        s = self.settings
        updates = (self.step - s.warmup_steps) // s.mask_interval + 1  # type: ignore[operator]
        most = math.floor(updates * s.rows_per_update + 1e-9)  # type: ignore[operator]
        chosen, self.masked = self.candidates.choose({n: v * self.prior[n] for n, v in self.norms().items()}, most)
        dense = {name: np.zeros(site.size, dtype=bool) for name, site in self.placement.sites.items()}
        for name, rows in self.row_maps():
            dense[name][rows.positions] |= chosen[rows.group][rows.channels]
        for name, c in self.compactors().items():
            c.choose(torch.as_tensor(dense[name][c.rows]))
        if s.rest and self.candidates.meets_budget(self.remaining()):
            self.phase = "resting"

    # ------------------------------------------------------------------------------------------------ what is where

    @property
    def follow_every(self) -> int:
        """The number of steps between measurements of the output variance."""
        return min(8, max(1, self.steps // 100))

    def compactors(self) -> dict[str, Compactor]:
        """The compactors in the model, by the name of the module that they follow."""
        return {name: compactor_at(self.model, name) for name in self.placement.sites}

    def row_maps(self) -> Iterator[tuple[str, ChannelMap]]:
        """(site, rows): the compactor rows that must be zero before channels of a group can be removed."""
        for maps in self.placement.rows.values():
            yield from maps.items()

    def by_channel(self, of: Callable[[Compactor], Tensor], fill: float) -> dict[str, list[np.ndarray]]:
        """A value of each compactor row, by group: one array (size,) per site. `fill`: the value of removed rows."""
        compactors = self.compactors()
        return self.candidates.by_channel({n: of(c).cpu().double().numpy() for n, c in compactors.items()},
                                          {n: c.rows for n, c in compactors.items()}, fill)

    def norms(self) -> dict[str, np.ndarray]:
        """For each channel the root mean square of the norms of its rows."""
        found = self.by_channel(lambda c: row_norms(c.weight.detach()), 0.0)
        return {g: np.sqrt(np.nanmean(np.square(rows), axis=0)) for g, rows in found.items()}

    def chosen_channels(self) -> dict[str, np.ndarray]:
        """For each channel whether it is to be removed."""
        return {g: np.nanmax(rows, axis=0) > 0 for g, rows in self.by_channel(lambda c: c.chosen, 1.0).items()}

    def remaining(self) -> Kept:
        """The channels that stay. A channel is removed if all its rows are zero and the ties allow it."""
        alive = {g: np.nanmax(rows, axis=0) > 0 for g, rows in self.by_channel(lambda c: c.gone == 0, 0.0).items()}
        return self.candidates.remaining(alive, self.kept)
