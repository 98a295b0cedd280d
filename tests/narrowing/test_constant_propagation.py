"""propagate: which constants reach which layers, and what these layers can do with them, written out for small networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from support.networks import Trick
from torch import Tensor, nn

import narrower
from narrower.narrowing.constant_propagation import Propagation, propagate
from narrower.narrowing.constant_values import ZERO
from narrower.narrowing.layers import Depthwise, Obstacle, Producer, Reader


def propagated(function: Callable[[Any, Tensor], Tensor], layers: dict[str, nn.Module],
               seed: Callable[[Producer], Tensor] = lambda producer: ZERO, bias: bool = False) -> Propagation:
    """The constants of a network whose input has 3 channels of 8 by 8 numbers. `bias`: whether layers can be given one."""
    graph = narrower.trace(Trick(function, layers).eval(), torch.randn(2, 3, 8, 8))
    return propagate(graph, lambda weight: bias, seed)


Read = tuple[list[str], dict[str, float], Reader | Obstacle | Depthwise]


def consumers(found: Propagation) -> list[Read]:
    """Of each consumer the modules that must make zeros, the constants of its groups, and its layer."""
    return [(sorted(p.module for p in c.activation.producers), {g: float(v) for g, v in c.activation.values.items()}, c.layer)
            for c in found.consumers]


def conv(i: int, o: int, kernel: int = 1, **options: Any) -> nn.Module:
    return nn.Conv2d(i, o, kernel, **options)


def pair(second: nn.Module, activation: Callable[[Tensor], Tensor] = torch.sigmoid, **options: Any) -> Propagation:
    """A convolution `a` of 4 channels, an activation, and a layer `b` that reads them."""
    return propagated(lambda m, x: m.b(activation(m.a(x))), {"a": conv(3, 4), "b": second}, **options)


FIRST: Read = ([], {}, Reader("a.weight", "a.bias"))  # the consumer `a`, which reads the input


def test_relu_keeps_zeros() -> None:
    assert consumers(pair(conv(4, 2), F.relu)) == [FIRST, (["a"], {"a": 0.0}, Reader("b.weight", "b.bias"))]


def test_sigmoid_makes_a_half_of_zero() -> None:
    found = pair(conv(4, 2))
    assert consumers(found) == [FIRST, (["a"], {"a": 0.5}, Reader("b.weight", "b.bias"))]
    assert found.consumers[1].activation.changed_by == "sigmoid"


def test_a_batch_norm_is_a_producer_and_its_mean_takes_what_its_convolution_reads() -> None:
    layers = {"a": conv(3, 4, bias=False), "n": nn.BatchNorm2d(4), "b": conv(4, 2, bias=False), "m": nn.BatchNorm2d(2)}
    found = propagated(lambda m, x: m.m(m.b(torch.sigmoid(m.n(m.a(x))))), layers)
    assert consumers(found) == [([], {}, Reader("a.weight", "n.running_mean", kind="running mean")),
                                (["n"], {"a": 0.5}, Reader("b.weight", "m.running_mean", kind="running mean"))]
    behind = {p.module: (p.layer.weight, p.norm) for p in found.producers if p.layer is not None}
    assert behind == {"a": ("a.weight", None), "n": ("a.weight", "n"), "b": ("b.weight", None), "m": ("b.weight", "m")}


def test_a_batch_norm_belongs_to_a_layer_only_if_nothing_else_reads_this() -> None:
    def twice(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(m.n(y) + y)

    def shared(m: Any, x: Tensor) -> Tensor:
        return m.b(m.n(m.a(x)) + m.a(x + 1))

    for function in (twice, shared):
        found = propagated(function, {"a": conv(3, 4), "n": nn.BatchNorm2d(4), "b": conv(4, 2)})
        assert {p.module: p.layer and p.layer.weight for p in found.producers} == {"a": "a.weight", "n": None, "b": "b.weight"}


def test_layers_that_share_a_weight_are_no_producers() -> None:
    a, c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
    c.weight = a.weight
    found = propagated(lambda m, x: m.b(m.a(x) + m.c(x)), {"a": a, "c": c, "b": conv(4, 2)})
    assert [p.module for p in found.producers] == ["b"]
    assert found.consumers[-1].activation.obstacle == "a.weight is shared by several layers"


def test_a_layer_without_bias_and_batch_norm_is_given_a_bias_if_it_can_use_one() -> None:
    bare = conv(4, 2, bias=False)
    assert consumers(pair(bare, bias=True))[1][2] == Reader("b.weight", "b.bias", kind="new bias")
    assert consumers(pair(bare))[1][2] == Obstacle("the layer of b.weight has neither a bias nor a BatchNorm behind it")


def test_zero_padding_is_an_obstacle() -> None:
    between = Obstacle("b.weight reads them between zeros")
    assert consumers(pair(conv(4, 2, 3, padding=1)))[1] == (["a"], {"a": 0.5}, between)
    assert consumers(pair(nn.ConvTranspose2d(4, 2, 3)))[1] == (["a"], {"a": 0.5}, between)


def test_a_grouped_convolution_takes_constants_block_by_block() -> None:
    assert consumers(pair(conv(4, 2, groups=2)))[1] == (["a"], {"a": 0.5}, Reader("b.weight", "b.bias", 2))


def test_channels_go_on_with_a_depthwise_convolution() -> None:
    layers = {"a": conv(3, 4), "d": conv(4, 4, 3, groups=4, padding=1), "b": conv(4, 2)}
    found = propagated(lambda m, x: m.b(F.relu(m.d(torch.sigmoid(m.a(x))))), layers)
    assert consumers(found)[1:] == [(["a"], {"a": 0.5}, Depthwise("d.weight")),
                                    (["d"], {"a": 0.0}, Reader("b.weight", "b.bias"))]


def test_an_addition_needs_the_zeros_of_both() -> None:
    found = propagated(lambda m, x: m.b(m.a(x) + m.c(x)), {"a": conv(3, 4), "c": conv(3, 4), "b": conv(4, 2)})
    assert consumers(found)[-1] == (["a", "c"], {"a": 0.0}, Reader("b.weight", "b.bias"))


def test_a_gate_needs_no_zeros() -> None:
    def squeeze_excite(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return m.b(y * torch.sigmoid(m.gate(y.mean((2, 3), keepdim=True))))

    found = propagated(squeeze_excite, {"a": conv(3, 4), "gate": conv(4, 4), "b": conv(4, 2)})
    assert consumers(found) == [FIRST, (["a"], {"a": 0.0}, Reader("gate.weight", "gate.bias")),
                                (["a"], {"a": 0.0}, Reader("b.weight", "b.bias"))]
    assert [p.module for p in found.gates] == ["gate"]


def test_a_product_that_is_not_zero_needs_both_factors() -> None:
    found = propagated(lambda m, x: m.b(torch.sigmoid(m.a(x)) * torch.sigmoid(m.c(x))),
                       {"a": conv(3, 4), "c": conv(3, 4), "b": conv(4, 2)})
    assert consumers(found)[-1] == (["a", "c"], {"a": 0.25}, Reader("b.weight", "b.bias"))
    assert not found.gates


def test_a_layer_that_is_used_twice_cannot_take_constants() -> None:
    """Each use may read another constant, the bias is the same."""
    once_more = Obstacle("b.weight is used more than once")
    for a, b, pooled in ((conv(3, 4), conv(4, 2), False), (nn.Linear(3, 4), nn.Linear(4, 2), True)):
        def twice(m: Any, x: Tensor, pooled: bool = pooled) -> Tensor:
            y = m.a(x.mean((2, 3)) if pooled else x)
            return m.b(torch.sigmoid(y)) + m.b(torch.tanh(y))

        found = consumers(propagated(twice, {"a": a, "b": b}))
        assert found[1:] == [(["a"], {"a": 0.5}, once_more), (["a"], {"a": 0.0}, once_more)]


def test_what_no_module_returns_is_no_producer() -> None:
    found = propagated(lambda m, x: m.b(F.relu(F.conv2d(x, m.a.weight))), {"a": conv(3, 4, bias=False), "b": conv(4, 2)})
    last = found.consumers[-1]
    assert last.activation.obstacle == "no module returns the output of a.weight"
    assert [p.module for p in last.activation.producers] == [""] and not last.activation.values


def test_operators_and_products_that_take_no_constants_are_obstacles() -> None:
    normalised = pair(conv(4, 2), lambda x: x.softmax(-1)).consumers[-1]
    assert normalised.activation.obstacle == "_softmax of zero may not be zero"
    assert [p.module for p in normalised.activation.producers] == ["a"]

    def attention(m: Any, x: Tensor) -> Tensor:
        y = torch.sigmoid(m.a(x)).flatten(2)
        return m.b(y.transpose(1, 2) @ y)  # sums over channels, of which the output has none

    found = consumers(propagated(attention, {"a": conv(3, 4), "b": nn.Linear(64, 2)}))
    assert found[1] == (["a"], {"a": 0.25}, Obstacle("bmm reads them"))


def test_products_without_a_weight_of_the_model_take_no_constants() -> None:
    found = propagated(lambda m, x: m.b(F.conv2d(torch.sigmoid(m.a(x)), 2 * m.c.weight)),
                       {"a": conv(3, 4), "c": conv(4, 4), "b": conv(4, 2)})
    assert (["a"], {"a": 0.5}, Obstacle("a convolution whose weight is computed reads them")) in consumers(found)

    def similarity(m: Any, x: Tensor) -> Tensor:
        y = torch.sigmoid(m.a(x.mean((2, 3))))
        return y @ y.t()

    read = (["a"], {"a": 0.5}, Obstacle("a product of activations reads them"))
    assert consumers(propagated(similarity, {"a": nn.Linear(3, 4)}))[1:] == [read, read]


def test_a_layer_over_positions_takes_no_constants_and_leaves_none() -> None:
    """As the token mixing of an MLP-Mixer: where a channel is zero, it makes its bias."""
    def mixer(m: Any, x: Tensor) -> Tensor:
        return m.b(m.over(m.a(x).flatten(2)).mean(2))

    found = propagated(mixer, {"a": conv(3, 4), "over": nn.Linear(64, 6), "b": nn.Linear(4, 2)})
    over = Obstacle("over.weight (over positions) reads them")
    assert consumers(found)[1:] == [(["a"], {"a": 0.0}, over), (["a"], {}, Reader("b.weight", "b.bias"))]
    assert found.consumers[-1].activation.obstacle == "over.weight (over positions)"


def test_a_seed_gives_each_channel_its_own_constant_or_none() -> None:
    seeds = {"a": torch.tensor([1.0, 0.0, float("nan"), -2.0]), "c": torch.tensor([3.0, 4.0, 5.0])}
    found = propagated(lambda m, x: m.b(F.relu(torch.cat([m.c(x), m.a(x)], 1))),
                       {"a": conv(3, 4), "c": conv(3, 3), "b": conv(7, 2)},
                       lambda producer: seeds.get(producer.module, ZERO).double())
    values = found.consumers[-1].activation.values
    torch.testing.assert_close(values["a"], torch.tensor([1.0, 0.0, float("nan"), 0.0]).double(), equal_nan=True)
    assert values["c"].tolist() == [3.0, 4.0, 5.0]


def test_a_batch_norm_over_concatenated_channels_gives_each_group_its_part() -> None:
    found = propagated(lambda m, x: m.b(m.n(torch.cat([m.c(x), m.a(x)], 1))),
                       {"a": conv(3, 4), "c": conv(3, 3), "n": nn.BatchNorm2d(7), "b": conv(7, 2)},
                       lambda producer: torch.arange(7.0).double() if producer.module == "n" else ZERO)
    values = found.consumers[-1].activation.values
    assert {g: v.tolist() for g, v in values.items()} == {"c": [0, 1, 2], "a": [3, 4, 5, 6]}
