"""ResRep on networks: it starts as the identity, follows the paper's rule, and what it returns is what was trained."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject
from hypothesis import strategies as st
from support import networks, random_networks, resrep_training
from support.networks import PATTERNS, TRAPS
from support.random_networks import Block, Random, examples
from support.reference import doubled
from support.resrep_training import difference, outputs, randomised, sgd
from torch import Tensor, nn

import narrower
from narrower.errors import BudgetError, ConfigError, NarrowerError, PlanError, StorageError
from narrower.models.resnet import CifarResNet
from narrower.resrep.compactor import NAME, Compactor

SCOPES = ("inner", "all")


def made(make: Callable[[], nn.Module], inputs: Any, budget: float, steps: int = 24, scope: str = "all",
         **options: Any) -> tuple[narrower.ResRep, list[Tensor]]:
    torch.manual_seed(1)
    model = randomised(make()).double()
    graph = narrower.trace(model, inputs)
    dense = outputs(model, inputs)
    return narrower.ResRep(model, graph, macs=budget, steps=steps, scope=scope, **options), dense  # type: ignore[arg-type]


class Diverged(Exception):
    """The training has: products of products soon do."""


def examined(make: Callable[[], nn.Module], inputs: Any, scope: str, budget: float = 0.8) -> narrower.ResRep | None:
    """All that must hold of a short training with shrinking on the way; None where there is nothing to compact."""
    inputs = doubled(inputs)
    try:
        resrep, dense = made(make, inputs, budget, scope=scope)
    except (BudgetError, PlanError):
        return None
    assert difference(dense, outputs(resrep.model, inputs)) < 1e-12
    optimizer = sgd(resrep)
    for n, fold in ((14, True), (4, False), (6, True)):
        resrep_training.train(resrep, optimizer, inputs, n, seed=n)
        before = outputs(resrep.model, inputs)
        if not all(bool(t.isfinite().all()) for t in before):
            raise Diverged
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert difference(before, outputs(resrep.merge(), inputs)) < 1e-10
        resrep.shrink(fold=fold)
        assert difference(before, outputs(resrep.model, inputs)) < 1e-10
    small = resrep.merge()
    assert resrep.reached() <= budget
    assert narrower.measure(small, inputs, seconds=0.0)["macs"] <= budget * resrep.dense["macs"] * (1 + 1e-9)
    assert not any(hasattr(m, NAME) or m._forward_hooks for m in small.modules())
    return resrep


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", PATTERNS)
def test_merged_is_trained(name: str, scope: str) -> None:
    examined(PATTERNS[name].make, PATTERNS[name].inputs, scope)


@pytest.mark.parametrize("name", TRAPS)
def test_no_trap_is_merged_wrongly(name: str) -> None:
    examined(TRAPS[name].make, networks.images(), "all", 0.9)


COMPACTED = {"plain": 3, "residual": 4, "option_a": 2, "dense": 5, "inception": 6, "depthwise": 2, "grouped": 3,
             "squeeze_excite": 4, "transposed": 3, "unet": 7}


@pytest.mark.parametrize("name", COMPACTED)
def test_patterns_that_must_have_compactors(name: str) -> None:
    resrep, _ = made(PATTERNS[name].make, doubled(PATTERNS[name].inputs), 0.9)
    assert len(resrep.placement.rows) >= COMPACTED[name] - ("sigmoid" in str(resrep.reasons)), resrep.reasons


@given(random_networks.recipes(), st.integers(0, 3))
@examples(30)
def test_random_networks(recipe: list[Block], head: int) -> None:
    inputs = networks.images(size=12)[:, :, :8]
    try:
        examined(lambda: Random(recipe, head), inputs, "all", 0.85)
    except Diverged:
        reject()
    except ConfigError as e:
        assert "not finite" in str(e)
        reject()


# ------------------------------------------------------------------------------------------------ the rule


class Two(nn.Module):
    """Two convolutions with BatchNorm, of which the first can be narrowed, and a third behind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.b, self.bn_b = nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_a(self.a(x)))
        x = F.relu(self.bn_b(self.b(x)))
        return self.fc(x.mean((2, 3)))


