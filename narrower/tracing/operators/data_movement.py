"""Operators that move data: ids move as the data do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from ..labels import Carried, Ids, Label, aligned, along, collapsed, even_dims, faster_dims, joined, permuted, reshaped
from .interface import Call, RuleContext, UnknownForm, dims_of, free_at, is_mask, labels_outside, meet, normal, piece


def view(r: RuleContext, call: Call) -> Sequence[Carried]:
    x = call.args[0]
    old, new = tuple(x.shape), tuple(call.out.shape)
    c = r.of(x)
    even = even_dims(c.even, old, new)
    if old == new or not c.labels:
        return [c._replace(view=True, even=even)]
    out = []
    for label in c.labels:
        # merged with a faster dimension, channels would change places unless the same ones go at each of its indices
        label = collapsed(label, faster_dims(label, old, new), r.unite)
        moved, spread = reshaped(label, old, new)
        if len(spread) > 1:
            spread, whole = r.spread_dims(call, spread, moved.ids), spread
            for d in set(whole) - set(spread):
                moved = Label(moved.ids.take([0], axis=d), spread[-1] if spread else -1)
        if len(spread) > 1:
            free = r.view_dim(call, spread, moved.ids)
            moved = Label(moved.ids, free, None)
            moved = collapsed(moved, [d for d in spread if d > free], r.unite)
            r.tie(moved)
        if moved.free >= 0:
            out.append(moved)
    return [c._replace(labels=tuple(out), view=True, even=even)]


def permute(r: RuleContext, call: Call) -> Sequence[Carried]:
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
    return [c._replace(labels=tuple(permuted(label, order) for label in c.labels), view=True,
                       even=tuple(order.index(d) for d in c.even))]


def expand(r: RuleContext, call: Call) -> Sequence[Carried]:
    x, ndim = call.args[0], call.out.ndim
    c = r.of(x)
    new = ndim - x.ndim
    even = tuple(d for d in range(ndim) if d < new or d - new in c.even or x.shape[d - ndim] == 1 < call.out.shape[d])
    return [c._replace(labels=tuple(aligned(label, ndim) for label in c.labels), view=True, even=even)]


def cut(r: RuleContext, call: Call) -> Sequence[Carried]:
    """slice.Tensor(x, dim, start, end, step)."""
    x: Tensor = call.args[0]
    rest = (*call.args[1:], *(0, None, None, 1)[len(call.args) - 1:])
    dim = normal(rest[0], x.ndim)
    start, end, step = slice(*rest[1:]).indices(x.shape[dim])
    c = r.of(x)
    if end - start == x.shape[dim] and step == 1:
        return [c._replace(view=True)]
    if step > 1:
        pin_taken(r, free_at(c, dim), f"one channel in {step} taken")
    return [c._replace(labels=tuple(piece(label, dim, start, end, step) for label in c.labels), view=True)]


def pin_taken(r: RuleContext, labels: Sequence[Label], text: str) -> None:
    """Pin channels of which the code takes some by their numbers.

    If a view has laid them in rows, and some of each row are taken, perhaps another dimension of the view shrinks: the code
    "position" lets the search try it.
    """
    for label in labels:
        r.pin([label], "index" if label.ids.size == label.ids.shape[label.free] else "position", text)


def select(r: RuleContext, call: Call) -> Sequence[Carried]:
    x, dim, index = call.args
    dim, index = normal(dim, x.ndim), normal(index, x.shape[normal(dim, x.ndim)])
    out = []
    c = r.of(x)
    for label in c.labels:
        if label.free == dim:
            pin_taken(r, [label], "one channel taken by its number")
            continue
        ids = piece(label, dim, index, index + 1).ids
        out.append(Label(ids.squeeze(dim), label.free - (label.free > dim)))
    return [c._replace(labels=tuple(out), view=True, even=tuple(d - (d > dim) for d in c.even if d != dim))]


def split(r: RuleContext, call: Call) -> Sequence[Carried]:
    """split, split_with_sizes, unbind; equal pieces of the free dimension stay equal."""
    x = call.args[0]
    dim = normal(call.args[2] if len(call.args) > 2 else call.kwargs.get("dim", 0), x.ndim)
    sizes = [t.shape[dim] for t in call.out]
    ends = list(accumulate(sizes))
    c = r.of(x)
    if len(sizes) > 1 and len(set(sizes)) == 1:
        for label in free_at(c, dim):
            r.tie(Label(np.stack([piece(label, dim, end - sizes[0], end).ids for end in ends]), dim + 1))
    return [c._replace(labels=tuple(piece(label, dim, end - size, end) for label in c.labels), view=True)
            for size, end in zip(sizes, ends, strict=True)]


def gates(r: RuleContext, call: Call) -> Sequence[Carried]:
    """unsafe_split, by which torch's recurrent layers part their gates."""
    raise UnknownForm("the gates of an LSTM or GRU, whose hidden size stays")


