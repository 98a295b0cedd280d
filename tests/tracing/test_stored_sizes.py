"""Numbers that modules store: they follow the widths where the probe agrees, through narrow, save, load and ResRep."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import networks, reference, resrep_training
from support.networks import Blurred, Head, chain, unit
from torch import Tensor, nn

import narrower
from narrower.errors import StorageError
from narrower.tracing import stored_sizes


class Res2(nn.Module):
    """Res2Net: equal pieces by a stored width, each but the first convolved with the sum so far."""

    def __init__(self, c: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.wide = unit(c, 3 * width, 1)
        self.convs = nn.ModuleList([unit(width, width), unit(width, width)])
        self.last = unit(3 * width, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = torch.split(self.wide(x), self.width, 1)
        b = self.convs[0](b)
        return self.last(torch.cat([a, b, self.convs[1](b + c)], 1)) + x


class Mixed(nn.Module):
    """MixNet: unequal pieces by a stored list, a kernel size for each."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.convs = nn.ModuleList([nn.Conv2d(n, n, 2 * k + 1, padding=k, groups=n) for k, n in enumerate(sizes)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(p) for conv, p in zip(self.convs, torch.split(x, self.sizes, 1), strict=True)], 1)


class Half(nn.Module):
    """CSP: slices at a stored channel."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.at = c // 3
        self.left, self.right = unit(self.at, 5), unit(c - self.at, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x[:, : self.at]), self.right(x[:, self.at :])], 1)


class Scaled(nn.Module):
    """poolformer: a vector viewed in a stored shape."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.shape = (c, 1, 1)
        self.scale = nn.Parameter(torch.rand(c) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(self.shape)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and how many numbers must follow
    "res2": (lambda: chain(unit(3, 8), Res2(8, 6), Res2(8, 5), Head(8)), 2),
    "mixed": (lambda: chain(unit(3, 12), Mixed([3, 4, 5]), unit(12, 7), Head(7)), 3),
    "half": (lambda: chain(unit(3, 12), Half(12), Head(11)), 1),
    "scaled": (lambda: chain(unit(3, 9), Scaled(9), unit(9, 6), Head(6)), 1),
    "blurred": (lambda: chain(unit(3, 10), Blurred(10), unit(10, 6), Blurred(6), Head(6)), 2),
}


def made(name: str) -> tuple[nn.Module, narrower.Graph]:
    torch.manual_seed(0)
    model = resrep_training.randomised(NETWORKS[name][0]()).double().eval()
    return model, narrower.trace(model, networks.IMAGES.double())


@pytest.mark.parametrize("name", NETWORKS)
def test_narrows_exactly_and_the_numbers_follow(name: str) -> None:
    model, graph = made(name)
    assert len(graph.edits) == NETWORKS[name][1]
    assert all(g.pinned is None or "output" in str(g.pinned) for g in graph), str(graph)
    before = {e: getattr(model.get_submodule(e.module), e.attribute) for e in graph.edits}
    plan = narrower.plan(graph, narrower.random(graph, seed=3), remove=0.4)
    reference.exact(model, plan, networks.IMAGES.double())
    assert all(getattr(model.get_submodule(e.module), e.attribute) == v for e, v in before.items())  # model is untouched


@pytest.mark.parametrize("name", NETWORKS)
def test_saved_and_loaded_and_narrowed_again(name: str, tmp_path: Path) -> None:
    model, graph = made(name)
    x = networks.IMAGES.double()
    small = narrower.narrow(model, narrower.plan(graph, narrower.random(graph), remove=0.3))
    again = narrower.trace(small, x)
    smaller = narrower.narrow(small, narrower.plan(again, narrower.random(again), remove=0.3))
    narrower.save(smaller, tmp_path)
    loaded = narrower.load(tmp_path, lambda: NETWORKS[name][0]().double()).eval()
    assert torch.equal(loaded(x), smaller(x))
    assert reference.params(smaller) < reference.params(small)


@pytest.mark.parametrize("name", NETWORKS)
def test_resrep_merges_exactly(name: str) -> None:
    model, graph = made(name)
    x = networks.IMAGES.double()
    resrep = narrower.ResRep(model, graph, macs=0.8, steps=24, scope="all")
    optimizer = resrep_training.sgd(resrep)
    resrep_training.train(resrep, optimizer, x, 14)
    before = resrep_training.outputs(model, x)
    resrep.shrink()
    assert resrep_training.difference(before, resrep_training.outputs(model, x)) < 1e-10
    resrep_training.train(resrep, optimizer, x, 10)
    assert resrep_training.difference(resrep_training.outputs(model, x), resrep_training.outputs(resrep.merge(), x)) < 1e-10


@pytest.mark.parametrize("name", NETWORKS)
def test_a_resumed_resrep_trains_on_as_the_uninterrupted_one(name: str) -> None:
    """A state is loaded into the dense network, whose modules store the dense sizes."""
    def fresh() -> tuple[narrower.ResRep, torch.optim.Optimizer]:
        resrep = narrower.ResRep(*made(name), macs=0.6, steps=40, scope="all")
        return resrep, resrep_training.sgd(resrep)

    x = networks.IMAGES.double()
    whole, optimizer = fresh()
    resrep_training.train(whole, optimizer, x, 30)
    assert whole.shrink() <= 0.6
    saved = copy.deepcopy((whole.state_dict(), whole.model.state_dict(), optimizer.state_dict()))
    resrep_training.train(whole, optimizer, x, 3)
    resumed, optimizer = fresh()
    for part, state in zip((resumed, resumed.model, optimizer), saved, strict=True):
        part.load_state_dict(state)  # type: ignore[attr-defined]
    resrep_training.train(resumed, optimizer, x, 3)
    state = resumed.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in whole.model.state_dict().items())


