"""HRank and ResRep at their published settings, beside the papers' procedures written to the letter (`support/literal.py`)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from support.literal import ResRepLiteral, hrank_literal
from support.resrep_training import randomised
from torch import Tensor, nn

import narrower


def conv_bn(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


class Small(nn.Module):
    """As VGG: conv-BN-ReLU with a pooling between; and a block as in a ResNet behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = conv_bn(3, 5)
        self.conv2, self.bn2, self.relu2 = conv_bn(5, 6)
        self.conv3, self.bn3, self.relu3 = conv_bn(6, 4)
        self.conv4, self.bn4, self.relu4 = conv_bn(4, 6)
        self.conv5, self.bn5, self.relu5 = conv_bn(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu1(self.bn1(self.conv1(x))), 2)
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.relu4(x + self.bn4(self.conv4(self.relu3(self.bn3(self.conv3(x))))))
        return self.relu5(self.bn5(self.conv5(x))).mean((2, 3))


def test_the_ranks_are_the_authors_over_five_batches_of_128() -> None:
    """Of each convolution: the map behind its activation, before a pooling. In a stream the authors rank each block's own sum
    for its second convolution; a channel of ours has the mean over the convolutions that read the stream."""
    torch.manual_seed(0)
    model = randomised(Small())
    graph = narrower.trace(model, torch.zeros(1, 3, 8, 8))
    batches = [F.interpolate(torch.randn(128, 3, 3, 3), size=8) + 0.3 * torch.randn(128, 3, 8, 8).round() for _ in range(5)]
    ours = narrower.hrank(model, graph, batches)
    behind = {f"conv{k}": model.get_submodule(f"relu{k}") for k in range(1, 5)}
    theirs = hrank_literal(model, behind, batches)
    for name in ("conv1", "conv3"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)
        assert theirs[name].std() > 0.01
    torch.testing.assert_close(ours["conv2"], (theirs["conv2"] + theirs["conv4"]) / 2, rtol=0, atol=1e-5)


class Three(nn.Module):
    """Three convolutions with BatchNorm. With `compactors` they go behind the BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a, _ = conv_bn(3, 10)
        self.b, self.bn_b, _ = conv_bn(10, 8)
        self.c, self.bn_c, _ = conv_bn(8, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor, compactors: Mapping[str, Tensor] | None = None) -> Tensor:
        for name in "abc":
            x = self.get_submodule(f"bn_{name}")(self.get_submodule(name)(x))
            if compactors is not None:
                x = torch.einsum("kc,nchw->nkhw", compactors[name], x)
            x = F.relu(x)
        return self.fc(x.mean((2, 3)))


def test_a_hundred_steps_of_resrep_are_the_authors() -> None:
    """At lambda 1e-4, momentum 0.99, four channels more at each choice. The masks are chosen every 16 steps instead of 200. The
    authors first choose one interval after the warm-up, we at its end."""
    settings = replace(narrower.Forgetting.published(1), warmup_steps=16, mask_interval=16)
    assert (settings.strength, settings.momentum, settings.rows_per_update, settings.threshold) == (1e-4, 0.99, 4, 1e-5)
    assert narrower.Forgetting.published(1).mask_interval == 200
    torch.manual_seed(0)
    model = randomised(Three()).double()
    slow: Any = copy.deepcopy(model)
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    resrep = narrower.ResRep(model, narrower.trace(model, x), macs=0.2, steps=100, settings=settings)
    optimizer = torch.optim.SGD(resrep.param_groups(lr=0.01, momentum=0.9, weight_decay=1e-4))
    resrep.attach(optimizer)

    def flops(d: Mapping[str, int]) -> float:
        return 36 * 9 * (3 * d["a"] + d["a"] * d["b"] + d["b"] * d["c"]) + 3 * d["c"]

    literal = ResRepLiteral({"a": 10, "b": 8, "c": 6}, flops, target=0.2, strength=1e-4, lr=0.01, momentum=0.99,
                            before_mask=0, interval=16, granularity=4)
    plain = torch.optim.SGD(slow.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    chosen = []
    for step in range(100):
        y = torch.randint(0, 3, (8,), generator=torch.Generator().manual_seed(step))
        for m in (model, slow):
            m.train().zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

        literal.begin()
        for q in literal.compactors.values():
            q.grad = None
        F.cross_entropy(slow(x, literal.compactors), y).backward()
        gradients = [q.grad for q in literal.compactors.values() if q.grad is not None]
        plain.step()
        literal.step(gradients)
        for name, q in literal.compactors.items():
            c = resrep.compactors()[f"bn_{name}"]
            assert torch.equal(c.chosen == 0, literal.masks[name].bool()), step
            torch.testing.assert_close(c.weight.detach(), q.detach(), rtol=0, atol=1e-9)
        chosen.append(sum(int((mask == 0).sum()) for mask in literal.masks.values()))
    assert chosen[15:100:16] == [0, 4, 8, 12, chosen[79], chosen[95]] and chosen[95] > 12
    torch.testing.assert_close(model.get_parameter("a.weight"), slow.a.weight, rtol=0, atol=1e-9)