def unbind(r: RuleContext, call: Call) -> Sequence[Carried]:
    x = call.args[0]
    dim = call.args[1] if len(call.args) > 1 else 0
    return [c for k in range(len(call.out)) for c in select(r, call._replace(args=(x, dim, k)))]


def cat(r: RuleContext, call: Call) -> Sequence[Carried]:
    pieces = [t for t in call.args[0] if t.numel() > 0 or t.ndim > 1]
    ndim = call.out.ndim
    dim = normal(call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0), ndim)
    carried = [r.of(t) for t in pieces]
    if len(pieces) > 1 and pieces[0].shape[dim] == 1 and all(t is pieces[0] for t in pieces):  # as often as there are channels
        return [Carried(carried[0].labels, even=(*carried[0].even, dim))]
    out = []
    if any(free_at(c, dim) for c in carried):
        ids = []
        for k, (c, t) in enumerate(zip(carried, pieces, strict=True)):
            labels = free_at(c, dim)
            ids.append(labels[0].ids if labels else padding(r, call, t.shape[dim], k, ndim, dim))
        out.append(Label(joined(ids, dim, [t.shape[dim] for t in pieces]), dim))
    out += side_by_side(r, carried, dim, [t.shape[dim] for t in pieces], "concatenated")
    return [Carried(tuple(out))]


def side_by_side(r: RuleContext, carried: Sequence[Carried], dim: int, sizes: Sequence[int], how: str) -> list[Label]:
    """Labels of parts joined along `dim`, with channels in another dimension: equally many, and each part keeps its own."""
    out = []
    for free in {label.free for c in carried for label in c.labels} - {dim}:
        have = [free_at(c, free) for c in carried]
        if not all(have):
            r.pin([label for labels in have for label in labels], "operand", f"{how} with a tensor that cannot shrink")
            continue
        out.append(Label(joined([h[0].ids for h in have], dim, sizes), free))
        r.tie(out[-1])
    return out


def padding(r: RuleContext, call: Call, size: int, part: int, ndim: int, dim: int) -> Ids:
    """Ids of `size` channels along `dim` that are there whatever is removed."""
    ids = along(r.padding_ids(call, size, part), ndim, dim)
    if size:
        r.pin([Label(ids, dim)], "padding", "zero-padded channels" if call.name == "constant_pad_nd" else
              "concatenated with a tensor whose width stays: one made in the forward, as a first state, or an input")
    return ids


def stack(r: RuleContext, call: Call) -> Sequence[Carried]:
    dim = normal(call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0), call.out.ndim)
    carried = [Carried(tuple(Label(np.expand_dims(x.ids, dim), x.free + (x.free >= dim)) for x in r.of(t).labels))
               for t in call.args[0]]
    return [Carried(tuple(side_by_side(r, carried, dim, [1] * len(carried), "stacked")))]


