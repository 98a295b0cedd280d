"""Rows of `narrower compare` that `narrower prune` does not make: the dense network trained on, and torch-pruning's pruners."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import narrower

from ..errors import NarrowerError
from ..extras import optional
from ..measuring import macs_of
from ..training.methods import Methods
from . import run_folder
from .job import Job
from .networks import labelled_by, load_dense, save_weights
from .oneshot import distilling
from .prune import Result, measured, save_at_end

EXTERNAL = ("tp-magnitude", "tp-group-norm")
"""The same share of every group by L2 norms; and the lowest norms of all groups together, without its sparse training."""
DENSE = "dense"
"""The dense network, trained on by the same training: what the others are to be held against."""
TRIALS = 12  # halvings of the interval of ratios: 1/4096 of the channels


def prune_external(job: Job, method: str) -> Result:
    """From the dense network to one that torch-pruning has narrowed (left as it is with `DENSE`), and that is fine-tuned.

    Raises:
        MissingExtraError: torch-pruning is not installed.
        ConfigError: the images have no classes, and the training is to use them.
        NarrowerError: it fails on this network, or cannot reach the budget.
    """
    model = load_dense(job)
    job = labelled_by(job, model)
    _ = job.data.train, job.data.val
    with job.claimed(model):
        with job.stage("evaluate dense") as facts:
            facts |= (before := job.headline(model))
        with job.stage("cut") as facts:
            small = copy.deepcopy(model) if method == DENSE else narrowed(
                model, job.example, method, job.settings.prune.macs or 0.5)
            facts |= {"method": method, **job.headline(small)}
        name = before["headline"]
        stages = {"cut": facts[name]}
        if job.settings.train.epochs:
            with (save_at_end(job, lambda: save_weights(small, job.run.folder / run_folder.MODEL)),
                  distilling(job, model, small) as distillation):
                stages["fine-tune"] = job.train(small, "fine-tune", run_folder.CHECKPOINT, job.settings.train,
                                                methods=Methods(distillation=distillation))[name]
        return measured(job, model, small, before, stages)


def narrowed(model: nn.Module, example: Tensor, method: str, macs: float) -> nn.Module:
    """A copy of `model` with at most `macs` multiply-adds: the least ratio of channels that reaches it, found by bisection.

    All layers that write into sums stay whole where torch-pruning fails with them.
    """
    optional("torch_pruning")
    graph = narrower.trace(model, example)
    classifier = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    budget = macs if macs > 1 else macs * macs_of(model, example)
    try:
        return by_ratio(model, example, method, budget, classifier)
    except Exception:  # whatever another tool raises
        try:
            return by_ratio(model, example, method, budget, [*classifier, *streams(model, graph)])
        except Exception as error:
            raise NarrowerError(f"torch-pruning fails on this network: {type(error).__name__}: {error}") from error


def by_ratio(model: nn.Module, example: Tensor, method: str, budget: float, ignored: Sequence[nn.Module]) -> nn.Module:
    """The widest copy of `model` that bisection of the pruning ratio finds within the budget."""
    low, high, found = 0.0, 1.0, None
    for _ in range(TRIALS):
        ratio = (low + high) / 2
        small = pruned(model, example, method, ratio, ignored)
        if macs_of(small, example) <= budget:
            high, found = ratio, small
        else:
            low = ratio
    if found is None:
        raise NarrowerError(f"no ratio of channels that {method} takes leaves as little as {budget:,.0f} MACs")
    return found


def pruned(model: nn.Module, example: Tensor, method: str, ratio: float, ignored: Sequence[nn.Module]) -> nn.Module:
    """A copy that one of torch-pruning's pruners has narrowed by a ratio of the channels."""
    tp: Any = optional("torch_pruning")
    copies = copy.deepcopy([model, *ignored])
    small, left = copies[0], copies[1:]
    make = tp.pruner.MagnitudePruner if method == "tp-magnitude" else tp.pruner.GroupNormPruner
    pruner = make(small, example, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=ratio,
                  global_pruning=method != "tp-magnitude", ignored_layers=left)
    pruner.step()
    return small


def streams(model: nn.Module, graph: narrower.Graph) -> list[nn.Module]:
    """The convolutions that write, beside others, into the same channels, or into channels that cannot go."""
    modules = dict(model.named_modules())
    return [modules[name] for group in graph.groups if not group.free or len(group.layers) > 1 for name in group.layers
            if name in modules]
