"""How channel ids pass through each kind of ATen operator.

A rule takes the recorder (what has been learnt so far) and one call, and returns what its outputs carry. Rules
say which ids must live and die together (`unite`), where fibres need equal counts (`tie`), what cannot shrink (`pin`) and what mixes
channels in a way that removal changes by definition (`mix`). An operator without a rule pins everything that enters it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .labels import NOTHING, Carried, Ids, Label, along, aligned, collapsed, faster_dims, joined, permuted, reshaped


class Call(NamedTuple):
    """One operator call: `name` without overload and in-place underscore, and what came out."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    number: int


class Recorder(Protocol):
    """What a rule may ask for and say; the trace collects it, the probe checks it."""

    def of(self, t: Any) -> Carried: ...
    def unite(self, a: Ids, b: Ids) -> None: ...
    def tie(self, label: Label) -> None: ...
    def pin(self, labels: Sequence[Label], reason: str) -> None: ...
    def mix(self, call: Call, label: Label, dim: int) -> None: ...
    def constant(self, call: Call, size: int, key: int) -> Ids: ...
    def split_dim(self, call: Call, dims: Sequence[int], new: Sequence[int]) -> int: ...
    def weight(self, w: Tensor, blocks: int, transposed: bool) -> tuple[Label | None, Label | None]: ...
    def role(self, label: Label | None, role: str) -> None: ...
    def use(self, label: Label | None, positions: float) -> None: ...
    def reads(self, label: Label, source: Tensor, pool: int) -> None: ...
    def scalars(self, call: Call, numbers: Sequence[float], labels: Sequence[Label]) -> None: ...


Rule = Callable[[Recorder, Call], Sequence[Carried]]


def free_at(c: Carried, dim: int) -> list[Label]:
    return [x for x in c.labels if x.free == dim]


def except_free_at(c: Carried, dims: Sequence[int]) -> list[Label]:
    return [x for x in c.labels if x.free not in dims]