def pad(r: RuleContext, call: Call) -> Sequence[Carried]:
    """constant_pad_nd(x, [last before, last after, ...]): padded channels are there whatever is removed."""
    x, amounts = call.args[0], call.args[1]
    labels = []
    for label in r.of(x).labels:
        for k in range(len(amounts) // 2):
            dim, before, after = x.ndim - 1 - k, amounts[2 * k], amounts[2 * k + 1]
            label = piece(label, dim, max(0, -before), x.shape[dim] + min(0, after))
            before, after = max(0, before), max(0, after)
            if dim == label.free and (before or after):
                lead = padding(r, call, before, 0, x.ndim, dim)
                tail = padding(r, call, after, 1, x.ndim, dim)
                label = Label(joined([lead, label.ids, tail], dim, [before, label.ids.shape[dim], after]), dim)
            elif before or after:
                label = collapsed(label, [dim], r.unite)
        labels.append(label)
    return [Carried(tuple(labels))]


def reorder(r: RuleContext, call: Call) -> Sequence[Carried]:
    """flip and roll, run on the ids themselves."""
    c = r.of(call.args[0])
    ndim = call.args[0].ndim
    if call.name == "roll" and len(call.args) < 3:
        raise UnknownForm("roll over all dimensions at once")
    labels = []
    for label in c.labels:
        ids = label.ids
        if call.name == "flip":
            ids = np.flip(ids, tuple(d for d in dims_of(call.args[1], ndim) if ids.shape[d] > 1))
        else:
            for shift, d in zip(call.args[1], dims_of(call.args[2], ndim), strict=True):
                ids = np.roll(ids, shift, d) if ids.shape[d] > 1 else ids
        labels.append(Label(ids, label.free))
    return [c._replace(labels=tuple(labels), view=False)]


def repeat(r: RuleContext, call: Call) -> Sequence[Carried]:
    x, times = call.args[0], list(call.args[1])
    c, new, labels = r.of(x), len(times) - x.ndim, []
    for label in c.labels:
        label = aligned(label, len(times))
        reps = [n if label.ids.shape[d] > 1 else 1 for d, n in enumerate(times)]
        labels.append(Label(np.tile(label.ids, reps), label.free))
    even = [d for d, n in enumerate(times) if d - new in c.even or (n > 1 and (d < new or x.shape[d - new] == 1))]
    return [Carried(tuple(labels), even=tuple(even))]


def pixel_shuffle(r: RuleContext, call: Call) -> Sequence[Carried]:
    """(C r r, H, W) <-> (C, H r, W r): the r*r channels of one pixel block live and die together."""
    x, factor = call.args[0], call.args[1]
    channel = x.ndim - 3
    out = []
    for label in r.of(x).labels:
        if label.free != channel or label.ids.size != label.ids.shape[channel]:
            r.pin([label], "position", "pixel shuffle of a tensor whose channels lie elsewhere")
            continue
        flat = label.ids.reshape(-1)
        if call.name == "pixel_shuffle":
            flat = united_blocks(r, flat, factor * factor)
        else:
            flat = flat.repeat(factor * factor)
        out.append(Label(along(flat, x.ndim, channel), channel))
    return [Carried(tuple(out))]


def united_blocks(r: RuleContext, ids: Ids, size: int) -> Ids:
    """Unite the ids of each block of `size` along the last dimension, which live and die together. One of each block."""
    rows = ids.reshape(*ids.shape[:-1], -1, size)
    r.unite(rows[..., :1], rows)
    return rows[..., 0]


def im2col(r: RuleContext, call: Call) -> Sequence[Carried]:
    """im2col(x, kernel, ...), F.unfold: (C, H, W) -> (C k, positions); each channel becomes a block of the kernel's size."""
    x, block = call.args[0], prod(call.args[1])
    channel = x.ndim - 3
    out = []
    for label in labels_outside(r, x, range(channel + 1, x.ndim), "im2col"):
        ids = collapsed(label, [x.ndim - 2, x.ndim - 1], r.unite).ids[..., 0]
        out.append(Label(ids.repeat(block, axis=channel) if ids.shape[channel] > 1 else ids, label.free))
    return [Carried(tuple(out))]


def col2im(r: RuleContext, call: Call) -> Sequence[Carried]:
    """col2im(x, size, kernel, ...), F.fold: (C k, positions) -> (C, H, W); the channels of one block live and die together."""
    x, block = call.args[0], prod(call.args[2])
    channel = x.ndim - 2
    out = []
    for label in labels_outside(r, x, range(channel + 1, x.ndim), "col2im"):
        ids = collapsed(label, [x.ndim - 1], r.unite).ids[..., 0]
        ids = united_blocks(r, ids, block) if ids.shape[channel] > 1 else ids
        out.append(Label(ids[..., None, None], label.free))
    return [Carried(tuple(out))]


def unfold(r: RuleContext, call: Call) -> Sequence[Carried]:
    """unfold(x, dim, size, step), run on the ids themselves: windows along `dim`, their entries along a new last dimension."""
    x, dim, size, step = call.args
    dim = normal(dim, x.ndim)
    out = []
    for label in labels_outside(r, x, [dim], "unfold"):
        ids = label.ids[..., None]
        if ids.shape[dim] > 1:
            ids = np.lib.stride_tricks.sliding_window_view(label.ids, size, axis=dim)
            ids = ids[(*[slice(None)] * dim, slice(None, None, step))]
        out.append(Label(ids, label.free))
    return [Carried(tuple(out), view=True)]


def diag_embed(r: RuleContext, call: Call) -> Sequence[Carried]:
    """diag_embed(x, offset, dim1, dim2): a diagonal matrix, with the same channels along its rows and its columns."""
    x, rest = call.args[0], [0, -2, -1]
    rest[:len(call.args) - 1] = call.args[1:]
    if rest[0]:
        raise UnknownForm("diag_embed beside the diagonal")
    row, column = normal(rest[1], x.ndim + 1), normal(rest[2], x.ndim + 1)
    places = [d for d in range(x.ndim + 1) if d not in (row, column)]  # of the dimensions before the last

    def spread(label: Label, *ends: int) -> Ids:
        return np.moveaxis(label.ids[..., None], range(x.ndim + 1), [*places, *ends])

    out = []
    for label in r.of(x).labels:
        if label.free < x.ndim - 1:
            out.append(Label(spread(collapsed(label, [x.ndim - 1], r.unite), row, column), places[label.free]))
        else:
            out += [Label(spread(label, row, column), row), Label(spread(label, column, row), column)]
    return [Carried(tuple(out))]


def view_as_real(r: RuleContext, call: Call) -> Sequence[Carried]:
    """Complex numbers as a last dimension of two."""
    return [Carried(tuple(Label(label.ids[..., None], label.free) for label in r.of(call.args[0]).labels), view=True)]


def view_as_complex(r: RuleContext, call: Call) -> Sequence[Carried]:
    """A last dimension of two as complex numbers. It has no channels, unless it is that of a parameter."""
    x, out = call.args[0], []
    for label in r.of(x).labels:
        if label.free == x.ndim - 1:
            r.pin([label], "position", "the parts of complex numbers")
        else:
            out.append(Label(collapsed(label, [x.ndim - 1], r.unite).ids[..., 0], label.free))
    return [Carried(tuple(out), view=True)]


def channel_shuffle(r: RuleContext, call: Call) -> Sequence[Carried]:
    """channel_shuffle(x, groups): channels at one place of all groups go together, else their order would change."""
    x, groups = call.args
    out = []
    for label in r.of(x).labels:
        if label.free != 1 or label.ids.size != label.ids.shape[1]:
            r.pin([label], "position", "channel shuffle of a tensor whose channels lie elsewhere")
            continue
        rows = label.ids.reshape(groups, -1)
        r.unite(rows[:1], rows)
        out.append(Label(along(rows.T.reshape(-1), x.ndim, 1), 1))
    return [Carried(tuple(out))]


def index_put(r: RuleContext, call: Call) -> Sequence[Carried]:
    """x[i, j] = values: what is written meets what is there, in the dimensions behind those of the indices."""
    x, where, values = call.args[:3]
    before, written = r.of(x), r.of(values)
    used = sum(i.ndim if is_mask(i) else 1 for i in where if i is not None)
    inner = 1 if any(is_mask(i) for i in where) else max(i.ndim for i in where if i is not None)
    labels = [aligned(v, inner + x.ndim - used) for v in written.labels]
    if any(i is None for i in where) or any(v.free < inner for v in labels) or any(v.free < used for v in before.labels):
        r.pin([*before.labels, *written.labels], "index", "index_put along the channels")
        return [before._replace(uniform=False, even=())]
    moved = []
    for v in labels:
        ids = collapsed(v, range(inner), r.unite).ids
        moved.append(Label(ids.reshape(*(1,) * used, *ids.shape[inner:]), v.free - inner + used))
    shape = (*(1,) * x.ndim, *values.shape)[-(x.ndim - used):] if used < x.ndim else ()
    place = Carried(tuple(moved), written.uniform)
    return [Carried(meet(r, [(before, x.shape), (place, (*(1,) * used, *shape))], x.ndim, call.name), view=before.view)]


def index(r: RuleContext, call: Call) -> Sequence[Carried]:
    """index(x, [None, i, ...]), index_select, embedding: only dimensions without channels may be indexed."""
    x, out = call.args[0], call.out
    if call.name == "embedding":
        where: list[Any] = [call.args[1]]
    elif call.name == "index_select":
        where = [None] * normal(call.args[1], x.ndim) + [call.args[2]]
    else:
        where = []
        for i in call.args[1]:  # a mask stands for all dimensions that it covers
            where += [i] * (i.ndim if is_mask(i) else 1)
    used = [d for d, i in enumerate(where) if i is not None]
    inner = out.ndim - (x.ndim - len(used))  # dimensions that the indices leave behind
    labels = []
    for label in r.of(x).labels:
        if label.free in used:
            if label.axis is None or call.name == "index":
                pin_taken(r, [label], f"{call.name} along the channels")
            else:
                r.pin([label], "index", "rows of a table")
            continue
        if used != list(range(used[0], used[-1] + 1)):
            r.pin([label], "position", "scattered indices")
            continue
        label = collapsed(label, used, r.unite)
        ids = label.ids.squeeze(tuple(used))
        ids = ids.reshape(*ids.shape[: used[0]], *(1,) * inner, *ids.shape[used[0]:])
        labels.append(Label(ids, label.free if label.free < used[0] else label.free - len(used) + inner, label.axis))
    return [Carried(tuple(labels))]
