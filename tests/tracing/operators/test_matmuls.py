"""Matrix products: the summed dimension meets, the others go on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support.operators import C, assert_pinned, collected, units
from torch import Tensor, nn

from narrower.tracing.constraints import ConstraintCollector
from narrower.tracing.labels import Axes, Axis


def test_a_linear_layer_reads_and_makes_channels() -> None:
    model = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5, bias=False)).to("meta")
    collector = ConstraintCollector(model, Axes(), {})
    with torch.no_grad(), collector:
        out = model(torch.empty(3, 7, device="meta"))
    assert {(Axis("2.weight", 1), "in"), (Axis("2.weight", 0), "out")} <= collector.roles
    assert collector.macs == {"0.weight": 3 * 7 * 6, "2.weight": 3 * 6 * 5}
    start = collector.axes.start[Axis("2.weight", 0)]
    assert collector.of(out).labels[0].ids.reshape(-1).tolist() == list(range(start, start + 5))
    find = units(collector)
    assert [find(collector.axes.start[Axis("0.weight", 0)] + k) for k in range(6)] \
        == [find(collector.axes.start[Axis("2.weight", 1)] + k) for k in range(6)]


def test_a_product_of_parameters_is_a_weight_and_a_linear_layer_of_one_is_a_layer() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Parameter(torch.zeros(6, 2)), nn.Parameter(torch.zeros(2, 7))
            self.latent, self.query = nn.Parameter(torch.zeros(4, 7)), nn.Linear(7, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.left @ self.right) @ self.query(self.latent).t()

    collector = ConstraintCollector(model := Both().to("meta"), Axes(), {})
    with torch.no_grad(), collector:
        model(torch.empty(3, 7, device="meta"))
    assert {(Axis("left", 0), "out"), (Axis("right", 1), "in"), (Axis("query.weight", 0), "out"),
            (Axis("query.weight", 1), "in")} <= collector.roles
    assert not any(axis in (Axis("left", 1), Axis("right", 0)) for axis, _ in collector.roles)


def test_a_matrix_that_cannot_shrink_pins() -> None:
    assert_pinned(lambda x: x.mean((2, 3)) @ torch.zeros(C, 5, device="meta"), "operand")


def test_a_product_of_activations_that_sums_over_channels_is_noted() -> None:
    def attention(x: Tensor) -> Tensor:
        tokens = F.relu(x).flatten(2).transpose(1, 2)
        return tokens @ tokens.transpose(1, 2)

    collector, out = collected(attention)
    [(number, shape, ids)] = collector.products
    assert number == 0 and shape == (1, 1, C) and ids.tolist() == list(range(C))
    assert not collector.of(out).labels and not collector.pins


def test_dimensions_that_are_not_summed_keep_their_ids() -> None:
    def gram(x: Tensor) -> Tensor:
        return torch.baddbmm(torch.zeros(1, device="meta"), x.flatten(2), x.flatten(2).transpose(1, 2))

    collector, out = collected(gram)
    assert [x.ids.reshape(-1).tolist() for x in collector.of(out).labels] == [list(range(C))] * 2
    assert not collector.products and not collector.pins
