"""`--method centripetal`: train the filters of each cluster until they are identical, then merge them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

import narrower

from ..centripetal.centripetal_sgd import PUBLISHED, unmergeable
from ..errors import ConfigError
from ..training.methods import Methods
from . import run_folder
from .config import PruneConfig
from .job import Job
from .oneshot import check_plan, distilling, recalibrated
from .trained import merged, plan_by_prior, save_if_interrupted, scored_by_prior

KNOWN = ("together", "strength", "clustering")


def check(job: Job, model: nn.Module, graph: narrower.Graph) -> None:
    """Check that filters can be merged, before the dense network is trained.

    Raises:
        ConfigError: `--pull` has an unknown setting, or one out of range.
        PlanError: no group can be merged, or the budget cannot be reached.
    """
    given = job.settings.prune
    plan = check_plan(scored_by_prior(given, graph, left_alone(given, graph)), model, graph, job.times)
    pulled(job, model, graph, plan, 1)


def left_alone(given: PruneConfig, graph: narrower.Graph) -> dict[str, str]:
    """The free groups that are not merged, with the reasons."""
    return unmergeable(graph, given.scope)


def pulled(job: Job, model: nn.Module, graph: narrower.Graph, plan: narrower.Plan, steps: int) -> narrower.CentripetalSGD:
    """CentripetalSGD as the settings say. Only the widths of the plan count. Raises as CentripetalSGD."""
    given = job.settings.prune
    named = given.pull
    found: Mapping[str, Any] = PUBLISHED if named == "published" else {named: None} if isinstance(named, str) else named
    if not found.keys() <= {*KNOWN}:
        raise ConfigError(f"--pull {named}: take published, or JSON with {', '.join(KNOWN)}")
    options: dict[str, Any] = {"scope": given.scope, "seed": job.settings.run.seed, **found}
    try:
        return narrower.CentripetalSGD(model, graph, plan=plan, steps=steps, **options)
    except ConfigError as error:
        raise ConfigError(f"--pull {named}: {error}") from error


def choose(job: Job, model: nn.Module, graph: narrower.Graph) -> narrower.Plan:
    """Plan the widths, without the groups that cannot be merged."""
    return plan_by_prior(job, model, graph, left_alone(job.settings.prune, graph))


def train_centripetal(job: Job, model: nn.Module, graph: narrower.Graph) -> tuple[nn.Module, narrower.Plan]:
    """Train a copy of `model` until the filters of each cluster are identical, merge them, and renew BatchNorm if better.

    Returns the narrow network, and the plan that keeps the first channel of each cluster. On Ctrl-C what there is is merged and
    saved.
    """
    plan = choose(job, model, graph)
    training = copy.deepcopy(model)
    csgd = pulled(job, training, graph, plan, job.updates)
    with (save_if_interrupted(job, lambda: csgd.merge() if csgd.step else None),
          distilling(job, model, training) as distillation):
        job.train(training, "centripetal", run_folder.CHECKPOINT, job.settings.train,
                  methods=Methods(centripetal=csgd, distillation=distillation))
    small = merged(job, csgd, csgd.unified())
    found = replace(csgd.plan, latency_ms=plan.latency_ms)  # of the same widths
    job.run.write(run_folder.PLAN, found.to_json().encode())
    return recalibrated(job, small), found
