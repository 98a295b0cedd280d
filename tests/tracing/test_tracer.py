"""trace: what it finds, what it leaves as it was, and how it says no."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import networks, reference
from support.networks import IMAGES, PATTERNS, TRAPS, Head, Plain, chain, images, unit
from torch import Tensor, nn

import narrower
from narrower.measuring import macs_of


def test_the_graph_of_a_plain_network() -> None:
    model = Plain()
    graph = narrower.trace(model, IMAGES)
    assert [g.name for g in graph] == ["conv1", "conv2", "conv3", "fc"], "in the order of execution"
    assert [g.size for g in graph] == [10, 14, 12, 5] and [g.free for g in graph] == [True, True, True, False]
    assert "network output" in str(graph["fc"].pinned)
    ends = {(s.tensor, s.dim, s.role) for s in graph["conv1"].slices}
    assert ends == {("conv1.weight", 0, "out"), ("conv1.bias", 0, "along"), ("conv2.weight", 1, "in"),
                    *((f"bn1.{n}", 0, "along") for n in ("weight", "bias", "running_mean", "running_var"))}
    assert set(graph.shapes) == set(model.state_dict()) and graph.parameters == {n for n, _ in model.named_parameters()}
    assert graph.shapes["conv2.weight"] == (14, 10, 3, 3)


def test_a_flattened_channel_owns_all_its_positions() -> None:
    case = PATTERNS["flattened"]
    graph = narrower.trace(case.make(), case.inputs)
    (end,) = (s for s in graph["1.0"].slices if s.role == "in")
    assert end.tensor == "2.fc1.weight" and end.dim == 1
    assert np.array_equal(end.channels, np.arange(28) // 4) and np.array_equal(np.sort(end.positions), np.arange(28))


def test_every_dimension_of_every_tensor_belongs_to_one_channel_at_most() -> None:
    for name, case in PATTERNS.items():
        graph = narrower.trace(case.make(), case.inputs)
        taken: dict[tuple[str, int], list[int]] = {}
        for g in graph:
            assert g.layers[0] == g.name.split("#")[0], name
            for s in g.slices:
                assert len(s.channels) == len(s.positions) and set(s.channels) == set(range(g.size)), (name, g.name)
                taken.setdefault((s.tensor, s.dim), []).extend(s.positions.tolist())
                assert max(s.positions) < graph.shapes[s.tensor][s.dim] * s.blocks
        assert all(len(set(p)) == len(p) for p in taken.values()), name


def test_it_prints() -> None:
    case = PATTERNS["option_a"]
    text = str(narrower.trace(case.make(), case.inputs))
    assert "zero-padded" in text and "network output" in text and "channels free in" in text
    assert text.splitlines()[2].split()[:2] == ["0.0", "6"]
    assert "inexact" in str(narrower.trace(chain(unit(3, 4), nn.GroupNorm(2, 4), unit(4, 4)), IMAGES))


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = networks.TrainingOnly().train(training)
    model.next.eval()
    before = {n: (id(t), t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    modes = [m.training for m in model.modules()]
    narrower.trace(model, IMAGES)
    after = model.state_dict(keep_vars=True)
    assert [m.training for m in model.modules()] == modes
    assert all(id(after[n]) == i and torch.equal(after[n], t) for n, (i, t) in before.items())
    assert not any(k.startswith("_narrower") for t in after.values() for k in vars(t))
    assert torch.is_grad_enabled()


class Writing(networks.Branching):
    """Normalises a weight and its input in the forward, as in SwAV, and asks for values."""

    def forward(self, x: Tensor) -> Tensor:
        x -= x.mean()
        stem, a = (dict(self.named_parameters())[n] for n in ("stem.0.weight", "a.0.weight"))
        stem.data /= stem.data.norm()
        with torch.no_grad():
            a.copy_(F.normalize(a, dim=0) * 3)
        return super().forward(x)


@pytest.mark.parametrize("call", [narrower.trace, macs_of])
def test_a_forward_that_writes_into_its_weights_and_inputs_changes_neither(call: Callable[..., Any]) -> None:
    model, x = Writing(), images()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    call(model, x)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items()) and torch.equal(x, images())


def test_the_random_state_and_the_hooks_are_left() -> None:
    model = chain(unit(3, 6), nn.Dropout(0.5), unit(6, 4), networks.Head(4))
    state = torch.get_rng_state()
    narrower.trace(model, IMAGES)
    assert torch.equal(state, torch.get_rng_state())


def test_a_network_that_is_always_in_training_mode_is_traced_in_eval() -> None:
    assert {g.name for g in narrower.trace(Plain().train(), IMAGES).free} == {"conv1", "conv2", "conv3"}


def test_inputs_as_tensor_tuple_and_dict_give_the_same() -> None:
    model = networks.ManyEnds()
    a = narrower.trace(model, (IMAGES, images(2)))
    b = narrower.trace(model, {"depth": images(2), "image": IMAGES})
    c = narrower.trace(model, {"image": IMAGES, "depth": images(2), "scale": 3.0})
    assert str(a) == str(b) == str(c)


def test_values_of_the_inputs_do_not_matter_and_are_not_changed() -> None:
    x = torch.full((2, 3, 8, 8), float("nan"))
    y = x.clone()
    assert str(narrower.trace(Plain(), x)) == str(narrower.trace(Plain(), IMAGES))
    assert torch.equal(x.isnan(), y.isnan())


def test_one_sample_is_enough() -> None:
    for name in ("plain", "shuffle", "tokens", "selective", "chunked"):
        case = PATTERNS[name]
        one, many = narrower.trace(case.make(), case.inputs[:1]), narrower.trace(case.make(), case.inputs)
        assert str(one) == str(many) and one.uses == many.uses


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    assert len(narrower.trace(Plain().to(dtype), IMAGES.to(dtype)).free) == 3


def test_heads_that_only_training_uses_are_traced() -> None:
    graph = narrower.trace(networks.TrainingOnly(), IMAGES)
    assert graph["aux.0"].free and "aux_fc" in {n for g in graph for n in g.layers}
    (end,) = (s for s in graph["aux.0"].slices if s.role == "in")
    assert end.tensor == "aux_fc.weight"


def test_a_training_forward_that_fails_is_noted() -> None:
    class Broken(networks.TrainingOnly):
        def forward(self, x: Tensor) -> Any:
            if self.training:
                raise RuntimeError("needs targets")
            return super().forward(x)

    model = Broken()
    graph = narrower.trace(model, IMAGES)
    assert any("needs targets" in n for n in graph.notes) and "needs targets" in str(graph)
    small: Any = narrower.narrow(model, narrower.plan(graph, narrower.random(graph), remove=0.5))
    assert small.aux[0].weight.shape[0] == 8, "what was not seen is not cut"


def test_layers_whose_weights_are_computed_by_unknown_operators_are_noted() -> None:
    """Channels that no parameter is known to make have no group: without a note the layers would just be missing."""
    orthogonal = nn.utils.parametrizations.orthogonal
    model = chain(orthogonal(nn.Conv2d(3, 12, 3)), nn.ReLU(), orthogonal(nn.Conv2d(12, 16, 3)), Head(16))
    graph = narrower.trace(model, IMAGES)
    assert not graph.free and len(graph.notes) == 1
    assert re.search(r"computed in a way .*aten\.tril is not known.* stay: 0, 2$", graph.notes[0])
    with pytest.raises(narrower.PlanError, match=r"nothing is free.*aten\.tril is not known.*: 0, 2"):
        narrower.plan(graph, narrower.magnitude(model, graph), macs=0.5)
    known = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 12, 3)), Head(12))
    assert not narrower.trace(known, IMAGES).notes


def test_layers_that_are_never_used_are_noted_and_left() -> None:
    class Unused(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Conv2d(10, 4, 1)

    model = Unused()
    graph = narrower.trace(model, IMAGES)
    assert any("spare" in n for n in graph.notes)
    assert narrower.narrow(model, reference.halved(model, IMAGES)).get_parameter("spare.weight").shape == (4, 10, 1, 1)


def test_structure_follows_the_forward_not_the_order_of_definition() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.b, self.a = nn.Conv2d(6, 3, 1), nn.Conv2d(5, 6, 1), nn.Conv2d(3, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(self.a(x))))

    graph = narrower.trace(Backwards(), IMAGES)
    assert [g.name for g in graph] == ["a", "b", "c"] and [g.free for g in graph] == [True, True, False]


def test_intermediate_outputs_are_never_cut() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = unit(3, 6), unit(6, 8), unit(8, 4)

        def forward(self, x: Tensor) -> Any:
            a = self.a(x)
            b = self.b(a)
            return {"features": [a], "nested": ({"last": self.c(b)}, None, 3)}

    graph = narrower.trace(Pyramid(), IMAGES)
    assert [g.name for g in graph.free] == ["b.0"]


def test_inexact_groups_can_be_pinned() -> None:
    model = chain(unit(3, 8), nn.GroupNorm(2, 8), unit(8, 6), networks.Head(6))
    loose, strict = (narrower.trace(model, IMAGES, allow_inexact=v) for v in (True, False))
    assert not loose["0.0"].exact and loose["0.0"].free
    assert "inexact" in str(strict["0.0"].pinned) and [g.name for g in strict.free] == ["2.0"]


def test_a_forward_that_asks_for_values_is_run_on_real_tensors() -> None:
    graph = narrower.trace(networks.Branching(), IMAGES)
    assert "a.0" in {g.name for g in graph.free}


@pytest.mark.parametrize("name", ["hard_coded_view", "split_by_numbers", "shuffle_fixed_width"])
def test_only_the_group_at_fault_is_pinned(name: str) -> None:
    graph = narrower.trace(TRAPS[name].make(), IMAGES)
    assert len([g for g in graph if g.pinned and "network output" not in str(g.pinned)]) == 1


def test_a_deep_network_with_one_fault_pins_one_group() -> None:
    """Found among many by asking, not by giving up."""
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(unit(3 if k == 0 else 8, 8) for k in range(20))
            self.head = networks.Head(8)

        def forward(self, x: Tensor) -> Tensor:
            for k, block in enumerate(self.blocks):
                x = block(x)
                if k == 13:
                    x = x.view(-1, 8, 64).relu().view(-1, 8, 8, 8)
            return self.head(x)

    graph = narrower.trace(Deep(), IMAGES)
    assert [g.name for g in graph if not g.free] == ["blocks.13.0", "head.fc"]


def test_a_long_trace_reports_its_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                            caplog: pytest.LogCaptureFixture) -> None:
    """To the callback, else to the logger; never to standard output or standard error."""
    model = chain(unit(3, 8), unit(8, 6), networks.Head(6))
    lines: list[str] = []
    narrower.trace(model, IMAGES, progress=lines.append)
    assert not lines
    monkeypatch.setattr("narrower.tracing.search.perf_counter", itertools.count(0, 3).__next__)
    with caplog.at_level("INFO", "narrower"):
        narrower.trace(model, IMAGES, progress=lines.append)
        assert len(lines) == 1 and "tracing since 3 s: 0 forwards" in lines[0] and not caplog.messages
        narrower.trace(model, IMAGES)
    assert len(lines) == 1 and len(caplog.messages) == 1 and "tracing since 3 s" in caplog.messages[0]
    assert capsys.readouterr() == ("", "")


def test_the_same_twice() -> None:
    for name in ("shuffle", "chunked", "unet"):
        case = PATTERNS[name]
        a, b = (narrower.trace(case.make(), case.inputs) for _ in range(2))
        assert str(a) == str(b) and a.uses == b.uses
        for g, h in zip(a, b, strict=True):
            assert [(s.tensor, s.dim, s.positions.tolist()) for s in g.slices] == [
                (s.tensor, s.dim, s.positions.tolist()) for s in h.slices]


@pytest.mark.parametrize("at", [1, 2, 5, 11, -1, -2, -5, -11])
def test_channels_taken_by_number_from_either_end_are_found(at: int) -> None:
    """A trial that left the few of them alone would say that they can go."""
    model = networks.Trap(lambda m, x: torch.cat([2 * x[:, :at], x[:, at:]], 1))
    assert [g.name for g in narrower.trace(model, networks.images()).free] == ["next.0"]
