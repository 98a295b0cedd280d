"""The folder of a run that has ended, without the run: a small network, cut by a plan, with the rows that a run writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

import narrower
from narrower.planning.damage import Curve, Sensitivity
from narrower.report import Facts, Layer, Scored

DENSE = {"top1": 88.29, "macs": 4e6, "params": 5000.0, "size_mb": 0.02, "latency_ms": 2.0}
NARROW = {"top1": 86.51, "macs": 2e6, "params": 3000.0, "size_mb": 0.01, "latency_ms": 1.5}
CURVES = Sensitivity((Curve(("conv1",), (0.125, 0.5), (0.01, 0.2)), Curve(("conv2",), (0.125, 0.5), (0.0, 0.1))), "kl", 64)


def epochs(stage: str, count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"stage": stage, "epoch": k + 1, "epochs": count, "lr": 0.1, "loss": 1 / (k + 1), "top1": 80.0 + k,
             "val_loss": 0.5, "seconds": 1.0, **more} for k in range(count)]


ROWS: list[dict[str, Any]] = [
    {"stage": "start", "command": "prune", "narrower": "0.1.0"},
    {"stage": "evaluate dense", "top1": 88.29, "by_class": {"images": [10, 20], "right": [9, 18]}, "seconds": 2.0},
    {"stage": "cut", "top1": 23.93, "seconds": 1.0},
    {"stage": "reconstruct", "top1": 81.27, "seconds": 3.0},
    *epochs("fine-tune", 3),
    {"stage": "fine-tune", "top1": 86.51, "by_class": {"images": [10, 20], "right": [10, 15]}, "seconds": 9.0},
    {"stage": "measure", "dense": DENSE, "narrow": NARROW, "stages": {"cut": 23.93, "reconstruct": 81.27, "fine-tune": 86.51},
     "layer_times": {"ms": {"conv1.weight": [0.3, 0.2], "conv2.weight": [0.5, 0.3]}, "threads": 2, "device": "cpu"}},
]
SETTINGS: dict[str, Any] = {"model": "net.py:Net", "method": "obs", "macs": 0.5, "seed": 7, "num_classes": 10, "in_chans": 3,
                            "img_size": 8, "model_kwargs": {}, "checkpoint": None, "pretrained": False}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3)))


@cache
def traced() -> narrower.Graph:
    return narrower.trace(Net(), torch.zeros(1, 3, 8, 8))


def make_facts(**changes: Any) -> Facts:
    """All that a run can know."""
    layers = [Layer("conv1.weight", (8, 3, 3, 3), (6, 3, 3, 3)), Layer("conv2.weight", (16, 8, 3, 3), (8, 6, 3, 3)),
              Layer("head.weight", (10, 16), (10, 8))]
    scores = {name: Scored(np.arange(size, dtype=float), np.arange(size) >= size - kept)
              for name, size, kept in (("conv1", 8, 6), ("conv2", 16, 8))}
    facts = Facts("run <1>", SETTINGS, ROWS, layers, {"conv1": (8, 6), "conv2": (16, 8)}, scores, CURVES, graph=traced())
    return replace(facts, **changes)


def resrep_facts() -> Facts:
    """Those of a run of ResRep."""
    rows = [*epochs("resrep", 3, masked=0.7, reached=0.8, chosen=4.0, zero=2.0, least_norm=0.9, mean_norm=1.0), *ROWS[1:2],
            ROWS[-2] | {"stage": "merge"}, ROWS[-1]]
    rows[:2] = [rows[0] | {"steps": [1, 2], "norms": {"conv1": [[1.0, 0.9], [0.9, 0.4]], "conv2": [[1.0], [1.0]]}},
                rows[1] | {"steps": [4], "norms": {"conv1": [[0.9, 0.0]], "conv2": [[0.9]]}}]
    return make_facts(settings=SETTINGS | {"method": "resrep"}, rows=rows)


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]] = ROWS, settings: Mapping[str, Any] = SETTINGS) -> None:
    """A run folder with its settings and metrics alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(settings)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder: Path, network: str, settings: Mapping[str, Any] | None = None) -> narrower.Plan:
    """A run folder as `narrower prune` leaves it. `network`: the source of a factory `Net`, written to net.py beside it."""
    file = folder.parent / "net.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(network)
    names: dict[str, Any] = {}
    exec(network, names)
    model = names["Net"]()
    graph = narrower.trace(model, torch.zeros(1, 3, 8, 8))
    plan = narrower.plan(graph, narrower.random(graph), macs=0.5)
    narrower.save(narrower.narrow(model, plan), folder)
    save_file(model.state_dict(), folder / "dense.safetensors")
    (folder / "plan.json").write_text(plan.to_json())
    save_file({g.name: torch.arange(g.size).float() for g in graph.free}, folder / "scores.safetensors")
    (folder / "sensitivity.json").write_text(CURVES.to_json())
    write_rows(folder, settings=SETTINGS | {"model": f"{file}:Net"} | dict(settings or {}))
    return plan
