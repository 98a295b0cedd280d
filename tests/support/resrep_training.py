"""Shared by the tests of methods that narrow while they train: networks made interesting, and a short training."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import narrower
from narrower.inputs import flatten_tensors
from support.networks import Head, unit

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def chain(seed: int = 0) -> nn.Module:
    """Three layers with BatchNorm and a linear one, in double precision."""
    torch.manual_seed(seed)
    return randomised(nn.Sequential(unit(3, 12), unit(12, 10, stride=2), unit(10, 8), Head(8)), seed).double()


@cache
def chain_graph() -> narrower.Graph:
    return narrower.trace(chain(), X[:1])


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorms with statistics, scales and shifts of their own, so that nothing is the identity by accident."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                ranges = ((m.running_mean, -0.3, 0.3), (m.running_var, 0.5, 2.0), (m.weight, 0.5, 1.5), (m.bias, -0.3, 0.3))
                for t, low, high in ranges:
                    if t is not None:
                        t.copy_(torch.rand(t.shape, generator=g) * (high - low) + low)
    return model


def called(model: nn.Module, inputs: Any) -> list[Tensor]:
    if isinstance(inputs, dict):
        return flatten_tensors(model(**inputs))
    return flatten_tensors(model(*inputs) if isinstance(inputs, tuple) else model(inputs))


@torch.no_grad()
def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    out = [t.clone() for t in called(model, inputs)]
    for m, mode in modes:
        m.training = mode
    return out


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference, relative to the largest output."""
    assert [t.shape for t in a] == [t.shape for t in b]
    return max(float((x - y).abs().max() / x.abs().max().clamp_min(1e-30)) for x, y in zip(a, b, strict=True))


def train(trained: narrower.ResRep | nn.Module, optimizer: torch.optim.Optimizer, inputs: Any, steps: int, seed: int = 0, *,
          closure: bool = False) -> None:
    """So many steps towards random targets, which differ from step to step. `closure`: gradients are computed in the step."""
    g = torch.Generator().manual_seed(seed)
    model = trained if isinstance(trained, nn.Module) else trained.model
    model.train()

    def gradients() -> Tensor:
        out = [t for t in called(model, inputs) if t.is_floating_point()]
        targets = [torch.randn(t.shape, generator=g).to(t.dtype) for t in out]
        loss = torch.stack([(t - y).square().mean() for t, y in zip(out, targets, strict=True)]).sum()
        optimizer.zero_grad()
        loss.backward()
        return loss

    for _ in range(steps):
        if closure:
            optimizer.step(gradients)  # type: ignore[arg-type]
        else:
            gradients()
            optimizer.step()


def sgd(resrep: narrower.ResRep, lr: float = 0.01) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(resrep.param_groups(lr=lr, momentum=0.9, weight_decay=1e-4))
    resrep.attach(optimizer)
    return optimizer