def test_against_the_papers_procedure_written_out() -> None:
    """200 steps beside a slow implementation in which compactors are plain tensors and channels are masked one at a time."""
    settings = narrower.Forgetting(1e-2, 20, 10, 1.0, 0, 0.9, rest=False, ranking="norm")
    x = networks.images(size=8).double()
    torch.manual_seed(0)
    model = randomised(Two()).double()
    slow: Any = copy.deepcopy(model)
    graph = narrower.trace(model, x)
    resrep = narrower.ResRep(model, graph, macs=0.4, steps=200, settings=settings)
    optimizer = torch.optim.SGD(resrep.param_groups(lr=0.05, momentum=0.9))
    resrep.attach(optimizer)

    q = {"a": torch.eye(8, dtype=torch.float64), "b": torch.eye(6, dtype=torch.float64)}
    velocity = {n: torch.zeros_like(w) for n, w in (*slow.named_parameters(), *q.items())}
    chosen = {n: torch.zeros(len(w), dtype=torch.bool) for n, w in q.items()}
    gone = {n: torch.zeros(len(w), dtype=torch.bool) for n, w in q.items()}
    area_a, area_b = 36, 16

    def macs(a: int, b: int) -> int:
        return area_a * 27 * a + area_b * 9 * a * b + 3 * b

    for step in range(200):
        y = torch.randint(0, 3, (len(x),), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()

        if step >= 20 and (step - 20) % 10 == 0:
            rows = sorted((float(w[r].norm()), n, r) for n, w in q.items() for r in range(len(w)))
            chosen = {n: torch.zeros(len(w), dtype=torch.bool) for n, w in q.items()}
            for _, n, r in rows[: (step - 20) // 10 + 1 + 99]:
                left = {k: int((~c).sum()) for k, c in chosen.items()}
                taken = sum(int(c.sum()) for c in chosen.values())
                if macs(left["a"], left["b"]) <= 0.4 * macs(8, 6) or taken > (step - 20) // 10:
                    break
                if left[n] > 1:
                    chosen[n][r] = True
            chosen = {n: c | gone[n] for n, c in chosen.items()}
        live = {n: w.clone().requires_grad_() for n, w in q.items()}
        slow.train()
        h = F.relu(torch.einsum("kc,nchw->nkhw", live["a"], slow.bn_a(slow.a(x))))
        h = F.relu(torch.einsum("kc,nchw->nkhw", live["b"], slow.bn_b(slow.b(h))))
        loss = F.cross_entropy(slow.fc(h.mean((2, 3))), y)
        parameters = dict(slow.named_parameters())
        grads = torch.autograd.grad(loss, [*parameters.values(), *live.values()])
        with torch.no_grad():
            for (n, w), g in zip(parameters.items(), grads, strict=False):
                velocity[n] = 0.9 * velocity[n] + g
                w.sub_(0.05 * velocity[n])
            for n, g in zip(q, grads[len(parameters):], strict=True):
                new = q[n].clone()
                for r in range(len(new)):
                    norm = float(q[n][r].norm())
                    row = (0 if chosen[n][r] else g[r]) + 1e-2 * (q[n][r] / norm if norm else 0)
                    velocity[n][r] = 0.9 * velocity[n][r] + row
                    new[r] -= 0.05 * velocity[n][r]
                    if chosen[n][r] and (float(new[r] @ q[n][r]) <= 0 or float(new[r].norm()) < 1e-5):
                        gone[n][r] = True
                    if gone[n][r]:
                        new[r], velocity[n][r] = 0, 0
                q[n] = new
        for n, module in (("a", "bn_a"), ("b", "bn_b")):
            c = resrep.compactors()[module]
            assert torch.equal(c.chosen.bool(), chosen[n]), step
            torch.testing.assert_close(c.weight.detach(), q[n], rtol=0, atol=1e-5)
    assert all(g.any() for g in (gone["a"] | gone["b"][:1].any(),))
    assert resrep.progress()["zero"] > 3


def small_resnet() -> nn.Module:
    return CifarResNet(1, 5)


IMAGES = networks.images(size=8).double()


def test_kept_rows_do_not_collapse_and_chosen_ones_become_exactly_zero() -> None:
    resrep, _ = made(small_resnet, IMAGES, 0.5, steps=60, scope="inner")
    optimizer = sgd(resrep)
    resrep_training.train(resrep, optimizer, IMAGES, 60)
    at = resrep.progress()
    assert at["reached"] <= 0.5
    assert 0.9 < at["least_norm"] <= at["mean_norm"] < 1.2
    for c in resrep.compactors().values():
        norms = c.weight.detach().norm(dim=1)
        assert torch.equal(norms == 0, c.gone.bool())
        assert torch.equal(c.gone, c.chosen)
        assert c.weight.isfinite().all()
    assert "norms of the rest" in str(resrep)


@pytest.mark.parametrize("kind", ["sgd", "nesterov", "adamw", "rmsprop"])
def test_optimizers(kind: str) -> None:
    resrep, _ = made(small_resnet, IMAGES, 0.6, steps=40, scope="inner")
    groups = resrep.param_groups(lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=kind == "nesterov")
    if kind in ("adamw", "rmsprop"):
        groups = resrep.param_groups(lr=1e-3, weight_decay=1e-4)
    makers: dict[str, Any] = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
    optimizer: torch.optim.Optimizer = makers.get(kind, torch.optim.SGD)(groups)
    resrep.attach(optimizer)
    resrep_training.train(resrep, optimizer, IMAGES, 40)
    assert resrep.progress()["reached"] <= 0.6
    before = outputs(resrep.model, IMAGES)
    assert difference(before, outputs(resrep.merge(), IMAGES)) < 1e-10


class Signs(torch.optim.Optimizer):
    """As Lion: every step has the same size, however small its momentum is."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(group["lr"] * (0.9 * momentum + 0.1 * p.grad).sign())
                momentum.lerp_(p.grad, 0.01)


def test_chosen_rows_shrink_as_said_under_an_optimizer_whose_steps_are_larger_than_the_pull() -> None:
    settings = narrower.Forgetting(warmup_steps=10, forget_steps=100, mask_interval=1000, rows_per_update=1000.0)
    resrep, _ = made(small_resnet, IMAGES, 0.6, steps=200, scope="inner", settings=settings)
    optimizer = Signs(resrep.param_groups(lr=5e-3))
    resrep.attach(optimizer)
    resrep_training.train(resrep, optimizer, IMAGES, 11)
    rows = {name: c.chosen.bool() for name, c in resrep.compactors().items()}
    before = {name: c.weight.detach().norm(dim=1)[rows[name]] for name, c in resrep.compactors().items()}
    resrep_training.train(resrep, optimizer, IMAGES, 20)
    assert sum(map(len, before.values())) > 5
    for name, c in resrep.compactors().items():
        torch.testing.assert_close(c.weight.detach().norm(dim=1)[rows[name]], before[name] - 0.2)


@pytest.mark.parametrize("make", [
    lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=20),
    lambda o: torch.optim.lr_scheduler.CyclicLR(o, [0, 0], [g["lr"] for g in o.param_groups], 10, cycle_momentum=False),
], ids=["restarts", "cyclic"])  # fmt: skip
def test_chosen_rows_take_their_time_where_learning_rates_jump(make: Any) -> None:
    """Also in a run that goes on just before a jump."""
    def start() -> tuple[narrower.ResRep, torch.optim.Optimizer, Any]:
        settings = narrower.Forgetting(warmup_steps=5, forget_steps=100, mask_interval=1000, rows_per_update=1000.0)
        resrep, _ = made(small_resnet, IMAGES, 0.6, steps=200, scope="inner", settings=settings)
        optimizer = sgd(resrep)
        return resrep, optimizer, make(optimizer)

    def norms(resrep: narrower.ResRep) -> dict[str, Tensor]:
        return {name: c.weight.detach().norm(dim=1)[c.chosen.bool()] for name, c in resrep.compactors().items()}

    parts = start()
    before: dict[str, Tensor] = {}
    for step in range(50):
        resrep, optimizer, schedule = parts
        resrep_training.train(resrep, optimizer, IMAGES, 1, seed=step)
        if step > 5:
            for name, now in norms(resrep).items():
                assert (before[name] - now).abs().max() < 0.04  # 0.01 in the long run
        schedule.step()
        before = norms(resrep)
        if step == 19:
            states = [copy.deepcopy(part.state_dict()) for part in (resrep, resrep.model, optimizer, schedule)]
            parts = start()
            for part, state in zip((parts[0], parts[0].model, *parts[1:]), states, strict=True):
                part.load_state_dict(state)
    assert sum(map(len, before.values())) > 5 and min(float(n.min()) for n in before.values()) > 0.3


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_maximizing_the_negative_loss_is_the_same_training(kind: Any) -> None:
    found = []
    for maximize in (False, True):
        torch.manual_seed(0)
        resrep, _ = made(small_resnet, IMAGES, 0.6, steps=20, scope="inner")
        optimizer = kind(resrep.param_groups(lr=0.01), maximize=maximize)
        resrep.attach(optimizer)
        for _ in range(20):
            loss = resrep.model(IMAGES).square().mean()
            optimizer.zero_grad()
            (-loss if maximize else loss).backward()
            optimizer.step()
        found.append(resrep.model.state_dict())
    assert all(torch.equal(found[0][name], t) for name, t in found[1].items())


def test_weight_decay_is_the_optimizers_own_unless_it_is_given() -> None:
    """Compactors never have any."""
    resrep, _ = made(small_resnet, IMAGES, 0.5)
    for own, decay in ((None, 0.3), (0.1, 0.1), (0.0, 0.0)):
        optimizer = torch.optim.SGD(resrep.param_groups(lr=0.1, weight_decay=own), weight_decay=0.3)
        assert [g["weight_decay"] for g in optimizer.param_groups] == [decay, 0.0]
    resrep.attach(optimizer)


def test_compactors_move_as_fast_as_the_network_and_never_faster() -> None:
    """The ratio of the two momenta would raise the learning rate in short trainings, where compactors have little momentum."""
    for steps, momentum, scale in ((10, 0.0, 1.0), (1000, 0.95, 0.5), (10_000, 0.99, 0.1)):
        resrep, _ = made(small_resnet, IMAGES, 0.5, steps=steps)
        network, compactors = resrep.param_groups(lr=0.1, momentum=0.9)
        assert network["momentum"] == 0.9 and network["lr"] == 0.1
        assert [compactors[k] for k in ("momentum", "lr_scale", "lr")] == pytest.approx([momentum, scale, 0.1 * scale])


def test_the_rule_acts_once_for_each_step_of_an_accumulated_gradient() -> None:
    """Two half batches summed are one whole batch (without BatchNorm in the way of it)."""
    results = []
    for halves in (1, 2):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        model = nn.Sequential(*layers).double()
        resrep = narrower.ResRep(model, narrower.trace(model, networks.images().double()), macs=0.6, steps=30)
        optimizer = sgd(resrep)
        for step in range(30):
            optimizer.zero_grad()
            x = networks.images(seed=step).double()
            for part in x.chunk(halves):
                (model(part).square().sum() / len(x)).backward()
            optimizer.step()
        results.append((resrep.step, [c.weight.detach() for c in resrep.compactors().values()]))
    assert results[0][0] == results[1][0] == 30
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


class Forked(nn.Module):
    """YOLO's C2f: halves of a layer, of which the second goes on through a block with a shortcut; all are read side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.block = networks.unit(3, 12, 1), networks.unit(6, 5), networks.unit(5, 6)
        self.last, self.head = networks.unit(18, 7, 1), networks.Head(7)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, 1)
        return self.head(self.last(torch.cat([a, b, b + self.block(self.inner(b))], 1)))


def test_pieces_of_a_layer_are_compacted_each_by_itself() -> None:
    """A sum with the second piece says nothing of the first."""
    resrep = examined(Forked, IMAGES, "all", 0.15)
    assert resrep is not None and not resrep.reasons and len(resrep.placement.rows) == 4
    assert all(len(k) < 6 for n, k in resrep.kept.keep.items() if n.startswith("first"))


def test_hooks_of_a_layer_take_what_its_compactor_gives() -> None:
    """As they take what the merged layer gives."""
    def hooked() -> nn.Module:
        model = Two()
        model.bn_a.register_forward_hook(lambda module, args, out: torch.tanh(3 * out))
        return model

    resrep, _ = made(hooked, IMAGES, 0.9, steps=40)
    assert "bn_a" in resrep.compactors()
    resrep_training.train(resrep, sgd(resrep, lr=0.05), IMAGES, 30)
    assert difference(outputs(resrep.model, IMAGES), outputs(resrep.merge(), IMAGES)) < 1e-10


def test_rows_are_chosen_at_the_end_of_the_warm_up_and_at_equal_distances_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    resrep, _ = made(Two, IMAGES, 0.5, settings=narrower.Forgetting(warmup_steps=7, mask_interval=5))
    at: list[int] = []
    monkeypatch.setattr(narrower.ResRep, "update_masks", lambda self: at.append(self.step))
    resrep_training.train(resrep, sgd(resrep), IMAGES, 20)
    assert at == [7, 12, 17]


def test_variances_are_measured_every_few_steps_also_of_a_resumed_training(monkeypatch: pytest.MonkeyPatch) -> None:
    at: list[int] = []
    resrep, _ = made(Two, IMAGES, 0.5, steps=400)
    optimizer = sgd(resrep)
    monkeypatch.setattr(Compactor, "follow", lambda *_: at.append(resrep.step))
    resrep_training.train(resrep, optimizer, IMAGES, 6)
    followed = len(at) // 2
    assert at == [0] * followed + [4] * followed and followed == len(resrep.compactors())
    saved = resrep.state_dict(), resrep.model.state_dict(), optimizer.state_dict()
    resrep, _ = made(Two, IMAGES, 0.5, steps=400)
    optimizer = sgd(resrep)
    for part, state in zip((resrep, resrep.model, optimizer), saved, strict=True):
        part.load_state_dict(state)  # type: ignore[attr-defined]
    at.clear()
    resrep_training.train(resrep, optimizer, IMAGES, 3)
    assert at == [8] * followed


def test_compactors_rest_once_the_budget_is_reached() -> None:
    resrep, _ = made(small_resnet, IMAGES, 0.5, steps=60, scope="inner")
    optimizer = sgd(resrep)
    resrep_training.train(resrep, optimizer, IMAGES, 50)
    assert resrep.phase == "resting" and resrep.reached() <= 0.5
    before = {n: c.weight.detach().clone() for n, c in resrep.compactors().items()}
    weight = resrep.model.get_parameter("layer1.0.conv1.weight").detach().clone()
    resrep_training.train(resrep, optimizer, IMAGES, 5)
    assert all(torch.equal(c.weight, before[n]) for n, c in resrep.compactors().items())
    assert not torch.equal(weight, resrep.model.get_parameter("layer1.0.conv1.weight"))


def test_nothing_is_chosen_again_at_rest() -> None:
    """It would be the same: norms stay as they are."""
    resrep, _ = made(Two, IMAGES, 0.5, steps=40)
    optimizer = sgd(resrep)
    resrep_training.train(resrep, optimizer, IMAGES, 30)
    assert resrep.phase == "resting"
    at, again = resrep.progress(), resrep.update_masks
    resrep.update_masks = pytest.fail  # type: ignore[method-assign]
    resrep_training.train(resrep, optimizer, IMAGES, 4)
    again()
    assert resrep.progress() == at and at["masked"] <= 0.5


def test_compactors_are_frozen_by_a_shrink_at_rest() -> None:
    """Merged for good, the identity: the outputs stay, the network trains on, and a resumed run goes on the same way."""
    resrep, _ = made(small_resnet, IMAGES, 0.5, steps=60, scope="inner")
    optimizer = sgd(resrep)
    resrep_training.train(resrep, optimizer, IMAGES, 50)
    before = outputs(resrep.model, IMAGES)
    assert resrep.waiting() == 1
    resrep.shrink()
    assert resrep.phase == "frozen" and resrep.waiting() == 0
    assert difference(before, outputs(resrep.model, IMAGES)) < 1e-10
    saved = copy.deepcopy((resrep.state_dict(), resrep.model.state_dict(), optimizer.state_dict()))
    other, _ = made(small_resnet, IMAGES, 0.5, steps=60, scope="inner")
    other_optimizer = sgd(other)
    other.load_state_dict(saved[0])
    other.model.load_state_dict(saved[1])
    other_optimizer.load_state_dict(saved[2])
    late, _ = made(small_resnet, IMAGES, 0.5, steps=60, scope="inner")
    late.load_state_dict(saved[0])
    sgd(late)  # an optimizer that is made afterwards will do
    for r, o in ((resrep, optimizer), (other, other_optimizer)):
        resrep_training.train(r, o, IMAGES, 5)
    trained = outputs(resrep.model, IMAGES)
    assert difference(before, trained) > 1e-6
    assert difference(trained, outputs(resrep.merge(), IMAGES)) < 1e-10
    assert difference(trained, outputs(other.model, IMAGES)) == 0


# ------------------------------------------------------------------------------------------------ shrink, merge, resume


def test_dropping_rows_changes_nothing_that_follows() -> None:
    """In float64: the outputs to 1e-10 at the moment, to 1e-6 after further steps. Twice, as rows become zero."""
    resrep, _ = made(small_resnet, IMAGES, 0.4, steps=60)
    optimizer = sgd(resrep)
    resrep_training.train(resrep, optimizer, IMAGES, 11)
    twin_model, twin_state = copy.deepcopy(resrep.model), copy.deepcopy(optimizer.state_dict())
    other, _ = made(small_resnet, IMAGES, 0.4, steps=60)
    other_optimizer = sgd(other)
    other.load_state_dict(resrep.state_dict())
    other.model.load_state_dict(twin_model.state_dict())
    other_optimizer.load_state_dict(twin_state)
    for seed in (8, 9):
        before, count = outputs(resrep.model, IMAGES), sum(p.numel() for p in resrep.model.parameters())
        assert resrep.shrink(fold=False) < 1
        assert sum(p.numel() for p in resrep.model.parameters()) < count
        assert difference(before, outputs(resrep.model, IMAGES)) < 1e-10
        resrep_training.train(resrep, optimizer, IMAGES, 20, seed=seed)
        resrep_training.train(other, other_optimizer, IMAGES, 20, seed=seed)
        assert difference(outputs(resrep.model, IMAGES), outputs(other.model, IMAGES)) < 1e-6


def test_folding_keeps_the_ranking_and_narrows_producers() -> None:
    resrep, _ = made(small_resnet, IMAGES, 0.4, steps=60, settings=narrower.Forgetting(rest=False))
    optimizer = sgd(resrep)
    resrep_training.train(resrep, optimizer, IMAGES, 40)
    keep = resrep.remaining().keep
    norms = {n: v[keep[n]] for n, v in resrep.norms().items()}
    before = outputs(resrep.model, IMAGES)
    resrep.shrink()
    assert difference(before, outputs(resrep.model, IMAGES)) < 1e-10
    for n, v in resrep.norms().items():
        torch.testing.assert_close(torch.tensor(v[keep[n]]), torch.tensor(norms[n]))
    for name, c in resrep.compactors().items():
        conv: Any = resrep.model.get_submodule(name.replace("bn", "conv"))
        assert c.weight.shape[0] == c.weight.shape[1] == conv.weight.shape[0]
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in parameters} == {id(p) for p in resrep.model.parameters()}
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in parameters)
    resrep_training.train(resrep, optimizer, IMAGES, 20)
    assert resrep.progress()["reached"] <= 0.4


