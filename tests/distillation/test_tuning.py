"""tune: what it returns diverges less on images that it never trained on, and what it was given is untouched."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from support.devices import APPLE, Waits, apple
from support.networks import Head, unit
from support.resrep_training import randomised
from torch import nn

import narrower
from narrower.distillation import tuning
from narrower.distillation.tuning import TEMPERATURE, Cosine, minibatches
from narrower.repair.comparison import divergences
from narrower.repair.held_out import split
from narrower.surgery.copying import moved

BATCHES = list(torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(32))


@pytest.fixture(scope="module")
def networks() -> tuple[Any, Any, narrower.Plan]:
    torch.manual_seed(0)
    model = randomised(nn.Sequential(unit(3, 12), unit(12, 10, stride=2), unit(10, 8), Head(8))).eval()
    graph = narrower.trace(model, BATCHES[0][:1])
    plan = narrower.plan(graph, narrower.magnitude(model, graph), remove=0.4)
    return model, narrower.narrow(model, plan), plan


def test_a_tuned_network_is_nearer_to_the_dense_one_on_held_out_images(networks: Any) -> None:
    model, small, plan = networks
    said: list[str] = []
    before = copy.deepcopy(small.state_dict())
    found = narrower.tune(model, small.train(), plan, BATCHES, steps=60, lr=3e-3, progress=said.append)
    assert found.kept and found.after < 0.7 * found.before and found.model is not small
    held_out = split([(b, len(b)) for b in BATCHES], 6, 128)[1]
    (again,), _ = divergences(model, [found.model], held_out)
    assert again == pytest.approx(found.after)
    assert len(said) == 10 and "step 60 of 60" in said[-1] and "kept" in str(found)
    assert small.training and all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    statistics = {k: v for k, v in found.model.state_dict().items() if "running" in k}
    assert statistics and all(torch.equal(v, before[k]) for k, v in statistics.items())


def test_the_images_that_decide_are_never_trained_on(networks: Any) -> None:
    model, small, plan = networks
    x, found = torch.cat(BATCHES), []
    for factor in (1.0, 1.5):
        x[5::6] *= factor
        found.append(narrower.tune(model, small, plan, x.split(32), steps=20, lr=3e-3))
    assert found[0].kept and found[1].kept and found[0].after != found[1].after
    states = [tuned.model.state_dict() for tuned in found]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_no_more_images_decide_than_it_says(networks: Any) -> None:
    model, small, plan = networks
    x = torch.randn(6 * 130, 3, 4, 4)
    found = narrower.tune(model, small, plan, [x], steps=1, lr=1e-5)
    assert found.before == pytest.approx(divergences(model, [small], [(x[5::6][:128], 128)])[0][0])


@pytest.mark.parametrize(("measure", "temperature"), [(None, TEMPERATURE), ("relative", None)])
def test_the_loss_and_what_decides_are_of_the_measure_that_is_given(
    networks: Any, measure: Any, temperature: float | None, monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, small, plan = networks
    made: list[Any] = []

    class Kept(narrower.Distillation):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(tuning, "Distillation", Kept)
    found = narrower.tune(model, small, plan, BATCHES, steps=20, lr=3e-3, measure=measure)
    assert made[0].temperature == temperature and found.measure == (measure or "kl") and found.kept
    held_out = split([(b, len(b)) for b in BATCHES], 6, 128)[1]
    (before, after), _ = divergences(model, [small, found.model], held_out, measure)
    assert (before, after) == pytest.approx((found.before, found.after))


def test_class_scores_at_each_position_of_a_signal_are_trained_on_as_such() -> None:
    """Scores that differ by a constant are the same probabilities: nothing is learnt from them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 5, 1))
    graph = narrower.trace(model, torch.randn(1, 1, 32))
    plan = narrower.plan(graph, narrower.magnitude(model, graph), remove=0.4)
    small: Any = narrower.narrow(model, plan)
    losses = []
    for offset in (0.0, 3.0):
        with torch.no_grad():
            small[2].bias += offset
        said: list[str] = []
        narrower.tune(model, small, plan, [torch.ones(24, 1, 32)], steps=1, measure="kl", progress=said.append)
        losses.append(said[0])
    assert losses[0] == losses[1]


