"""Optimizers and schedules by timm's names: what they do over time, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("timm")
from support.training import network

import narrower
from narrower.errors import ConfigError
from narrower.training.config import TrainConfig
from narrower.training.optimizing import make_average, make_optimizer, make_schedule, updates_per_epoch

CONFIG = TrainConfig(epochs=10, lr=1.0, warmup_epochs=1, min_lr=0.1, warmup_lr=0.05)


def rates(config: TrainConfig, updates: int = 10, scale: float = 1.0) -> list[float]:
    optimizer = make_optimizer(network(), config)
    optimizer.param_groups[0]["lr_scale"] = scale
    schedule = make_schedule(optimizer, config, updates)
    found = []
    for update in range(config.epochs * updates):
        if schedule is not None:
            schedule.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_the_rate_rises_then_falls_along_a_cosine() -> None:
    found = rates(CONFIG)
    assert found[:10] == pytest.approx([0.05 + 0.095 * k for k in range(10)])
    assert max(found[10:]) <= 1 and found[10:] == sorted(found[10:], reverse=True)
    assert found[50] == pytest.approx(0.55) and 0.1 < found[-1] < 0.101
    assert rates(CONFIG, scale=0.5) == pytest.approx([rate / 2 for rate in found])


@pytest.mark.parametrize(("settings", "at"), [
    ({"sched": "step", "decay_epochs": 4, "decay_rate": 0.5}, {30: 1.0, 45: 0.5, 85: 0.25}),
    ({"sched": "multistep", "decay_milestones": [2, 6], "decay_rate": 0.1}, {15: 1.0, 25: 0.1, 65: 0.01}),
    ({"sched": "none", "warmup_epochs": 0}, {0: 1.0, 99: 1.0}),
])
def test_other_schedules_have_their_own_settings(settings: dict[str, Any], at: dict[int, float]) -> None:
    found = rates(replace(CONFIG, min_lr=0.0, **settings))
    assert {step: found[step] for step in at} == pytest.approx(at)


def test_groups_keep_their_scale_without_a_schedule() -> None:
    assert rates(replace(CONFIG, sched="none"), scale=0.5) == [0.5] * 100


def test_a_schedule_begins_anew_from_the_rate_of_the_settings() -> None:
    """A resumed optimizer has the rate of where it stopped, and of the settings before."""
    optimizer = make_optimizer(network(), CONFIG)
    make_schedule(optimizer, CONFIG, 10).step_update(77)
    make_schedule(optimizer, replace(CONFIG, lr=3.0), 10).step_update(10)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 + 2.9 * 0.5 * (1 + math.cos(math.pi / 10)))


def test_optimizers_of_timm() -> None:
    sgd = make_optimizer(network(), CONFIG)
    assert type(sgd) is torch.optim.SGD
    assert {k: sgd.defaults[k] for k in ("nesterov", "momentum", "weight_decay")} == {
        "nesterov": True, "momentum": 0.9, "weight_decay": 5e-4}
    assert not make_optimizer(network(), replace(CONFIG, momentum=0.0)).defaults["nesterov"]
    adamw = make_optimizer(network(), replace(CONFIG, opt="adamw", opt_kwargs={"betas": [0.8, 0.9]}))
    assert isinstance(adamw, torch.optim.AdamW) and [*adamw.defaults["betas"]] == [0.8, 0.9]


@pytest.mark.parametrize(("settings", "message"), [
    ({"opt": "sdg"}, "--opt sdg: of timm's, take one of adabelief, (?!.*adahessian).*sgd"),
    ({"opt": "adahessian"}, "--opt adahessian: .*second derivatives"),
    ({"opt_kwargs": {"colour": 1}}, "--opt sgd --opt-kwargs .*colour"),
    ({"sched": "plateau"}, "would differ"),
    ({"sched": "cosinus"}, "--sched cosinus"),
])
def test_what_timm_has_not_is_refused(settings: dict[str, Any], message: str) -> None:
    config = replace(CONFIG, **settings)
    with pytest.raises(ConfigError, match=message):
        make_schedule(make_optimizer(network(), config), config, 10)


def test_resrep_works_with_sgd_alone() -> None:
    model = network()
    graph = narrower.trace(model, torch.zeros(1, 1, 8, 8))
    resrep = narrower.ResRep(model, graph, macs=0.8, steps=10)
    with pytest.raises(ConfigError, match="--opt adamw: ResRep"):
        make_optimizer(model, replace(CONFIG, opt="adamw"), resrep)
    assert len(make_optimizer(model, CONFIG, resrep).param_groups) > 1
    with pytest.raises(ConfigError, match="cannot be averaged"):
        make_average(model, replace(CONFIG, model_ema=True), narrows=True)


def test_updates_of_an_epoch_cover_all_its_batches() -> None:
    assert [updates_per_epoch(count, replace(CONFIG, grad_accum_steps=4)) for count in (1, 4, 5, 8)] == [1, 1, 2, 2]