def test_averages_and_schedulers_follow_a_shrink() -> None:
    resrep, _ = made(small_resnet, IMAGES, 0.4, steps=60)
    optimizer = sgd(resrep)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    average = copy.deepcopy(resrep.model)
    resrep_training.train(resrep, optimizer, IMAGES, 40)
    schedule.step()
    resrep.shrink(ema=[average])
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (average, resrep.model)]
    assert shapes[0] == shapes[1]
    rate = optimizer.param_groups[0]["lr"]
    schedule.step()
    assert optimizer.param_groups[0]["lr"] < rate
    merged = resrep.merge(average)
    assert [t.shape for t in outputs(merged, IMAGES)] == [(4, 5)]


def test_an_average_that_is_not_zero_where_it_is_cut_is_said() -> None:
    """It lags behind the trained model."""
    resrep, _ = made(small_resnet, IMAGES, 0.4, steps=60)
    average = copy.deepcopy(resrep.model)
    resrep_training.train(resrep, sgd(resrep), IMAGES, 60)
    with pytest.warns(UserWarning, match=r"the averaged copy is cut where it is not zero: .* norms up to 1\.0e\+00, of 1"):
        resrep.merge(average)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resrep.merge(copy.deepcopy(resrep.model))


def test_torchs_average_takes_the_buffers_along_and_states_with_bools_load() -> None:
    """Rows were marked by bools once, which cannot be averaged."""
    resrep, _ = made(small_resnet, IMAGES, 0.6, steps=20)
    optimizer = sgd(resrep)
    average = torch.optim.swa_utils.AveragedModel(resrep.model, use_buffers=True)
    for step in range(20):
        resrep_training.train(resrep, optimizer, IMAGES, 1, seed=step)
        average.update_parameters(resrep.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert difference(outputs(resrep.merge(average.module), IMAGES), outputs(resrep.merge(), IMAGES)) > 0
    marks = ("chosen", "gone")
    state = {name: t.bool() if name.endswith(marks) else t for name, t in resrep.model.state_dict().items()}
    again, _ = made(small_resnet, IMAGES, 0.6, steps=20)
    again.load_state_dict(resrep.state_dict())
    again.model.load_state_dict(state)
    assert all(torch.equal(t, resrep.model.state_dict()[name]) for name, t in again.model.state_dict().items())
    assert all(c[mark].dtype == torch.bool for c in resrep.state_dict()["compactors"].values() for mark in marks)


def in_two_optimizers() -> tuple[narrower.ResRep, torch.optim.Optimizer]:
    """A ResRep of which a channel is zero, and a second optimizer: that of a layer that reads the channel."""
    resrep, _ = made(Two, IMAGES, 0.5)
    own = resrep.model.get_parameter("b.weight")
    groups = resrep.param_groups(lr=0.01, momentum=0.9)
    groups[0]["params"] = [p for p in groups[0]["params"] if p is not own]
    resrep.attach(torch.optim.SGD(groups))
    with torch.no_grad():
        c = resrep.compactors()["bn_a"]
        c.weight[0], c.gone[0] = 0, 1
    return resrep, torch.optim.SGD([own], lr=0.01)


def test_a_shrink_takes_other_optimizers_along() -> None:
    resrep, second = in_two_optimizers()
    before = resrep.model.get_parameter("b.weight")
    resrep.shrink(optimizers=[second])
    after = resrep.model.get_parameter("b.weight")
    assert after.shape != before.shape and second.param_groups[0]["params"][0] is after


def test_a_shrink_refuses_lbfgs_before_it_changes_anything() -> None:
    resrep, _ = in_two_optimizers()
    before = resrep.model.get_parameter("b.weight")
    with pytest.raises(ConfigError, match="LBFGS cannot go on"):
        resrep.shrink(optimizers=[torch.optim.LBFGS([before])])
    assert resrep.model.get_parameter("b.weight") is before


def test_a_parameter_that_no_known_optimizer_has_is_named() -> None:
    resrep, second = in_two_optimizers()
    with pytest.warns(UserWarning, match=r"in no optimizer that was given: b\.weight; .* shrink\(optimizers="):
        resrep.shrink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resrep, second = in_two_optimizers()
        resrep.shrink(optimizers=[second])
        resrep, _ = in_two_optimizers()
        resrep.model.get_parameter("b.weight").requires_grad_(False)
        resrep.shrink()


@pytest.mark.parametrize(("name", "kinds"), [
    ("residual", {"full"}), ("grouped", {"full", "block"}), ("depthwise", {"full", "diagonal"}), ("transposed", {"full"})])
def test_resumed_is_uninterrupted_bit_for_bit_across_a_shrink(name: str, kinds: set[str]) -> None:
    make = small_resnet if name == "residual" else PATTERNS[name].make
    inputs = IMAGES if name == "residual" else doubled(PATTERNS[name].inputs)

    def fresh() -> tuple[narrower.ResRep, torch.optim.Optimizer]:
        resrep, _ = made(make, inputs, 0.5, steps=70)
        assert kinds <= {s.kind for s in resrep.placement.sites.values()}
        return resrep, sgd(resrep)

    def until(resrep: narrower.ResRep, optimizer: torch.optim.Optimizer, steps: list[int]) -> None:
        for step in steps:
            resrep_training.train(resrep, optimizer, inputs, 1, seed=step)
            if step in (30, 45):
                resrep.shrink(fold=step == 30)

    whole, optimizer = fresh()
    until(whole, optimizer, list(range(50)))
    assert whole.kept.cuts, "nothing has been taken out before the interruption"
    saved = copy.deepcopy((whole.state_dict(), whole.model.state_dict(), optimizer.state_dict()))
    progress = whole.progress()
    until(whole, optimizer, list(range(50, 70)))
    resumed, optimizer = fresh()
    resumed.load_state_dict(saved[0])
    resumed.model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    assert resumed.progress() == progress
    until(resumed, optimizer, list(range(50, 70)))
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert whole.state_dict()["step"] == resumed.state_dict()["step"] == 70
    assert difference(outputs(whole.merge(), inputs), outputs(resumed.merge(), inputs)) == 0


def planned(macs: float = 0.5, steps: int = 60, **options: Any) -> tuple[narrower.ResRep, narrower.Plan, nn.Module]:
    """A ResRep that has its channels from a plan, the plan, and the dense network."""
    torch.manual_seed(1)
    model = randomised(small_resnet()).double()
    graph = narrower.trace(model, IMAGES)
    plan = narrower.plan(graph, narrower.random(graph, seed=5), macs=macs)
    training = copy.deepcopy(model)
    return narrower.ResRep(training, graph, plan=plan, steps=steps, scope="all", **options), plan, model


def test_training_sends_exactly_the_channels_of_a_plan_to_zero() -> None:
    resrep, plan, model = planned()
    optimizer = sgd(resrep, lr=0.02)
    for _ in range(3):
        resrep_training.train(resrep, optimizer, IMAGES, 20)
        resrep.shrink()
    assert resrep.phase == "frozen" and resrep.reached() == pytest.approx(plan.macs[1] / plan.macs[0])
    before = outputs(resrep.model, IMAGES)
    merged = resrep.merge()
    assert difference(before, outputs(merged, IMAGES)) < 1e-10
    shapes = {n: t.shape for n, t in narrower.narrow(model, plan).state_dict().items()}
    assert {n: t.shape for n, t in merged.state_dict().items() if n in shapes} == shapes
    assert all(np.array_equal(resrep.kept.keep[n], k) for n, k in plan.keep.items())


def test_rows_of_a_plan_are_chosen_by_their_norms_a_few_at_a_time() -> None:
    resrep, plan, _ = planned()
    norms = {n: np.arange(resrep.graph[n].size, dtype=float) for n in resrep.placement.rows}
    gone = {n: np.setdiff1d(np.arange(resrep.graph[n].size), plan.keep[n]) for n in norms}
    few, costs = resrep.candidates.choose(norms, 3)
    lowest = sorted((norms[n][k], n, k) for n in gone for k in gone[n])[:3]
    assert sorted((norms[n][k], n, k) for n in few for k in np.nonzero(few[n])[0]) == lowest
    every, all_costs = resrep.candidates.choose(norms)
    assert {n: np.nonzero(mask)[0].tolist() for n, mask in every.items()} == {n: k.tolist() for n, k in gone.items()}
    assert plan.macs[0] > costs["macs"] > all_costs["macs"] == plan.macs[1]


def test_the_rest_of_a_plan_is_cut_though_other_groups_are_as_planned() -> None:
    """A group that the plan leaves whole is so from the first step on."""
    _, plan, model = planned()
    name = next(n for n, k in plan.keep.items() if len(k) < plan.graph[n].size)
    only = replace(plan, keep={g.name: plan.keep[name] if g.name == name else np.arange(g.size) for g in plan.graph.free})
    training = copy.deepcopy(model)
    resrep = narrower.ResRep(training, plan.graph, plan=only, steps=40, scope="all")
    with pytest.warns(UserWarning, match="not zero yet are cut"):
        merged = resrep.merge(over=True)
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in narrower.narrow(model, only).parameters())