def test_a_loss_among_the_outputs_is_not_compared(networks: Any) -> None:
    class WithLoss(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            out = self.network(x)
            return {"loss": out.square().mean(), "logits": out}

    model = WithLoss(networks[0]).eval()
    graph = narrower.trace(model, BATCHES[0][:1])
    plan = narrower.plan(graph, narrower.magnitude(model, graph), remove=0.4)
    found = narrower.tune(model, narrower.narrow(model, plan), plan, BATCHES, steps=5, lr=1e-3)
    assert found.kept and found.measure == "kl"


def test_what_makes_it_worse_is_not_kept(networks: Any) -> None:
    model, small, plan = networks
    found = narrower.tune(model, small, plan, BATCHES, steps=3, lr=1.0)
    assert not found.kept and found.model is small and "stays as it was given" in str(found)


def test_the_same_seed_gives_the_same_network_and_frozen_parameters_stay(networks: Any) -> None:
    model, small, plan = networks
    small = copy.deepcopy(small)
    small[0][0].weight.requires_grad_(False)
    runs = [narrower.tune(model, small, plan, BATCHES, steps=10, lr=1e-3, seed=s).model for s in (3, 3, 4)]
    states = [run.state_dict() for run in runs]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert not all(torch.equal(v, states[2][k]) for k, v in states[0].items())
    assert torch.equal(states[0]["0.0.weight"], small[0][0].weight)
    assert not runs[0].get_parameter("0.0.weight").requires_grad and runs[0].get_parameter("1.0.weight").requires_grad


def test_the_host_waits_for_the_device_as_often_however_many_steps_there_are(
    networks: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, small, plan = networks
    with apple(monkeypatch):
        model, small, images = moved(model, APPLE), moved(small, APPLE), [x.to(APPLE) for x in BATCHES]
        found = []
        for steps in (10, 20, 40):
            with Waits() as waits:
                narrower.tune(model, small, plan, images, steps=steps, lr=1e-3)
            found.append(Counter(waits.there))
    assert found[0] == found[1] == found[2] and found[0]["_to_copy"] and found[0]["_local_scalar_dense"]


def test_a_tuned_network_is_saved_and_loaded(networks: Any, tmp_path: Any) -> None:
    model, small, plan = networks
    tuned = narrower.tune(model, small, plan, BATCHES, steps=20, lr=3e-3).model
    narrower.save(tuned, tmp_path)
    again = narrower.load(tmp_path, lambda: copy.deepcopy(model)).eval()
    assert torch.equal(again(BATCHES[0]), tuned.eval()(BATCHES[0]))


def test_every_image_is_drawn_once_in_each_pass() -> None:
    numbers = [({"x": torch.arange(4)}, 4), ({"x": torch.arange(4, 10)}, 6)]
    drawn = [b["x"] for b in minibatches(numbers, 5, 4, seed=0)]
    assert [len(d) for d in drawn] == [4] * 5
    assert sorted(torch.cat(drawn).tolist()) == sorted([*range(10)] * 2)
    assert [len(b["x"]) for b in minibatches(numbers, 2, 64, seed=0)] == [10, 10]


def test_the_learning_rate_falls_to_zero() -> None:
    rates = [Cosine(2.0, 10).at(step) for step in range(11)]
    assert rates[0] == 2.0 and rates[10] == pytest.approx(0) and rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"steps": 0}, narrower.ConfigError, "steps=0: give a whole number"),
    ({"batch_size": 2.5}, narrower.ConfigError, "batch_size=2.5"),
    ({"seed": 0.5}, narrower.ConfigError, "seed=0.5"),
    ({"lr": 0.0}, narrower.ConfigError, "lr=0.0: give a number above 0"),
    ({"lr": 1e30, "steps": 20}, narrower.ConfigError, "no longer finite at step .* try a lower lr"),
    ({"images": 5}, narrower.DataError, "tune got 5 images: give it 12"),
])  # fmt: skip
def test_bad_input_is_named(options: dict[str, Any], error: type[Exception], message: str, networks: Any) -> None:
    model, small, plan = networks
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(error, match=message):
        narrower.tune(model, small, plan, BATCHES, **options)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def test_frozen_networks_are_refused_with_what_helps(networks: Any) -> None:
    model, small, plan = networks
    frozen = copy.deepcopy(small).requires_grad_(False)
    with pytest.raises(narrower.ConfigError, match=r"nothing to train: call requires_grad_\(True\)"):
        narrower.tune(model, frozen, plan, BATCHES)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_trains_in_modes_without_gradients(mode: Any, networks: Any) -> None:
    model, small, plan = networks
    want = narrower.tune(model, small, plan, BATCHES, steps=5, lr=1e-3)
    with mode():
        images = [x.clone() for x in BATCHES]  # in inference mode tensors that autograd cannot store
        found = narrower.tune(model, small, plan, images, steps=5, lr=1e-3)
    found.model.train()(BATCHES[0]).sum().backward()
    assert (found.before, found.after) == (want.before, want.after)


def test_networks_in_the_wrong_order_are_refused(networks: Any) -> None:
    model, small, plan = networks
    for dense, cut in ((small, model), (model, copy.deepcopy(model))):
        with pytest.raises(narrower.PlanError, match=r"0\.0\.weight is \(12, 3, 3, 3\), should be .*give tune what narrow"):
            narrower.tune(dense, cut, plan, BATCHES, steps=1)
