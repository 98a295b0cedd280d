"""What the methods that narrow in the training share."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.plans import graph_of
from support.resrep_training import X, chain, chain_graph, sgd, train
from torch import nn

import narrower
from narrower.app import trained
from narrower.app.config import PruneConfig
from narrower.app.trained import difference, scored_by_prior


def test_a_plan_is_scored_by_the_prior_and_leaves_groups_alone() -> None:
    graph = graph_of("plain")
    name, *others = [group.name for group in graph.free]
    given = PruneConfig(method="soft", prior="fpgm", exclude=["a"])
    found = scored_by_prior(given, graph, {name: "why"})
    assert (found.method, found.exclude) == ("fpgm", ["a", name])
    with pytest.raises(narrower.PlanError, match=f"--method soft can narrow nothing here: {name}: because"):
        scored_by_prior(given, graph, dict.fromkeys([name, *others], "because"))


def test_what_is_left_of_a_plan_is_cut_in_the_end_also_if_a_scaler_has_skipped_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = narrower.plan(chain_graph(), narrower.random(chain_graph()), remove=0.4)
    resrep = narrower.ResRep(chain(), chain_graph(), plan=plan, steps=10, settings=narrower.Forgetting(forget_steps=0))
    monkeypatch.setattr(trained, "sample", lambda job, count: iter([(X, None)]))
    for steps in (9, 1):
        train(resrep, sgd(resrep) if resrep.optimizer is None else resrep.optimizer, X, steps)
        facts: dict[str, Any] = {}
        job: Any = SimpleNamespace(stage=lambda name, facts=facts: nullcontext(facts), headline=lambda small: {})
        small = trained.merged(job, resrep, resrep.model)
        assert {n: t.shape for n, t in small.state_dict().items()} == {
            n: t.shape for n, t in narrower.narrow(chain(), plan).state_dict().items()}
        assert facts["error"] < 1e-6 and facts["text"].count("not zero yet are cut") == 1


def test_networks_are_compared_in_float32() -> None:
    """A stand-in for TF32, which CUDA's convolutions compute in by default. It rounds compactors that are not merged yet."""
    class Conv(nn.Conv2d):
        rounds = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y * 1.002 if torch.backends.cudnn.allow_tf32 and self.rounds else y

    one, two = Conv(3, 4, 1), Conv(3, 4, 1)
    one.rounds = True
    two.load_state_dict(one.state_dict())
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    assert before[0] and difference(one, two, torch.ones(2, 3, 4, 4)) == 0
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == before


def test_ctrl_c_saves_what_there_is_and_an_error_of_the_merge_is_told(tmp_path: Path) -> None:
    job: Any = SimpleNamespace(run=SimpleNamespace(writes=True, folder=tmp_path))

    def broken() -> nn.Module:
        raise narrower.ConfigError("no such setting")

    for narrowed, error in ((lambda: None, KeyboardInterrupt), (broken, narrower.ConfigError)):
        with pytest.raises(error), trained.save_if_interrupted(job, narrowed):
            raise KeyboardInterrupt
    assert not [*tmp_path.iterdir()]


def test_a_merged_network_that_computes_something_else_is_an_error() -> None:
    net, x = nn.Linear(4, 3), torch.ones(2, 4)
    assert difference(net, copy.deepcopy(net), x) == 0
    other = copy.deepcopy(net)
    other.bias.data[0] += 1
    with pytest.raises(narrower.VerifyError, match="differs from the trained one by"):
        difference(net, other, x)
