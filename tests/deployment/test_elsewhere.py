"""Jobs for another machine: all that it needs is in the folder, and its times give the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.latency import survey_of
from support.networks import PATTERNS, Plain, images
from support.plans import graph_of
from torch import Tensor

import narrower
from narrower.deployment.layer_times import key_of
from narrower.deployment.survey import survey


def test_times_from_elsewhere_give_the_table(tmp_path: Path) -> None:
    model, graph, x = PATTERNS["plain"].make(), graph_of("plain"), images(batch=1)
    folder = narrower.write_latency_jobs(model, graph, x, tmp_path / "jobs", suffix=".ts")
    assert {p.name for p in folder.iterdir()} == {
        "jobs.json", "layer_times.py", *(f"network-{i}.ts" for i in range(5))}
    with pytest.raises(narrower.ConfigError, match=r"run layer_times.py on the other machine"):
        narrower.read_latency_times(folder)
    jobs = json.loads((folder / "jobs.json").read_text())
    times: dict[str, dict[str, Any]] = {"place": {"runtime": "theirs"}, "layers": {key_of(job): 0.5 for job in jobs["jobs"]},
             "networks": {name: [9.0 - i, 0.1] for i, name in enumerate(jobs["files"])}}
    complete = {part: dict(times[part]) for part in ("networks", "layers")}
    (folder / "times.json").write_text(json.dumps(times))
    table = narrower.read_latency_times(folder)
    found = survey(model, graph, x)
    assert (table.kinds, table.layers) == (found.kinds, found.layers) and table.place == {"runtime": "theirs"}
    assert [n.ms for n in table.networks] == [9.0, 8.0, 7.0, 6.0, 5.0] and len(table.points) == len(found.points)
    plan = narrower.plan(graph, narrower.random(graph), macs=0.5, latency=table)
    assert plan.latency_ms is not None and plan.latency_ms[0] == pytest.approx(table.predict(table.networks[0].sizes))
    for part, missing in (("networks", "network-4.ts"), ("layers", "kernel")):
        times[part].popitem()
        (folder / "times.json").write_text(json.dumps(times))
        with pytest.raises(narrower.ConfigError, match=rf"incomplete \(no .*{missing}"):
            narrower.read_latency_times(folder)
        times[part] = dict(complete[part])
    assert survey_of("plain").layers


class Repeated(Plain):
    """Takes a whole number beside the images."""

    def forward(self, x: Tensor, times: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * times


def test_what_the_script_cannot_feed_is_refused(tmp_path: Path) -> None:
    case = PATTERNS["many_ends"]
    with pytest.raises(narrower.ExportError, match="feeds networks with noise"):
        narrower.write_latency_jobs(case.make(), graph_of("many_ends"), case.inputs, tmp_path / "jobs", suffix=".ts")
    plain, graph, x = PATTERNS["plain"].make(), graph_of("plain"), images(batch=1)
    with pytest.raises(narrower.ExportError, match="feeds networks with noise"):
        narrower.write_latency_jobs(Repeated(), graph, (x, torch.tensor([3])), tmp_path / "jobs")
    with pytest.raises(narrower.ExportError, match="this network is in float16"):
        narrower.write_latency_jobs(plain.half(), graph, x.half(), tmp_path / "jobs")
    assert not list(tmp_path.iterdir())