class Fixed(nn.Module):
    """A stored number that does not count channels, though it is as large as their number is."""

    def __init__(self) -> None:
        super().__init__()
        self.side = 8
        self.conv, self.next, self.head = unit(3, 8), unit(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.interpolate(x, (self.side, self.side)))
        return self.head(self.next(x[:, :, : self.side, : self.side]))


def test_a_number_that_is_no_count_stays() -> None:
    model = Fixed().double().eval()
    graph = narrower.trace(model, networks.IMAGES.double())
    assert not graph.edits
    reference.exact(model, narrower.plan(graph, narrower.random(graph), remove=0.5), networks.IMAGES.double())


def test_numbers_edited_by_hand_are_refused(tmp_path: Path) -> None:
    model, graph = made("half")
    narrower.save(narrower.narrow(model, narrower.plan(graph, narrower.random(graph), remove=0.3)), tmp_path)
    meta = json.loads((tmp_path / "narrower.json").read_text())
    ((module, attribute, entry, value),) = meta["numbers"]
    wrong: list[Any] = [
        [module, "nothing", entry, value], [module, "forward", entry, value], [module, attribute, 1, value],
        ["9", attribute, entry, 1], [module, attribute, entry, 99], [module, attribute, entry, -1],
        [module, "__class__", entry, 1], [1, 2], "x"]
    for row in wrong:
        (tmp_path / "narrower.json").write_text(json.dumps({**meta, "numbers": [row]}))
        with pytest.raises(StorageError, match="number"):
            narrower.load(tmp_path, lambda: NETWORKS["half"][0]().double())


class Partial(nn.Module):
    """FasterNet: a convolution on the first channels, the others pass; both numbers are stored."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first, self.rest = c // 4, c - c // 4
        self.conv, self.wide, self.back = nn.Conv2d(c // 4, c // 4, 3, padding=1), unit(c, 2 * c, 1), nn.Conv2d(2 * c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, [self.first, self.rest], 1)
        return x + self.back(self.wide(torch.cat([self.conv(a), b], 1)))


def test_blocks_of_one_kind_and_several_widths_are_all_mended() -> None:
    """An edit that fails for one width must not be given up for the others while it takes the probe further."""
    model = nn.Sequential(unit(3, 32), Partial(32), Partial(32), unit(32, 48), Partial(48), unit(48, 80), Partial(80), Head(80))
    x = networks.images()
    graph = narrower.trace(model.eval(), x)
    pinned = [g.name for g in graph if not g.free and "output" not in str(g.pinned)]
    assert len(pinned) <= 1, str(graph)  # the first channels of the first width are given up before the others are known
    assert len(graph.edits) == 8
    reference.exact(model, narrower.plan(graph, narrower.random(graph), remove=0.5), x)


class Branches(nn.Module):
    """SKNet with a stored width and, first, a small number that counts no channels."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.branches, self.width = 2, c
        self.convs = nn.ModuleList([unit(c, c), unit(c, c)])
        self.squeeze, self.gate = unit(c, 8, 1), nn.Conv2d(8, 2 * c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([conv(x) for conv in self.convs], 1)
        w = self.gate(self.squeeze(y.sum(1).mean((2, 3), keepdim=True)))
        w = w.view(len(w), self.branches, self.width).softmax(1)
        return (y * w[..., None, None]).sum(1)


def branching() -> tuple[nn.Module, Tensor]:
    widths = (32,) * 8
    units = (nn.Sequential(unit(a, b), Branches(b)) for a, b in zip((3, *widths), widths, strict=False))
    return chain(*units, Head(widths[-1])).eval(), networks.images()


def test_a_small_number_is_not_taken_for_a_count_of_the_first_channels() -> None:
    model, x = branching()
    graph = narrower.trace(model, x)
    assert {e.attribute for e in graph.edits} == {"width"}
    assert len(graph.free) == len(graph) - 1, str(graph)
    for seed in range(4):
        reference.exact(model, narrower.plan(graph, narrower.random(graph, seed=seed), remove=0.5), x)


def test_a_number_that_a_trial_leaves_as_it_was_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong count of the first two channels passes every trial in which both stay: others must find it out."""
    model, x = branching()
    right = stored_sizes.proposals

    def with_wrong(names: Any, modules: Any, log: Any, failed: int, axes: Any) -> Any:
        for edits in right(names, modules, log, failed, axes):
            yield {**{p._replace(attribute="branches"): ids[:2] for p, ids in edits.items()}, **edits}

    monkeypatch.setattr("narrower.tracing.search.proposals", with_wrong)
    graph = narrower.trace(model, x)
    for seed in range(8):
        reference.exact(model, narrower.plan(graph, narrower.random(graph, seed=seed), remove=0.5), x)
