"""What the one-shot route does beyond the library."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.command_line import NETWORK, SMALL
from torch import Tensor, nn

import narrower
from narrower.app import cli, oneshot, run_folder
from narrower.app.oneshot import roomier
from narrower.data.task import CLASSIFICATION
from narrower.planning.plan import costed_plan

JOB: Any = SimpleNamespace(data=SimpleNamespace(task=CLASSIFICATION))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 5)).eval()


def images() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(32, 3, 8, 8), torch.zeros(32).long()) for _ in range(2)]


def keeping(graph: narrower.Graph, *counts: int) -> narrower.Plan:
    return costed_plan(graph, {g.name: torch.arange(n).numpy() for g, n in zip(graph.free, counts, strict=True)}, {})


def test_of_two_plans_the_one_is_taken_whose_repaired_network_is_nearer() -> None:
    model = network()
    graph = narrower.trace(model, images()[0][0][:2])
    narrow_first, narrow_second = keeping(graph, 1, 30), keeping(graph, 14, 2)
    far = [narrower.reconstruct(model, narrower.narrow(model, p), p, images(), stream_targets=False)
           for p in (narrow_first, narrow_second)]
    nearer = min(zip(far, (narrow_first, narrow_second), strict=True), key=lambda found: found[0].divergences[found[0].kept])[1]
    for plan, other in ((narrow_first, narrow_second), (narrow_second, narrow_first)):
        taken, told = roomier(JOB, model, plan, lambda other=other: other, images())  # type: ignore[misc]
        assert taken is nearer and told.endswith(": taken" if nearer is other else ": not taken")


def test_nothing_is_compared_where_no_group_is_small_or_the_budget_has_no_room() -> None:
    model = network()
    graph = narrower.trace(model, images()[0][0][:2])
    plan = keeping(graph, 2, 4)  # an eighth each
    assert roomier(JOB, model, plan, lambda: pytest.fail("tried"), []) == (plan, "")

    def unreachable() -> narrower.Plan:
        raise narrower.BudgetError("the least is more")

    plan = keeping(graph, 1, 4)
    assert roomier(JOB, model, plan, unreachable, []) == (plan, "")


@pytest.mark.parametrize(("flags", "compared"), [([], True), (["--min-channels", "1"], False), (["--no-reconstruct"], False)])
def test_a_deep_cut_is_tried_with_a_share_of_every_group(flags: list[str], compared: bool, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETWORK)
    monkeypatch.setattr(oneshot, "LEAST_SHARE", 0.5)
    run = ["prune", *SMALL, "-b", "256", "--macs", "0.4", "--epochs", "0", "--no-report"]
    assert cli.main([*run, *flags, "--output", "run"]) == 0
    log, plan = Path("run", run_folder.LOG).read_text(), json.loads(Path("run", run_folder.PLAN).read_text())
    assert ("where every group keeps 0.5 of its channels" in log) == compared
    least = min(len(plan["keep"][name]) / size for name, size in plan["groups"].items())
    assert (": taken\n" in log) == (least >= 0.5)