def test_what_is_left_of_a_plan_after_all_steps_is_cut_and_said() -> None:
    resrep, plan, model = planned(steps=40, settings=narrower.Forgetting(forget_steps=0))  # the pull is too weak
    optimizer = sgd(resrep, lr=1e-6)
    resrep_training.train(resrep, optimizer, IMAGES, 10)
    with pytest.warns(UserWarning, match="was not reached"):
        early = resrep.merge()
    assert difference(outputs(resrep.model, IMAGES), outputs(early, IMAGES)) < 1e-10
    shapes = {n: t.shape for n, t in narrower.narrow(model, plan).state_dict().items()}
    for steps, over in ((29, True), (1, None)):  # a scaler has skipped a step
        resrep_training.train(resrep, optimizer, IMAGES, steps)
        with pytest.warns(UserWarning, match="channels of the plan that are not zero yet are cut"):
            merged = resrep.merge(over=over)
        assert {n: t.shape for n, t in merged.state_dict().items() if n in shapes} == shapes
    with pytest.warns(UserWarning, match="remain .*was asked for; train"):
        assert difference(outputs(resrep.model, IMAGES), outputs(resrep.merge(over=False), IMAGES)) < 1e-10


def test_plans_that_do_not_fit_are_refused() -> None:
    resrep, plan, model = planned()
    graph = plan.graph
    with pytest.raises(PlanError, match="no compactor: plan with exclude"):
        narrower.ResRep(copy.deepcopy(model), graph, plan=plan, steps=9, scope="inner")
    with pytest.raises(PlanError, match="or instead a plan"):
        narrower.ResRep(copy.deepcopy(model), graph, plan=plan, macs=0.5, steps=9)
    nothing = replace(plan, keep={g.name: np.arange(g.size) for g in graph.free})
    with pytest.raises(PlanError, match="removes nothing"):
        narrower.ResRep(copy.deepcopy(model), graph, plan=nothing, steps=9, scope="all")
    other = narrower.trace(PATTERNS["grouped"].make(), PATTERNS["grouped"].inputs)
    with pytest.raises(PlanError, match="another network: its groups differ, for example"):
        narrower.ResRep(copy.deepcopy(model), graph, steps=9, scope="all",
                        plan=narrower.plan(other, narrower.random(other), remove=0.5))
    with pytest.raises(StorageError, match="of another run: plan was"):
        planned(macs=0.6)[0].load_state_dict(resrep.state_dict())


