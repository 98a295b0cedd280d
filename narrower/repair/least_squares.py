"""Ridge regression on the difference to given weights: pure functions over moments.

With inputs `x` and the residual `r` of weights that are there already, the correction `D` minimises
`|r - D x - b|^2 + ridge |D|^2`. The intercept `b` is free, or zero. A ridge towards infinity leaves the weights as they are.
Letters: `G` groups, `P` samples, `I` inputs, `O` outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridges that are tried, relative to the mean variance of the inputs."""


class Moments(NamedTuple):
    """Sums over samples: enough to solve, and to judge a solution. float64."""

    size: int
    x: Tensor  # (G, I)
    r: Tensor  # (G, O)
    xx: Tensor  # (G, I, I)
    rx: Tensor  # (G, O, I)
    rr: Tensor  # (G, O)


def moments(x: Tensor, r: Tensor) -> Moments:
    """The moments of inputs `(G, P, I)` and residuals `(G, P, O)`."""
    xx, rx = x.transpose(1, 2) @ x, r.transpose(1, 2) @ x
    return Moments(x.shape[1], x.double().sum(1), r.double().sum(1), xx.double(), rx.double(), r.double().square().sum(1))


def together(a: Moments, b: Moments) -> Moments:
    """The moments of both sets of samples."""
    return Moments(a.size + b.size, a.x + b.x, a.r + b.r, a.xx + b.xx, a.rx + b.rx, a.rr + b.rr)


def uncentred(m: Moments) -> Moments:
    """The moments as if all means were zero: what is solved from them has no intercept."""
    return m._replace(x=torch.zeros_like(m.x), r=torch.zeros_like(m.r))


class Correction(NamedTuple):
    """What is added to the weights `(G, O, I)`, and to the outputs `(G, O)`."""

    weight: Tensor
    intercept: Tensor


def solve(m: Moments, strength: float) -> Correction:
    """The correction with a ridge of `strength` times the mean variance of the inputs.

    Raises torch.linalg.LinAlgError where rounding makes the second moments indefinite.
    """
    mean_x, mean_r = m.x / m.size, m.r / m.size
    xx = m.xx / m.size - mean_x[:, :, None] * mean_x[:, None]
    rx = m.rx / m.size - mean_r[:, :, None] * mean_x[:, None]
    ridge = strength * xx.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    xx.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    weight = torch.cholesky_solve(rx.transpose(1, 2), torch.linalg.cholesky(xx)).transpose(1, 2)
    return Correction(weight, mean_r - (weight @ mean_x[..., None])[..., 0])


def squared_error(x: Tensor, r: Tensor, c: Correction, scale: Tensor) -> float:
    """The mean over samples of the squared residual that a correction leaves, summed over outputs.

    `x` `(G, P, I)`, `r` `(G, P, O)`. Each output is first multiplied by its `scale` `(G, O)`.
    """
    left = r - x @ c.weight.transpose(1, 2).to(x.dtype) - c.intercept[:, None].to(x.dtype)
    return float((left * scale[:, None].to(x.dtype)).square().sum(dtype=torch.float64)) / x.shape[1]


class Choice(NamedTuple):
    """The correction that was chosen (None: the weights stay), and the error on held-out samples before and after."""

    correction: Correction | None
    strength: float | None
    before: float
    after: float


def choose(x: Tensor, r: Tensor, held_out: Tensor, scale: Tensor, intercept: bool = True) -> Choice:
    """Of no correction, an intercept alone, and the ridges of `STRENGTHS`: what is best on the samples `held_out`, bool `(P,)`.

    The chosen one is then fitted to all samples. The ridges are walked from the middle, in the direction in which the error
    falls, as far as it does. `intercept`: whether the layer has a place for one; else it is zero throughout.
    """
    def sums(x: Tensor, r: Tensor) -> Moments:
        return moments(x, r) if intercept else uncentred(moments(x, r))

    fit, judge = sums(x[:, ~held_out], r[:, ~held_out]), (x[:, held_out], r[:, held_out])
    no_weight = torch.zeros_like(fit.rx)
    before = squared_error(*judge, Correction(no_weight, torch.zeros_like(fit.r)), scale)
    errors = {float("inf"): squared_error(*judge, Correction(no_weight, fit.r / fit.size), scale)}

    def error(strength: float) -> float:
        if strength not in errors:
            try:
                errors[strength] = squared_error(*judge, solve(fit, strength), scale)
            except torch.linalg.LinAlgError:
                errors[strength] = float("inf")
        return errors[strength]

    lowest(error, STRENGTHS)
    strength = min(errors, key=lambda s: errors[s])
    if not errors[strength] < before:
        return Choice(None, None, before, before)
    both = together(fit, sums(*judge))
    while strength < float("inf"):
        try:
            return Choice(solve(both, strength), strength, before, error(strength))
        except torch.linalg.LinAlgError:  # all samples may round to moments that a part of them did not
            strength *= 10
    return Choice(Correction(no_weight, both.r / both.size), strength, before, error(strength))


def lowest(error: Callable[[float], float], values: Sequence[float]) -> float:
    """The value with the lowest error, if the error falls and then rises: few are tried, from the middle on."""
    k = len(values) // 2
    step = 1 if k + 1 < len(values) and error(values[k + 1]) < error(values[k]) else -1
    while 0 <= k + step < len(values) and error(values[k + step]) < error(values[k]):
        k += step
    return values[k]
