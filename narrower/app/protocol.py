"""What all runs of a grid share: settings, the dense network and the images. A folder of runs that differ is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..report.facts import START
from ..training.agreement import first
from ..training.config import TrainConfig
from . import run_folder
from .config import DataConfig, ModelConfig, PruneConfig, part, unused
from .job import Reporter, Settings, absolute, count_of, open_images, with_absolute_paths
from .networks import with_weights
from .resuming import WHERE, fingerprint, named
from .run_folder import IMAGES, WEIGHTS

DISTILLED = ("distill", "distill_temperature", "distill_weight")
OF_DENSE = ("dense_epochs", "dense_lr")
OF_IMAGES = ("num_classes", "in_chans", "img_size", "mean", "std")
"""Settings that a run completes from its images."""


def pruning_of(settings: Settings, *, ours: bool) -> list[str]:
    """The settings of pruning that count for a run. `ours`: of a method that `narrower prune` has."""
    given, method = settings.model, settings.prune.method
    left_out = {"method", *unused(method), *(OF_DENSE if given.checkpoint or given.pretrained else ())}
    names = [item.name for item in fields(PruneConfig)] if ours else ["macs", *DISTILLED, *OF_DENSE]
    return [name for name in names if name not in left_out]


def check_settings(folder: Path, settings: Settings, pruning: Iterable[str]) -> None:
    """Raise ConfigError where a run is there already and was made otherwise. `pruning`: what counts of its own settings."""
    def read() -> dict[str, Any]:
        return run_folder.read_settings(folder) if (folder / run_folder.CONFIG).is_file() else {}

    before, now = first(read), with_absolute_paths(settings).flat()
    names = [*(item.name for group in (ModelConfig, DataConfig, TrainConfig) for item in fields(group)), *pruning]
    completed = [name for name in OF_IMAGES if settings.data.task or now[name] is None]
    changed = {name: (before[name], now[name]) for name in names
               if name in before and before[name] != now[name] and name not in (*WHERE, *completed)}
    if changed:
        raise ConfigError(f"{folder} was made otherwise: {named(changed, [*changed])}; all runs of a grid have the same "
                          "settings, so give another --output")


def start_of(folder: Path) -> dict[str, Any]:
    """What a run began with. Runs of older versions do not say."""
    def read() -> dict[str, Any]:
        row = run_folder.Run(folder, resume=True, writes=False).last(START)
        return {key: row[key] for key in (IMAGES, WEIGHTS) if key in row}

    return first(read)


def start_now(settings: Settings, folder: Path, seed: int, report: Reporter) -> dict[str, Any]:
    """What the run in `folder` would begin with now. Images are counted where they lie elsewhere than before."""
    before = first(lambda: run_folder.read_settings(folder))
    torch.manual_seed(seed)  # of the head, where published weights have none
    network = replace(part(ModelConfig, before), checkpoint=settings.model.checkpoint, pretrained=settings.model.pretrained)
    found: dict[str, Any] = {WEIGHTS: fingerprint(with_weights(network))}
    if absolute(settings.data.data_dir) != before.get("data_dir"):
        found[IMAGES] = count_of(open_images(settings, report)[0].train)
    return found


def check_start(folder: Path, start: Mapping[str, Any], other: str) -> None:
    """Raise ConfigError where a run began with other images or weights than `start`, which is that of `other`."""
    mine = start_of(folder)
    if differ := [key for key in (IMAGES, WEIGHTS) if key in mine and key in start and mine[key] != start[key]]:
        raise ConfigError(f"{folder} began with other {' and '.join(differ)} than {other}: a grid has one dense "
                          "network and the same images for all; give another --output")