def normal(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim


def dims_of(arg: Any, ndim: int) -> list[int]:
    if arg is None or (isinstance(arg, (list, tuple)) and not arg):
        return list(range(ndim))
    return [normal(d, ndim) for d in (arg if isinstance(arg, (list, tuple)) else [arg])]


def tensors_in(args: Any) -> list[Tensor]:
    out: list[Tensor] = []
    for a in args:
        if isinstance(a, Tensor):
            out.append(a)
        elif isinstance(a, (list, tuple)):
            out += tensors_in(a)
    return out


# ------------------------------------------------------------------------------------------------ elementwise


def meet(r: Recorder, operands: Sequence[tuple[Carried, Sequence[int]]], ndim: int, what: str) -> tuple[Label, ...]:
    """Labels of an elementwise result: operands that are free in one dimension unite there; where one of them has a
    size but no channels, nothing can shrink."""
    found: dict[int, list[Label]] = {}
    order = sorted(operands, key=lambda o: -len(o[1])) if len(operands) > 1 else operands
    for carried, _ in order:
        for label in carried.labels:
            label = aligned(label, ndim)
            found.setdefault(label.free, []).append(label)
    out: list[Label] = []
    for dim, labels in found.items():
        for other in labels[1:]:
            if other.ids is not labels[0].ids:
                r.unite(labels[0].ids, other.ids)
        for carried, shape in operands:
            d = dim - (ndim - len(shape))
            if d >= 0 and shape[d] > 1 and not carried.uniform and not free_at(carried, d):
                r.pin(labels, f"{what} with a tensor whose {shape[d]} entries cannot shrink")
                break
        out.append(labels[0])
    return tuple(out)


def elementwise(r: Recorder, call: Call) -> Sequence[Carried]:
    inputs = tensors_in(call.args)
    out = call.out if isinstance(call.out, Tensor) else call.out[0]
    carried = [(r.of(t), t.shape) for t in inputs]
    numbers = [a for a in call.args if type(a) in (int, float)]
    if numbers:
        r.scalars(call, numbers, [x for c, _ in carried for x in c.labels])
    if len(carried) == 1:
        return [carried[0][0]._replace(view=False)]
    labels = meet(r, carried, out.ndim, call.name)
    return [Carried(labels, all(c.uniform for c, _ in carried), pool=max((c.pool for c, _ in carried), default=-1)
                    if sum(bool(c.labels) for c, _ in carried) == 1 else -1)]


def like(r: Recorder, call: Call) -> Sequence[Carried]:
    """A new tensor of the same shape and uniform or random content."""
    return [Carried((), uniform=True)]


def same(r: Recorder, call: Call) -> Sequence[Carried]:
    """The first input as it is, and nothing for further outputs (masks, indices)."""
    return [r.of(call.args[0])]


def copied(r: Recorder, call: Call) -> Sequence[Carried]:
    """dst.copy_(src): the labels of both meet; a write into a part of another tensor cannot be followed."""
    dst, src = r.of(call.args[0]), r.of(call.args[1])
    if src.labels and (dst.view or dst.labels):
        r.pin([*src.labels, *dst.labels], "written in place into a part of a tensor")
        return [dst]
    return [src._replace(view=False)]


# ------------------------------------------------------------------------------------------------ movement


def view(r: Recorder, call: Call) -> Sequence[Carried]:
    x = call.args[0]
    old, new = tuple(x.shape), tuple(call.out.shape)
    c = r.of(x)
    if old == new or not c.labels:
        return [c._replace(view=True)]
    out = []
    for label in c.labels:
        # merged with a faster dimension, channels would change places unless the same ones go at each of its indices
        label = collapsed(label, faster_dims(label, old, new), r.unite)
        moved, spread = reshaped(label, old, new)
        if len(spread) > 1:
            free = r.split_dim(call, spread, new)
            moved = Label(moved.ids, free, None)
            moved = collapsed(moved, [d for d in spread if d > free], r.unite)
            r.tie(moved)
        if moved.free >= 0:
            out.append(moved)
    return [c._replace(labels=tuple(out), view=True)]


def permute(r: Recorder, call: Call) -> Sequence[Carried]:
    x = call.args[0]
    order = list(range(x.ndim))
    if call.name == "permute":
        order = [normal(d, x.ndim) for d in call.args[1]]
    elif call.name == "t":
        order.reverse()
    else:
        a, b = normal(call.args[1], x.ndim), normal(call.args[2], x.ndim)
        order[a], order[b] = order[b], order[a]
    c = r.of(x)
    return [c._replace(labels=tuple(permuted(label, order) for label in c.labels), view=True)]


def expand(r: Recorder, call: Call) -> Sequence[Carried]:
    c = r.of(call.args[0])
    return [c._replace(labels=tuple(aligned(label, call.out.ndim) for label in c.labels), view=True)]


def piece(label: Label, dim: int, start: int, stop: int, step: int = 1) -> Label:
    if label.ids.shape[dim] == 1 and label.free != dim:
        return label
    index: list[slice] = [slice(None)] * label.ids.ndim
    index[dim] = slice(start, stop, step)
    return Label(label.ids[tuple(index)], label.free)


def cut(r: Recorder, call: Call) -> Sequence[Carried]:
    """slice.Tensor(x, dim, start, end, step)."""
    x, dim, start, end, step = (*call.args, *(0, None, None, 1)[len(call.args) - 1:])
    dim = normal(dim, x.ndim)
    start, end, step = slice(start, end, step).indices(x.shape[dim])
    c = r.of(x)
    if end - start == x.shape[dim]:
        return [c._replace(view=True)]
    return [c._replace(labels=tuple(piece(label, dim, start, end, step) for label in c.labels), view=True)]


def select(r: Recorder, call: Call) -> Sequence[Carried]:
    x, dim, index = call.args
    dim, index = normal(dim, x.ndim), normal(index, x.shape[normal(dim, x.ndim)])
    out = []
    c = r.of(x)
    for label in c.labels:
        if label.free == dim:
            r.pin([label], "one channel taken by its number")
            continue
        ids = piece(label, dim, index, index + 1).ids
        out.append(Label(ids.squeeze(dim), label.free - (label.free > dim)))
    return [c._replace(labels=tuple(out), view=True)]


def split(r: Recorder, call: Call) -> Sequence[Carried]:
    """split, split_with_sizes, unbind; equal pieces of the free dimension stay equal."""
    x = call.args[0]
    dim = normal(call.args[2] if len(call.args) > 2 else call.kwargs.get("dim", 0), x.ndim)
    sizes = [t.shape[dim] for t in call.out]
    out: list[Carried] = []
    c = r.of(x)
    at = 0
    for size in sizes:
        labels = tuple(piece(label, dim, at, at + size) for label in c.labels)
        out.append(c._replace(labels=labels, view=True))
        at += size
    if len(sizes) > 1 and len(set(sizes)) == 1:
        for label in free_at(c, dim):
            rows = np.stack([piece(label, dim, k * sizes[0], (k + 1) * sizes[0]).ids for k in range(len(sizes))])
            r.tie(Label(rows, dim + 1))
    return out


def unbind(r: Recorder, call: Call) -> Sequence[Carried]:
    x = call.args[0]
    dim = call.args[1] if len(call.args) > 1 else 0
    out: list[Carried] = []
    for k in range(len(call.out)):
        out += select(r, call._replace(args=(x, dim, k)))
    return out


def cat(r: Recorder, call: Call) -> Sequence[Carried]:
    pieces = [t for t in call.args[0] if t.numel() > 0 or t.ndim > 1]
    ndim = call.out.ndim
    dim = normal(call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0), ndim)
    carried = [r.of(t) for t in pieces]
    out = []
    if any(free_at(c, dim) for c in carried):
        ids = []
        for k, (c, t) in enumerate(zip(carried, pieces, strict=True)):
            labels = free_at(c, dim)
            ids.append(labels[0].ids if labels else along(r.constant(call, t.shape[dim], k), ndim, dim))
        out.append(Label(joined(ids, dim, [t.shape[dim] for t in pieces]), dim))
    for free in {label.free for c in carried for label in c.labels} - {dim}:
        have = [free_at(c, free) for c in carried]
        if not all(have):
            r.pin([label for labels in have for label in labels], "concatenated with a tensor that cannot shrink")
            continue
        # side by side in another dimension: equally many channels, and each part keeps its own
        label = Label(joined([h[0].ids for h in have], dim, [t.shape[dim] for t in pieces]), free)
        r.tie(label)
        out.append(label)
    return [Carried(tuple(out))]