def test_merged_saves_loads_and_trains_on(tmp_path: Any) -> None:
    resrep, _ = made(small_resnet, IMAGES, 0.5, steps=50)
    optimizer = sgd(resrep, lr=0.02)
    resrep_training.train(resrep, optimizer, IMAGES, 50)
    small = resrep.merge()
    narrower.save(small, tmp_path)
    loaded = narrower.load(tmp_path, lambda: small_resnet().double())
    assert difference(outputs(small, IMAGES), outputs(loaded, IMAGES)) == 0

    def loss(model: nn.Module) -> float:
        return float(copy.deepcopy(model).train()(IMAGES).square().mean().detach())

    assert loss(small) == pytest.approx(loss(resrep.model), rel=0.1)  # no jump in train mode either
    start = loss(small)
    own = torch.optim.SGD(small.parameters(), lr=0.01)
    for _ in range(5):
        own.zero_grad()
        small.train()(IMAGES).square().mean().backward()
        own.step()
    assert loss(small) < start
    assert narrower.trace(loaded, IMAGES).free


def test_half_precision_autocast_and_compiled() -> None:
    torch.manual_seed(0)
    model = randomised(small_resnet())
    x = IMAGES.float()
    resrep = narrower.ResRep(model, narrower.trace(model, x), macs=0.5, steps=40)
    optimizer = sgd(resrep)
    compiled = torch.compile(model, backend="eager")
    for step in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(x).float().square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step == 25:
            resrep.shrink()
    assert resrep.progress()["reached"] <= 0.5
    assert difference(outputs(model, x), outputs(resrep.merge(), x)) < 1e-5


