"""`--method resrep`: train the network with compactors towards the budget, then merge them."""

from __future__ import annotations

import copy
from functools import partial
from typing import NamedTuple

from torch import nn

import narrower

from ..errors import ConfigError
from ..planning.requests import excluded
from ..resrep.history import NormHistory
from ..resrep.placement import place, without_groups
from ..resrep.ranking import tied_parts
from ..surgery.resize import takes_bias
from ..training.agreement import first
from ..training.methods import Methods
from . import run_folder
from .config import PruneConfig
from .job import Job
from .oneshot import calibration, distilling, make_plan, recalibrated, scored
from .trained import merged, plan_by_prior, save_if_interrupted, scored_by_prior


class Choice(NamedTuple):
    """Which channels go: those of a `plan`, or (None) those that the norms of the rows, times `scores`, choose on the way."""

    plan: narrower.Plan | None = None
    scores: narrower.Scores | None = None


def forgetting(given: PruneConfig) -> narrower.Forgetting:
    """The settings of `--forgetting`. Raises ConfigError for one that is not known."""
    try:
        return narrower.Forgetting(**given.forgetting)
    except TypeError as error:
        known = ", ".join(narrower.Forgetting.__dataclass_fields__)
        raise ConfigError(f"--forgetting {given.forgetting}: it knows {known}") from error
    except ConfigError as error:
        raise ConfigError(f"--forgetting {given.forgetting}: {error}") from error


def compacted(given: PruneConfig, model: nn.Module, graph: narrower.Graph, steps: int, choice: Choice) -> narrower.ResRep:
    """Insert compactors into `model` as the settings say. Raises as ResRep."""
    budget = {} if choice.plan else {"macs": given.macs, "params": given.params}
    return narrower.ResRep(
        model, graph, **budget, plan=choice.plan, steps=steps, scores=choice.scores,
        scope=given.scope, exclude=given.exclude, settings=forgetting(given),
    )  # fmt: skip


def check(job: Job, model: nn.Module, graph: narrower.Graph) -> None:
    """Check that ResRep is possible, before the dense network is trained.

    Raises:
        ConfigError: `--forgetting` or `--scope` is none.
        PlanError: nothing can be compacted, or the budget cannot be reached.
    """
    given = job.settings.prune
    forgetting(given)
    plan = None if given.allocate == "norms" else make_plan(
        scored_by_prior(given, graph, left_alone(given, model, graph)), graph, narrower.random(graph), times=job.times)
    compacted(given, copy.deepcopy(model), graph, 1, Choice(plan))


def left_alone(given: PruneConfig, model: nn.Module, graph: narrower.Graph) -> dict[str, str]:
    """The free groups that no compactor covers, with the reasons. Those that the settings exclude are not among them."""
    apart = dict.fromkeys(excluded(graph, given.exclude), "excluded")
    found = place(graph, given.scope, partial(takes_bias, model))
    covered = tied_parts(graph, without_groups(found, apart))[1]
    return {name: why for name, why in covered.reasons.items() if name not in apart}


def choose(job: Job, model: nn.Module, graph: narrower.Graph) -> Choice:
    """Plan, or score for the choice by norms."""
    given = job.settings.prune
    if given.allocate != "norms":
        return Choice(plan_by_prior(job, model, graph, left_alone(given, model, graph)))
    if given.prior == "none":
        return Choice()
    scoring = job.with_pruning(method=given.prior, allocate="share")  # a method that scores has no norms
    images = calibration(job)
    return Choice(scores=first(lambda: scored(scoring, model, graph, images)))


def train_resrep(job: Job, model: nn.Module, graph: narrower.Graph) -> tuple[nn.Module, narrower.Plan | None]:
    """Train a copy of `model` with compactors, shrink it on the way, merge it, and renew its BatchNorm statistics if better.

    On Ctrl-C it is merged and saved.
    """
    given = job.settings.prune
    choice = choose(job, model, graph)
    training = copy.deepcopy(model)
    resrep = compacted(given, training, graph, job.updates, choice)
    with save_if_interrupted(job, resrep.merge), distilling(job, model, training) as distillation:
        job.train(training, "resrep", run_folder.CHECKPOINT, job.settings.train,
                  methods=Methods(resrep=resrep, distillation=distillation, norms=NormHistory(resrep)))
    return recalibrated(job, merged(job, resrep, training)), choice.plan
