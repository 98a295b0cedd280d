"""Operators that reduce or mix over dimensions: reductions, softmax, pooling, resizing."""

from __future__ import annotations

from collections.abc import Sequence

from ..labels import Carried, Label, collapsed
from .interface import Call, RuleContext, UnknownForm, dims_of, labels_outside, meet, normal, piece, tensors_in


def reduce(r: RuleContext, call: Call) -> Sequence[Carried]:
    """mean, sum, var, amax, norms: channels that are reduced over are mixed; the others keep their ids.

    argmax pins them: its output has their numbers. So has the second output of max, which pins them once it is used.
    """
    x = call.args[0]
    at = {"linalg_vector_norm": 2}.get(call.name, 1)
    arg = call.args[at] if len(call.args) > at else call.kwargs.get("dim")
    dims = dims_of(arg, x.ndim)
    outs = tensors_in((call.out,))
    keepdim = outs[0].ndim == x.ndim
    c = r.of(x)
    labels = []
    for label in c.labels:
        if label.free in dims:
            r.mix(call, label)
            continue
        label = collapsed(label, dims, r.unite)
        if not keepdim:
            before = sum(d < label.free for d in dims)
            label = Label(label.ids.squeeze(tuple(dims)), label.free - before)
        labels.append(label._replace(axis=None))
    out = Carried(tuple(labels), c.uniform)
    reduced = tuple(label for label in c.labels if label.free in dims)
    if call.name in ("argmax", "argmin") and reduced:
        r.pin(reduced, "index", f"{call.name} gives their numbers, which would be others")
    return [out, out._replace(chosen=reduced)] if call.name in ("max", "min") and len(outs) > 1 else [out] * len(outs)


def glu(r: RuleContext, call: Call) -> Sequence[Carried]:
    """glu(x, dim): the first half times the sigmoid of the second."""
    x = call.args[0]
    dim = normal(call.args[1] if len(call.args) > 1 else -1, x.ndim)
    half = x.shape[dim] // 2
    labels = []
    for label in r.of(x).labels:
        first, second = piece(label, dim, 0, half), piece(label, dim, half, 2 * half)
        r.unite(first.ids, second.ids)
        labels.append(first)
    return [Carried(tuple(labels))]


def softmax(r: RuleContext, call: Call) -> Sequence[Carried]:
    """softmax and cumulative sums along a dimension: what varies there is mixed."""
    x = call.args[0]
    dim = normal(call.args[1], x.ndim)
    labels = []
    for label in r.of(x).labels:
        if label.free == dim:
            r.mix(call, label)
        else:
            label = collapsed(label, [dim], r.unite)
        labels.append(label)
    return [Carried(tuple(labels))]


def ordered(r: RuleContext, call: Call) -> Sequence[Carried]:
    """sort, topk, median and their kin along one dimension, not that of the channels: values and their places."""
    x, outs = call.args[0], tensors_in((call.out,))
    at = 2 if call.name in ("topk", "kthvalue") else 1
    if len(outs) < 2:
        raise UnknownForm(f"{call.name} of all entries")
    dim = normal(call.args[at] if len(call.args) > at else call.kwargs.get("dim", -1), x.ndim)
    labels = []
    gone = outs[0].ndim < x.ndim
    for label in labels_outside(r, x, [dim], call.name):
        ids = collapsed(label, [dim], r.unite).ids
        labels.append(Label(ids.squeeze(dim), label.free - (dim < label.free)) if gone else Label(ids, label.free))
    return [Carried(tuple(labels))] * len(outs)


def fourier(r: RuleContext, call: Call) -> Sequence[Carried]:
    """Fourier transforms over dimensions without channels."""
    x, dims = call.args[0], dims_of(call.args[1], call.args[0].ndim)
    labels = labels_outside(r, x, dims, "a Fourier transform")
    return [Carried(tuple(Label(collapsed(label, dims, r.unite).ids, label.free) for label in labels))]


def scalar_product(r: RuleContext, call: Call) -> Sequence[Carried]:
    """dot and vdot: one number from all channels of two vectors."""
    raise UnknownForm(f"{call.name} makes one number of all channels, as that by which spectral norm divides a weight")


def unpool(r: RuleContext, call: Call) -> Sequence[Carried]:
    """max_unpool(x, places, size): the values of a channel and their places go together."""
    meet(r, [(r.of(t), t.shape) for t in call.args[:2]], call.out.ndim, call.name)
    return spatial(r, call._replace(args=call.args[:1]))


def spatial(r: RuleContext, call: Call) -> Sequence[Carried]:
    """Pooling, resizing, padding by reflection, sampling: each channel for itself, over the last dimensions."""
    x = call.args[0]
    r.pin([label for t in tensors_in(call.args[1:]) for label in r.of(t).labels], "position",
          f"{call.name} at places that channels tell")
    outs = tensors_in((call.out,))
    c = r.of(x)
    last = list(range(2, x.ndim)) or [x.ndim - 1]
    labels = []
    for label in c.labels:
        if label.free in last and x.shape[label.free] != outs[0].shape[label.free]:
            r.pin([label], "position", f"{call.name} along the channels")
            continue
        if label.free in last:
            r.mix(call, label)
        labels.append(collapsed(label, [d for d in last if d != label.free], r.unite))
    return [Carried(tuple(labels), pool=c.pool, even=tuple(d for d in c.even if d not in last))] * len(outs)