def test_chosen_rows_of_a_network_in_half_precision_shrink_by_small_steps() -> None:
    """A row near one that loses a thousandth in each step would stay where it is: in bfloat16 1 - 0.001 is 1."""
    torch.manual_seed(0)
    model, x = randomised(small_resnet()).bfloat16(), IMAGES.bfloat16()
    slow = narrower.Forgetting(warmup_steps=0, mask_interval=1, rows_per_update=1000.0, forget_steps=1000, rest=False)
    resrep = narrower.ResRep(model, narrower.trace(model, x), macs=0.5, steps=200, settings=slow)
    before = outputs(model, x)
    optimizer = sgd(resrep)
    resrep_training.train(resrep, optimizer, x, 150)
    chosen = torch.cat([c.weight.detach().norm(dim=1)[c.chosen.bool()] for c in resrep.compactors().values()])
    assert len(chosen) and chosen.min() > 0.5 and chosen.max() < 0.95
    state = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = resrep.merge()
    assert {t.dtype for t in small.parameters()} == {torch.bfloat16} == {t.dtype for t in outputs(small, x)}
    assert difference(outputs(model, x), outputs(small, x)) < 0.1 < difference(before, outputs(small, x))
    resrep.shrink()
    resrep_training.train(resrep, optimizer, x, 1)
    assert {state[n].dtype for n in state if NAME in n and "weight" in n} == {torch.float32}
    assert {s["momentum_buffer"].dtype for s in optimizer.state.values()} == {torch.bfloat16, torch.float32}


