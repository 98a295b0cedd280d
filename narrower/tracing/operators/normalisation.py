"""Norms: batch, layer, group and weight norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..labels import Carried, Label, along
from .interface import Call, RuleContext, at_channels, except_free_at, free_at, meet


def batch_norm(r: RuleContext, call: Call) -> Sequence[Carried]:
    """native_batch_norm(x, weight, bias, mean, var, ...): all of them along dimension 1."""
    x = call.args[0]
    c = r.of(x)
    vectors = [(r.of(t), t) for t in call.args[1:5] if isinstance(t, Tensor)]
    pairs = [(Carried(tuple(along_label(label, x.ndim) for label in v.labels), v.uniform),
              (1, t.shape[0], *(1,) * (x.ndim - 2))) for v, t in vectors]
    labels = meet(r, [(c, x.shape), *pairs], x.ndim, "batch norm")
    if any(a is True for a in call.args[5:6]):  # statistics of this very tensor: over all dimensions but 1
        for label in except_free_at(c, [1]):
            r.mix(call, label)
    return [Carried(tuple(labels), pool=c.pool)]


def along_label(label: Label, ndim: int) -> Label:
    return Label(along(label.ids.reshape(-1), ndim, 1), 1, label.axis)


def layer_norm(r: RuleContext, call: Call) -> Sequence[Carried]:
    """native_layer_norm(x, normalized_shape, weight, bias, eps)."""
    x, shape = call.args[0], call.args[1]
    c = r.of(x)
    affine = [(r.of(t), t.shape) for t in call.args[2:4] if isinstance(t, Tensor)]
    labels = meet(r, [(c, x.shape), *affine], x.ndim, "layer norm")
    for label in c.labels:
        if label.free >= x.ndim - len(shape):
            r.mix(call, label)
    return [Carried(labels)]


def weight_norm(r: RuleContext, call: Call) -> Sequence[Carried]:
    """_weight_norm_interface(v, g, dim): v over its norm along all dimensions but `dim`, times g."""
    v, g, dim = (*call.args, 0)[:3]
    labels = meet(r, [(r.of(v), v.shape), (r.of(g), g.shape)], v.ndim, "weight norm")
    for label in labels:
        if label.free != dim:
            r.mix(call, label)
    return [Carried(labels)]


def group_norm(r: RuleContext, call: Call) -> Sequence[Carried]:
    """native_group_norm(x, weight, bias, N, C, HxW, groups, eps): equally many channels in each group."""
    x, groups = call.args[0], call.args[6]
    c = r.of(x)
    affine = [(Carried(tuple(along_label(label, x.ndim) for label in r.of(t).labels)), (1, t.shape[0], *(1,) * (x.ndim - 2)))
              for t in call.args[1:3] if isinstance(t, Tensor)]
    labels = meet(r, [(c, x.shape), *affine], x.ndim, "group norm")
    for label in free_at(c, 1):
        flat = at_channels(r, label)
        r.tie(Label(flat.reshape(groups, -1), 1))
        r.mix(call, Label(along(flat, x.ndim, 1), 1))
    return [Carried(labels)]


def restrict_layer_norm(args: Sequence[Any], dim: int, stays: Tensor) -> list[Any]:
    """The arguments of native_layer_norm with only the channels `stays` of dimension `dim`."""
    x, shape, weight, bias, *rest = args
    inner = dim - (x.ndim - len(shape))
    narrow_shape = [len(stays) if d == inner else n for d, n in enumerate(shape)]
    affine = [None if t is None else t.index_select(inner, stays) for t in (weight, bias)]
    return [x.index_select(dim, stays), narrow_shape, *affine, *rest]


def restrict_group_norm(args: Sequence[Any], dim: int, stays: Tensor) -> list[Any]:
    """The arguments of native_group_norm with only the channels `stays`."""
    x, weight, bias, batch, _, *rest = args
    affine = [None if t is None else t.index_select(0, stays) for t in (weight, bias)]
    return [x.index_select(dim, stays), *affine, batch, len(stays), *rest]
