"""Merge a compactor into the layer and BatchNorm before it. Pure functions over tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .compactor import TINY, rows_like
from .placement import Site


def apply_compactor(q: Tensor, t: Tensor) -> Tensor:
    """Apply a compactor's weight to a tensor `(C, ...)`, where C is its number of input channels. Returns `(K, ...)`."""
    if q.dim() == 1:
        return q.view(-1, *(1,) * (t.dim() - 1)) * t
    if q.dim() == 2:
        return (q @ t.reshape(len(t), -1)).view(len(q), *t.shape[1:])
    return torch.bmm(q, t.reshape(len(q), q.shape[2], -1)).view(-1, *t.shape[1:])


def scaled_layer(q: Tensor, weight: Tensor, site: Site) -> Tensor:
    """The weight of a layer without BatchNorm, with its compactor merged."""
    if not site.transposed:
        return apply_compactor(q, weight)
    if q.dim() == 2:
        return apply_compactor(q, weight.transpose(0, 1)).transpose(0, 1)
    parts = weight.view(site.blocks, -1, *weight.shape[1:])
    return (parts * q.view(site.blocks, 1, -1, *(1,) * (weight.dim() - 2))).view_as(weight)


def merge_tensors(q: Tensor, site: Site, t: Mapping[str, Tensor], eps: float, variance: Tensor,
           rest: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of a site's layer and BatchNorm with its compactor `q` merged. In eval mode they compute the same.

    `t` (float64): the layer's `weight` and `bias`, the BatchNorm's `gamma`, `beta`, `mean` and `var`, as far as the site has
    them. `variance` `(K,)`: of the compactor's output. `rest` `(K,)`: the diagonal of the compactor that follows from now on
    (None: ones).

    Let D = diag(gamma / sqrt(var + eps)). The new weight is Q D W, the new mean is Q D mean, and the new running variance is
    `variance`. Rows are then scaled to the norm that they had in W, so that training continues with steps of the same size.
    """
    if site.norm is None:
        q = q if rest is None else q / rows_like(rest, q)
        out = {"weight": scaled_layer(q, t["weight"], site)}
        return out | {"bias": apply_compactor(q, t["bias"])} if "bias" in t else out
    if site.kind == "diagonal":
        return {"gamma": q * t["gamma"], "beta": q * t["beta"]}
    rest = torch.ones_like(variance) if rest is None else rest
    d = t["gamma"] / torch.sqrt(t["var"] + eps)
    qd = q * (d if q.dim() < 3 else d.view(len(q), 1, -1))
    weight = t["weight"].transpose(0, 1) if site.transposed else t["weight"]
    moved = apply_compactor(qd, weight)
    lengths = moved.flatten(1).norm(dim=1)
    shares = q.abs()
    before = apply_compactor(shares, weight.flatten(1).norm(dim=1)) / shares.flatten(0, -2).sum(1).clamp_min(TINY)
    scale = torch.where(lengths > 0, before / lengths.clamp_min(1e-300), 1.0)
    scale = torch.where(scale > 0, scale, 1.0)
    moved = moved * scale.view(-1, *(1,) * (moved.dim() - 1))
    out = {
        "weight": moved.transpose(0, 1) if site.transposed else moved,
        "mean": apply_compactor(qd, t["mean"]) * scale,
        "var": variance * scale**2,
        "gamma": torch.sqrt(variance * scale**2 + eps) / scale / rest,
        "beta": apply_compactor(q, t["beta"]) / rest,
    }
    return out | {"bias": apply_compactor(qd, t["bias"]) * scale} if "bias" in t else out