def test_a_scaled_loss_is_the_same_training() -> None:
    """The rule sees gradients after GradScaler has unscaled them; a step that it skips, as gradients overflow, is no step."""
    results = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = randomised(small_resnet())
        resrep = narrower.ResRep(model, narrower.trace(model, IMAGES.float()), macs=0.5, steps=40)
        optimizer = sgd(resrep)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=10**6, enabled=scaled)
        for step in range(40):
            for factor in ((float("inf"), 1.0) if scaled and step == 30 else (1.0,)):  # the first of them overflows
                model.train(factor == 1.0)  # so that BatchNorm does not see more
                optimizer.zero_grad()
                loss = model(IMAGES.float()).square().mean() * factor
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        results.append((resrep.step, resrep.reached(), outputs(resrep.merge(), IMAGES.float())))
    assert results[0][:2] == results[1][:2]
    assert results[0][0] == 40
    assert results[0][1] <= 0.5
    assert difference(results[0][2], results[1][2]) < 1e-6


# ------------------------------------------------------------------------------------------------ bad input


def test_requests_that_cannot_be_met() -> None:
    torch.manual_seed(0)
    model = small_resnet()
    graph = narrower.trace(model, IMAGES.float())
    for error, words, options in (
        (PlanError, "budget", {"steps": 10}),
        (ConfigError, "steps", {"macs": 0.5, "steps": 0}),
        (ConfigError, "scope", {"macs": 0.5, "steps": 9, "scope": "outer"}),
        (BudgetError, "the least is", {"macs": 0.05, "steps": 9}),
        (PlanError, "between 0 and 1", {"macs": -1, "steps": 9}),
        (PlanError, "no group matches", {"macs": 0.5, "steps": 9, "exclude": ["nothing"]}),
    ):
        with pytest.raises(error, match=words):
            narrower.ResRep(model, graph, **options)
    assert not any(hasattr(m, NAME) for m in model.modules())
    with pytest.raises(PlanError, match="not the one that was traced"):
        narrower.ResRep(CifarResNet(2, 5), graph, macs=0.5, steps=9)
    narrower.ResRep(model, graph, macs=0.5, steps=9)
    with pytest.raises(NarrowerError, match="compactors already|not the one that was traced"):
        narrower.ResRep(model, graph, macs=0.5, steps=9)


