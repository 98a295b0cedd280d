"""The two papers' procedures, slow and to the letter, as their published code runs them. Nothing of narrower is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def hrank_literal(model: nn.Module, activations: Mapping[str, nn.Module], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """HRank's rank of each filter: one pass over the batches for each layer, the rank of each map behind its activation, and an
    average over images that is renewed after each batch. `activations`: {name of the convolution: the module behind it}."""
    model.eval()
    batches, found = list(batches), {}
    for name, activation in activations.items():
        average, total = torch.tensor(0.0), torch.tensor(0.0)

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            nonlocal average, total
            ranks = torch.linalg.matrix_rank(output).float().sum(0)
            average = average * total + ranks
            total = total + len(output)
            average = average / total

        handle = activation.register_forward_hook(hook)
        for x in batches:
            model(x)
        handle.remove()
        found[name] = average
    return found


class ResRepLiteral:
    """ResRep's compactors, masks and steps. Conversion, which happens once at the end, is not part of it.

    Attributes:
        compactors: {layer: Q, [C, C]}; they are parameters of `forward` in the caller's hands.
        masks: {layer: ones and zeros, [C]}.
    """

    def __init__(self, widths: Mapping[str, int], flops: Callable[[Mapping[str, int]], float], *, target: float,
                 strength: float, lr: float, momentum: float, before_mask: int, interval: int, granularity: int) -> None:
        self.widths, self.flops, self.target = dict(widths), flops, target
        self.strength, self.lr, self.momentum = strength, lr, momentum
        self.before_mask, self.interval, self.granularity = before_mask, interval, granularity
        self.compactors = {n: torch.eye(c, dtype=torch.float64, requires_grad=True) for n, c in widths.items()}
        self.masks = {n: torch.ones(c, dtype=torch.float64) for n, c in widths.items()}
        self.velocity = {n: torch.zeros(c, c, dtype=torch.float64) for n, c in widths.items()}
        self.iteration = 0

    def begin(self) -> None:
        """In front of a step: new masks where they are due."""
        since = self.iteration - self.before_mask
        if since > 0 and since % self.interval == 0:
            self.choose()

    def choose(self) -> None:
        dense = self.flops(self.widths)
        now = {n: int(mask.sum()) for n, mask in self.masks.items()}
        most = 9999999
        if self.flops(now) > self.target * dense:
            most = sum(self.widths.values()) - sum(now.values()) + self.granularity
        metric = {(n, k): float(q[k].detach().norm()) for n, q in self.compactors.items() for k in range(len(q))}
        attempt, taken = dict(self.widths), []
        for i, (n, k) in enumerate(sorted(metric, key=lambda row: metric[row])):
            if self.flops(attempt) <= self.target * dense or i >= most:
                break
            if attempt[n] > 1:
                attempt[n] -= 1
                taken.append((n, k))
        for mask in self.masks.values():
            mask.fill_(1)
        for n, k in taken:
            self.masks[n][k] = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Reset, penalise, and a step of SGD with momentum."""
        for (n, q), gradient in zip(self.compactors.items(), gradients, strict=True):
            total = gradient.clone()
            for k in range(len(q)):
                total[k] = self.masks[n][k] * gradient[k] + self.strength * q[k] * (q[k] ** 2).sum() ** -0.5
            self.velocity[n] = self.momentum * self.velocity[n] + total
            q -= self.lr * self.velocity[n]
        self.iteration += 1
