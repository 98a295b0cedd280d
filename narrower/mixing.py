"""Operators that sum or normalise over dimensions: contractions, norms, reductions, pooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .calls import Call, Recorder, at_channels, dims_of, except_free_at, free_at, meet, normal, piece, tensors_in
from .labels import Carried, Label, along, collapsed
from .products import FIRST_FACTOR


def contract(r: Recorder, a: Sequence[Label], b: Sequence[Label], what: str) -> None:
    """Unite the summed dimension of both sides (given flat); a side without channels pins the other."""
    if a and b:
        for label in b:
            r.unite(a[0].ids, label.ids)
    elif a or b:
        r.pin([*a, *b], f"{what} with a tensor that cannot shrink")


def convolution(r: Recorder, call: Call) -> Sequence[Carried]:
    """convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    x, w, bias, transposed, groups = *call.args[:3], call.args[6], call.args[8]
    out: Tensor = call.out
    c = r.of(x)
    w_in, w_out = r.weight(w, groups, transposed)
    inputs = free_at(c, 1)
    into = at_channels(r, inputs[0]) if inputs else None
    depthwise = r.depthwise(call)
    ids_out = None if w_out is None else w_out.ids.reshape(-1)
    r.role(w_out, "out")
    r.use(w_out, (x if transposed else out).numel() * w[0].numel())
    if depthwise:
        if into is not None:
            if ids_out is None:
                r.pin(inputs, "depthwise convolution whose weight cannot shrink")
            else:
                r.unite(into.reshape(-1, 1), ids_out.reshape(groups, -1))
            r.reads(Label(into, 0), x, c.pool)
        elif w_out is not None:
            r.pin([w_out], "depthwise convolution of a tensor without channels (an input or a constant)")
    else:
        if into is not None and w_in is not None:
            r.unite(into, w_in.ids.reshape(-1))
            r.reads(Label(into, 0), x, c.pool)
        elif into is not None:
            r.pin(inputs, "convolution whose weight cannot shrink")
        elif w_in is not None:
            r.pin([w_in], "reads a tensor without channels (an input or a constant)")
        r.role(w_in, "in")
        if groups > 1:
            if into is not None:
                r.tie(Label(into.reshape(groups, -1), 1))
            if ids_out is not None:
                r.tie(Label(ids_out.reshape(groups, -1), 1))
    labels = []
    if w_out is not None and ids_out is not None and not r.alone(w_out):
        labels.append(Label(along(ids_out, out.ndim, 1), 1))
        if bias is not None:
            meet(r, [(Carried((Label(ids_out, 0),)), (out.shape[1],)), (r.of(bias), bias.shape)], 1, "bias")
    for label in except_free_at(c, [1]):
        if label.free == 0:
            labels.append(collapsed(label, range(1, x.ndim), r.unite))
        elif x.shape[label.free] == out.shape[label.free] and not transposed:
            # channels laid along space (efficient channel attention): neighbours are mixed
            label = collapsed(label, [d for d in range(x.ndim) if d != label.free], r.unite)
            r.mix(call, label)
            labels.append(Label(label.ids, label.free))
        else:
            r.pin([label], "convolution along the channels")
    return [Carried(tuple(labels))]


def matmul(r: Recorder, call: Call) -> Sequence[Carried]:
    """mm, bmm, mv, and with a summand addmm, baddbmm: out = a @ b over (batch, m, k) and (batch, k, n)."""
    added = FIRST_FACTOR[call.name]
    a, b = call.args[added:added + 2]
    out: Tensor = call.out
    ca, cb = r.of(a), r.of(b)
    ka, kb = a.ndim - 1, max(0, b.ndim - 2)
    batch = range(a.ndim - 2)
    left = [collapsed(x, [a.ndim - 2], r.unite) for x in free_at(ca, ka)]
    right = [collapsed(x, [b.ndim - 1], r.unite) if b.ndim > 1 else x for x in free_at(cb, kb)]
    weight = next((x for x in (*cb.labels, *ca.labels) if x.axis), None)
    r.use(weight, out.numel() * a.shape[ka])
    # the contracted dimension is the last but one of `right`: bring both to (batch..., k)
    contract(r, [Label(x.ids.reshape(*(x.ids.shape[d] for d in batch), -1), 0) for x in left],
             [Label(x.ids.reshape(*(x.ids.shape[d] for d in batch), -1), 0) for x in right], call.name)
    for x in (*left, *right):
        r.role(x, "in")
    if left and not any(x.axis for x in (*left, *right)):
        r.product(call, left[0])
    if left and ca.pool >= 0:
        r.reads(left[0], a, ca.pool)
    labels: list[Label] = []
    sides = []
    for c, k in ((ca, ka), (cb, kb)):
        kept = []
        for x in except_free_at(c, [k]):
            x = collapsed(x, [k], r.unite)
            r.role(x, "out")
            kept.append(Label(x.ids, x.free))
        sides.append(kept)
    for x in sides[0]:
        if x.free not in batch:
            labels.append(Label(x.ids if out.ndim == a.ndim else x.ids.squeeze(ka), x.free))
    for x in sides[1]:
        if x.free not in batch:
            labels.append(Label(x.ids, x.free))
    shared = [(Carried(tuple(x for x in s if x.free in batch)), t.shape) for s, t in zip(sides, (a, b), strict=True)]
    if any(c.labels for c, _ in shared):
        pairs = [(c, tuple(n if d in batch else 1 for d, n in enumerate(shape))) for c, shape in shared]
        labels += meet(r, pairs, out.ndim, call.name)
    if added:
        summand = call.args[0]
        result = [(Carried(tuple(labels)), out.shape), (r.of(summand), summand.shape)]
        labels = list(meet(r, result, out.ndim, "bias"))
    return [Carried(tuple(labels))]


