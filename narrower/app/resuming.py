"""A run that goes on: which settings may change, and what must be as it was at the start."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..report.facts import MEASURE, START
from ..training.config import flag
from .config import TRAINED
from .run_folder import CONFIG, Run, quoted, read_settings

WHERE = ("device", "workers", "amp", "channels_last", "data_dir", "dataset_download", "cache_dir", "checkpoint", "amp_dtype",
         "torchcompile", "report")
"""Settings that may always change: where and how to compute, and where the same images and weights are."""
TRAINING = ("epochs", "lr", "min_lr", "warmup_epochs", "warmup_lr", "sched", "decay_epochs", "decay_milestones", "decay_rate",
            "smoothing", "clip_grad", "mixup", "cutmix", "reprob")
"""Settings that may change for the rest of a training. Where the network narrows in it, the schedule follows from `epochs`,
which must stay."""
ENDS = (MEASURE, "train")
"""The last rows of runs that have ended."""

Changes = dict[str, tuple[Any, Any]]
"""{setting: (before, now)}"""


def changes(run: Run, settings: Mapping[str, Any]) -> Changes:
    """The settings that differ from those of a run.

    Raises:
        ConfigError: one of them may not change, or has nothing left to act on.
    """
    before, rows = read_settings(run.folder), run.rows()
    changed = {key: (before[key], value) for key, value in settings.items() if key in before and before[key] != value}
    narrows = before.get("method") in TRAINED
    may = [*WHERE, *(name for name in TRAINING if not (narrows and name == "epochs"))]
    if refused := [key for key in changed if key not in may]:
        raise ConfigError(
            f"a run goes on with its own settings: {named(changed, refused)} cannot change (of this run can: "
            f"{', '.join(flag(name) for name in may)}); for another run give --config {quoted(run.folder / CONFIG)} and "
            "--output"
        )
    late = [key for key in changed if key in TRAINING]
    before_epochs, epochs = changed.get("epochs", (0, 0))
    ended = bool(rows) and rows[-1]["stage"] in ENDS and "epoch" not in rows[-1]
    if late and epochs <= before_epochs and (ended or (narrows and run.last("save"))):
        more = "" if narrows else "; more --epochs would train further"
        raise ConfigError(f"the training in {run.folder} has ended: {named(changed, late)} would change nothing{more}")
    return changed


def check_start(run: Run, facts: Mapping[str, Any]) -> None:
    """Raise ConfigError where a run began with other facts. Runs of older versions have none."""
    for key, was in run.last(START).items():
        if key in facts and facts[key] != was:
            raise ConfigError(f"{run.folder} began with other {key} ({was}) than there are now ({facts[key]}): --resume needs "
                              "the same")


def named(changed: Changes, names: list[str]) -> str:
    return ", ".join(f"{flag(name)} ({changed[name][0]}, now {changed[name][1]})" for name in names)


def fingerprint(model: nn.Module) -> str:
    """A short hash of all weights and buffers."""
    digest = hashlib.sha256()
    for name, t in model.state_dict().items():
        digest.update(name.encode())
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
