"""Distillation: nothing to learn where the networks agree, one direction where they do not, and nothing else is touched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.networks import Head, unit
from support.resrep_training import randomised
from torch import nn
from torch.utils.checkpoint import checkpoint

import narrower
from narrower.distillation.distill import divergence

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 5


def cut(remove: float = 0.4) -> tuple[Any, Any, narrower.Plan]:
    model = randomised(nn.Sequential(unit(3, 12), unit(12, 10, stride=2), unit(10, 8), Head(8))).eval()
    graph = narrower.trace(model, X[:1])
    plan = narrower.plan(graph, narrower.magnitude(model, graph), remove=remove)
    return model, narrower.narrow(model, plan), plan


def test_equal_networks_have_no_loss_and_no_gradient() -> None:
    model, _, plan = cut()
    everything = narrower.Plan(plan.graph, {g.name: torch.arange(g.size).numpy() for g in plan.graph.free}, (1, 1), (1, 1), {})
    student = copy.deepcopy(model)
    loss = narrower.Distillation(model, student, everything, weight=1.0, features=1.0).loss(X, student(X))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-5 for p in student.parameters())


@pytest.mark.parametrize("features", [0.0, 1.0])
def test_training_on_the_loss_brings_the_narrow_network_nearer(features: float) -> None:
    model, small, plan = cut()
    distillation = narrower.Distillation(model, small, plan, features=features, weight=1.0)
    optimizer = torch.optim.Adam(small.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = distillation.loss(X, small(X))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_loss_is_the_weighted_sum_of_task_and_divergence() -> None:
    model, small, _ = cut()
    out = small(X)
    p, q = (model(X) / 2).softmax(1), (out / 2).softmax(1)
    kl = 4 * (p * (p / q).log()).sum(1).mean()
    task = F.cross_entropy(out, Y)
    loss = narrower.Distillation(model, small, temperature=2.0, weight=0.3).loss((X, Y), out, task)
    assert float(loss.detach()) == pytest.approx(float(0.7 * task + 0.3 * kl), rel=1e-4)


def test_features_are_compared_on_the_kept_channels_of_what_stages_give() -> None:
    model, small, plan = cut()
    distillation = narrower.Distillation(model, small, plan, weight=0.0, features=1.0)
    assert [tap.module for tap in distillation.taps] == ["1.0", "3.fc"]
    with torch.no_grad():
        dense = {"1.0": model[0](X)[:, plan.keep["0.0"]], "3.fc": model[:3](X).mean((2, 3))[:, plan.keep["2.0"]]}
        narrow = {"1.0": small[0](X), "3.fc": small[:3](X).mean((2, 3))}
        errors = [(narrow[k] - dense[k]).square().mean() / dense[k].var() for k in dense]
    loss = distillation.loss(X, small(X))
    assert float(loss.detach()) == pytest.approx(float(sum(errors) / 2), rel=1e-4)


def test_a_student_that_is_still_wide_is_compared_on_the_channels_that_it_will_have() -> None:
    model, small, plan = cut()
    one = narrower.plan(plan.graph, narrower.magnitude(model, plan.graph), remove={"2.0": 0.9})  # would broadcast
    assert len(one.keep["2.0"]) == 1
    for chosen in (plan, one):
        wide = copy.deepcopy(model)
        narrower.SoftPruning(wide, plan.graph, plan=chosen, steps=1, grow=0.0, harden=0.0).step()
        losses = [float(narrower.Distillation(model, student, chosen, weight=0.0, features=1.0).loss(X, student(X)).detach())
                  for student in (wide, narrower.narrow(model, chosen))]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    distillation = narrower.Distillation(model, small, one, features=1.0)
    with pytest.raises(narrower.ConfigError, match=r"1\.0 reads features .* in the student"):
        distillation.loss(X, small(X))


def test_the_teacher_is_untouched_and_runs_in_eval_mode() -> None:
    model, small, plan = cut()
    model.train()
    before = copy.deepcopy(model.state_dict())
    narrower.Distillation(model, small.train(), plan, features=1.0).loss(X, small(X)).backward()
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_close_takes_all_hooks_off_and_a_copy_of_the_student_has_no_teacher_in_it() -> None:
    model, small, plan = cut()
    distillation = narrower.Distillation(model, small, plan, features=1.0)
    copied = copy.deepcopy(small)
    small(X)
    copied(2 * X)  # the hooks of the copy write where the student's do: what counts is the last forward before the loss
    distillation.close()
    assert not any(m._forward_pre_hooks for m in small.modules())
    with pytest.raises(ValueError, match="within"), narrower.Distillation(model, small, plan, features=1.0):
        assert any(m._forward_pre_hooks for m in small.modules())
        raise ValueError("within")
    assert not any(m._forward_pre_hooks for m in small.modules())


def test_features_of_another_forward_than_that_of_the_outputs_are_refused() -> None:
    model, small, plan = cut()
    distillation = narrower.Distillation(model, small, plan, features=1.0)
    first, second = small(X), small(2 * X)
    with pytest.raises(narrower.ConfigError, match="not those of the student's last forward"):
        distillation.loss(X, first)
    distillation.loss(2 * X, second.float() * 1)  # computed from its outputs
    with pytest.raises(narrower.ConfigError, match="run the student before each loss"):
        distillation.loss(2 * X, second)
    first = small(X)
    with torch.no_grad():
        small(2 * X)  # an evaluation in between
    with pytest.raises(narrower.ConfigError, match="not those of the student's last forward"):
        distillation.loss(X, first)
    with torch.no_grad():
        distillation.loss(X, small(X))


class Checkpointed(nn.Module):
    """Runs all but the first and last layers again in backward, to save memory."""

    def __init__(self, layers: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.layers, self.reentrant = layers, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *middle, last = self.layers.children()
        return last(checkpoint(nn.Sequential(*middle), first(x), use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_features_that_a_reentrant_checkpoint_leaves_without_a_gradient_are_refused() -> None:
    def run(reentrant: bool) -> list[torch.Tensor | None]:
        torch.manual_seed(0)
        layers = [unit(3, 12), unit(12, 10), unit(10, 10, stride=2), Head(10)]
        dense = Checkpointed(randomised(nn.Sequential(*layers)), reentrant).eval()
        graph = narrower.trace(dense, X[:1])
        plan = narrower.plan(graph, narrower.magnitude(dense, graph), remove=0.4)
        student = narrower.narrow(dense, plan)
        distillation = narrower.Distillation(dense, student, plan, features=1.0, weight=0.0)
        with torch.no_grad():
            distillation.loss(X, student(X))
        distillation.loss(X, student(X)).backward()
        return [p.grad for p in student.parameters()]

    assert all(grad is not None for grad in run(reentrant=False)[:3])
    with pytest.raises(narrower.ConfigError, match=r"layers\.2\.0 reads carry no gradient.*use_reentrant=False"):
        run(reentrant=True)


def test_divergence_of_other_outputs_is_relative_to_their_variance() -> None:
    want: dict[str, Any] = {"boxes": torch.randn(4, 6, 3), "more": [torch.randn(4, 1)], "index": torch.arange(4)}
    near = {"boxes": want["boxes"] + 0.1, "more": [want["more"][0]], "index": torch.zeros(4, dtype=torch.long)}
    assert float(divergence(want, want)) == 0
    assert float(divergence(want, near)) == pytest.approx(0.005 / float(want["boxes"].var()), rel=1e-3)


def test_single_numbers_have_no_variance_and_are_left_out() -> None:
    """A loss among the outputs, and the outputs (N, 1) of a last batch of one image."""
    want, have = torch.randn(4, 3), torch.randn(4, 3)
    loss = {"loss": torch.tensor(1.0), "logits": want}, {"loss": torch.tensor(2.0), "logits": have}
    for temperature in (None, 2.0):
        assert float(divergence(*loss, temperature)) == float(divergence(want, have, temperature))
    one = torch.ones(1, 1, requires_grad=True)
    for temperature in (None, 2.0):
        error = divergence(torch.zeros(1, 1), one, temperature)
        error.backward()
        assert float(error.detach()) == 0 and one.grad is not None and not one.grad.any()
    with pytest.raises(narrower.ConfigError, match="no floating-point tensors"):
        divergence(torch.tensor(1.0), torch.tensor(1.0))


def test_segmentation_scores_count_each_position() -> None:
    want, have = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    flat = (want.movedim(1, -1).reshape(-1, 3), have.movedim(1, -1).reshape(-1, 3))
    assert float(divergence(want, have, 3.0)) == pytest.approx(float(divergence(flat[0], flat[1], 3.0)), rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 2, 4, 4)])
def test_class_scores_of_any_number_of_dimensions_are_compared_as_such_if_they_are_said_to_be(shape: tuple[int, ...]) -> None:
    want, have = torch.randn(shape), torch.randn(shape)
    flat = (want.movedim(1, -1).reshape(-1, 3), have.movedim(1, -1).reshape(-1, 3))
    assert float(divergence(want, have, 3.0, logits=True)) == pytest.approx(float(divergence(*flat, 3.0)), rel=1e-5)
    assert float(divergence(want, have, 3.0)) == float(divergence(want, have, None))
    for out in (want[:, :1], (want, want)):
        with pytest.raises(narrower.ConfigError, match="logits=True is for one tensor of class scores"):
            divergence(out, out, 3.0, logits=True)


@pytest.mark.parametrize(("change", "message"), [
    ({"logits": True, "temperature": None}, "logits=True needs temperature="),
    ({"temperature": 0.0}, "temperature=0.0: give a number between"),
    ({"weight": 1.5}, "weight=1.5: give a number between"),
    ({"features": 1.0}, "features need plan="),
])  # fmt: skip
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    model, small, _ = cut()
    with pytest.raises(narrower.ConfigError, match=message):
        narrower.Distillation(model, small, **change)


def test_a_teacher_that_is_the_student_is_refused() -> None:
    model, _, _ = cut()
    with pytest.raises(narrower.ConfigError, match="shares parameters with the student"):
        narrower.Distillation(model, model)


def test_outputs_that_cannot_be_compared_are_refused() -> None:
    model, small, _ = cut()
    with pytest.raises(narrower.ConfigError, match=r"distillation compares equal outputs.*outputs\['out'\].*--no-distill"):
        narrower.Distillation(model, small).loss(X, small(X)[:, :3])


def test_a_teacher_that_is_narrower_than_the_student_is_refused() -> None:
    model, small, plan = cut()
    for features in (0.0, 1.0):
        with pytest.raises(narrower.ConfigError, match=r"the teacher is narrower.*: 0\.0\.weight is \(8, 3, 3, 3\) in"):
            narrower.Distillation(small, model, plan, features=features)
        narrower.Distillation(model, small, plan, features=features).close()
    narrower.Distillation(copy.deepcopy(model), model, plan).close()  # the student in training, still dense
    other = nn.Sequential(unit(3, 4), unit(4, 11, stride=2), unit(11, 8), Head(8))
    narrower.Distillation(other, model).close()  # wider in places: nothing is certain
    compacted = copy.deepcopy(model)
    narrower.ResRep(compacted, plan.graph, macs=0.5, steps=10)
    narrower.Distillation(model, compacted, plan).close()