def test_optimizers_that_do_not_fit() -> None:
    resrep, _ = made(small_resnet, IMAGES, 0.5)
    own = [p for n, p in resrep.model.named_parameters() if NAME not in n]
    with pytest.raises(ConfigError, match="lacks the compactor of"):
        resrep.attach(torch.optim.SGD(own, lr=0.1))
    with pytest.raises(ConfigError, match="decays the compactor of"):
        resrep.attach(torch.optim.SGD(resrep.model.parameters(), lr=0.1, weight_decay=1e-4))
    optimizer = sgd(resrep)
    with pytest.raises(ConfigError, match="attach was called before"):
        resrep.attach(optimizer)
    with pytest.raises(ConfigError, match="no gradient has reached"):
        optimizer.step()


def test_a_loss_that_is_not_finite_leaves_the_last_good_state() -> None:
    resrep, _ = made(small_resnet, IMAGES, 0.5)
    optimizer = sgd(resrep)
    resrep_training.train(resrep, optimizer, IMAGES, 3)
    good = copy.deepcopy(dict(resrep.model.named_parameters()))
    optimizer.zero_grad()
    (resrep.model.train()(IMAGES).sum() * float("nan")).backward()
    with pytest.raises(ConfigError, match="not finite at step 3"):
        optimizer.step()
    assert all(torch.equal(p, good[n]) for n, p in resrep.model.named_parameters())


def test_a_state_of_another_run_is_refused() -> None:
    resrep, _ = made(small_resnet, IMAGES, 0.5)
    state = resrep.state_dict()
    other: list[dict[str, Any]] = [
        {"budget": {"macs": 0.6, "params": None}}, {"steps": 9}, {"format": 99}, {"groups": {}}, {"scope": "inner"}]
    for changed in other:
        with pytest.raises(StorageError, match="of another run"):
            made(small_resnet, IMAGES, 0.5)[0].load_state_dict({**state, **changed})
    resrep_training.train(resrep, sgd(resrep), IMAGES, 1)
    with pytest.raises(StorageError, match="fresh"):
        resrep.load_state_dict(state)


def test_a_state_goes_on_with_the_scores_that_it_was_begun_with() -> None:
    graph = narrower.trace(small_resnet(), IMAGES)

    def begun(seed: int | None) -> narrower.ResRep:
        scores = None if seed is None else narrower.random(graph, seed)
        return narrower.ResRep(small_resnet(), graph, macs=0.5, steps=24, scores=scores)

    state = begun(1).state_dict()
    begun(1).load_state_dict(state)
    for seed in (2, None):
        with pytest.raises(StorageError, match="its scores= were others"):
            begun(seed).load_state_dict(state)
        begun(seed).load_state_dict({key: value for key, value in state.items() if key != "scores"})  # of an earlier version


def test_scores_decide_where_the_norms_are_equal() -> None:
    """At the first choice all rows have norm one: of each group the lowest scores go, whatever their unit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(4, 3, 9, 9)
    graph = narrower.trace(model, x)
    scores = narrower.Scores({g.name: 10.0**k * torch.randperm(g.size).add(1).float() for k, g in enumerate(graph.free)})
    settings = narrower.Forgetting(warmup_steps=0, mask_interval=1, rows_per_update=100)
    resrep = narrower.ResRep(model, graph, macs=0.6, steps=10, scores=scores, settings=settings)
    optimizer = sgd(resrep)
    model(x).sum().backward()
    optimizer.step()
    chosen = resrep.chosen_channels()
    assert len(chosen) == 2
    for name, mask in chosen.items():
        assert 0 < mask.sum() < 8
        assert set(np.nonzero(mask)[0]) == set(scores[name].argsort()[: mask.sum()].tolist())


def test_a_missed_budget_is_said_and_what_is_there_is_merged() -> None:
    resrep, _ = made(small_resnet, IMAGES, 0.4, steps=100)
    with pytest.warns(UserWarning, match="the budget was not reached: .*; attach\\(optimizer\\) was never called"):
        resrep.merge()
    resrep_training.train(resrep, sgd(resrep), IMAGES, 15)
    with pytest.warns(UserWarning, match="the budget was not reached: .*; train longer \\(step 15 of 100\\)"):
        small = resrep.merge()
    assert difference(outputs(resrep.model, IMAGES), outputs(small, IMAGES)) < 1e-10


def test_inexact_groups_are_left_alone_with_a_reason() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
                          nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(64, 2))
    resrep = narrower.ResRep(model, narrower.trace(model, networks.images()), macs=0.9, steps=9)
    assert "0" in resrep.reasons
    assert "mixes" in resrep.reasons["0"]
    assert "3" in resrep.placement.rows


class LayerScale(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, c))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(1, -1, 1, 1)


def scaled() -> nn.Module:
    parts = networks.unit(3, 8, act=nn.PReLU(8)), networks.unit(8, 6, act=nn.PReLU(6)), LayerScale(6), networks.unit(6, 7)
    return networks.chain(*parts, networks.Head(7))


def test_numbers_by_channel_that_are_viewed_as_images_hide_no_channels() -> None:
    """A PReLU and a layer scale: the forward moves a parameter, which is no activation."""
    resrep = examined(scaled, networks.images(), "inner")
    assert resrep is not None and len(resrep.placement.rows) == 3 and not resrep.reasons


def test_compactors_behind_instance_norms() -> None:
    """Their scales reach the operator repeated for each image."""
    def make() -> nn.Module:
        widths = ((3, 8), (8, 6), (6, 7))
        parts = (nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.InstanceNorm2d(o, affine=True), nn.ReLU()) for i, o in widths)
        return networks.chain(*parts, nn.Flatten(), nn.Linear(7 * 64, 5))

    resrep = examined(make, networks.images(), "inner")
    assert resrep is not None and len(resrep.placement.rows) == 3 and not resrep.reasons
