"""`narrower train` and `narrower prune` from start to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import narrower

from ..data.streams import StreamImages
from ..deployment.module_times import time_modules
from ..errors import ConfigError, DataError
from ..models.checkpoints import load_checkpoint
from ..report.facts import MEASURE
from ..training.agreement import first, share
from ..training.evaluate import headline
from ..training.methods import Methods
from . import run_folder
from .config import LEAST_IMAGES, TRAINED
from .job import Job, Settings
from .layerwise import narrow_by_layers
from .narrowing_methods import NARROWING_METHODS
from .networks import (
    Costs,
    costs_of,
    from_first,
    from_run,
    is_narrow,
    labelled_by,
    load_dense,
    save_network,
    save_weights,
)  # fmt: skip
from .oneshot import distilling, narrow_oneshot, planned, sample, saved_plan
from .timing import Timed, check_request, timed, with_given_times, with_times

LAYER_SECONDS = 1.0
"""How long the times of layers are measured."""
STAGES = ("cut", "merge", "recalibrate", "reconstruct", "tune", "layers")
"""Stages before the fine-tuning after which the network is evaluated."""


@dataclass(frozen=True)
class Result:
    """Costs of the network before and after, and how good they are: by the figure `headline` of the task, in percent.

    `before`: that of the first. `stages`: that of the narrow network after each stage, in their order. `start` says what the
    first one is: "dense", or "given" where it was narrow already. `timed`: with `--latency`.
    """

    dense: Costs
    narrow: Costs
    headline: str
    before: float
    stages: dict[str, float]
    folder: Path
    start: str = "dense"
    timed: Timed | None = None


def train_dense(job: Job) -> dict[str, Any]:
    """`narrower train`: train a dense network, or further that of a run, and save it. Returns its headline."""
    if not job.data.labelled:
        raise ConfigError(f"the images of {job.data.name} have no classes, so no network can be trained on them")
    model = load_dense(job)
    _ = job.data.train, job.data.val
    with job.claimed(model), save_at_end(job, lambda: save_network(model, job.run.folder)):
        return job.train(model, "train", run_folder.CHECKPOINT, job.settings.train, best=lambda: save_best(job, model))


def save_best(job: Job, model: nn.Module) -> None:
    save_weights(model, job.run.folder / run_folder.BEST)


@contextmanager
def save_at_end(job: Job, save: Callable[[], object]) -> Iterator[None]:
    """Save at the end and on Ctrl-C, but not after another error. Only the first of several processes saves."""
    try:
        yield
    except KeyboardInterrupt:
        if job.run.writes:
            save()
        raise
    if job.run.writes:
        save()


def prune(job: Job) -> Result:
    """`narrower prune`. A resumed run continues where it stopped.

    Raises:
        NarrowerError: something cannot be done. If possible, this is found before training starts.
        KeyboardInterrupt: Ctrl-C. What was trained is in the run folder.
    """
    job, model, graph = prepared(job)
    with job.claimed(model):
        return run_stages(job, model, graph)


def prepared(job: Job) -> tuple[Job, nn.Module, narrower.Graph]:
    """The network and its graph. What cannot be done fails here, before anything is trained."""
    model = load_dense(job)
    job = labelled_by(job, model)
    with job.stage("trace", busy="tracing") as facts:
        graph = narrower.trace(
            model, job.example, allow_inexact=job.settings.prune.allow_inexact, progress=job.report.note
        )  # fmt: skip
        facts |= {"groups": len(graph.groups), "free": len(graph.free)}
    if job.settings.prune.method in TRAINED:
        check_training(job.settings)
    job = with_given_times(job, graph)
    check_request(job, model, graph)
    _ = job.data.train, job.data.val
    check_images(job)
    return job, model, graph


def check_images(job: Job) -> None:
    """Raise DataError where there are too few training images to measure and repair on."""
    images = job.fit_and_held[0]
    if job.settings.prune.measures and not isinstance(images, StreamImages) and len(images) < LEAST_IMAGES:
        raise DataError(f"{len(images)} training images are too few: measuring and repairing need {LEAST_IMAGES} at least, "
                        "better hundreds; or leave both out: --allocate share --no-reconstruct")


def check_training(given: Settings) -> None:
    """Raise ConfigError where the settings of the training are none for a method that narrows in it."""
    method = f"--method {given.prune.method}"
    if given.train.epochs < 1:
        raise ConfigError(f"{method} needs --epochs: it works by training; without training take --method obs")
    if given.train.model_ema:
        raise ConfigError(f"--model-ema: {method} narrows the network in the training, so its weights cannot be averaged")


def plan_only(job: Job) -> narrower.Plan:
    """`narrower prune --dry-run`: the plan, reported as a stage.

    Raises:
        ConfigError: the weights are not there yet, or the plan is made by the training.
    """
    given = job.settings
    if not (given.model.checkpoint or given.model.pretrained):
        raise ConfigError("--dry-run plans for trained weights: give --checkpoint, --pretrained or the folder of a run")
    if given.prune.allocate == "norms":
        raise ConfigError("--dry-run has nothing to show for --allocate norms: the training decides")
    job, model, graph = prepared(job)
    job = with_times(job, model, graph)
    if method := NARROWING_METHODS.get(given.prune.method):
        return cast(narrower.Plan, method.plan(job, model, graph))
    return planned(job, model, graph, list(sample(job, given.prune.images)))


def run_stages(job: Job, model: nn.Module, graph: narrower.Graph) -> Result:
    """From the dense network to the saved narrow one. What the folder of a run that goes on has is not done again."""
    method = job.settings.prune.method
    job = with_times(job, model, graph)
    before = prepare_dense(job, model)
    name = before["headline"]
    if (found := restored(job, graph)) is None:
        untrained = narrow_by_layers if job.settings.prune.schedule == "layer" else narrow_oneshot
        narrowed_by = NARROWING_METHODS[method].train if method in NARROWING_METHODS else untrained
        found = narrowed_by(job, model, graph)
        if job.run.writes:
            with job.stage("save"):
                narrower.save(found[0], job.run.folder)
            (job.run.folder / run_folder.LAYERS).unlink(missing_ok=True)
    small, plan = found
    stages = first(lambda: {stage: row[name] for stage in STAGES if name in (row := job.run.last(stage))})
    if job.settings.train.epochs and method not in TRAINED:
        with (save_at_end(job, lambda: narrower.save(small, job.run.folder)),
              distilling(job, model, small, plan) as distillation):
            stages["fine-tune"] = job.train(
                small, "fine-tune", run_folder.CHECKPOINT, job.settings.train, best=lambda: save_best(job, small),
                methods=Methods(distillation=distillation),
            )[name]  # fmt: skip
    times = timed(job, model, small, plan) if plan is not None else None
    return replace(measured(job, model, small, before, stages or {"narrow": job.headline(small)[name]}), timed=times)


def measured(job: Job, model: nn.Module, small: nn.Module, before: Mapping[str, Any], stages: dict[str, float]) -> Result:
    """The last stage: both networks measured. `before`: the headline of the first, `stages`: those of the second."""
    name = before["headline"]
    with job.stage(MEASURE, busy="measuring") as facts:
        dense, narrow = first(lambda: costs_of(job.example, model, small))
        facts |= first(lambda: layer_times(job.example, model, small))
        last = {name: [*stages.values()][-1]}
        facts |= {"dense": {name: before[name], **asdict(dense)}, "narrow": last | asdict(narrow), "stages": stages}
    return Result(dense, narrow, name, before[name], stages, job.run.folder, "given" if is_narrow(model) else "dense")


def layer_times(example: Tensor, model: nn.Module, small: nn.Module) -> dict[str, Any]:
    """`{"layer_times": {"ms": {weight: [dense, narrow]}, ...}}` in eager PyTorch, and with how many threads on which device."""
    dense, narrow = time_modules([model, small], example, seconds=LAYER_SECONDS)
    both = {name: [round(dense[name], 5), round(narrow[name], 5)] for name in dense if name in narrow}
    return {"layer_times": {"ms": both, "threads": torch.get_num_threads(), "device": str(example.device)}}


def restored(job: Job, graph: narrower.Graph) -> tuple[nn.Module, narrower.Plan | None] | None:
    """The narrow network and its plan from the folder of a run that goes on."""
    if not first(lambda: job.run.resume and bool(job.run.last("save"))):  # a network without that row was saved on Ctrl-C
        return None
    text = first(lambda: plan.to_json() if (plan := saved_plan(job, graph)) else None)
    return from_first(job, lambda: from_run(job, job.run.folder)), narrower.Plan.from_json(text, graph) if text else None


def prepare_dense(job: Job, model: nn.Module) -> dict[str, Any]:
    """Give the dense network its weights: load those that this run has trained, or train it if the settings name none.

    Returns its headline.
    """
    given, file = job.settings.model, job.run.folder / run_folder.DENSE
    if not given.checkpoint and not given.pretrained:
        if not first(lambda: job.run.resume and file.exists()):
            own = replace(job.settings.train, epochs=job.settings.prune.dense_epochs, lr=job.settings.prune.dense_lr)
            found = job.train(model, "train dense", run_folder.DENSE_CHECKPOINT, own)
            if job.run.writes:
                save_weights(model, file)
                (job.run.folder / run_folder.DENSE_CHECKPOINT).unlink(missing_ok=True)
            return found
        first(lambda: bool(load_checkpoint(model, file)))
        share(model)
    with job.stage("evaluate dense") as facts:
        facts |= job.headline(model)
    return headline(facts)
