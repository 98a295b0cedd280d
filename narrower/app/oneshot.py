"""The one-shot methods: score every channel once, cut, and recalibrate BatchNorm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch.nn.functional as F
from torch import nn

import narrower

from ..data.images import Batch, batches, mix
from .config import PruneConfig
from .job import Job

LOOKING = ("hrank", "taylor")
"""Methods whose scores need images."""


def score(
    given: PruneConfig, model: nn.Module, graph: narrower.Graph, images: Iterable[Batch], seed: int = 0
) -> narrower.Scores:
    """The scores of the configured method. `images` are read only if it needs them."""
    methods: dict[str, Callable[[], narrower.Scores]] = {
        "hrank": lambda: narrower.hrank(model, graph, images, macs=given.macs, params=given.params),
        "taylor": lambda: narrower.taylor(model, graph, images, F.cross_entropy),
        "magnitude": lambda: narrower.magnitude(model, graph),
        "fpgm": lambda: narrower.fpgm(model, graph),
        "bn_scale": lambda: narrower.bn_scale(model, graph),
        "random": lambda: narrower.random(graph, seed),
    }
    return methods[given.method]()


def trial_scores(given: PruneConfig, model: nn.Module, graph: narrower.Graph) -> narrower.Scores:
    """Scores without images, to check that a plan is possible before anything is trained."""
    return narrower.random(graph) if given.method in LOOKING else score(given, model, graph, [])


def make_plan(given: PruneConfig, graph: narrower.Graph, scores: narrower.Scores) -> narrower.Plan:
    """The plan for the configured request."""
    return narrower.plan(
        graph, scores, macs=given.macs, params=given.params, remove=given.remove,
        round_to=given.round_to, exclude=given.exclude, min_channels=given.min_channels,
    )  # fmt: skip


def agreed(job: Job, plan: narrower.Plan) -> narrower.Plan:
    """The plan of the first process, in every process. Equal scores may be ordered differently in another process."""
    if job.accelerator.num_processes == 1:
        return plan
    from accelerate.utils import broadcast_object_list

    (text,) = broadcast_object_list([plan.to_json()])
    return narrower.Plan.from_json(text, plan.graph)


def sample(job: Job, count: int) -> Iterator[Batch]:
    """`count` random training images (by the run's seed), not augmented, on the device."""
    config = job.settings.train
    order = mix(job.settings.run.seed, "sample")
    for x, y in batches(job.data.train, min(config.batch_size, count), order=order, workers=config.workers):
        x, y = x[:count], y[:count]
        yield x.to(job.accelerator.device), y.to(job.accelerator.device)
        count -= len(y)
        if count <= 0:
            return


def narrow_oneshot(job: Job, model: nn.Module, graph: narrower.Graph) -> nn.Module:
    """Score, plan, narrow, verify and recalibrate. Returns the narrow network."""
    given = job.settings.prune
    with job.stage("score") as facts:
        images = job.report.watch(sample(job, given.images), f"scoring ({given.method})", given.images)
        scores = score(given, model, graph, images, job.settings.run.seed)
        facts["method"] = given.method
    with job.stage("plan") as facts:
        plan = agreed(job, make_plan(given, graph, scores))
        facts |= {"macs": plan.macs, "params": plan.params, "text": str(plan)}
    with job.stage("narrow") as facts:
        folded = narrower.fold(model, plan)
        if folded.channels or folded.left:
            facts |= {"folded": dict(folded.channels), "text": str(folded)}
        model, plan = folded.model, folded.plan
        small = narrower.narrow(model, plan)
    with job.stage("verify", busy="verifying") as facts:
        facts["error"] = narrower.verify(model, small, plan, next(sample(job, 4))[0]).error
    if given.recalibrate:
        with job.stage("recalibrate") as facts:
            stream = job.report.watch(sample(job, given.recalibrate), "renewing BatchNorm statistics", given.recalibrate)
            facts["images"] = narrower.recalibrate(small, stream)
    return small
