"""What a step of a forward is: which layer, what produces channels, and where a layer takes constants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.networks import Trick
from torch import nn

import narrower
from narrower.graph.types import Step
from narrower.narrowing.layers import Depthwise, Layer, Layers, Obstacle, Producer, Reader, bias_name


def found(*modules: nn.Module, function: Any = None) -> tuple[Layers, dict[str, Step]]:
    """The layers of a chain of modules called m0, m1 ..., and the step that reads each weight."""
    def forward(m: Any, x: Any) -> Any:
        for k in range(len(modules)):
            x = getattr(m, f"m{k}")(x)
        return x

    model = Trick(function or forward, {f"m{k}": module for k, module in enumerate(modules)}).eval()
    graph = narrower.trace(model, torch.randn(2, 4, 8, 8))
    return Layers(graph), {i: step for step in graph.steps for i in step.inputs if isinstance(i, str) and i.endswith("weight")}


def layer(module: nn.Module) -> Layer | None:
    layers, steps = found(nn.Conv2d(4, 8, 1), module)
    return layers.layer(steps["m1.weight"])


LAYERS: dict[str, tuple[nn.Module, Layer]] = {
    "plain": (nn.Conv2d(8, 4, 3), Layer("m1.weight", "m1.bias", "m1")),
    "without bias": (nn.Conv2d(8, 4, 3, bias=False), Layer("m1.weight", None, "m1")),
    "padded": (nn.Conv2d(8, 4, 3, padding=1), Layer("m1.weight", "m1.bias", "m1", padded=True)),
    "grouped": (nn.Conv2d(8, 4, 1, groups=2), Layer("m1.weight", "m1.bias", "m1", blocks=2)),
    "depthwise": (nn.Conv2d(8, 8, 1, groups=8), Layer("m1.weight", "m1.bias", "m1", blocks=8, depthwise=True)),
    "transposed": (nn.ConvTranspose2d(8, 4, 2), Layer("m1.weight", "m1.bias", "m1", transposed=True, padded=True)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_convolution_is_read_from_its_call(name: str) -> None:
    module, want = LAYERS[name]
    assert layer(module) == want


def test_a_linear_layer_is_a_layer_and_a_norm_is_none() -> None:
    layers, steps = found(nn.Conv2d(4, 8, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 3))
    linear = next(s for s in layers.graph.steps if "m3.bias" in s.inputs)
    assert layers.layer(linear) == Layer("m3.weight", "m3.bias", "m3")
    assert layers.layer(steps["m1.weight"]) is None


def test_a_matrix_product_reads_its_weight_as_it_lies_and_whole() -> None:
    """x @ W has a weight (in, out), a part of a weight is none, and a matrix that is added is no bias."""
    def forward(m: Any, x: Any) -> Any:
        y = x.mean((2, 3)) @ m.m0.weight
        return m.m2(torch.addmm(m.m3.weight, F.linear(y, m.m1.weight[:4]), m.m4.weight.t()))

    layers, _ = found(nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 4), function=forward)
    products = [layers.layer(s) for s in layers.graph.steps if s.name in ("mm", "addmm") and not s.training]
    assert products == [Layer("m0.weight", None, "", transposed=True), None, None, Layer("m2.weight", "m2.bias", "m2")]


def test_a_batch_norm_behind_a_layer_is_its_producer_if_it_alone_reads_the_layer() -> None:
    layers, steps = found(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    conv = layers.layer(steps["m0.weight"])
    both = layers.producer(steps["m1.weight"], None)
    assert both == Producer("m1", conv, "m1") and isinstance(both, Producer) and both.axis == ("m1.weight", 0)
    def residual(m: Any, x: Any) -> Any:
        y = m.m0(x)
        return m.m2(m.m1(y) + y)

    layers, steps = found(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1), function=residual)
    assert layers.producer(steps["m1.weight"], None) == Producer("m1", None, "m1")


def test_a_weight_that_several_layers_read_produces_nothing() -> None:
    shared, second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    second.weight = shared.weight
    layers, steps = found(shared, second, nn.Conv2d(4, 2, 1))
    made = layers.layer(steps["m0.weight"])
    assert layers.producer(steps["m0.weight"], made) == Obstacle("m0.weight is shared by several layers")


READERS: dict[str, tuple[list[nn.Module], bool, Any]] = {
    "bias": ([nn.Conv2d(8, 4, 1)], True, Reader("m1.weight", "m1.bias")),
    "running mean": ([nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)], True,
                     Reader("m1.weight", "m2.running_mean", 1, "running mean")),
    "new bias": ([nn.Conv2d(8, 4, 1, bias=False), nn.ReLU()], True, Reader("m1.weight", "m1.bias", 1, "new bias")),
    "no bias": ([nn.Conv2d(8, 4, 1, bias=False), nn.ReLU()], False, "has neither a bias nor a BatchNorm behind it"),
    "padded": ([nn.Conv2d(8, 4, 3, padding=1)], True, "between zeros"),
    "depthwise": ([nn.Conv2d(8, 8, 1, groups=8)], True, Depthwise("m1.weight")),
}


@pytest.mark.parametrize("name", READERS)
def test_a_layer_takes_constants_into_its_bias_a_running_mean_or_not_at_all(name: str) -> None:
    modules, allowed, want = READERS[name]
    layers, steps = found(nn.Conv2d(4, 8, 1), *modules)
    step = steps["m1.weight"]
    made = layers.layer(step)
    assert made is not None
    reader = layers.reader(step, made, lambda weight: allowed)
    assert want in reader.text if isinstance(reader, Obstacle) else reader == want


def test_a_layer_that_is_used_twice_takes_no_constants() -> None:
    layers, steps = found(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), function=lambda m, x: m.m1(m.m1(m.m0(x))))
    made = layers.layer(steps["m1.weight"])
    assert made is not None
    assert layers.reader(steps["m1.weight"], made, lambda weight: True) == Obstacle("m1.weight is used more than once")


def test_a_bias_has_the_name_of_its_weight() -> None:
    assert bias_name("a.b.weight") == "a.b.bias"
