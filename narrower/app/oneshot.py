"""The one-shot methods: score every channel once, measure, cut and repair. No labels are needed, but by `taylor`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

import narrower

from ..data.images import Batch, batches
from ..data.seeding import mix
from ..data.streams import StreamImages
from ..data.task import CLASSIFICATION, Task, has_logits
from ..deployment.fitting import elsewhere
from ..errors import BudgetError, ConfigError, StorageError
from ..graph.cost import CostKind, CostModel
from ..inputs import map_tensors
from ..repair.comparison import Measure
from ..training.agreement import first
from ..training.settle import renew, settle
from . import run_folder
from .config import TRAINED, PruneConfig
from .job import Job
from .networks import check_score, from_first, load_dense

LOOKING = ("hrank", "obs", "taylor")
"""Methods whose scores need images."""
LEAST_SHARE = 0.125
"""Of every group, what the second plan leaves that `roomier` tries. Damages of groups are measured one at a time: where most of
several neighbours goes, together they may cost more than their sum."""
SAMPLED = 128  # images in a batch to score, measure and repair with, at most


def score(
    given: PruneConfig, model: nn.Module, graph: narrower.Graph, images: Iterable[Batch], seed: int = 0,
    task: Task = CLASSIFICATION,
) -> narrower.Scores:
    """The scores of the configured method. `images` are read only if it needs them, the loss of the task by `taylor`."""
    methods: dict[str, Callable[[], narrower.Scores]] = {
        "hrank": lambda: narrower.hrank(model, graph, images, macs=given.macs, params=given.params),
        "obs": lambda: narrower.obs(model, graph, images),
        "taylor": lambda: narrower.taylor(model, graph, images, task.loss),
        "magnitude": lambda: narrower.magnitude(model, graph),
        "fpgm": lambda: narrower.fpgm(model, graph),
        "bn_scale": lambda: narrower.bn_scale(model, graph),
        "random": lambda: narrower.random(graph, seed),
    }
    return methods[given.method]()


def trial_scores(given: PruneConfig, model: nn.Module, graph: narrower.Graph) -> narrower.Scores:
    """Scores without images, to check that a plan is possible before anything is trained."""
    return narrower.random(graph) if given.method in LOOKING else score(given, model, graph, [])


def make_plan(given: PruneConfig, graph: narrower.Graph, scores: narrower.Scores,
              damage: narrower.Sensitivity | None = None, times: narrower.LatencyTable | None = None) -> narrower.Plan:
    """The plan for the configured request."""
    return narrower.plan(graph, scores, **request_of(given, damage, times))


def request_of(given: PruneConfig, damage: narrower.Sensitivity | None, times: narrower.LatencyTable | None) -> dict[str, Any]:
    """The configured request, as `plan` takes it."""
    return {
        "macs": given.macs, "params": given.params, "latency_ms": given.latency, "remove": given.remove,
        "round_to": given.round_to, "exclude": given.exclude, "min_channels": given.min_channels or 1, "sensitivity": damage,
        "latency": times,
    }  # fmt: skip


@contextmanager
def distilling(job: Job, model: nn.Module, student: nn.Module,
               plan: narrower.Plan | None = None) -> Iterator[narrower.Distillation | None]:
    """Within, the distillation of the settings; None where they want none. Features are compared where there is a plan."""
    given = job.settings.prune
    if not given.distill:
        yield None
        return
    logits = has_logits(job.data.task)
    with narrower.Distillation(
        model, student, plan, temperature=given.distill_temperature if logits else None, weight=given.distill_weight,
        features=given.distill_features if plan is not None else 0.0, logits=logits,
    ) as distillation:  # fmt: skip
        yield distillation


def measure_of(job: Job) -> Measure:
    """How outputs are compared: as class scores where the task says that they are."""
    return "kl" if has_logits(job.data.task) else "relative"


def check_plan(given: PruneConfig, model: nn.Module, graph: narrower.Graph, times: narrower.LatencyTable | None = None,
               ) -> narrower.Plan:
    """A plan of other scores, to fail before anything is trained. Raises as `make_plan` and `read_sensitivity`."""
    damage = read_sensitivity(Path(given.sensitivity)) if given.sensitivity else None
    return make_plan(given, graph, trial_scores(given, model, graph), damage, times)


def sample(job: Job, count: int) -> Iterator[Batch]:
    """`count` random training images (by the run's seed), not augmented, on the device. None of them is held out.

    They come in batches as large as those of all processes together: what is sampled from a batch depends on its size.
    """
    config, images = job.settings.train, job.fit_and_held[0]
    order, size = mix(job.settings.run.seed, "sample"), min(config.batch_size * job.shard[1], SAMPLED, count)
    workers = 0 if isinstance(images, StreamImages) else config.workers  # each reader of a stream has other images
    for x, y in batches(images, size, order=order, workers=workers, limit=count):
        if len(x) > count:  # of a stream
            x, y = x[:count], y[:count]
        yield map_tensors((x, y), lambda t: t.to(job.accelerator.device))
        count -= len(x)
        if count <= 0:
            return


def calibration(job: Job) -> list[Batch]:
    """The sampled images of the settings, in the first process, which scores, measures and repairs for all."""
    return list(sample(job, job.settings.prune.images)) if job.shard[0] == 0 else []


def scored(job: Job, model: nn.Module, graph: narrower.Graph, images: Sequence[Batch], *,
           again: bool = False) -> narrower.Scores:
    """The scores of the settings, as a stage, or from the folder of a run that goes on.

    `again`: of a network on its way, which is not the one of the folder.
    """
    given, file = job.settings.prune, job.run.folder / run_folder.SCORES
    if job.run.resume and file.exists() and not again:
        return read_scores(file)
    with job.stage("score") as facts:
        watched = job.report.watch(images, f"scoring ({given.method})", given.images)
        facts["method"] = given.method
        found = score(given, model, graph, watched, job.settings.run.seed, job.data.task)
    if not again:
        job.run.write(run_folder.SCORES, save({name: values.detach().cpu().clone() for name, values in found.items()}))
    return found


def read_scores(file: Path) -> narrower.Scores:
    """The scores in a file. Raises StorageError if it cannot be read."""
    try:
        return narrower.Scores(load_file(file))
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot read the scores {file}: {error}") from error


def measured(job: Job, model: nn.Module, graph: narrower.Graph, scores: narrower.Scores,
             images: Sequence[Batch], *, again: bool = False) -> narrower.Sensitivity:
    """The damage of each group: measured, or read from the file of the settings or from the folder of a run that goes on.

    `again`: of a network on its way, which is not the one of the files.
    """
    file = job.run.folder / run_folder.SENSITIVITY
    if job.settings.prune.sensitivity:
        return read_sensitivity(Path(job.settings.prune.sensitivity))
    if job.run.resume and file.exists() and not again:
        return read_sensitivity(file)
    with job.stage("sensitivity") as facts:
        found = narrower.sensitivity(model, graph, scores, images, measure=measure_of(job), progress=job.note_slowly())
        facts |= {"images": found.images, "text": str(found)}
    if not again:
        job.run.write(run_folder.SENSITIVITY, found.to_json().encode())
    return found


def read_sensitivity(file: Path) -> narrower.Sensitivity:
    """The damages in a file. Raises ConfigError if it cannot be read, PlanError if it holds something else."""
    try:
        return narrower.Sensitivity.from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the sensitivity {file}: {error}") from error


def measure_sensitivity(job: Job) -> narrower.Sensitivity:
    """`narrower sensitivity`: the damage of each group of the dense network, saved in the run folder."""
    given = job.settings.model
    if not (given.checkpoint or given.pretrained):
        raise ConfigError("the damage of groups is measured on a trained network: give --checkpoint or --pretrained")
    if job.settings.prune.method in TRAINED:  # which plan by their prior
        job = job.with_pruning(method=job.settings.prune.prior)
    check_score(job)
    model = load_dense(job)
    graph = narrower.trace(model, job.example, allow_inexact=job.settings.prune.allow_inexact, progress=job.report.note)
    _ = job.data.train
    with job.claimed(model):
        def find() -> narrower.Sensitivity:
            images = list(sample(job, job.settings.prune.images))
            return measured(job, model, graph, scored(job, model, graph, images), images)

        return first(find)


def planned(job: Job, model: nn.Module, graph: narrower.Graph, images: Sequence[Batch]) -> narrower.Plan:
    """Score, measure and plan, or read the plan of a run that goes on. By the first process, for all."""
    text = first(lambda: (saved_plan(job, graph) or new_plan(job, model, graph, images)).to_json())
    return narrower.Plan.from_json(text, graph)


def new_plan(job: Job, model: nn.Module, graph: narrower.Graph, images: Sequence[Batch]) -> narrower.Plan:
    """Score, measure and plan."""
    given = job.settings.prune
    plan = planned_in_steps(job, model, graph, images) if given.steps > 1 else planned_once(job, model, graph, images)
    job.run.write(run_folder.PLAN, plan.to_json().encode())
    return plan


def planned_once(job: Job, model: nn.Module, graph: narrower.Graph, images: Sequence[Batch], *,
                 again: bool = False) -> narrower.Plan:
    """Score, measure (`again`: another network than the dense one) and plan."""
    given = job.settings.prune
    scores, damage = scored(job, model, graph, images, again=again), None
    if given.allocate == "measured" and given.remove is None:
        damage = measured(job, model, graph, scores, images, again=again)
    with job.stage("plan", busy="planning") as facts:
        plan, told = make_plan(given, graph, scores, damage, job.times), ""
        if damage is not None and given.reconstruct and given.min_channels is None and given.steps == 1:
            roomy = replace(given, min_channels=LEAST_SHARE)
            other, told = roomier(job, model, plan, lambda: make_plan(roomy, graph, scores, damage, job.times), images)
            given, plan = (given, plan) if other is plan else (roomy, other)
        if given.latency is not None and job.times is not None and not elsewhere(job.times, model, job.example):
            found = narrower.fit_latency(model, graph, scores, job.example, start=plan,
                                         **request_of(given, damage, job.times))
            plan, told = found.plan, f"{told}\n{found}"
            facts["trials"] = [{**t._asdict(), "error": t.error} for t in found.trials]
        facts |= {"macs": plan.macs, "params": plan.params, "text": f"{plan}{told}"}
        if plan.latency_ms:
            facts["predicted_ms"] = plan.latency_ms
    return plan


def roomier(job: Job, model: nn.Module, plan: narrower.Plan, wider: Callable[[], narrower.Plan],
            images: Sequence[Batch]) -> tuple[narrower.Plan, str]:
    """The plan, or a `wider` one that leaves `LEAST_SHARE` of every group, and why: the one whose repaired network is nearer to
    the dense one, on images that nothing was fitted on. The plan itself where it leaves as much, or that cannot be done."""
    if all(len(kept) >= LEAST_SHARE * plan.graph[name].size for name, kept in plan.keep.items()):
        return plan, ""
    try:
        other = wider()
    except BudgetError:
        return plan, ""
    far = []
    for tried in (plan, other):
        found = narrower.reconstruct(model, narrower.narrow(model, tried), tried, images, stream_targets=False,
                                     measure=measure_of(job))
        far.append(found.divergences[found.kept])
    told = (f"\n{found.measure} from the dense outputs once repaired: {far[0]:.4g}, and {far[1]:.4g} where every group keeps "
            f"{LEAST_SHARE:g} of its channels: ")
    return (plan, told + "not taken") if far[0] <= far[1] else (other, told + "taken")


def planned_in_steps(job: Job, model: nn.Module, graph: narrower.Graph, images: Sequence[Batch]) -> narrower.Plan:
    """A plan in several steps, each by the same factor: the network is cut, repaired, and scored and measured again in between.

    The plan that comes out is for the dense network.
    """
    given, small = job.settings.prune, model
    plan: narrower.Plan | None = None
    for number in range(1, given.steps + 1):
        at = narrower.trace(small, job.example, allow_inexact=given.allow_inexact) if plan else graph
        budget = budget_of_step(given, graph, at, number / given.steps)
        if not any(budget.values()):
            continue  # the step before went far enough: a channel is more than the rest of the way
        job.report.note(f"step {number} of {given.steps}")
        found = planned_once(job.with_pruning(**budget), small, at, images, again=number > 1)
        plan = narrower.compose(plan, found) if plan else found
        if number < given.steps:
            small = narrower.narrow(model, plan)
            if given.reconstruct:
                small = narrower.reconstruct(model, small, plan, images, measure=measure_of(job)).model
    assert plan is not None
    return plan


def budget_of_step(given: PruneConfig, graph: narrower.Graph, at: narrower.Graph, way: float) -> dict[str, Any]:
    """The budget after a part `way` (0 to 1) of the steps, as numbers of MACs and parameters. None where `at` meets it."""
    found: dict[str, Any] = {}
    kinds: tuple[CostKind, ...] = ("macs", "params")
    for kind in kinds:
        dense, now = (sum(CostModel(g).dense_costs(kind).values()) for g in (graph, at))
        wish: float | None = getattr(given, kind)
        if wish is not None:
            share = wish / dense if wish > 1 else wish
            found[kind] = goal if (goal := dense * share**way) < now else None
    return found


def saved_plan(job: Job, graph: narrower.Graph) -> narrower.Plan | None:
    """The plan in the folder of a run that goes on, if there is one."""
    file = job.run.folder / run_folder.PLAN
    if not job.run.resume or not file.exists():
        return None
    return narrower.Plan.from_json(file.read_text(encoding="utf-8"), graph)


def narrow_oneshot(job: Job, model: nn.Module, graph: narrower.Graph) -> tuple[nn.Module, narrower.Plan]:
    """Plan, narrow, verify, and repair. The narrow network and its plan."""
    given = job.settings.prune
    images = calibration(job)
    plan = planned(job, model, graph, images)
    if given.reconstruct:
        small = reconstructed(job, model, narrowed(job, model, plan), plan, images)
        return (tuned(job, model, small, plan, images) if given.tune_steps else small), plan
    with job.stage("fold") as facts:
        folded = narrower.fold(model, plan)
        if folded.channels or folded.left:
            facts |= {"folded": dict(folded.channels), "text": str(folded)}
    return recalibrated(job, narrowed(job, folded.model, folded.plan)), plan


def narrowed(job: Job, model: nn.Module, plan: narrower.Plan) -> nn.Module:
    """Narrow, and verify against the masked dense network."""
    with job.stage("narrow"):
        small = narrower.narrow(model, plan)
    with job.stage("verify", busy="verifying") as facts:
        facts["error"] = first(lambda: narrower.verify(model, small, plan, next(sample(job, 4))[0]).error)
    with job.stage("cut") as facts:
        facts |= job.headline(small)
    return small


def reconstructed(job: Job, model: nn.Module, small: nn.Module, plan: narrower.Plan, images: Sequence[Batch]) -> nn.Module:
    """The cut network, its remaining weights repaired by least squares. `verify` is for the network before."""
    with job.stage("reconstruct", busy="reconstructing") as facts:
        def repair() -> nn.Module:
            found = narrower.reconstruct(model, small, plan, images, measure=measure_of(job))
            facts["text"] = str(found)
            return found.model

        repaired = from_first(job, repair)
        facts |= job.headline(repaired)
    return repaired


def tuned(job: Job, model: nn.Module, small: nn.Module, plan: narrower.Plan, images: Sequence[Batch]) -> nn.Module:
    """The repaired network, tuned without labels on the images of the repair."""
    given = job.settings.prune
    with job.stage("tune", busy="tuning") as facts:
        def train() -> nn.Module:
            found = narrower.tune(model, small, plan, images, steps=given.tune_steps, lr=given.tune_lr,
                                  seed=job.settings.run.seed, measure=measure_of(job), progress=job.note_slowly())
            facts["text"] = str(found)
            return found.model

        better = from_first(job, train)
        facts |= job.headline(better)
    return better


def recalibrated(job: Job, small: nn.Module) -> nn.Module:
    """The cut network with renewed BatchNorm statistics, where they are better on the images held out, or where none are."""
    fit, held = job.fit_and_held
    config, seed = job.settings.train, job.settings.run.seed
    if config.recalibrate:
        with job.stage("recalibrate") as facts:
            if held is None:
                facts["images"] = renew(small, fit, config, job.accelerator, seed)
            else:
                facts["kept"] = settle(small, fit, held, config, job.accelerator, seed=seed).kept
            facts |= job.headline(small)
    return small
