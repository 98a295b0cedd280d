"""What the methods that narrow in the training share: the plan before it, and the merge after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import narrower

from ..errors import PlanError, VerifyError
from ..inputs import flatten_tensors
from ..training.agreement import first
from .config import PruneConfig
from .job import Job
from .oneshot import calibration, planned, sample

MERGED = 1e-3  # largest difference of the merged network, relative to the outputs, in float32


def scored_by_prior(given: PruneConfig, graph: narrower.Graph, left: Mapping[str, str]) -> PruneConfig:
    """The settings of the plan: scored by the prior. `left`: the groups that the method leaves alone, with the reasons.

    Raises:
        PlanError: these are all.
    """
    if graph.free and {g.name for g in graph.free} <= left.keys():
        why = "; ".join(f"{name}: {reason}" for name, reason in [*left.items()][:4])
        raise PlanError(f"--method {given.method} can narrow nothing here: {why}")
    return replace(given, method=given.prior, exclude=[*given.exclude, *left])


def plan_by_prior(job: Job, model: nn.Module, graph: narrower.Graph, left: Mapping[str, str]) -> narrower.Plan:
    """Plan, or read the plan of a run that goes on. `left`: as for `scored_by_prior`."""
    given = job.settings.prune
    for name, why in left.items():
        job.report.note(f"left alone: {name}: {why}")
    by_prior = replace(job, settings=replace(job.settings, prune=scored_by_prior(given, graph, left)))
    return planned(by_prior, model, graph, calibration(job))


@contextmanager
def save_if_interrupted(job: Job, narrowed: Callable[[], nn.Module | None]) -> Iterator[None]:
    """Ctrl-C within saves what `narrowed` makes of the network by then (None: there is nothing to save yet), without its
    warning that training was too short."""
    try:
        yield
    except KeyboardInterrupt:
        if job.run.writes:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                small = narrowed()
            if small is not None:
                narrower.save(small, job.run.folder)
        raise


def merged(job: Job, method: narrower.ResRep | narrower.CentripetalSGD, trained: nn.Module) -> nn.Module:
    """The network that a method merges in the end, as a stage.

    Raises:
        VerifyError: it does not compute what `trained` does, which is as wide as before.
    """
    with job.stage("merge") as facts:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if isinstance(method, narrower.ResRep):  # compared before what is left of a plan is cut, which is not zero
                exact = method.merge(over=False)
                said.clear()
                small = method.merge(over=True)
            else:
                exact = small = method.merge()
        facts["error"] = first(lambda: difference(trained, exact, next(sample(job, 16))[0]))
        facts["text"] = "\n".join([str(method), *(f"warning: {w.message}" for w in said)])
        facts |= job.headline(small)
    return small


@torch.inference_mode()
def difference(trained: nn.Module, merged: nn.Module, images: Any) -> float:
    """The largest difference of the outputs in eval mode, relative to the largest output. In float32, also on CUDA.

    Raises:
        VerifyError: the difference is too large for rounding.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 alone may differ by more than MERGED
        want, have = (flatten_tensors(net.to(images.device).eval()(images)) for net in (trained, merged))
    error = max(float((a.float() - b.float()).abs().max() / a.float().abs().max().clamp_min(1e-12))
                for a, b in zip(want, have, strict=True))
    if not error <= MERGED:
        raise VerifyError(f"the merged network differs from the trained one by {error:.1e} of its outputs (at most "
                          f"{MERGED:.0e} is rounding): narrower is at fault, please report it; the checkpoint is kept")
    return error
