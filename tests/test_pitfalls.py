"""What breaks in other pruning tools, as their users report it, holds here."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import networks, reference
from support.networks import PATTERNS, TRAPS, Blurred, Head, chain, unit
from support.resrep_training import randomised
from torch import Tensor, nn

import narrower
from narrower.models.resnet import CifarResNet

X = networks.IMAGES.double()


def narrowed(model: nn.Module, remove: float = 0.4, x: Tensor = X) -> tuple[narrower.Graph, nn.Module]:
    """Traced, cut at random, and compared with the masked dense network by code that is not the library's."""
    model = randomised(model).double().eval()
    graph = narrower.trace(model, x)
    plan = narrower.plan(graph, narrower.random(graph, seed=1), remove=remove)
    reference.exact(model, plan, x)
    return graph, narrower.narrow(model, plan)


class Yolo(nn.Module):
    """C2f blocks, a neck with upsampling and concatenation, a head at each of two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.c1 = unit(3, 8, stride=2), networks.Chunked(8, 6, 12)
        self.down, self.c2 = unit(12, 14, stride=2), networks.Chunked(14, 8, 16)
        self.join = networks.Chunked(28, 6, 10)
        self.heads = nn.ModuleList([nn.Conv2d(10, 7, 1), nn.Conv2d(16, 7, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        a = self.c1(self.stem(x))
        b = self.c2(self.down(a))
        a = self.join(torch.cat([F.interpolate(b, scale_factor=2), a], 1))
        return [head(t) for head, t in zip(self.heads, (a, b), strict=True)]


def test_chunk_and_concat_blocks_narrow_exactly() -> None:
    graph, small = narrowed(Yolo())
    assert {g.name for g in graph if g.pinned} == {"heads.0", "heads.1"}
    assert [t.shape[1] for t in small(X)] == [7, 7]


def test_channels_behind_a_shuffle_are_those_before_it() -> None:
    graph, _ = narrowed(PATTERNS["shuffle"].make())
    assert all(g.free for g in graph if g.name != "4.fc")


class Exchange(nn.Module):
    """HRNet: branches at two resolutions, each the sum of what all give to it."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.a, self.b = unit(a, a), unit(b, b)
        self.up, self.down = unit(b, a, 1, act=nn.Identity()), unit(a, b, 3, 2, act=nn.Identity())

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        a, b = self.a(xs[0]), self.b(xs[1])
        return [F.relu(a + F.interpolate(self.up(b), scale_factor=2)), F.relu(b + self.down(a))]


class Resolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.second = unit(3, 6), unit(6, 10, stride=2)
        self.stages = nn.ModuleList([Exchange(6, 10) for _ in range(3)])
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        xs = [self.stem(x)]
        xs.append(self.second(xs[0]))
        for stage in self.stages:
            xs = stage(xs)
        return self.head(torch.cat([F.max_pool2d(xs[0], 2), xs[1]], 1))


def test_branches_at_two_resolutions_narrow_exactly() -> None:
    graph, _ = narrowed(Resolutions())
    assert all(g.free for g in graph if g.name != "head.fc")


@pytest.mark.parametrize("budget", [{"macs": 0.37}, {"params": 0.37}])
def test_the_cost_that_comes_out_is_the_one_asked_for(budget: dict[str, float]) -> None:
    model = CifarResNet(1).eval()
    x = torch.zeros(1, 3, 32, 32)
    graph = narrower.trace(model, x)
    plan = narrower.plan(graph, narrower.magnitude(model, graph), **budget)  # type: ignore[arg-type]
    cost = narrower.measure(narrower.narrow(model, plan), x, seconds=0)
    assert (cost["macs"], cost["params"]) == (plan.macs[1], plan.params[1])
    (kind,) = budget
    dense, now = getattr(plan, kind)
    assert 0.33 * dense < now <= 0.37 * dense


def test_widths_are_multiples_of_eight_if_asked() -> None:
    model = nn.Sequential(unit(3, 64), unit(64, 128), unit(128, 96), Head(96))
    graph = narrower.trace(model, networks.IMAGES)
    plan = narrower.plan(graph, narrower.random(graph), macs=0.43, round_to=8)
    assert all(len(kept) % 8 == 0 for kept in plan.keep.values())


def test_a_narrow_model_is_saved_and_loaded_without_pickle(tmp_path: Path) -> None:
    _, small = narrowed(PATTERNS["residual"].make())
    narrower.save(small, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "narrower.json"]
    json.loads((tmp_path / "narrower.json").read_text())
    loaded = narrower.load(tmp_path, lambda: PATTERNS["residual"].make().double()).eval()
    assert torch.equal(loaded(X), small(X))


def test_frozen_models_narrow_and_stay_frozen() -> None:
    frozen = PATTERNS["residual"].make().requires_grad_(False)
    graph, small = narrowed(frozen)
    assert len(graph.free) == 4
    assert not any(p.requires_grad for p in small.parameters())


