"""`--method resrep`: train the network with compactors towards the budget, then merge them."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

import narrower

from ..errors import ConfigError, VerifyError
from ..inputs import flatten_tensors
from ..training.agreement import first
from ..training.methods import Methods
from . import run_folder
from .config import PruneConfig
from .job import Job
from .oneshot import distilling, make_plan, planned, recalibrated, sample, scored

MERGED = 1e-3  # largest difference of the merged network, relative to the outputs, in float32


class Choice(NamedTuple):
    """Which channels go: those of a `plan`, or (None) those that the norms of the rows, times `scores`, choose on the way."""

    plan: narrower.Plan | None = None
    scores: narrower.Scores | None = None


def compacted(given: PruneConfig, model: nn.Module, graph: narrower.Graph, steps: int, choice: Choice) -> narrower.ResRep:
    """Insert compactors into `model` as the settings say.

    Raises:
        ConfigError: `--forgetting` has an unknown setting.
        PlanError: nothing can be compacted, or the budget cannot be reached.
    """
    try:
        settings = narrower.Forgetting(**given.forgetting)
    except TypeError as error:
        known = ", ".join(narrower.Forgetting.__dataclass_fields__)
        raise ConfigError(f"--forgetting {given.forgetting}: it knows {known}") from error
    budget = {} if choice.plan else {"macs": given.macs, "params": given.params}
    return narrower.ResRep(
        model, graph, **budget, plan=choice.plan, steps=steps, scores=choice.scores,
        scope=given.scope, exclude=given.exclude, settings=settings,  # type: ignore[arg-type]
    )  # fmt: skip


def check(job: Job, model: nn.Module, graph: narrower.Graph) -> None:
    """Check that ResRep is possible, before the dense network is trained. Raises as `compacted`."""
    given = job.settings.prune
    plan = None if given.allocate == "norms" else make_plan(
        compactable(given, model, graph), graph, narrower.random(graph), times=job.times)
    compacted(given, copy.deepcopy(model), graph, 1, Choice(plan))


def compactable(given: PruneConfig, model: nn.Module, graph: narrower.Graph) -> PruneConfig:
    """The settings of a plan for ResRep: scored by the prior, without the groups that no compactor covers."""
    least = replace(given, macs=1 - 1e-9, params=None)
    covered = compacted(least, copy.deepcopy(model), graph, 1, Choice()).placement.rows
    whole = [group.name for group in graph.free if group.name not in covered]
    return replace(given, method=given.prior, forgetting={}, exclude=[*given.exclude, *whole])


def choose(job: Job, model: nn.Module, graph: narrower.Graph) -> Choice:
    """Plan, or score for the choice by norms."""
    given = job.settings.prune
    images = list(sample(job, given.images)) if job.shard[0] == 0 else []
    if given.allocate != "norms":
        planning = replace(job, settings=replace(job.settings, prune=compactable(given, model, graph)))
        return Choice(planned(planning, model, graph, images))
    if given.prior == "none":
        return Choice()
    scoring = replace(given, method=given.prior, allocate="share", forgetting={})  # a method that scores has no norms
    scoring_job = replace(job, settings=replace(job.settings, prune=scoring))
    return Choice(scores=first(lambda: scored(scoring_job, model, graph, images)))


def train_resrep(job: Job, model: nn.Module, graph: narrower.Graph) -> tuple[nn.Module, narrower.Plan | None]:
    """Train a copy of `model` with compactors, shrink it on the way, merge it, and renew its BatchNorm statistics if better.

    On Ctrl-C it is merged and saved.
    """
    given = job.settings.prune
    choice = choose(job, model, graph)
    training = copy.deepcopy(model)
    resrep = compacted(given, training, graph, job.updates, choice)
    try:
        job.train(training, "resrep", run_folder.CHECKPOINT, job.settings.train,
                  methods=Methods(resrep=resrep, distillation=distilling(job, model, training)))
    except KeyboardInterrupt:
        if job.run.writes:
            narrower.save(resrep.merge(), job.run.folder)
        raise
    with job.stage("merge") as facts:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            small = resrep.merge()
        facts["error"] = first(lambda: difference(training, small, next(sample(job, 16))[0]))
        facts["text"] = "\n".join([str(resrep), *(f"warning: {w.message}" for w in said)])
        facts |= job.headline(small)
    return recalibrated(job, small), choice.plan


@torch.inference_mode()
def difference(trained: nn.Module, merged: nn.Module, images: Any) -> float:
    """The largest difference of the outputs in eval mode, relative to the largest output.

    Raises:
        VerifyError: the difference is too large for rounding.
    """
    want, have = (flatten_tensors(net.to(images.device).eval()(images)) for net in (trained, merged))
    error = max(float((a.float() - b.float()).abs().max() / a.float().abs().max().clamp_min(1e-12))
                for a, b in zip(want, have, strict=True))
    if not error <= MERGED:
        raise VerifyError(f"the merged network differs from the trained one by {error:.1e} of its outputs (at most "
                          f"{MERGED:.0e} is rounding): narrower is at fault, please report it; the checkpoint is kept")
    return error
