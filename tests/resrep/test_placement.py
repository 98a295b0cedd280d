"""Where compactors stand in small networks: the sites and the rows of each group, written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.networks import Blurred, Trick
from torch import Tensor, nn

import narrower
from narrower.resrep.placement import Placement, Scope, Site, place, prepare

IMAGES = torch.randn(2, 3, 8, 8)


def conv(i: int, o: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel, bias=False, **options)


Function = Callable[[Any, Tensor], Tensor]


def net(middle: Function, **layers: nn.Module) -> nn.Module:
    """A convolution `stem` of 4 channels with its BatchNorm `bn` and relu, a function of the layers, and a linear head."""
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(middle(m, F.relu(m.bn(m.stem(x)))).mean((2, 3)))

    return Trick(forward, {"stem": conv(3, 4, 3), "bn": nn.BatchNorm2d(4), **layers, "head": nn.Linear(4, 2)})


def residual() -> nn.Module:
    return net(lambda m, x: F.relu(x + m.bn2(m.conv2(F.relu(m.bn1(m.conv1(x)))))),
               conv1=conv(4, 6, 3, padding=1), bn1=nn.BatchNorm2d(6), conv2=conv(6, 4), bn2=nn.BatchNorm2d(4))


def activated(read: nn.Module) -> nn.Module:
    """Zeros become 0.5 where the layer `read` reads them."""
    return net(lambda m, x: m.read(torch.sigmoid(x)), read=read)


def placed(model: nn.Module, scope: Scope = "all") -> Placement:
    return place(narrower.trace(model.eval(), IMAGES), scope)


def rows(found: Placement) -> dict[str, dict[str, list[int]]]:
    """{group: {module: the rows of its channels, in order}}."""
    return {g: {m: s.positions[s.channels.argsort()].tolist() for m, s in maps.items()} for g, maps in found.rows.items()}


def full(module: str, size: int, weight: str) -> Site:
    return Site(module, "full", size, weight=f"{weight}.weight", norm=module)


def test_a_residual_stream_has_a_compactor_behind_each_producer() -> None:
    found = placed(residual())
    assert found.sites == {"bn": full("bn", 4, "stem"), "bn1": full("bn1", 6, "conv1"), "bn2": full("bn2", 4, "conv2")}
    assert rows(found) == {"stem": {"bn": [0, 1, 2, 3], "bn2": [0, 1, 2, 3]}, "conv1": {"bn1": [0, 1, 2, 3, 4, 5]}}
    assert not found.reasons and not found.constants


def test_the_inner_scope_leaves_out_what_several_layers_make() -> None:
    found = placed(residual(), "inner")
    assert rows(found) == {"conv1": {"bn1": [0, 1, 2, 3, 4, 5]}}
    assert list(found.sites) == ["bn1"]
    assert found.reasons == {"stem": "2 layers make these channels (scope='inner')"}


@pytest.mark.parametrize("scope", ["inner", "all"])
def test_behind_a_depthwise_convolution_stands_a_diagonal_compactor(scope: Scope) -> None:
    inverted = net(lambda m, x: m.narrow(F.relu(m.bn2(m.dw(F.relu(m.bn1(m.wide(x))))))), wide=conv(4, 8), bn1=nn.BatchNorm2d(8),
                   dw=conv(8, 8, 3, groups=8, padding=1), bn2=nn.BatchNorm2d(8), narrow=conv(8, 4))
    found = placed(inverted, scope)
    assert found.sites == {"bn": full("bn", 4, "stem"), "bn1": Site("bn1", "diagonal", 8, norm="bn1"),
                           "bn2": Site("bn2", "diagonal", 8, norm="bn2"),
                           "narrow": Site("narrow", "full", 4, weight="narrow.weight")}
    every = list(range(8))
    assert rows(found)["wide"] == {"bn1": every, "bn2": every}


def test_in_a_pre_activation_network_compactors_stand_behind_the_batch_norms_that_read() -> None:
    """As in DenseNet and ResNetV2: behind the convolution a BatchNorm would undo any scale."""
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        return m.c1(F.relu(m.n1(y))) + m.c2(F.relu(m.n2(y)))

    found = placed(Trick(forward, {"stem": conv(3, 4), "n1": nn.BatchNorm2d(4), "n2": nn.BatchNorm2d(4), "c1": conv(4, 2),
                                   "c2": conv(4, 2)}))
    stem = {m: s for m, s in found.sites.items() if m in found.rows["stem"]}
    assert stem == {"n1": Site("n1", "diagonal", 4, norm="n1"), "n2": Site("n2", "diagonal", 4, norm="n2")}
    assert rows(found)["stem"] == {"n1": [0, 1, 2, 3], "n2": [0, 1, 2, 3]}


def test_concatenated_channels_are_rows_of_one_batch_norm() -> None:
    found = placed(net(lambda m, x: m.c2(F.relu(m.n(torch.cat([m.c1(x), x], 1)))),
                       c1=conv(4, 3), n=nn.BatchNorm2d(7), c2=conv(7, 4)))
    assert rows(found)["c1"] == {"n": [0, 1, 2]}
    assert rows(found)["stem"] == {"bn": [0, 1, 2, 3], "n": [3, 4, 5, 6]}


def test_a_gate_does_not_count_as_a_layer_that_makes_the_channels() -> None:
    found = placed(net(lambda m, x: x * torch.sigmoid(m.gate(x.mean((2, 3), keepdim=True))), gate=conv(4, 4)), "inner")
    assert rows(found) == {"stem": {"bn": [0, 1, 2, 3]}}


def test_linear_layers_and_grouped_and_expanding_convolutions() -> None:
    layers = (conv(3, 8, 3), nn.ReLU(), conv(8, 6, groups=2), nn.ReLU(), conv(6, 12), nn.ReLU(), nn.Flatten(),
              nn.Linear(432, 5), nn.ReLU(), nn.Linear(5, 2))
    assert placed(nn.Sequential(*layers)).sites == {
        "0": Site("0", "full", 8, weight="0.weight"),
        "2": Site("2", "block", 6, weight="2.weight", blocks=2),
        "4": Site("4", "diagonal", 12, weight="4.weight"),  # a full one would be larger than the convolution
        "7": Site("7", "diagonal", 5, dim=-1, weight="7.weight", bias="7.bias"),
    }


def test_transposed_convolutions_have_full_compactors_and_in_groups_diagonal_ones() -> None:
    layers = (conv(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, groups=2),
              nn.ReLU(), conv(4, 2))
    assert {name: site.kind for name, site in placed(nn.Sequential(*layers)).sites.items()} == {
        "0": "full", "2": "full", "4": "diagonal"}


class Filters(nn.Module):
    """A convolution whose weight is a buffer, which a state dict lacks."""

    kernel: Tensor

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.randn(o, i, 3, 3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel)


def test_nothing_is_merged_into_buffers() -> None:
    """A checkpoint may lack them. Through a filter of each channel zeros pass; behind others stand BatchNorms or nothing."""
    assert rows(placed(net(lambda m, x: m.read(F.relu(m.blur(x))), blur=Blurred(4), read=conv(4, 4)))) == {
        "stem": {"bn": [0, 1, 2, 3]}, "read": {"read": [0, 1, 2, 3]}}
    found = placed(nn.Sequential(conv(3, 4), nn.ReLU(), Filters(4, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 2)))
    assert found.sites == {"0": Site("0", "diagonal", 4, weight="0.weight"), "3": Site("3", "diagonal", 6, norm="3")}
    found = placed(nn.Sequential(conv(3, 4), nn.ReLU(), Filters(4, 6), nn.ReLU(), conv(6, 2)))
    assert found.sites.keys() == {"0"} and [*found.reasons.values()] == ["2.kernel is a buffer, which no training changes"]


def test_a_batch_norm_without_running_statistics_has_a_diagonal_compactor() -> None:
    """A full one would be merged into its running mean and variance."""
    found = placed(nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), conv(4, 2)))
    assert found.sites == {"1": Site("1", "diagonal", 4, norm="1")}


def test_constants_are_taken_by_the_layer_that_reads_them() -> None:
    (constant,) = placed(activated(nn.Conv2d(4, 4, 1))).constants
    assert (constant.reader.into, constant.group, constant.value) == ("read.bias", "stem", 0.5)


def test_prepare_gives_a_layer_the_bias_that_takes_a_constant() -> None:
    for excluded in ([], ["stem"]):
        model: Any = activated(conv(4, 4)).eval()
        before = narrower.trace(model, IMAGES)
        graph, found = prepare(model, before, "all", excluded)
        if excluded:
            assert graph is before and model.read.bias is None
            continue
        assert model.read.bias.tolist() == [0, 0, 0, 0] and graph.created == ("read.bias",)
        assert [(c.reader.into, c.reader.kind) for c in found.constants] == [("read.bias", "bias")]


def test_groups_without_compactors_have_a_reason() -> None:
    padded = placed(activated(conv(4, 4, 3, padding=1))).reasons
    assert padded == {"stem": "sigmoid makes 0.5 of zero, and read.weight reads them between zeros"}
    softmax = placed(nn.Sequential(conv(3, 4), nn.Softmax(-1), conv(4, 2)))
    assert softmax.reasons == {"0": "_softmax of zero may not be zero"} and not softmax.rows
    functional = placed(net(lambda m, x: m.last(F.relu(F.conv2d(x, m.own.weight))), own=conv(4, 6), last=conv(6, 4))).reasons
    assert functional == {"own": "no module returns the output of own.weight"}
    normed = placed(nn.Sequential(conv(3, 4), nn.GroupNorm(2, 4), conv(4, 2)))
    assert normed.reasons == {"0": "a layer mixes these channels: without a channel of zeros its output would change"}


def tied(part: str, a: nn.Module, b: nn.Module) -> dict[str, nn.Module]:
    setattr(b, part, getattr(a, part))
    return {"a": a, "b": b}


TIED: dict[str, tuple[Function, dict[str, nn.Module], str, str]] = {
    "linear": (lambda m, x: F.relu(m.a(x.mean((2, 3)))) + F.relu(m.b(x.amax((2, 3)))),
               tied("weight", nn.Linear(4, 6), nn.Linear(4, 6)), "a", "a.weight"),
    "in a chain": (lambda m, x: F.relu(m.b(F.relu(m.a(x)))), tied("weight", conv(4, 4), conv(4, 4)), "stem", "a.weight"),
    "beside a function": (lambda m, x: F.relu(m.a(x)) + F.conv2d(x, m.a.weight), {"a": conv(4, 6)}, "a", "a.weight"),
    "bias": (lambda m, x: F.relu(m.a(x)) + F.relu(m.b(x)), tied("bias", nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1)), "a", "a.bias"),
    "scale": (lambda m, x: m.a(m.c(x)) + m.b(m.d(x)),
              {**tied("weight", nn.BatchNorm2d(6), nn.BatchNorm2d(6)), "c": conv(4, 6), "d": conv(4, 6)}, "c", "of its own"),
}


@pytest.mark.parametrize("name", TIED)
def test_a_tensor_that_several_layers_share_is_not_merged_twice(name: str) -> None:
    function, layers, group, tensor = TIED[name]

    def forward(m: Any, x: Tensor) -> Tensor:
        y = function(m, F.relu(m.bn(m.stem(x))))
        return m.head(y.mean((2, 3)) if y.dim() > 2 else y)

    width = 4 if name == "in a chain" else 6
    found = placed(Trick(forward, {"stem": conv(3, 4, 3), "bn": nn.BatchNorm2d(4), **layers, "head": nn.Linear(width, 2)}))
    assert group not in found.rows and tensor in found.reasons[group], found.reasons


def test_a_module_that_makes_two_outputs_can_have_no_compactor() -> None:
    class Switch(nn.Module):
        """Another convolution at each call."""

        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4, 1, 1)) for _ in range(2)])
            self.first = True

        def forward(self, x: Tensor) -> Tensor:
            self.first = not self.first
            return F.conv2d(x, self.weights[int(self.first)])

    found = placed(net(lambda m, x: m.last(m.switch(F.relu(m.switch(x)))), switch=Switch(), last=conv(4, 4)))
    assert sorted(found.reasons.values()) == ["switch returns the outputs of different layers"] * 2
    assert set(found.rows) == {"stem", "last"}
