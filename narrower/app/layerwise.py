"""`--schedule layer`: cut one layer, fine-tune, cut the next, as HRank does (Lin et al., CVPR 2020, section 4.1).

All layers are scored once, on the dense network, and planned together. They are cut in the order of the forward, tied ones
together. What is trained is narrow already, where HRank masks.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

import narrower

from ..graph.equal_counts import components
from ..planning.plan import costed_plan
from ..training.agreement import first
from ..training.methods import Methods
from ..training.train import read_checkpoint
from .job import Job
from .networks import packed, unpacked
from .oneshot import calibration, distilling, planned, sample
from .run_folder import LAYERS, LAYERS_CHECKPOINT


def narrow_by_layers(job: Job, model: nn.Module, graph: narrower.Graph) -> tuple[nn.Module, narrower.Plan]:
    """Plan, then cut and fine-tune layer by layer. The narrow network and its plan.

    A run that goes on begins with the network after the last layer that was done, and with the checkpoint of the next.
    """
    given = job.settings.prune
    # no name for the images, or they would lie on the GPU through all trainings
    plan = planned(job, model, graph, calibration(job))
    parts = cut_order(plan)
    done, small = restored_layers(job) or (0, copy.deepcopy(model))
    config = replace(job.settings.train, epochs=given.epochs_per_layer)
    for number, names in enumerate(parts[done:], done + 1):
        small = cut(job, small, plan, names)
        with distilling(job, model, small) as distillation:
            job.train(small, f"layer {number}/{len(parts)} {names[0]}", LAYERS_CHECKPOINT, config,
                      methods=Methods(distillation=distillation))
        save_layers(job, number, small)
    with job.stage("layers") as facts:
        facts |= {"layers": len(parts), **job.headline(small)}
    return small, plan


def cut_order(plan: narrower.Plan) -> list[list[str]]:
    """The groups that lose channels, in the order of the forward, those that are tied together."""
    order = {g.name: k for k, g in enumerate(plan.graph.groups)}
    parts = [sorted({cell.group for cell in part.cells}, key=order.__getitem__) for part in components(plan.graph)]
    losing = [part for part in parts if any(len(plan.keep[name]) < plan.graph[name].size for name in part)]
    return sorted(losing, key=lambda part: order[part[0]])


def cut(job: Job, small: nn.Module, plan: narrower.Plan, names: Sequence[str]) -> nn.Module:
    """The network without the channels that the plan takes from these groups, which are whole so far. Verified."""
    graph = narrower.trace(small, job.example, allow_inexact=job.settings.prune.allow_inexact)
    keep = {g.name: plan.keep[g.name] if g.name in names else np.arange(g.size) for g in graph.free}
    step = costed_plan(graph, keep, {"layer": list(names)})
    with job.stage(f"cut {names[0]}") as facts:
        narrow = narrower.narrow(small, step)
        facts["error"] = first(lambda: narrower.verify(small, narrow, step, next(sample(job, 4))[0]).error)
        facts["macs"] = step.macs
    return narrow


def save_layers(job: Job, done: int, small: nn.Module) -> None:
    """Keep the network after a layer, in one file. Where a process is killed before, the layer is trained again: the same."""
    if not job.run.writes:
        return
    (job.run.folder / LAYERS_CHECKPOINT).unlink(missing_ok=True)
    content = io.BytesIO()
    files = {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in packed(small).items()}
    torch.save({"done": done, "files": files}, content)
    job.run.write(LAYERS, content.getvalue())


def restored_layers(job: Job) -> tuple[int, nn.Module] | None:
    """How many layers a run that goes on has done, and the network after them."""
    found = first(lambda: read_checkpoint(job.run.folder / LAYERS) if job.run.resume else None)
    if found is None:
        return None
    return found["done"], unpacked(job, {name: data.numpy().tobytes() for name, data in found["files"].items()})