def test_a_distributed_model_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapped model is refused at once, with what to do; test_distributed.py trains one in two processes."""

    class DistributedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(narrower.TraceError, match=r"trace model\.module instead"):
        narrower.trace(DistributedDataParallel(PATTERNS["plain"].make()), networks.IMAGES)


def test_where_nothing_is_free_the_reason_is_given() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1))
    graph = narrower.trace(model, networks.IMAGES)
    assert "pinned: network output" in str(graph)
    with pytest.raises(narrower.PlanError, match="nothing is free in this network.*network output"):
        narrower.plan(graph, narrower.Scores(), remove=0.5)


@pytest.mark.parametrize("name", ["plain", "many_ends", "unet"])
def test_outputs_keep_their_shapes(name: str) -> None:
    case = PATTERNS[name]
    model = case.make().eval()
    graph = narrower.trace(model, case.inputs)
    small = narrower.narrow(model, narrower.plan(graph, narrower.random(graph), remove=0.6))
    shapes = [[t.shape for t in reference.flat(reference.call(net, case.inputs))] for net in (model, small)]
    assert shapes[0] == shapes[1]


def test_a_trace_is_three_forwards_at_any_depth() -> None:
    """Three forwards, however deep: one to trace, one to see that training does the same, and one to probe."""
    for depth in (3, 30):
        calls: list[int] = []
        model = nn.Sequential(unit(3, 8), *(networks.Residual(8, 6, 8) for _ in range(depth)), Head(8))
        model[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        narrower.trace(model.eval(), networks.IMAGES)
        assert len(calls) == 3


@pytest.mark.parametrize("name", ["view_2_half", "view_half_2"])
def test_views_into_two_and_c_narrow_exactly(name: str) -> None:
    narrowed(TRAPS[name].make())
    graph, _ = narrowed(PATTERNS["selective"].make())
    assert all(g.free for g in graph if "fc" not in g.name)


def test_option_a_shortcuts_are_pinned_or_narrow_exactly() -> None:
    graph, _ = narrowed(CifarResNet(1), x=networks.images(size=16).double())
    assert graph["conv1"].free
    assert any("zero-padded" in str(g.pinned) for g in graph)
    narrowed(chain(unit(3, 6), networks.OptionA(6, 13), Head(13)))


class Standardised(nn.Module):
    """A standardised weight with a gain for each filter."""

    def __init__(self, i: int, o: int, k: int) -> None:
        super().__init__()
        self.filters = o
        self.weight, self.bias = nn.Parameter(torch.randn(o, i, k, k)), nn.Parameter(torch.randn(o))
        self.gain = nn.Parameter(torch.rand(o, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.filters, -1)
        weight = F.batch_norm(flat, None, None, weight=self.gain.view(-1), training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


def test_blur_pool_buffers_and_weight_standardisation_gains_follow_the_width() -> None:
    graph, small = narrowed(nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), Blurred(8), unit(8, 6), Head(6)))
    assert [g.name for g in graph.free] == ["0", "3.0"]
    assert small[2].kernel.shape[0] == small[0].gain.shape[0] == small[2].channels < 8  # type: ignore[index]


def bfloat16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


class Autocast(nn.Module):
    """A network that turns autocast on itself."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with bfloat16():
            return self.net(x).float()


def measured(model: nn.Module, around: Callable[[], AbstractContextManager[Any]]) -> list[Any]:
    """What the library measures of a network within some mode, without names. What is made there can be trained."""
    batches = list(torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(16))
    with around():
        if torch.is_inference_mode_enabled():
            batches = [x.clone() for x in batches]
        graph = narrower.trace(model, batches[0][:1])
        scores = [narrower.obs(model, graph, batches), narrower.hrank(model, graph, batches),
                  narrower.taylor(model, graph, [(x, 0.0) for x in batches], lambda out, _: out.square().mean())]
        damage = narrower.sensitivity(model, graph, scores[0], batches)
        plan = narrower.plan(graph, scores[0], macs=0.5, sensitivity=damage)
        small = narrower.narrow(model, plan)
        narrower.verify(model, small, plan, batches[0])
        repair = narrower.reconstruct(model, small, plan, batches)
        folded = narrower.fold(model, plan).model
        macs = narrower.measure(small, batches[0], seconds=0.0)["macs"]
    for net in (small, repair.model, folded):
        net.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    channels = [v.tolist() for found in scores[:2] for v in found.values()]
    return [channels, [v.tolist() for v in scores[2].values()], [c.damages for c in damage.curves], list(plan.keep.values()),
            [(r.error, r.strength) for r in repair.layers], macs]


@pytest.mark.parametrize("mode", ["inference mode", "autocast", "no_grad", "autocast in the forward"])
def test_modes_around_a_call_or_in_the_forward_change_no_result(mode: str) -> None:
    """In inference mode dispatch modes see other operators. Under autocast layers read cast copies of their weights."""
    around = {"inference mode": torch.inference_mode, "autocast": bfloat16, "no_grad": torch.no_grad}
    model = randomised(chain(unit(3, 12), unit(12, 10), nn.Conv2d(10, 8, 3), nn.GroupNorm(4, 8), Head(8))).eval()
    want = measured(model, nullcontext)
    found = measured(model, around[mode]) if mode in around else measured(Autocast(model).eval(), nullcontext)
    if mode == "autocast in the forward":  # gradients are those of the forward as it is
        del want[1], found[1]
    assert str(found) == str(want)
    assert want[-2], "no layer was repaired"


def test_what_resrep_and_centripetal_sgd_merge_in_inference_mode_can_be_trained() -> None:
    for method in (narrower.ResRep, narrower.CentripetalSGD):
        model = randomised(chain(unit(3, 8), unit(8, 6), Head(6)))
        trained = method(model, narrower.trace(model, X.float()), macs=0.9, steps=10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        trained.attach(optimizer)
        model(X.float()).sum().backward()
        optimizer.step()
        with torch.inference_mode(), pytest.warns(UserWarning):
            small = trained.merge()
        small.train()(X.float()).sum().backward()
