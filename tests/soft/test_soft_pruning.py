"""SoftPruning: what is masked is what is cut, soft channels come back, hard ones do not, and a resumed run is the same run."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from support.devices import Waits, without_float64
from support.networks import PATTERNS, Head, unit
from support.plans import graph_of
from support.resrep_training import X, called, chain, chain_graph, difference, outputs, randomised, train
from torch import nn

import narrower
from narrower.soft.soft_pruning import kept_without, multiply_readers, relative_norms, share_at, unmaskable, weight_left

NAMES = ["residual", "dense", "depthwise", "grouped", "squeeze_excite", "shuffle", "unet", "shared", "transposed", "flattened"]
SFP: dict[str, Any] = {"factor": 0.0, "grow": 0.0, "harden": None}
READS = "1.0.weight"  # what reads the group 0.0
HARD: dict[str, Any] = {"factor": 0.0, "grow": 0.0, "harden": 0.0}


def soft_pruning(model: nn.Module, **options: Any) -> narrower.SoftPruning:
    if "plan" not in options:
        options.setdefault("macs", 0.5)
    options.setdefault("steps", 1)
    return narrower.SoftPruning(model, chain_graph(), **options)


def trained(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """The outputs in train mode."""
    with torch.no_grad():
        return called(model.train(), inputs)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_narrow_network_is_the_masked_one(name: str) -> None:
    graph, inputs = graph_of(name), PATTERNS[name].inputs
    model = randomised(PATTERNS[name].make()).double()
    inputs = inputs.double()
    soft = narrower.SoftPruning(model, graph, macs=0.6, steps=1, **SFP)
    before = outputs(model, inputs)
    assert soft.step() == 0.0
    small = soft.narrow()
    assert difference(outputs(model, inputs), outputs(small, inputs)) < 1e-10
    assert difference(before, outputs(small, inputs)) > 1e-4
    assert narrower.verify(model, small, soft.plan, inputs).error < 1e-10
    assert soft.plan.macs[1] <= 0.6 * soft.plan.macs[0]
    assert difference(trained(model, inputs), trained(small, inputs)) < 1e-10


def test_a_device_without_float64_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    soft = soft_pruning(chain().float())
    with without_float64(monkeypatch, "soft.soft_pruning"):
        soft.step()
    assert soft.progress()["masked"] <= 0.5


@pytest.mark.parametrize("make", [sgd, lambda m: torch.optim.AdamW(m.parameters(), lr=0.01)])
def test_hard_pruning_trains_as_the_narrow_network_does(make: Any) -> None:
    model = chain()
    soft = soft_pruning(model, **HARD)
    optimizer = make(model)
    soft.attach(optimizer)
    soft.step()
    small = soft.narrow()
    train(model, optimizer, X, 4)
    train(small, make(small), X, 4)
    assert difference(outputs(small, X), outputs(soft.narrow(), X)) < 1e-10
    assert difference(outputs(model, X), outputs(small, X)) < 1e-10


def test_clipped_hard_pruning_trains_as_the_narrow_network_does_from_the_first_step_of_a_resumed_run_on() -> None:
    """What reads a hard channel has gradients that are not zero, which must not count, from one batch and the next."""
    begun = soft_pruning(chain(), **HARD)
    begun.step()
    model = copy.deepcopy(begun.model)
    soft = soft_pruning(model, **HARD)
    wide = sgd(model)
    soft.attach(wide)
    soft.load_state_dict(begun.state_dict())
    small = soft.narrow()
    for network, optimizer in ((model, wide), (small, sgd(small))):
        for step in range(4):
            optimizer.zero_grad()
            for images in (X + step, X - step):
                network.train()(images).square().sum().backward()
            assert nn.utils.clip_grad_norm_(network.parameters(), 0.01) > 1
            optimizer.step()
    assert difference(outputs(model, X), outputs(small, X)) < 1e-10
    assert difference(outputs(begun.model, X), outputs(small, X)) > 1e-5


def test_a_factor_of_one_prunes_nothing() -> None:
    model = chain()
    before = copy.deepcopy(model.state_dict())
    soft = soft_pruning(model, **SFP)
    masked = soft.choose(1.0, soft.values())
    assert sum(m.sum() for m in masked.values()) > 5
    multiply_readers(model, kept_without(soft.graph, masked), 1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    multiply_readers(model, kept_without(soft.graph, masked), 0.5)
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["1.0.weight", "2.0.weight", "3.fc.weight"]
    gone = masked["0.0"]
    assert torch.equal(model.state_dict()["1.0.weight"][:, gone], 0.5 * before["1.0.weight"][:, gone])
    assert torch.equal(model.state_dict()["1.0.weight"][:, ~gone], before["1.0.weight"][:, ~gone])


def test_a_weight_with_two_names_is_multiplied_once() -> None:
    shared, model = graph_of("shared"), PATTERNS["shared"].make()
    tied = model.get_parameter("left.weight")
    before = tied.detach().clone()
    multiply_readers(model, kept_without(shared, {"stem.0": np.arange(9) < 3}), 0.5)
    assert tied is model.get_submodule("right").weight
    assert torch.equal(tied[:, :3], 0.5 * before[:, :3]) and torch.equal(tied[:, 3:], before[:, 3:])


def test_factor_number_and_hardness_follow_the_schedule() -> None:
    soft = soft_pruning(chain(), steps=8, factor=0.8, grow=0.5, harden=0.75)
    total = sum(int(n.sum()) for n in soft.goal)
    factors, channels, hard = [], [], []
    for _ in range(8):
        factors.append(soft.step())
        assert soft.plan.macs[1] <= soft.plan.macs[0]
        channels.append(soft.progress()["channels"])
        hard.append(soft.progress()["hard"])
    assert factors == pytest.approx([0.8 * (1 - t / 6) if t < 6 else 0.0 for t in range(1, 9)])
    assert channels == sorted(channels) and hard == sorted(hard)
    assert 0 < channels[0] < total and channels[3:] == [total] * 5
    assert 0 < hard[2] < total and hard[5:] == [total] * 3
    assert [share_at(t, 0.5) for t in (0.25, 0.5, 1.0)] == [0.875, 1.0, 1.0] and share_at(0.1, 0.0) == 1.0


def test_the_number_of_masked_channels_is_the_nearest_to_the_share_so_that_none_waits_for_the_end() -> None:
    soft = soft_pruning(chain(), steps=10, factor=0.0, grow=1.0, harden=None)
    masked = []
    for _ in range(10):
        soft.step()
        masked.append({name: int(m.sum()) for name, m in soft.masked.items() if m.any()})
    assert masked[8] == masked[9] and sum(masked[9].values()) == sum(int(n.sum()) for n in soft.goal)
    shares = [share_at(t / 10, 1.0) for t in range(1, 11)]
    assert all(abs(now[name] - share * most) <= 0.5 for now, share in zip(masked, shares, strict=True)
               for name, most in masked[9].items())


def test_a_soft_channel_comes_back_when_its_readers_grow_and_a_hard_one_does_not() -> None:
    for settings, comes_back in ((SFP, True), (HARD, False)):
        model = chain()
        soft = soft_pruning(model, steps=5, **settings)
        soft.step()
        masked = soft.masked["0.0"].copy()
        with torch.no_grad():
            model.get_parameter(READS).data[:, masked] = 10.0
        soft.step()
        assert bool((soft.masked["0.0"] & masked).any()) != comes_back
        assert soft.masked["0.0"].sum() == masked.sum()


def test_masked_channels_learn_again_between_soft_steps() -> None:
    model = chain()
    soft = soft_pruning(model, **SFP)
    optimizer = sgd(model)
    soft.attach(optimizer)
    soft.step()
    train(model, optimizer, X, 1)
    assert weight_left(model, kept_without(soft.graph, soft.masked))
    assert bool((model.get_parameter(READS)[:, soft.masked["0.0"]].abs().amax((0, 2, 3)) > 0).all())


def test_a_frozen_layer_may_read_masked_channels() -> None:
    model = chain()
    model.get_parameter(READS).requires_grad_(False)
    soft = soft_pruning(model, **HARD)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    soft.attach(optimizer)
    soft.step()
    train(model, optimizer, X, 2)
    assert not model.get_parameter(READS)[:, soft.masked["0.0"]].any()
    assert difference(outputs(model, X), outputs(soft.narrow(), X)) < 1e-5


def test_masks_are_copied_to_the_device_once_for_each_step_and_none_while_no_channel_is_hard() -> None:
    model = chain()
    soft = soft_pruning(model, steps=4, factor=0.0, grow=0.0, harden=1.0)
    soft.zero_hard()
    seen = []
    for _ in range(2):
        with Waits() as waits:
            soft.zero_hard()
        seen.append(waits.found)
        soft.step()
    assert seen == [[], []]
    model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        model.get_parameter(READS).fill_(1.0)
    soft.zero_hard()
    assert torch.equal((model.get_parameter(READS) == 0).all(0).all(-1).all(-1), torch.as_tensor(soft.hard["0.0"]))
    model.to("meta")
    soft.zero_hard()
    assert soft.zeros and {mask.device.type for mask in soft.zeros.values()} == {"meta"}


def test_the_hard_channels_of_a_state_replace_those_before() -> None:
    soft, other = soft_pruning(chain(), **HARD), soft_pruning(chain(1), **HARD)
    for part in (soft, other):
        part.step()
    assert (soft.hard["0.0"] != other.hard["0.0"]).any()
    soft.load_state_dict(other.state_dict())
    with torch.no_grad():
        soft.model.get_parameter(READS).fill_(1.0)
    soft.zero_hard()
    assert torch.equal((soft.model.get_parameter(READS) == 0).all(0).all(-1).all(-1), torch.as_tensor(other.hard["0.0"]))


def test_a_plan_says_which_channels_go() -> None:
    model = chain()
    plan = narrower.plan(chain_graph(), narrower.random(chain_graph()), macs=0.5)
    soft = soft_pruning(model, plan=plan, steps=4)
    for _ in range(4):
        soft.step()
        assert all(set(plan.keep[n]) <= set(kept) for n, kept in soft.plan.keep.items())
    assert all(np.array_equal(kept, plan.keep[n]) for n, kept in soft.plan.keep.items())
    narrower.verify(model, soft.narrow(), plan, X)


def test_of_a_plan_that_is_not_fixed_only_the_widths_count() -> None:
    """The plan here takes what is largest, the training what is lowest."""
    model, graph = chain(), chain_graph()
    plan = narrower.plan(graph, {n: s.max() - s for n, s in narrower.magnitude(model, graph).items()}, macs=0.5)
    soft = soft_pruning(model, plan=plan, steps=1, fixed=False)
    soft.step()
    assert any(not np.array_equal(kept, plan.keep[n]) for n, kept in soft.plan.keep.items())
    assert {n: len(kept) for n, kept in soft.plan.keep.items()} == {n: len(kept) for n, kept in plan.keep.items()}


def test_scores_weigh_the_choice() -> None:
    model = chain()
    scores = narrower.Scores({g.name: torch.where(torch.arange(g.size) < 2, 1e-9, 1.0) for g in chain_graph().free})
    soft = soft_pruning(model, scores=scores, **SFP)
    soft.step()
    assert all(bool(m[:2].all()) for m in soft.masked.values())


@pytest.mark.parametrize("settings", [SFP, {}, {"grow": 1.0, "harden": 1.0}])
def test_a_resumed_training_is_the_uninterrupted_one(settings: dict[str, Any]) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, narrower.SoftPruning]:
        model = chain()
        soft, optimizer = soft_pruning(model, steps=4, **settings), sgd(model)
        soft.attach(optimizer)
        return model, optimizer, soft

    def epochs(model: nn.Module, optimizer: torch.optim.Optimizer, soft: narrower.SoftPruning, numbers: range) -> None:
        for n in numbers:
            train(model, optimizer, X, 2, seed=n)
            soft.step()

    whole, first, second = start(), start(), start()
    epochs(*whole, range(4))
    epochs(*first, range(2))
    saved = io.BytesIO()
    torch.save([part.state_dict() for part in first], saved)
    saved.seek(0)
    states = torch.load(saved, weights_only=True)
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)  # type: ignore[attr-defined]
    epochs(*second, range(2, 4))
    for a, b in zip(whole[0].state_dict().values(), second[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert whole[2].state_dict() == second[2].state_dict()


def test_norms_are_those_of_what_makes_and_what_reads_a_channel() -> None:
    model = randomised(PATTERNS["transposed"].make())
    graph, tensors = graph_of("transposed"), dict(model.state_dict())
    up, wide, last = (tensors[f"{n}.weight"] for n in ("up", "wide", "last"))  # (in, out / groups, ...): 2 groups, 12, 1
    made = torch.cat([part.square().sum((0, 2, 3)) for part in up.chunk(2)]).sqrt()
    again, read = (w.square().sum((1, 2, 3)).sqrt() for w in (wide, last))
    both = (made / made.mean() + again / again.mean()) / 2
    assert relative_norms(graph, tensors, "out")["up"] == pytest.approx(both.numpy(), rel=1e-5)
    assert relative_norms(graph, tensors, "in")["up"] == pytest.approx((read / read.mean()).numpy(), rel=1e-5)


class Computed(nn.Conv2d):
    """Zeros of its parameter are no zeros of its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight + 0.1, self.bias, padding=1)