def batch_norm(r: Recorder, call: Call) -> Sequence[Carried]:
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


def layer_norm(r: Recorder, call: Call) -> Sequence[Carried]:
    """native_layer_norm(x, normalized_shape, weight, bias, eps)."""
    x, shape = call.args[0], call.args[1]
    c = r.of(x)
    affine = [(r.of(t), t.shape) for t in call.args[2:4] if isinstance(t, Tensor)]
    labels = meet(r, [(c, x.shape), *affine], x.ndim, "layer norm")
    for label in c.labels:
        if label.free >= x.ndim - len(shape):
            r.mix(call, label)
    return [Carried(labels)]


def weight_norm(r: Recorder, call: Call) -> Sequence[Carried]:
    """_weight_norm_interface(v, g, dim): v over its norm along all dimensions but `dim`, times g."""
    v, g, dim = (*call.args, 0)[:3]
    labels = meet(r, [(r.of(v), v.shape), (r.of(g), g.shape)], v.ndim, "weight norm")
    for label in labels:
        if label.free != dim:
            r.mix(call, label)
    return [Carried(labels)]


def group_norm(r: Recorder, call: Call) -> Sequence[Carried]:
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


def reduce(r: Recorder, call: Call) -> Sequence[Carried]:
    """mean, sum, var, amax, norms: channels that are reduced over are mixed; the others keep their ids."""
    x = call.args[0]
    at = {"linalg_vector_norm": 2}.get(call.name, 1)
    arg = call.args[at] if len(call.args) > at else call.kwargs.get("dim")
    dims = dims_of(arg, x.ndim)
    out = call.out if isinstance(call.out, Tensor) else call.out[0]
    keepdim = out.ndim == x.ndim
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
    return [Carried(tuple(labels), c.uniform)] * (1 if isinstance(call.out, Tensor) else len(call.out))


def glu(r: Recorder, call: Call) -> Sequence[Carried]:
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


def softmax(r: Recorder, call: Call) -> Sequence[Carried]:
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


def unpool(r: Recorder, call: Call) -> Sequence[Carried]:
    """max_unpool(x, places, size): the values of a channel and their places go together."""
    meet(r, [(r.of(t), t.shape) for t in call.args[:2]], call.out.ndim, call.name)
    return spatial(r, call._replace(args=call.args[:1]))


def spatial(r: Recorder, call: Call) -> Sequence[Carried]:
    """Pooling, resizing, padding by reflection, sampling: each channel for itself, over the last dimensions."""
    x = call.args[0]
    r.pin([label for t in tensors_in(call.args[1:]) for label in r.of(t).labels], f"{call.name} at places that channels tell")
    out = call.out if isinstance(call.out, Tensor) else call.out[0]
    c = r.of(x)
    last = list(range(2, x.ndim)) or [x.ndim - 1]
    labels = []
    for label in c.labels:
        if label.free in last and x.shape[label.free] != out.shape[label.free]:
            r.pin([label], f"{call.name} along the channels")
            continue
        if label.free in last:
            r.mix(call, label)
        labels.append(collapsed(label, [d for d in last if d != label.free], r.unite))
    return [Carried(tuple(labels), pool=c.pool)] * (1 if isinstance(call.out, Tensor) else len(call.out))
