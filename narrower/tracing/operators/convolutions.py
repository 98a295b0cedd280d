"""The rule for convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..labels import Carried, Label, along, collapsed
from .interface import Call, RuleContext, UnknownForm, at_channels, except_free_at, free_at, meet


def convolution(r: RuleContext, call: Call) -> Sequence[Carried]:
    """convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    x, w, bias, transposed, groups = *call.args[:3], call.args[6], call.args[8]
    out: Tensor = call.out
    c = r.of(x)
    w_in, w_out = weight_labels(r, w, groups, transposed)
    inputs = free_at(c, 1)
    into = at_channels(r, inputs[0]) if inputs else None
    depthwise = r.is_depthwise(call)
    ids_out = None if w_out is None else w_out.ids.reshape(-1)
    if depthwise and into is not None and w_out is None and (r.of(w).uniform or 0 in r.of(w).even):
        ids_out = into.repeat(out.shape[1] // groups)  # the same filter for every channel, as in blurring
    r.use_axis(call, w_out, "out")
    r.use_weight(w_out, (x if transposed else out).numel() * w[0].numel())
    if depthwise:
        if into is not None:
            if ids_out is None:
                r.pin(inputs, "operand", "depthwise convolution whose weight cannot shrink")
            else:
                r.unite(into.reshape(-1, 1), ids_out.reshape(groups, -1))
            r.read_maps(call, Label(into, 0), c.pool)
        elif w_out is not None:
            r.pin([w_out], "operand", "depthwise convolution of a tensor without channels (an input or a constant)")
    else:
        if into is not None and w_in is not None:
            r.unite(into, w_in.ids.reshape(-1))
            r.read_maps(call, Label(into, 0), c.pool)
        elif into is not None:
            r.pin(inputs, "operand", "convolution whose weight cannot shrink")
        elif w_in is not None:
            r.pin([w_in], "operand", "reads a tensor without channels (an input or a constant)")
        r.use_axis(call, w_in, "in")
        if groups > 1:
            if into is not None:
                r.tie(Label(into.reshape(groups, -1), 1))
            if ids_out is not None:
                r.tie(Label(ids_out.reshape(groups, -1), 1))
    labels = []
    if ids_out is not None and (w_out is None or not r.is_single(w_out)):
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
            r.pin([label], "position", "convolution along the channels")
    return [Carried(tuple(labels))]


def deformable(r: RuleContext, call: Call) -> Sequence[Carried]:
    """torchvision's deform_conv2d(x, w, offset, mask, bias, 2 strides, 2 paddings, 2 dilations, groups, offset groups, ...).

    It reads x as a convolution does. Each offset group moves equally many of the channels. Offsets and masks have a channel for
    each entry of the kernel.
    """
    x, w, offset, mask, bias = call.args[:5]
    groups, offset_groups = call.args[11:13]
    c = r.of(x)
    where = [label for t in (offset, mask) for label in r.of(t).labels]
    r.pin(where, "position", "they say where a deformable convolution reads")
    if except_free_at(c, [0, 1]):
        raise UnknownForm("deform_conv2d along the channels")
    for label in free_at(c, 1) if offset_groups > 1 else ():
        r.tie(Label(at_channels(r, label).reshape(offset_groups, -1), 1))
    sizes = [list(call.args[k:k + 2]) for k in (5, 7, 9)]
    return convolution(r, call._replace(args=(x, w, bias, *sizes, False, [0, 0], groups)))


def weight_labels(r: RuleContext, w: Tensor, blocks: int, transposed: bool) -> tuple[Label | None, Label | None]:
    """Flat ids of a convolution weight's read and made channels (through all blocks), None where it has none."""
    of_parameter = r.weight_axes(w, blocks, transposed)
    if of_parameter is not None:
        return of_parameter
    c = r.of(w)
    others = except_free_at(c, [0, 1])
    if others:
        r.pin(others, "position", "kernel positions")
    if not free_at(c, 0):
        return None, None
    first = collapsed(free_at(c, 0)[0], range(1, w.ndim), r.unite)
    first, second = Label(first.ids.reshape(-1), 0, first.axis), None
    for label in free_at(c, 1)[:1] if w.shape[1] > 1 else []:
        label = collapsed(label, range(2, w.ndim), r.unite)
        rows = np.broadcast_to(label.ids.reshape(label.ids.shape[0], -1), (w.shape[0], w.shape[1]))
        rows = rows.reshape(blocks, -1, w.shape[1])
        r.unite(rows[:, :1], rows)
        second = Label(rows[:, 0].reshape(-1), 0, label.axis)
    return (first, second) if transposed else (second, first)
