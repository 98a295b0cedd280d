"""Which weights have lost inputs, what their layers still make, and where intercepts go."""

from __future__ import annotations

import torch
from support.networks import Head, unit
from torch import Tensor, nn

import narrower
from narrower.graph.selection import Kept
from narrower.repair.readers import give_intercepts, images_wanted, input_counts, losing_inputs


def kept_of(model: nn.Module, keep: dict[str, list[int]], x: Tensor) -> Kept:
    graph = narrower.trace(model, x)
    return Kept(graph, {name: torch.as_tensor(channels).numpy() for name, channels in keep.items()})


def test_only_weights_that_lost_inputs_count_with_their_kept_outputs() -> None:
    model = nn.Sequential(unit(3, 6), unit(6, 5), Head(5))
    kept = kept_of(model, {"0.0": [0, 2, 5], "1.0": [1, 3]}, torch.randn(1, 3, 8, 8))
    outputs, left = losing_inputs(kept)
    assert {n: t.tolist() for n, t in outputs.items()} == {"1.0.weight": [1, 3], "2.fc.weight": [0, 1, 2, 3, 4]}
    assert not left


def test_a_weight_that_is_used_twice_is_left_in_whatever_way() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Linear(6, 5), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            code = torch.relu(self.b(self.a(x).mean((2, 3))))
            out: Tensor = self.c(code @ self.b.weight)
            return out

    model = Tied()
    kept = kept_of(model, {"a": [0, 1, 4]}, torch.randn(2, 3, 4, 4))
    outputs, left = losing_inputs(kept)
    assert left == {"b.weight": "it is used more than once in a forward"} and list(outputs) == ["c.weight"]
    assert list(input_counts(kept.graph)) == ["c.weight"]


def test_a_transposed_layer_that_keeps_all_outputs_lists_those_of_each_group() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2, groups=2))
    kept = kept_of(model, {"0": [0, 1, 4, 5]}, torch.randn(1, 3, 4, 4))
    outputs, _ = losing_inputs(kept)
    assert outputs["2.weight"].tolist() == [0, 1, 2, 3]


def test_intercepts_go_into_a_bias_a_running_mean_or_a_new_bias() -> None:
    model = nn.Sequential(unit(3, 6), nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
                          nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.ReLU(), Head(6))
    kept = kept_of(model, {"0.0": [0, 1], "1": [0, 1, 2], "4": [3, 4]}, torch.randn(1, 3, 8, 8))
    outputs, _ = losing_inputs(kept)
    small = narrower.narrow(model, narrower.plan(kept.graph, narrower.random(kept.graph), remove=0.5))
    places = give_intercepts(small, kept, outputs)
    assert {name: (p.into, p.kind) for name, p in places.items()} == {
        "1.weight": ("2.running_mean", "running mean"), "4.weight": ("4.bias", "new bias"),
        "6.fc.weight": ("6.fc.bias", "bias")}
    assert not small.get_parameter("4.bias").any()


def test_the_layer_that_needs_most_images_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))
    graph = narrower.trace(model, torch.randn(1, 3, 8, 8))
    assert images_wanted(graph, {"0.weight": 27, "4.weight": 32}) == "4.weight reads 32 inputs: 32 images give as many samples"
    assert images_wanted(graph, {"0.weight": 27 * 64}) == "0.weight reads 1,728 inputs: 27 images give as many samples"
    assert images_wanted(graph, {}) == "no layer to repair"