def test_what_cannot_be_masked_by_weights_is_left_alone_and_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(unit(3, 12), unit(12, 8), nn.GroupNorm(2, 8), unit(8, 6), Computed(6, 6, 3), nn.ReLU(), Head(6))
    model = model.double()
    found = narrower.trace(model, X[:1])
    reasons = unmaskable(found)
    assert set(reasons) == {"1.0", "3.0"}
    assert "across its channels" in reasons["1.0"] and "computed from parameters" in reasons["3.0"]
    soft = narrower.SoftPruning(model, found, macs=0.7, steps=1, exclude=["4"])
    soft.step()
    assert not any(soft.masked[n].any() for n in ("1.0", "3.0", "4")) and soft.masked["0.0"].any()
    assert "left alone: 4: excluded" in str(soft)
    with pytest.raises(narrower.PlanError, match=r"removes channels of 1.0, which cannot be masked"):
        narrower.SoftPruning(model, found, plan=narrower.plan(found, narrower.random(found), remove=0.5), steps=1)


def test_narrowing_too_early_warns_and_cuts() -> None:
    model = chain()
    soft = soft_pruning(model, steps=4, harden=None)
    soft.step()
    with pytest.warns(UserWarning, match="of the budget are not masked yet and channels that are cut are not at zero"):
        small = soft.narrow()
    narrower.verify(model, small, soft.plan, X)


