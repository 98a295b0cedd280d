"""A plain PyTorch loop: ResRep or soft pruning, then distillation from the dense network. Random images stand in for data.

    python examples/plain_loop.py [resrep | soft]
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.nn.functional as F
from torch import nn

import narrower


def make_network() -> nn.Module:
    """In earnest: your trained network."""
    def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(block(3, 16), block(16, 32, 2), block(32, 32), pool, nn.Linear(32, 4))


def make_batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """In earnest: a DataLoader. The class of an image is the corner that is bright."""
    batches = []
    for _ in range(count):
        labels = torch.randint(4, (16,))
        images = torch.randn(16, 3, 16, 16)
        for image, label in zip(images, labels.tolist(), strict=True):
            top, left = label // 2 * 8, label % 2 * 8
            image[:, top:top + 8, left:left + 8] += 1
        batches.append((images, labels))
    return batches


def train_narrow(method: str, model: nn.Module, batches: list, epochs: int) -> nn.Module:
    """The loop is yours; three lines make it a training of ResRep, or of soft pruning."""
    graph = narrower.trace(model, batches[0][0][:2])
    if method == "resrep":
        resrep = narrower.ResRep(model, graph, macs=0.5, steps=epochs * len(batches))
        optimizer = torch.optim.SGD(resrep.param_groups(lr=0.05, momentum=0.9, weight_decay=1e-4))
        resrep.attach(optimizer)
    else:
        soft = narrower.SoftPruning(model, graph, macs=0.5, steps=epochs)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        soft.attach(optimizer)
    model.train()
    for _ in range(epochs):
        for images, labels in batches:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        if method == "resrep":
            resrep.shrink()
        else:
            soft.step()
    print(resrep if method == "resrep" else soft)
    return resrep.merge() if method == "resrep" else soft.narrow()


def distil(dense: nn.Module, small: nn.Module, batches: list, epochs: int) -> None:
    """Fine-tune the narrow network towards the dense one."""
    distillation = narrower.Distillation(dense, small, weight=0.5)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.01, momentum=0.9)
    small.train()
    for _ in range(epochs):
        for images, labels in batches:
            logits = small(images)
            distillation.loss(images, logits, F.cross_entropy(logits, labels)).backward()
            optimizer.step()
            optimizer.zero_grad()


def main(method: str = "resrep", epochs: int = 12) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    batches = make_batches()
    dense = make_network()
    small = train_narrow(method, copy.deepcopy(dense), batches, epochs)
    distil(dense, small, batches, epochs=1)
    costs = [narrower.measure(m, batches[0][0][:1])["macs"] for m in (dense, small)]
    print(f"multiply-adds {costs[0]:,.0f} -> {costs[1]:,.0f}")
    return dense, small


if __name__ == "__main__":
    main(*sys.argv[1:2])
