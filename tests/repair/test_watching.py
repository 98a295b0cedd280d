"""The layers that a forward shows, and the sums that they go into."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from narrower.repair.watching import LayerCall, LayerWatch


class Block(nn.Module):
    """A residual block: conv, BatchNorm, added to the input; then a linear layer on rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.twice, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        x = x + self.norm(self.conv(x))
        x = self.twice(torch.relu(self.twice(x)))
        return self.fc(x.flatten(2).transpose(1, 2).reshape(-1, 4))


class Seen(LayerWatch):
    def __init__(self, model: nn.Module, weights: list[str]) -> None:
        super().__init__(model, weights)
        self.layers: list[LayerCall] = []
        self.outs: dict[int, Tensor] = {}

    def layer(self, call: LayerCall) -> Tensor:
        self.layers.append(call)
        return call.run()

    def finished(self, number: int, out: Tensor) -> None:
        self.outs[number] = out


def test_layers_are_seen_with_their_inputs_and_geometry() -> None:
    model, x = Block().eval(), torch.randn(2, 4, 5, 5)
    watch = Seen(model, ["conv.weight", "twice.weight", "fc.weight"])
    out = watch.run(x, 2)
    with torch.no_grad():
        assert torch.equal(out, model(x))
    assert [c.weight for c in watch.layers] == ["conv.weight", "twice.weight", "twice.weight", "fc.weight"]
    assert torch.equal(watch.layers[0].x, x.relu())
    assert watch.layers[0].geometry.kernel == (3, 3) and watch.layers[0].geometry.padding == (1, 1)
    assert watch.layers[3].x.shape == (50, 4) and watch.layers[3].geometry.kernel == ()
    assert watch.uses == {"conv.weight": 1, "twice.weight": 2, "fc.weight": 1}


def test_a_sum_is_known_by_its_norm_its_other_summand_and_the_addition() -> None:
    model, x = Block().eval(), torch.randn(2, 4, 5, 5)
    watch = Seen(model, ["conv.weight"])
    watch.run(x, 2)
    stream = watch.streams["conv.weight"]
    assert stream.norm == "norm"
    with torch.no_grad():
        assert torch.equal(watch.outs[stream.other], x.relu())
        assert torch.equal(watch.outs[stream.addition], x.relu() + model.norm(model.conv(x.relu())))


def test_other_weights_are_not_seen() -> None:
    watch = Seen(Block().eval(), ["fc.weight"])
    watch.run(torch.randn(2, 4, 5, 5), 2)
    assert [c.weight for c in watch.layers] == ["fc.weight"] and not watch.streams


def test_a_second_forward_starts_anew() -> None:
    watch = Seen(Block().eval(), ["conv.weight"])
    for _ in range(2):
        watch.run(torch.randn(2, 4, 5, 5), 2)
    assert watch.uses == {"conv.weight": 1} and len(watch.layers) == 2
