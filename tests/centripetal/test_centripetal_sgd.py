"""CentripetalSGD: the merged network is the trained one, the rule is the paper's, and a resumed run is the same run."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import networks, random_networks
from support.devices import Waits, without_float64
from support.networks import PATTERNS, TRAPS
from support.plans import graph_of
from support.random_networks import Block, Random, examples
from support.resrep_training import X, called, chain, chain_graph, difference, outputs, randomised, train
from torch import nn

import narrower
from narrower.centripetal.centripetal_sgd import unmergeable
from narrower.narrowing.narrow import RECORD

NAMES = ["residual", "dense", "depthwise", "unet", "shared", "transposed", "flattened", "inception"]


def sgd(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)


def test_a_device_without_float64_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain().float()
    csgd = narrower.CentripetalSGD(model, chain_graph(), macs=0.6, steps=2)
    optimizer = sgd(model)
    csgd.attach(optimizer)
    with without_float64(monkeypatch, "centripetal.centripetal_sgd"):
        train(model, optimizer, X.float(), 2)
        assert csgd.progress()["spread"] < 1e-6


@pytest.mark.parametrize(("name", "scope"), [*((name, "inner") for name in NAMES), ("residual", "all"), ("dense", "all"),
                                             ("squeeze_excite", "all")])
def test_the_merged_network_is_the_trained_one(name: str, scope: Any) -> None:
    case, graph = PATTERNS[name], graph_of(name)
    model, inputs = randomised(case.make()).double(), case.inputs.double()
    csgd = narrower.CentripetalSGD(model, graph, remove=0.5, steps=8, scope=scope)
    optimizer = sgd(model)
    csgd.attach(optimizer)
    before = csgd.progress()["spread"]
    train(model, optimizer, inputs, 8)
    assert csgd.progress()["spread"] < 1e-12 < before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = csgd.merge()
    assert difference(outputs(model, inputs), outputs(small, inputs)) < 1e-10
    assert narrower.measure(small, inputs)["macs"] == csgd.plan.macs[1] < csgd.plan.macs[0]
    lost = narrower.narrow(model, csgd.plan)  # the same channels cut, and not merged
    assert difference(outputs(model, inputs), outputs(lost, inputs)) > 1e-4


def examined(make: Callable[[], nn.Module], inputs: torch.Tensor) -> None:
    """Merged is trained, in residual streams too, or nothing can be merged."""
    model = randomised(make()).double()
    try:
        csgd = narrower.CentripetalSGD(model, narrower.trace(model, inputs), remove=0.5, steps=3, scope="all")
    except narrower.PlanError:
        return
    optimizer = sgd(model, lr=1e-3)
    csgd.attach(optimizer)
    train(model, optimizer, inputs, 3)
    if all(bool(t.isfinite().all()) for t in outputs(model, inputs)):
        assert difference(outputs(model, inputs), outputs(csgd.merge(), inputs)) < 1e-9


@given(random_networks.recipes(), st.integers(0, 3))
@examples(8)
def test_random_networks(recipe: list[Block], head: int) -> None:
    examined(lambda: Random(recipe, head), networks.images(size=12)[:, :, :8].double())


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAPS)
def test_no_trap_is_merged_wrongly(name: str) -> None:
    examined(TRAPS[name].make, networks.images().double())


@pytest.mark.parametrize("make", [sgd, lambda m: torch.optim.AdamW(m.parameters(), lr=0.01)])
def test_identical_filters_stay_identical_and_compute_alike_in_training(make: Any) -> None:
    model = chain()
    csgd = narrower.CentripetalSGD(model, chain_graph(), macs=0.5, steps=10, together=0.2)
    optimizer = make(model)
    csgd.attach(optimizer)
    train(model, optimizer, X, 2)
    assert csgd.progress()["spread"] < 1e-12
    train(model, optimizer, X, 8, seed=1)
    assert csgd.progress()["spread"] < 1e-12
    small = csgd.merge()
    with torch.no_grad():
        assert difference(called(model.train(), X), called(small.train(), X)) < 1e-10


def test_the_published_rule_beside_a_loop_over_filters() -> None:
    """Equation 4: the mean of the gradients, weight decay, and the pull towards the mean of the cluster."""
    model = chain()
    slow = copy.deepcopy(model)
    csgd = narrower.CentripetalSGD(model, chain_graph(), macs=0.5, steps=30, strength=3e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=1e-4)
    csgd.attach(optimizer)
    made = {name: ("weight", f"{name[0]}.1.weight", f"{name[0]}.1.bias") for name in csgd.clusters}
    for step in range(30):
        train(model, optimizer, X, 1, seed=step)
        train(slow, torch.optim.SGD(slow.parameters(), lr=0.0), X, 1, seed=step)
        with torch.no_grad():
            tensors, new = dict(slow.named_parameters()), {}
            for name, p in tensors.items():
                assert p.grad is not None
                group = f"{name[0]}.0"
                new[name] = p - 0.05 * (p.grad + 1e-4 * p)
                if group in csgd.clusters and name in (f"{group}.weight", *made[group][1:], f"{group}.bias"):
                    clusters = csgd.clusters[group]
                    for j in range(len(p)):
                        cluster = [k for k in range(len(p)) if clusters[k] == clusters[j]]
                        mean = sum(p[k] for k in cluster) / len(cluster)
                        gradient = sum(p.grad[k] for k in cluster) / len(cluster)
                        new[name][j] = p[j] + 0.05 * (-gradient - 1e-4 * p[j] + 3e-3 * (mean - p[j]))
            for name, p in tensors.items():
                p.copy_(new[name])
        for (name, p), q in zip(model.named_parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-10, msg=f"{name} at step {step}")


def test_differences_fall_in_proportion_to_the_steps_that_are_left() -> None:
    model = chain()
    csgd = narrower.CentripetalSGD(model, chain_graph(), macs=0.5, steps=10, together=0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    csgd.attach(optimizer)
    first = csgd.progress()["spread"]
    for step in range(1, 9):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert csgd.progress()["spread"] == pytest.approx(first * (1 - step / 8), abs=1e-9)


def test_a_resumed_run_equals_an_uninterrupted_one() -> None:
    def start() -> tuple[nn.Module, narrower.CentripetalSGD, torch.optim.Optimizer]:
        model = chain()
        csgd = narrower.CentripetalSGD(model, chain_graph(), params=0.5, steps=8)
        optimizer = sgd(model)
        csgd.attach(optimizer)
        return model, csgd, optimizer

    model, csgd, optimizer = start()
    train(model, optimizer, X, 3)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, csgd, optimizer)], file)
    train(model, optimizer, X, 5, seed=1)
    file.seek(0)
    again: Any = start()
    for part, state in zip(again, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(again[0], again[2], X, 5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again[0].state_dict().values(), strict=True))
    assert again[1].step == 8
    other = narrower.CentripetalSGD(chain(), chain_graph(), params=0.5, steps=9)
    with pytest.raises(narrower.StorageError, match="steps was 8, is 9"):
        other.load_state_dict(csgd.state_dict())


@pytest.mark.parametrize("strength", [None, 3e-3])
def test_maximizing_the_negative_loss_is_the_same_training(strength: float | None) -> None:
    found = []
    for maximize in (False, True):
        model = chain()
        csgd = narrower.CentripetalSGD(model, chain_graph(), macs=0.5, steps=6, strength=strength)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, maximize=maximize)
        csgd.attach(optimizer)
        for _ in range(6):
            loss = model(X).square().mean()
            optimizer.zero_grad()
            (-loss if maximize else loss).backward()
            optimizer.step()
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], t) for name, t in found[1].items())


@pytest.mark.parametrize("strength", [None, 3e-3])
def test_only_the_first_step_copies_indices_to_the_device(strength: float | None) -> None:
    model = chain()
    csgd = narrower.CentripetalSGD(model, chain_graph(), macs=0.5, steps=4, strength=strength)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, X, 1)
    seen = []
    for _ in range(2):
        with Waits() as waits:
            csgd.before_step(optimizer)
            csgd.after_step(optimizer)
        seen.append(waits.found)
    assert seen[0] and not seen[1]
    places = csgd.places
    assert csgd.present()[1] is places
    model.to("meta")
    assert {i.device.type for p in csgd.present()[1] for i in (p.at, p.clusters, p.sizes)} == {"meta"}


def test_the_clusters_of_a_state_replace_those_of_the_steps_before() -> None:
    model = chain()
    csgd, other = (narrower.CentripetalSGD(model, chain_graph(), macs=0.5, steps=8, clustering=c) for c in ("kmeans", "even"))
    optimizer = sgd(model)
    csgd.attach(optimizer)
    train(model, optimizer, X, 1)
    csgd.load_state_dict(other.state_dict())
    train(model, optimizer, X, 8)
    assert csgd.progress()["spread"] < 1e-12 and other.progress()["spread"] < 1e-12


def test_filters_that_still_differ_are_said_and_averaged() -> None:
    model = chain()
    csgd = narrower.CentripetalSGD(model, chain_graph(), macs=0.5, steps=10, clustering="even")
    with pytest.raises(narrower.ConfigError, match="still differ, by .*: attach\\(optimizer\\) was never called"):
        csgd.merge()
    optimizer = sgd(model)
    csgd.attach(optimizer)
    with pytest.raises(narrower.ConfigError, match="the attached optimizer has made no step"):
        csgd.merge()
    train(model, optimizer, X, 1)
    with pytest.warns(UserWarning, match="still differ, by .* train longer \\(step 1 of 10\\)"):
        small = csgd.merge()
    clusters = csgd.clusters["0.0"]
    first = model.get_parameter("0.0.weight")[clusters == 0].mean(0)
    torch.testing.assert_close(small.get_parameter("0.0.weight")[0], first)
    assert hasattr(small, RECORD)
    assert difference(outputs(csgd.unified(), X), outputs(small, X)) < 1e-10 < difference(outputs(model, X), outputs(small, X))


def test_what_cannot_be_merged_is_named() -> None:
    assert "several layers make it" in str(unmergeable(graph_of("residual"), "inner"))
    assert "several layers make it" not in str(unmergeable(graph_of("residual"), "all"))
    assert "groups of a convolution" in str(unmergeable(graph_of("grouped")))
    csgd = narrower.CentripetalSGD(chain(), chain_graph(), macs=0.5, steps=10, exclude=["1.0"])
    assert "1.0" not in csgd.clusters and "left alone: 1.0: excluded" in str(csgd)
    assert f"{sum(len(c) for c in csgd.clusters.values())} channels become" in str(csgd)


def test_plans_give_the_widths() -> None:
    plan = narrower.plan(chain_graph(), narrower.random(chain_graph()), remove={"0.0": 0.5, "2.0": 0.25})
    csgd = narrower.CentripetalSGD(chain(), chain_graph(), plan=plan, steps=1)
    assert {n: int(c.max()) + 1 for n, c in csgd.clusters.items()} == {"0.0": 6, "2.0": 6}
    assert csgd.plan.macs == plan.macs and np.array_equal(csgd.plan.keep["1.0"], np.arange(10))
    with pytest.raises(narrower.PlanError, match="a plan= says what remains"):
        narrower.CentripetalSGD(chain(), chain_graph(), plan=plan, macs=0.5, steps=1)


def test_the_seed_decides_where_the_clusters_begin() -> None:
    model = chain()
    found = [narrower.CentripetalSGD(model, chain_graph(), remove=0.5, steps=1, seed=seed).clusters for seed in (0, 0, 1, 2, 3)]
    same = [all(np.array_equal(one[n], found[0][n]) for n in one) for one in found]
    assert same[1] and not all(same)


@pytest.mark.parametrize(("options", "error", "says"), [
    ({"steps": 0}, narrower.ConfigError, "number of optimizer steps"),
    ({"clustering": "odd"}, narrower.ConfigError, "'kmeans' or 'even'"),
    ({"scope": "outer"}, narrower.ConfigError, "'inner' or 'all'"),
    ({"together": 0.0}, narrower.ConfigError, "fraction of the steps"),
    ({"together": "soon"}, narrower.ConfigError, "together='soon': give a number"),
    ({"strength": -1.0}, narrower.ConfigError, "above 0"),
    ({"strength": float("inf")}, narrower.ConfigError, "strength=inf: give a number above 0"),
    ({"seed": -1}, narrower.ConfigError, "seed=-1: give a whole number from 0"),
    ({"macs": 1e-6}, narrower.BudgetError, "cannot be reached"),
    ({"macs": None}, narrower.PlanError, "give either a budget"),
    ({"exclude": ["*"]}, narrower.PlanError, "nothing to merge"),
])  # fmt: skip
def test_requests_that_cannot_be_met(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        narrower.CentripetalSGD(chain(), chain_graph(), **{"macs": 0.5, "steps": 10, **options})
    csgd = narrower.CentripetalSGD(chain(), chain_graph(), macs=0.5, steps=1)
    csgd.attach(sgd(csgd.model))
    with pytest.raises(narrower.ConfigError, match="attach was called before"):
        csgd.attach(sgd(csgd.model))