def stack(r: Recorder, call: Call) -> Sequence[Carried]:
    dim = normal(call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0), call.out.ndim)
    carried = [r.of(t) for t in call.args[0]]
    out = []
    for free in {label.free for c in carried for label in c.labels}:
        have = [free_at(c, free) for c in carried]
        if not all(have):
            r.pin([label for labels in have for label in labels], "stacked with a tensor that cannot shrink")
            continue
        ids = joined([np.expand_dims(h[0].ids, dim) for h in have], dim, [1] * len(have))
        label = Label(ids, free + (free >= dim))
        r.tie(label)
        out.append(label)
    return [Carried(tuple(out))]


def pad(r: Recorder, call: Call) -> Sequence[Carried]:
    """constant_pad_nd(x, [last before, last after, ...]): padded channels are there whatever is removed."""
    x, amounts = call.args[0], call.args[1]
    labels = []
    for label in r.of(x).labels:
        for k in range(len(amounts) // 2):
            dim, before, after = x.ndim - 1 - k, amounts[2 * k], amounts[2 * k + 1]
            if dim == label.free and (before > 0 or after > 0):
                lead = along(r.constant(call, before, 0), x.ndim, dim)
                tail = along(r.constant(call, after, 1), x.ndim, dim)
                label = Label(joined([lead, label.ids, tail], dim, [before, x.shape[dim], after]), dim)
            elif before < 0 or after < 0:
                label = piece(label, dim, max(0, -before), x.shape[dim] + min(0, after))
            elif label.ids.shape[dim] > 1 and (before or after):
                label = collapsed(label, [dim], r.unite)
        labels.append(label)
    return [Carried(tuple(labels))]


def reorder(r: Recorder, call: Call) -> Sequence[Carried]:
    """flip and roll, run on the ids themselves."""
    c = r.of(call.args[0])
    ndim = call.args[0].ndim
    labels = []
    for label in c.labels:
        ids = label.ids
        if call.name == "flip":
            ids = np.flip(ids, [d for d in dims_of(call.args[1], ndim) if ids.shape[d] > 1])
        else:
            for shift, d in zip(call.args[1], dims_of(call.args[2], ndim), strict=True):
                ids = np.roll(ids, shift, d) if ids.shape[d] > 1 else ids
        labels.append(Label(ids, label.free))
    return [c._replace(labels=tuple(labels), view=False)]


def repeat(r: Recorder, call: Call) -> Sequence[Carried]:
    x, times = call.args[0], list(call.args[1])
    labels = []
    for label in r.of(x).labels:
        label = aligned(label, len(times))
        reps = [n if label.ids.shape[d] > 1 else 1 for d, n in enumerate(times)]
        labels.append(Label(np.tile(label.ids, reps), label.free))
    return [Carried(tuple(labels))]


def pixel_shuffle(r: Recorder, call: Call) -> Sequence[Carried]:
    """(C r r, H, W) <-> (C, H r, W r): the r*r channels of one pixel block live and die together."""
    x, factor = call.args[0], call.args[1]
    channel = x.ndim - 3
    out = []
    for label in r.of(x).labels:
        if label.free != channel or label.ids.size != label.ids.shape[channel]:
            r.pin([label], "pixel shuffle of a tensor whose channels lie elsewhere")
            continue
        flat = label.ids.reshape(-1)
        if call.name == "pixel_shuffle":
            rows = flat.reshape(-1, factor * factor)
            r.unite(rows[:, :1], rows)
            flat = rows[:, 0]
        else:
            flat = flat.repeat(factor * factor)
        out.append(Label(along(flat, x.ndim, channel), channel))
    return [Carried(tuple(out))]


# ------------------------------------------------------------------------------------------------ contractions


def contract(r: Recorder, a: Sequence[Label], b: Sequence[Label], what: str) -> None:
    """Unite the summed dimension of both sides (given flat); a side without channels pins the other."""
    if a and b:
        for label in b:
            r.unite(a[0].ids, label.ids)
    elif a or b:
        r.pin([*a, *b], f"{what} with a tensor that cannot shrink")


def at_channels(r: Recorder, label: Label) -> Ids:
    """Flat ids along the free dimension; whatever changes elsewhere is mixed and unites."""
    others = [d for d in range(label.ids.ndim) if d != label.free]
    return collapsed(label, others, r.unite).ids.reshape(-1)


def convolution(r: Recorder, call: Call) -> Sequence[Carried]:
    """convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    x, w, bias, transposed, groups = *call.args[:3], call.args[6], call.args[8]
    out: Tensor = call.out
    c, channels = r.of(x), x.shape[1]
    w_in, w_out = r.weight(w, groups, transposed)
    positions = (x if transposed else out).numel() // (x if transposed else out).shape[1]
    inputs = free_at(c, 1)
    into = at_channels(r, inputs[0]) if inputs else None
    depthwise = groups > 1 and groups == channels
    ids_out = None if w_out is None else w_out.ids.reshape(-1)
    r.role(w_out, "out")
    r.use(w_out, positions)
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
    if ids_out is not None:
        labels.append(Label(along(ids_out, out.ndim, 1), 1))
        if bias is not None:
            meet(r, [(Carried((Label(ids_out, 0),)), (out.shape[1],)), (r.of(bias), bias.shape)], 1, "bias")
    for label in except_free_at(c, [1]):
        if label.free == 0:
            labels.append(collapsed(label, range(1, x.ndim), r.unite))
        elif x.shape[label.free] == out.shape[label.free] and not transposed:
            # channels laid along space (efficient channel attention): neighbours are mixed
            label = collapsed(label, [d for d in range(x.ndim) if d != label.free], r.unite)
            r.mix(call, label, label.free)
            labels.append(Label(label.ids, label.free))
        else:
            r.pin([label], "convolution along the channels")
    return [Carried(tuple(labels))]


def matmul(r: Recorder, call: Call) -> Sequence[Carried]:
    """mm, bmm, mv, and with a summand addmm, baddbmm: out = a @ b over (batch, m, k) and (batch, k, n)."""
    added = call.name in ("addmm", "baddbmm", "addmv")
    a, b = call.args[1:3] if added else call.args[:2]
    out: Tensor = call.out
    ca, cb = r.of(a), r.of(b)
    ka, kb = a.ndim - 1, max(0, b.ndim - 2)
    batch = range(a.ndim - 2)
    left = [collapsed(x, [a.ndim - 2], r.unite) for x in free_at(ca, ka)]
    right = [collapsed(x, [b.ndim - 1], r.unite) if b.ndim > 1 else x for x in free_at(cb, kb)]
    weight = next((x for x in (*cb.labels, *ca.labels) if x.axis), None)
    if weight is not None:  # multiply-adds for each element of the weight
        held = b if any(x is weight for x in cb.labels) else a
        r.use(weight, out.numel() * a.shape[ka] / max(1, held.numel()))
    # the contracted dimension is the last but one of `right`: bring both to (batch..., k)
    contract(r, [Label(x.ids.reshape(*(x.ids.shape[d] for d in batch), -1), 0) for x in left],
             [Label(x.ids.reshape(*(x.ids.shape[d] for d in batch), -1), 0) for x in right], call.name)
    for x in (*left, *right):
        r.role(x, "in")
    if left and ca.pool >= 0:
        r.reads(left[0], a, ca.pool)
    labels: list[Label] = []
    sides = []
    for c, k, n in ((ca, ka, a.ndim), (cb, kb, b.ndim)):
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


# ------------------------------------------------------------------------------------------------ mixing


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
            r.mix(call, label, label.free)
    return [Carried(tuple(labels), pool=c.pool)]


def along_label(label: Label, ndim: int) -> Label:
    return Label(along(label.ids.reshape(-1), ndim, 1), 1, label.axis)


def layer_norm(r: Recorder, call: Call) -> Sequence[Carried]:
    """native_layer_norm(x, normalized_shape, weight, bias, eps)."""
    x, shape = call.args[0], call.args[1]
    c = r.of(x)
    affine = [(r.of(t), t.shape) for t in call.args[2:4] if isinstance(t, Tensor)]
    labels = meet(r, [(c, x.shape), *affine], x.ndim, "layer norm")
    for label in free_labels(c, range(x.ndim - len(shape), x.ndim)):
        r.mix(call, label, label.free)
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
        r.mix(call, Label(along(flat, x.ndim, 1), 1), 1)
    return [Carried(labels)]


def free_labels(c: Carried, dims: Sequence[int]) -> list[Label]:
    return [x for x in c.labels if x.free in dims]


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
            r.mix(call, label, label.free)
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
            r.mix(call, label, dim)
        else:
            label = collapsed(label, [dim], r.unite)
        labels.append(label)
    return [Carried(tuple(labels))]


def spatial(r: Recorder, call: Call) -> Sequence[Carried]:
    """Pooling, resizing and padding by reflection: each channel for itself, over the last dimensions."""
    x = call.args[0]
    out = call.out if isinstance(call.out, Tensor) else call.out[0]
    c = r.of(x)
    last = [d for d in range(2, x.ndim)] or [x.ndim - 1]
    labels = []
    for label in c.labels:
        if label.free in last and x.shape[label.free] != out.shape[label.free]:
            r.pin([label], f"{call.name} along the channels")
            continue
        if label.free in last:
            r.mix(call, label, label.free)
        labels.append(collapsed(label, [d for d in last if d != label.free], r.unite))
    return [Carried(tuple(labels), pool=c.pool)] * (1 if isinstance(call.out, Tensor) else len(call.out))


def index(r: Recorder, call: Call) -> Sequence[Carried]:
    """index(x, [None, i, ...]), index_select, embedding: only dimensions without channels may be indexed."""
    x, out = call.args[0], call.out
    if call.name == "embedding":
        where: list[Any] = [call.args[1]]
    elif call.name == "index_select":
        where = [None] * normal(call.args[1], x.ndim) + [call.args[2]]
    else:
        where = list(call.args[1])
    used = [d for d, i in enumerate(where) if i is not None]
    inner = out.ndim - (x.ndim - len(used))  # dimensions that the indices leave behind
    labels = []
    for label in r.of(x).labels:
        if label.free in used:
            if label.axis is None or call.name == "index":
                r.pin([label], f"{call.name} along the channels")
            else:
                r.pin([label], "rows of a table")
            continue
        if used != list(range(used[0], used[-1] + 1)):
            r.pin([label], "scattered indices")
            continue
        label = collapsed(label, used, r.unite)
        ids = label.ids.squeeze(tuple(used))
        ids = ids.reshape(*ids.shape[: used[0]], *(1,) * inner, *ids.shape[used[0]:])
        labels.append(Label(ids, label.free if label.free < used[0] else label.free - len(used) + inner, label.axis))
    return [Carried(tuple(labels))]


def fresh(r: Recorder, call: Call) -> Sequence[Carried]:
    return [NOTHING]


KINDS: dict[Rule, str] = {
    view: "view _unsafe_view reshape _reshape_alias unsqueeze squeeze flatten unflatten view_copy",
    permute: "permute transpose t swapaxes",
    expand: "expand",
    same: "clone alias detach contiguous _to_copy native_dropout dropout feature_dropout alpha_dropout lift_fresh "
          "fake_quantize_per_tensor_affine as_strided_",
    copied: "copy",
    cut: "slice",
    select: "select",
    split: "split split_with_sizes split_with_sizes_copy",
    unbind: "unbind",
    cat: "cat concat",
    stack: "stack",
    pad: "constant_pad_nd",
    reorder: "flip roll",
    repeat: "repeat",
    pixel_shuffle: "pixel_shuffle pixel_unshuffle",
    convolution: "convolution _convolution",
    matmul: "mm addmm bmm baddbmm mv addmv",
    batch_norm: "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit "
                "_native_batch_norm_legit_no_training _batch_norm_with_update batch_norm",
    layer_norm: "native_layer_norm",
    group_norm: "native_group_norm",
    glu: "glu",
    reduce: "mean sum var std var_mean std_mean amax amin max min prod linalg_vector_norm logsumexp any all "
            "argmax argmin",
    softmax: "_softmax _log_softmax _safe_softmax cumsum cumprod",
    spatial: "avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices max_pool2d "
             "adaptive_max_pool2d adaptive_max_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d fractional_max_pool2d "
             "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_linear1d "
             "upsample_trilinear3d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa "
             "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d",
    index: "index index_select embedding",
    like: "zeros_like ones_like full_like empty_like rand_like randn_like new_empty new_zeros new_ones new_full empty "
          "zeros ones full rand randn bernoulli uniform normal fill zero empty_strided new_empty_strided",
    fresh: "arange eye linspace scalar_tensor",
    elementwise: "add sub mul div where maximum minimum addcmul addcdiv lerp prelu _prelu_kernel hardswish relu6 "
                 "hardtanh leaky_relu elu glu_backward threshold clamp pow rsub",
}

RULES: dict[str, Rule] = {name: rule for rule, names in KINDS.items() for name in names.split()}


def pooling(name: str, args: Sequence[Any]) -> bool:
    """Whether a call pools over space: a pooling operator, or a mean or maximum over all but the first two dimensions."""
    if name in ("mean", "amax") and len(args) > 1 and args[0].ndim > 2:
        return sorted(dims_of(args[1], args[0].ndim)) == list(range(2, args[0].ndim))
    return "pool" in name


def rule_for(func: Any) -> tuple[str, Rule | None]:
    """Name without the in-place underscore, and the rule; any operator that torch tags as pointwise has one."""
    name = func._schema.name.split("::")[-1]
    if name not in RULES and name.endswith("_"):
        name = name[:-1]
    rule = RULES.get(name)
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = elementwise
    return name, rule


__all__ = ["Call", "Recorder", "Rule", "pooling", "rule_for", "tensors_in"]
