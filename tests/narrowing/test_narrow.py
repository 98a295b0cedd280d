"""narrow: what comes back is the dense network without those channels, or it is pinned with a reason."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import networks, reference
from support.networks import IMAGES, MIXERS, PATTERNS, TRAPS, Head, Plain, chain, images, unit
from torch import nn
from torch.nn.utils import prune

import narrower
from narrower.models import CIFAR_MODELS


def scores(graph: narrower.Graph, kind: int) -> narrower.Scores:
    """Random ones, or such that the first (last) channels of each group go."""
    if kind < 2:
        return narrower.random(graph, seed=kind)
    return narrower.Scores({g.name: torch.arange(g.size).float() * (1 if kind == 2 else -1) + g.size for g in graph.free})


def removed(plan: narrower.Plan) -> int:
    return sum(g.size - len(plan.keep[g.name]) for g in plan.graph.free)


# ------------------------------------------------------------------------------------------------ exactly


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_narrows_exactly(name: str) -> None:
    case = PATTERNS[name]
    model = case.make()
    graph = narrower.trace(model, case.inputs)
    assert {g.name: g.size for g in graph.free} == case.free
    assert all(g.exact for g in graph)
    for kind in range(3):
        plan = narrower.plan(graph, scores(graph, kind), remove=0.5 - 0.1 * kind)
        reference.exact(model, plan, case.inputs)
        small = narrower.narrow(model, plan)
        assert reference.params(small) == plan.params[1] < plan.params[0] == reference.params(model)
        assert narrower.verify(model, small, plan, case.inputs).error < 1e-12


@pytest.mark.parametrize("name", [n for n in CIFAR_MODELS if n not in ("cifar_resnet32", "cifar_resnet44", "cifar_resnet110")])
def test_cifar_network_narrows_exactly(name: str) -> None:
    model, x = CIFAR_MODELS[name]().eval(), images(size=32, batch=2)
    graph = narrower.trace(model, x[:1])
    for g in graph:
        assert g.free or re.search("network output|zero-padded channels", str(g.pinned)), f"{g.name}: {g.pinned}"
    plan = narrower.plan(graph, narrower.random(graph), remove=0.5)
    assert plan.params[1] < 0.5 * plan.params[0]
    reference.exact(model, plan, x)


def test_option_a_pins_the_padded_channels_and_couples_the_rest() -> None:
    graph = narrower.trace(CIFAR_MODELS["cifar_resnet20"](), images(size=32, batch=2))
    padded = [g for g in graph if "zero-padded" in str(g.pinned)]
    assert [g.size for g in padded] == [8, 8, 16, 16]
    assert all("layer" in str(g.pinned) for g in padded)
    stream = graph["conv1"]
    assert stream.free and stream.size == 16 and {"layer2.0.conv2", "layer3.2.conv2"} <= set(stream.layers)


# ------------------------------------------------------------------------------------------------ or pinned


@pytest.mark.parametrize("name", TRAPS)
def test_trap_is_pinned_with_a_reason_or_narrows_exactly(name: str) -> None:
    model = TRAPS[name].make()
    graph = narrower.trace(model, IMAGES)
    assert {g.name: g.size for g in graph.free} == TRAPS[name].free
    pinned = {g.name: g.pinned for g in graph if g.pinned and g.pinned.code != "output"}
    assert {n: reason.code for n, reason in pinned.items()} == TRAPS[name].pinned, pinned
    assert not pinned or any(re.search(TRAPS[name].text, str(reason)) for reason in pinned.values()), pinned
    for kind in range(4):
        plan = narrower.plan(graph, scores(graph, kind), remove=0.5 - 0.06 * kind)
        assert removed(plan)
        reference.exact(model, plan, IMAGES)
        narrower.verify(model, narrower.narrow(model, plan), plan, IMAGES)


@pytest.mark.parametrize("name", [n for n, case in TRAPS.items() if case.pinned])
def test_the_reason_names_the_place(name: str) -> None:
    graph = narrower.trace(TRAPS[name].make(), IMAGES)
    for g in graph:
        if g.pinned is not None and g.pinned.code != "output":
            assert re.search(r"trick|stem|networks\.py:\d+", str(g.pinned)), g.pinned


@pytest.mark.parametrize("name", MIXERS)
def test_layers_that_mix_channels(name: str) -> None:
    """Evaluated on the surviving channels, or pinned on request."""
    model = MIXERS[name]().eval()
    graph = narrower.trace(model, IMAGES)
    assert any(g.pinned or not g.exact for g in graph if "network output" not in str(g.pinned))
    mixers = {"trick": "stem.1.weight"} if isinstance(model, networks.Trap) else None
    for kind in range(4):
        plan = narrower.plan(graph, scores(graph, kind), remove=0.5 - 0.06 * kind)
        reference.exact(model, plan, IMAGES, mixers)
        narrower.verify(model, narrower.narrow(model, plan), plan, IMAGES)
    strict = narrower.trace(model, IMAGES, allow_inexact=False)
    assert all(g.exact for g in strict.free)
    assert {g.name for g in strict.free} == {g.name for g in graph.free if g.exact}
    plan = narrower.plan(strict, scores(strict, 0), remove=0.5)
    reference.exact(model, plan, IMAGES)


@pytest.mark.parametrize("name", networks.STANDARDISED)
def test_weight_standardisation_sees_the_surviving_channels(name: str) -> None:
    """The narrow layer normalises each filter over what it still reads; verify takes the same for its reference."""
    standardise = networks.STANDARDISED[name]
    model = networks.Standardised(standardise).double().eval()
    x = IMAGES.double()
    graph = narrower.trace(model, x)
    assert graph["stem.0"].free and not graph["stem.0"].exact
    assert graph["conv"].free
    plan = narrower.plan(graph, narrower.random(graph), remove=0.4)
    small = narrower.narrow(model, plan)
    a, b = plan.keep["stem.0"], plan.keep["conv"]
    weight, bias = model.get_parameter("conv.weight")[b][:, a], model.get_parameter("conv.bias")[b]
    maps = F.relu(F.conv2d(model.stem(x)[:, a], standardise(weight), bias)).mean((2, 3))
    want = F.linear(maps, model.get_parameter("head.fc.weight")[:, b], model.get_parameter("head.fc.bias"))
    assert torch.allclose(small(x), want, rtol=1e-10)
    assert narrower.verify(model, small, plan, x).error < 1e-9
    strict = narrower.trace(model, x, allow_inexact=False)
    assert [g.name for g in strict.free] == ["conv"]


# ------------------------------------------------------------------------------------------------ kept as it was


@pytest.mark.parametrize("name", ["plain", "chunked", "shuffle", "shared", "grouped"])
def test_the_model_is_untouched(name: str) -> None:
    case = PATTERNS[name]
    model = case.make()
    before = reference.state(model)
    small, plan = reference.pair(model, case.inputs)
    narrower.verify(model, small, plan, case.inputs)
    assert reference.same_state(before, reference.state(model))
    addresses = {t.data_ptr() for t in reference.float_tensors(model).values()}
    assert not addresses & {t.data_ptr() for t in reference.float_tensors(small).values()}, "memory is shared"


def test_surviving_values_are_the_same_bits() -> None:
    model = Plain().to(torch.bfloat16)
    plan = reference.halved(model, IMAGES.bfloat16())
    index = reference.survivors(narrower.narrow(reference.coded(model), plan), model)
    dense, small = reference.float_tensors(model), reference.float_tensors(narrower.narrow(model, plan))
    for name, t in small.items():
        assert t.dtype == torch.bfloat16
        assert torch.equal(t, dense[name].flatten()[index[name]])


def test_classes_modes_and_gradients_are_kept() -> None:
    model = Plain()
    model.conv2.requires_grad_(False)
    model.train()
    model.bn3.eval()
    small, plan = reference.pair(model)
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    want = {n: p.requires_grad for n, p in model.named_parameters()}
    assert want == {n: p.requires_grad for n, p in small.named_parameters()}
    assert len(plan.keep["conv2"]) == 7, "a frozen layer is narrowed like the others"
    assert all(type(p) is nn.Parameter and p.is_leaf for p in small.parameters())
    assert list(small.state_dict()) == list(model.state_dict())


def test_memory_format_is_kept() -> None:
    model = Plain().to(memory_format=torch.channels_last)
    small, _ = reference.pair(model, IMAGES.to(memory_format=torch.channels_last))
    for name in ("conv1.weight", "conv2.weight", "conv3.weight"):
        t = dict(small.named_parameters())[name]
        assert t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous(), name
    plain, _ = reference.pair(Plain())
    assert all(p.is_contiguous() for p in plain.parameters())


def test_hooks_are_kept() -> None:
    model = Plain()
    seen: list[Any] = []
    model.conv2.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    model.bn3.register_forward_pre_hook(lambda m, args: seen.append(len(args)))
    small, _ = reference.pair(model)
    seen.clear()
    small.eval()(IMAGES)
    assert seen == [(4, 7, 8, 8), 1]


def test_tied_parameters_stay_tied() -> None:
    model = networks.Shared()
    small, _ = reference.pair(model)
    assert small.left.weight is small.right.weight
    assert small.left.weight.shape == (4, 5, 1, 1)
    assert len(list(small.parameters())) == len(list(model.parameters()))


def test_a_module_used_under_two_names_stays_one() -> None:
    model = Plain()
    model.alias = model.conv2
    small, plan = reference.pair(model)
    assert small.alias is small.conv2
    assert plan.params == (reference.params(model), reference.params(small))
    reference.exact(model, plan, IMAGES)


def test_sizes_that_other_attributes_repeat_make_the_forward_fail_or_follow() -> None:
    """`num_features` of a BatchNorm, `normalized_shape`, `in_channels`: a layer of the same settings has the same shapes."""
    model = chain(unit(3, 8), nn.GroupNorm(2, 8), networks.Last(nn.LayerNorm(8)), nn.PReLU(8), unit(8, 6), networks.Head(6))
    small, _ = reference.pair(model)
    reference.mirrors(small)
    assert "BatchNorm2d(4" in str(small) and "GroupNorm(2, 4" in str(small) and "LayerNorm((4,)" in str(small)
    assert "num_parameters=4" in str(small)


PARAMETRISATIONS: dict[str, Any] = {
    "weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "spectral_norm": torch.nn.utils.parametrizations.spectral_norm,
    "orthogonal": torch.nn.utils.parametrizations.orthogonal,
    "old_spectral_norm": torch.nn.utils.spectral_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_parametrised_weights_narrow_exactly_or_are_refused_by_name(name: str) -> None:
    """Where conv2 cannot shrink, the layer behind it still can."""
    model = Plain().eval()
    PARAMETRISATIONS[name](model.conv2)
    graph = narrower.trace(model, IMAGES)
    assert graph["conv3"].free
    plan = narrower.plan(graph, narrower.random(graph), remove=0.4)
    try:
        small: Any = narrower.narrow(model, plan)
    except narrower.NarrowerError as e:
        assert "conv2" in str(e)
        return
    narrower.verify(model, small, plan, IMAGES)
    assert hasattr(small.conv2, "parametrizations") == hasattr(model.conv2, "parametrizations")
    small.train()(IMAGES).sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("norm", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.weight_norm], ids=["new", "old"])
def test_weight_norm_is_over_the_channels_that_stay(norm: Any) -> None:
    model: Any = nn.Sequential(norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), norm(nn.Conv2d(8, 12, 3)), nn.ReLU(), Head(12)).eval()
    graph = narrower.trace(model, IMAGES)
    first, second = (g for g in graph.free)
    assert not first.exact and second.exact, "the second reads the first's channels and is normed over them"
    plan = narrower.plan(graph, narrower.random(graph), remove=0.5)
    small: Any = narrower.narrow(model, plan)
    narrower.verify(model, small, plan, IMAGES)
    x, kept = IMAGES, [torch.as_tensor(plan.keep[g.name]) for g in (first, second)]
    reads = torch.arange(3)
    for conv, mine in zip((model[0], model[2]), kept, strict=True):
        v, g = sorted((t for n, t in conv.named_parameters() if n != "bias"), key=torch.Tensor.numel, reverse=True)
        v = v[mine][:, reads]
        x = F.relu(F.conv2d(x, g[mine] * v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1), conv.bias[mine]))
        reads = mine
    want = F.linear(x.mean((2, 3)), model[4].fc.weight[:, reads], model[4].fc.bias)
    assert torch.allclose(small(IMAGES), want, atol=1e-5)


# ------------------------------------------------------------------------------------------------ training goes on


@pytest.mark.parametrize("name", [n for n in PATTERNS if n not in ("dict_inputs",)])
def test_the_narrow_network_trains(name: str) -> None:
    case = PATTERNS[name]
    small, _ = reference.pair(case.make(), case.inputs)
    out = reference.flat(reference.call(small.train(), case.inputs))
    torch.stack([t.square().sum() for t in out]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def test_training_only_heads_still_train() -> None:
    small, plan = reference.pair(networks.TrainingOnly())
    assert len(plan.keep["aux.0"]) == 4
    out, aux = small.train()(IMAGES)
    (out.sum() + aux.sum()).backward()
    assert small.aux_fc.weight.grad is not None


# ------------------------------------------------------------------------------------------------ again, and never


@pytest.mark.parametrize("name", ["plain", "residual", "grouped", "shuffle", "chunked", "unet"])
def test_narrowing_twice(name: str) -> None:
    case = PATTERNS[name]
    model = case.make()
    first = reference.halved(model, case.inputs, remove=0.34)
    small = narrower.narrow(model, first)
    second = reference.halved(small, case.inputs, seed=1, remove=0.4)
    assert {g.name for g in second.graph.free} == {g.name for g in first.graph.free}
    reference.exact(small, second, case.inputs)
    error = reference.difference(model, lambda m: narrower.narrow(narrower.narrow(m, first), second), case.inputs)
    assert error < reference.EXACT


def test_a_grouped_convolution_with_one_channel_left_in_each_group() -> None:
    """It looks like a depthwise one, and is none."""
    model = chain(unit(3, 8), unit(8, 8, groups=4), unit(8, 6, groups=2), networks.Head(6))
    graph = narrower.trace(model, IMAGES)
    assert {g.name: g.size for g in graph.free} == {"0.0": 8, "1.0": 8, "2.0": 6}
    plan = narrower.plan(graph, narrower.random(graph), remove={"0.0": 0.5})
    assert len(plan.keep["0.0"]) == 4 and len(plan.keep["1.0"]) == 8
    reference.exact(model, plan, IMAGES)
    small = narrower.narrow(model, plan)
    reference.exact(small, reference.halved(small, IMAGES), IMAGES)


def test_a_plan_that_removes_nothing_changes_nothing() -> None:
    model = Plain().eval()
    graph = narrower.trace(model, IMAGES)
    plan = narrower.plan(graph, narrower.random(graph), remove={"*": 0.0})
    small = narrower.narrow(model, plan)
    assert torch.equal(small(IMAGES), model(IMAGES))
    assert plan.macs[0] == plan.macs[1] and plan.params[0] == plan.params[1]


def test_values_may_change_between_trace_and_narrow_but_not_shapes() -> None:
    model = Plain().eval()
    plan = reference.halved(model, IMAGES)
    for p in model.parameters():
        p.data.add_(1)
    small = narrower.narrow(model, plan)
    narrower.verify(model, small, plan, IMAGES)
    other = Plain()
    other.conv2 = nn.Conv2d(10, 15, 3)
    with pytest.raises(narrower.PlanError, match=r"conv2\.weight"):
        narrower.narrow(other, plan)
    with pytest.raises(narrower.PlanError, match="not the one that was traced"):
        narrower.narrow(small, plan)


def test_kept_channels_are_what_the_plan_says() -> None:
    model = Plain()
    graph = narrower.trace(model, IMAGES)
    plan = narrower.plan(graph, scores(graph, 2), remove=0.5)
    small: Any = narrower.narrow(model, plan)
    assert plan.keep["conv2"].tolist() == list(range(7, 14))
    assert torch.equal(small.conv2.weight, model.conv2.weight[7:, np.arange(5, 10)])
    assert torch.equal(small.conv2.bias, model.state_dict()["conv2.bias"][7:])
    assert torch.equal(small.fc.weight, model.fc.weight[:, 6:])
