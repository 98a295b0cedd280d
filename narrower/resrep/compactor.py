"""Compactors: 1x1 convolutions behind layers, and the rule for their gradient (ResRep, sections 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..narrowing.optimizer import Swap
from .placement import Site

NAME = "compactor"  # the attribute of a site's module that holds its compactor
TINY = 1e-12


class Compactor(nn.Module):
    """A 1x1 convolution that starts as the identity.

    `weight` is `(K, C)` for a full compactor, `(blocks, K / blocks, C / blocks)` for a block-diagonal and `(K,)` for a
    diagonal one. K = C at first. `rows` `(K,)` and `columns` `(C,)` are the remaining rows and input channels of the dense
    network, ascending. The weight is at least float32: in half precision the small steps of a row near one would round to none.

    Buffers, `(K,)` each: `chosen` is 1 for rows that are being shrunk to zero, `gone` for rows that stay zero, `penalised` for
    rows with a penalty; 0 for others. They are no bools, as torch's AveragedModel cannot average these. `variance` is a running
    variance of the output over batch and space. It is measured on whole batches: the processes' parts of one are then all of
    it, however they are divided. It is empty if no BatchNorm needs it.
    """

    chosen: Tensor
    gone: Tensor
    penalised: Tensor
    variance: Tensor

    def __init__(self, site: Site, like: Tensor, variance: Tensor | None) -> None:
        super().__init__()
        self.dim = site.dim
        self.rows = self.columns = np.arange(site.size)
        self.following = True  # whether the next forward in train mode updates `variance`
        self.shrinking = False  # whether there are chosen rows, known without a device sync
        self.reached = False  # whether it has had a gradient
        self.frozen = False  # merged already: the identity, which no longer trains
        ones = torch.ones(site.size, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        self.weight = nn.Parameter(diagonal(ones, site))
        self.register_buffer("chosen", torch.zeros_like(ones))
        self.register_buffer("gone", torch.zeros_like(ones))
        self.register_buffer("penalised", torch.zeros_like(ones), persistent=False)
        self.register_buffer("variance", ones[:0] if variance is None else variance.detach().to(ones.dtype, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        if self.frozen:
            return x
        w = self.weight.to(x.dtype)
        if w.dim() == 1:
            return x * w if self.dim == -1 else x * w.view(-1, *(1,) * (x.dim() - 2))
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
        """Update the running variance from an output. `F.batch_norm` does it, which can be in sync over processes."""
        y = y.detach().float()
        if y.numel() > y.shape[1]:
            running = self.variance.float()
            F.batch_norm(y, torch.zeros_like(running), running, training=True, momentum=0.25)
            self.variance.copy_(running)

    def choose(self, rows: Tensor) -> None:
        """Choose these rows (bool, `(K,)`). Rows that are zero already stay chosen."""
        self.chosen.copy_(rows.to(self.chosen.device) | self.gone.bool())
        self.shrinking |= bool(self.chosen.any())

    def settle(self, old: Tensor, threshold: float, state: Mapping[str, Any]) -> None:
        """After a step from the weight `old`: chosen rows that have reached zero stay there, in the optimizer's `state` too."""
        w = self.weight
        self.gone.masked_fill_(rows_at_zero(w, old, self.chosen.bool(), threshold), 1)
        zero = rows_like(self.gone.bool(), w)
        w.masked_fill_(zero, 0)
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == w.shape:
                value.masked_fill_(zero, 0)

    def restrict(self, rows: np.ndarray, columns: np.ndarray, weight: Tensor | None = None) -> Swap:
        """Keep only these dense `rows` and `columns`. `weight`: the new weight (None: the part of the old one)."""
        old = self.weight
        part = partial(submatrix, rows=np.searchsorted(self.rows, rows), columns=np.searchsorted(self.columns, columns))
        new = part(old.detach()) if weight is None else weight.to(old.dtype)
        self.weight = nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)
        index = torch.as_tensor(np.searchsorted(self.rows, rows), device=old.device)
        for name in ("chosen", "gone", "penalised", "variance"):
            buffer = getattr(self, name)
            setattr(self, name, buffer[index] if buffer.numel() else buffer)
        self.rows, self.columns = rows, columns
        return Swap(old, self.weight, part)

    def freeze(self) -> None:
        """Be the identity from now on."""
        self.frozen = True
        self.weight.requires_grad_(False)


def run_compactor(module: nn.Module, args: object, output: Tensor) -> Tensor:
    """The forward hook of a site's module. A convolution also takes a single image, without the dimension of the batch."""
    compactor = getattr(module, NAME)
    if isinstance(module, nn.modules.conv._ConvNd) and output.dim() < module.weight.dim():
        return compactor(output[None])[0]
    return compactor(output)


def insert_compactor(module: nn.Module, compactor: Compactor) -> None:
    """Put a compactor behind a module, before its own hooks: it is merged into what they take."""
    module.add_module(NAME, compactor.train(module.training))
    module.register_forward_hook(run_compactor, prepend=True)


def remove_compactor(module: nn.Module) -> None:
    """Take a compactor and its hook away."""
    for key in [k for k, hook in module._forward_hooks.items() if hook is run_compactor]:
        del module._forward_hooks[key]
    del module._modules[NAME]


def submatrix(weight: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """Some rows and columns of a compactor's weight: equally many from each block if it is block-diagonal."""
    def at(index: np.ndarray) -> Tensor:
        return torch.as_tensor(index, device=weight.device)

    if weight.dim() == 1:
        return weight[at(rows)]
    if weight.dim() == 2:
        return weight[at(rows)][:, at(columns)]
    blocks, k, c = weight.shape
    return torch.stack([weight[b][at(r % k)][:, at(o % c)] for b, (r, o) in enumerate(
        zip(rows.reshape(blocks, -1), columns.reshape(blocks, -1), strict=True))])


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
    """The gradient of a compactor (section 3.3, eq. 14): the task's gradient, zero on chosen rows, plus the penalty's.

    `grad` and `weight` have the compactor's shape; `chosen` (bool) and `strength` have one entry per row, `(K,)`.
    """
    return grad.masked_fill(rows_like(chosen, weight), 0) + rows_like(strength, weight) * unit_rows(weight)


def rows_at_zero(new: Tensor, old: Tensor, chosen: Tensor, threshold: float) -> Tensor:
    """The chosen rows (bool, `(K,)`) that have reached zero: the step from `old` to `new` reversed their direction, or their
    norm is below `threshold`."""
    along = new * old if new.dim() == 1 else (new * old).flatten(0, -2).sum(1)
    return chosen & ((along <= 0) | (row_norms(new) < threshold))
