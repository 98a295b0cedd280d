"""`--method soft`: train the network with masks that come and go, from soft to hard, then cut what is masked."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

import narrower

from ..errors import ConfigError
from ..soft.soft_pruning import PUBLISHED, unmaskable
from ..training.methods import Methods
from . import run_folder
from .config import PruneConfig
from .job import Job
from .oneshot import check_plan, distilling, narrowed, recalibrated
from .trained import plan_by_prior, save_if_interrupted, scored_by_prior

MASKINGS = 20  # so often channels are chosen at least, also in a training of fewer epochs
KNOWN = ("factor", "grow", "harden", "fixed")


def check(job: Job, model: nn.Module, graph: narrower.Graph) -> None:
    """Check that soft pruning is possible, before the dense network is trained.

    Raises:
        ConfigError: `--softness` has an unknown setting, or one out of range.
        PlanError: no group can be masked, or the budget cannot be reached.
    """
    given = job.settings.prune
    plan = check_plan(scored_by_prior(given, graph, unmaskable(graph)), model, graph, job.times)
    try:
        narrower.SoftPruning(model, graph, plan=plan, steps=1, **softness(given))
    except ConfigError as error:
        raise ConfigError(f"--softness {given.softness}: {error}") from error


def softness(given: PruneConfig) -> dict[str, Any]:
    """The settings of SoftPruning: how many channels go is planned, which of them the training decides. Raises ConfigError."""
    named = given.softness
    found: Mapping[str, Any] = PUBLISHED.get(named, {named: None}) if isinstance(named, str) else named
    if not found.keys() <= {*KNOWN}:
        raise ConfigError(f"--softness {named}: take {', '.join(PUBLISHED)}, or JSON with {', '.join(KNOWN)}")
    return {"fixed": False, **found}


def choose(job: Job, model: nn.Module, graph: narrower.Graph) -> narrower.Plan:
    """Plan, without the groups that cannot be masked."""
    return plan_by_prior(job, model, graph, unmaskable(graph))


def train_soft(job: Job, model: nn.Module, graph: narrower.Graph) -> tuple[nn.Module, narrower.Plan]:
    """Train a copy of `model` by soft pruning, cut it, and renew its BatchNorm statistics if better.

    Returns the narrow network, and the plan of the channels that went in the end. On Ctrl-C what is masked is cut and saved.
    """
    given, config = job.settings.prune, job.settings.train
    plan = choose(job, model, graph)
    training = copy.deepcopy(model)
    steps = min(job.updates, max(config.epochs, MASKINGS))
    soft = narrower.SoftPruning(training, graph, plan=plan, steps=steps, **softness(given))
    with save_if_interrupted(job, soft.narrow), distilling(job, model, training) as distillation:
        job.train(training, "soft", run_folder.CHECKPOINT, config, methods=Methods(soft=soft, distillation=distillation))
    found = replace(soft.plan, latency_ms=plan.latency_ms)  # of the same widths
    with job.stage("mask") as facts:
        facts |= {"macs": found.macs, "params": found.params, "text": str(soft)}
        job.run.write(run_folder.PLAN, found.to_json().encode())
    return recalibrated(job, narrowed(job, training, found)), found
