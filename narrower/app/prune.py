"""`narrower train` and `narrower prune` from start to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

import narrower

from ..models.checkpoints import load_checkpoint
from . import run_folder
from .job import Job
from .networks import Figures, figures, from_run, load_dense, save_weights
from .oneshot import make_plan, narrow_oneshot, trial_scores
from .resrep_run import check, train_resrep


@dataclass(frozen=True)
class Result:
    """Figures of the dense and the narrow network. `cut_top1`: top-1 after the cut and before fine-tuning."""

    dense: Figures
    narrow: Figures
    cut_top1: float
    folder: Path


def train_dense(job: Job) -> float:
    """`narrower train`: train the dense network and save it. Returns its top-1."""
    model = load_dense(job)
    _ = job.data.train, job.data.val
    job.run.claim(job.settings.flat())
    with save_at_end(job, lambda: save_weights(model, job.run.folder / run_folder.MODEL)):
        return job.train(model, "train", run_folder.CHECKPOINT, job.settings.train)


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
    model = load_dense(job)
    with job.stage("trace", busy="tracing") as facts:
        graph = narrower.trace(
            model, job.example, allow_inexact=job.settings.prune.allow_inexact, progress=job.report.note
        )  # fmt: skip
        facts |= {"groups": len(graph.groups), "free": len(graph.free)}
    trains = job.settings.prune.method == "resrep"
    if trains:  # fail before training if it cannot be done
        check(job, model, graph)
    else:
        make_plan(job.settings.prune, graph, trial_scores(job.settings.prune, model, graph))
    _ = job.data.train, job.data.val  # and if images cannot be read
    job.run.claim(job.settings.flat())
    dense_top1 = prepare_dense(job, model)
    folder = job.run.folder
    if job.run.resume and (folder / run_folder.PLAN).exists() and (cut := job.run.last("cut")):
        small = from_run(job, folder)
        cut_top1 = cut["top1"]
    else:
        small = train_resrep(job, model, graph) if trains else narrow_oneshot(job, model, graph)
        with job.stage("cut") as facts:
            facts["top1"] = cut_top1 = job.evaluate(small)
        if job.run.writes:
            narrower.save(small, folder)
    top1 = cut_top1
    if job.settings.train.epochs and not trains:
        with save_at_end(job, lambda: narrower.save(small, folder)):
            top1 = job.train(small, "fine-tune", run_folder.CHECKPOINT, job.settings.train)
    with job.stage("measure", busy="measuring") as facts:
        dense, narrow = figures(job.example, (model, dense_top1), (small, top1))
        facts |= {"dense": asdict(dense), "narrow": asdict(narrow), "cut_top1": cut_top1}
    return Result(dense, narrow, cut_top1, folder)


def prepare_dense(job: Job, model: nn.Module) -> float:
    """Give the dense network its weights: load those that this run has trained, or train it if the settings name none.

    Returns its top-1.
    """
    given, file = job.settings.model, job.run.folder / run_folder.DENSE
    if not given.checkpoint and not given.pretrained:
        if not (job.run.resume and file.exists()):
            own = replace(job.settings.train, epochs=job.settings.prune.dense_epochs, lr=job.settings.prune.dense_lr)
            top1 = job.train(model, "train dense", run_folder.DENSE_CHECKPOINT, own)
            if job.run.writes:
                save_weights(model, file)
                (job.run.folder / run_folder.DENSE_CHECKPOINT).unlink(missing_ok=True)
            return top1
        load_checkpoint(model, file)
    with job.stage("evaluate dense") as facts:
        facts["top1"] = job.evaluate(model)
    return facts["top1"]