def test_narrowing_when_all_that_is_masked_is_at_zero_still_says_what_is_missing() -> None:
    soft = soft_pruning(chain(), steps=4, factor=0.0, grow=1.0, harden=0.0)
    soft.step()
    with pytest.warns(UserWarning, match=r"^\d+ channels of the budget are not masked yet: call step\(\) 4 times"):
        small = soft.narrow()
    assert narrower.measure(small, X, seconds=0.0)["macs"] == soft.plan.macs[1] > 0.5 * soft.plan.macs[0]


def test_an_average_is_narrowed_by_the_same_channels() -> None:
    model, average = chain(), chain(1)
    soft = soft_pruning(model, **SFP)
    soft.step()
    before = copy.deepcopy(average.state_dict())
    with pytest.warns(UserWarning, match=r"not at zero \(what reads them has up to [0-9.e-]+ of .* an average lags behind"):
        narrower.verify(average, soft.narrow(average), soft.plan, X)
    assert all(torch.equal(v, before[k]) for k, v in average.state_dict().items())


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"macs": None}, narrower.PlanError, "give a budget"),
    ({"steps": 0}, narrower.ConfigError, "steps=0: say how often"),
    ({"factor": 1.5}, narrower.ConfigError, "factor=1.5: give a number between 0 and 1"),
    ({"grow": None}, narrower.ConfigError, "grow=None"),
    ({"macs": 1e-6}, narrower.BudgetError, "cannot be reached"),
])  # fmt: skip
def test_bad_settings_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        soft_pruning(chain(), **change)


def test_other_networks_optimizers_and_states_are_refused() -> None:
    model = chain()
    soft = soft_pruning(model)
    soft.attach(sgd(model))
    with pytest.raises(narrower.ConfigError, match="attach was called before"):
        soft.attach(sgd(model))
    with pytest.raises(narrower.StorageError, match="of another run: steps was 2, is 1"):
        soft.load_state_dict(soft_pruning(chain(), steps=2).state_dict())
    with pytest.raises(narrower.PlanError, match="the plan is of another network"):
        soft_pruning(model, plan=narrower.plan(graph_of("plain"), narrower.random(graph_of("plain")), remove=0.5))
    with pytest.raises(narrower.StorageError, match="its scores= were others"):
        soft.load_state_dict(soft_pruning(chain(), scores=narrower.random(chain_graph())).state_dict())
    state = soft.state_dict()
    del state["scores"]  # as earlier versions saved it
    soft.load_state_dict(state)
