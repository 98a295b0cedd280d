"""Compactors and the rule for their gradient (ResRep, section 3.2 and 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..narrowing.constant_propagation import Site

NAME = "compactor"  # the attribute of a site's module
TINY = 1e-12


class Compactor(nn.Module):
    """A 1x1 convolution that starts as the identity.

    `weight` is `(K, C)` for a full one, `(blocks, K / blocks, C / blocks)` for a block-diagonal and `(K,)` for a diagonal
    one, with K = C until rows are dropped. Of its rows, `chosen` are to go and `gone` are zero for good. `variance` `(K,)`
    follows the output's over batch and space, from a quarter of a training batch (16 samples at least) now and then; empty
    where nothing needs it.
    """

    chosen: Tensor
    gone: Tensor
    variance: Tensor

    def __init__(self, site: Site, like: Tensor, variance: Tensor | None) -> None:
        super().__init__()
        self.dim = site.dim
        self.following = True  # whether the next forward in train mode counts for `variance`
        self.idle = False  # merged already, the identity from now on
        ones = torch.ones(site.size, dtype=like.dtype, device=like.device)
        self.weight = nn.Parameter(diagonal(ones, site))
        self.register_buffer("chosen", torch.zeros(site.size, dtype=torch.bool, device=like.device))
        self.register_buffer("gone", self.chosen.clone())
        self.register_buffer("variance", ones[:0] if variance is None else variance.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.idle:
            return x
        w = self.weight
        if w.dim() == 1:
            return x * w.to(x.dtype) if self.dim == -1 else x * w.to(x.dtype).view(-1, *(1,) * (x.dim() - 2))
        blocks = w.shape[0] if w.dim() == 3 else 1
        kernel = w.flatten(0, -2)
        if x.dim() == 2:
            y = F.conv1d(x[:, :, None], kernel[..., None], groups=blocks)[:, :, 0]
        else:
            conv = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
            y = conv(x, kernel.view(*kernel.shape, *(1,) * (x.dim() - 2)), groups=blocks)
        if self.training and self.following and self.variance.numel():
            self.follow(y)
        return y

    @torch.no_grad()
    def follow(self, y: Tensor) -> None:
        part = y.detach()[: max(16, len(y) // 4)].float()
        if part.numel() > part.shape[1]:
            found = part.var([0, *range(2, y.dim())], unbiased=True)
            self.variance.lerp_(found.to(self.variance.dtype), 0.25)


def behind(module: nn.Module, args: object, output: Tensor) -> Tensor:
    """The forward hook of a site's module."""
    return getattr(module, NAME)(output)


def diagonal(values: Tensor, site: Site) -> Tensor:
    """A compactor weight of the site's kind with these values on its diagonal."""
    if site.kind == "diagonal":
        return values.clone()
    if site.kind == "full":
        return torch.diag(values)
    return torch.diag_embed(values.view(site.blocks, -1))


def row_norms(weight: Tensor) -> Tensor:
    """L2 norms of a compactor's rows, shape `(K,)`."""
    return weight.abs() if weight.dim() == 1 else torch.linalg.vector_norm(weight.flatten(0, -2), dim=1)


def rows_like(values: Tensor, weight: Tensor) -> Tensor:
    """One value per row `(K,)`, shaped to broadcast over a compactor's weight."""
    return values if weight.dim() == 1 else values.view(*weight.shape[:-1], 1)


def unit_rows(weight: Tensor) -> Tensor:
    """Rows divided by their norms: the gradient of the sum of norms, zero at a zero row."""
    return weight / rows_like(row_norms(weight), weight).clamp_min(TINY)


def resrep_gradient(grad: Tensor, weight: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    """The gradient of a compactor (section 3.3, eq. 14): the task's, reset to zero on chosen rows, and the penalty's.

    `grad` and `weight` have the compactor's shape; `chosen` (bool) and `strength` have one entry per row, `(K,)`.
    """
    return grad.masked_fill(rows_like(chosen, weight), 0) + rows_like(strength, weight) * unit_rows(weight)


def turned_around(new: Tensor, old: Tensor, chosen: Tensor, threshold: float) -> Tensor:
    """The chosen rows `(K,)` that have arrived: a step has turned them around, or they are shorter than `threshold`."""
    along = new * old if new.dim() == 1 else (new * old).flatten(0, -2).sum(1)
    return chosen & ((along <= 0) | (row_norms(new) < threshold))
